"""PixArt-Sigma and PixArt-Alpha, of any width and depth.

Names: diffusers/models/transformers/pixart_transformer_2d.py; original: PixArt-alpha/PixArt-sigma,
by scripts/convert_pixart_sigma_to_diffusers.py of diffusers, which ComfyUI shares
(comfy/ldm/pixart/pixartms.py). Alpha at 1024 is told the picture's size and aspect ratio as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.family import Entry, Family, Fold, Infos, Linear, depth

_BLOCK, _THEIRS = "transformer_blocks.{i}", "blocks.{i}"
_SELF, _CROSS = f"{_BLOCK}.attn1", f"{_BLOCK}.attn2"
_HEADS = 16
"""Attention heads of every model so far, which the shapes do not tell."""

_QKV = tuple(f"{_SELF}.{name}" for name in ("to_q", "to_k", "to_v"))
_KV = tuple(f"{_CROSS}.{name}" for name in ("to_k", "to_v"))
_LINEARS = (
    *(Linear(name, "attention", "qkv", _QKV[0]) for name in _QKV),
    Linear(f"{_SELF}.to_out.0", "attention", "attention_out"),
    Linear(f"{_CROSS}.to_q", "attention", "cross_q"),
    *(Linear(name, "attention", "text_kv", _KV[0]) for name in _KV),
    Linear(f"{_CROSS}.to_out.0", "attention", "cross_out"),
    Linear(f"{_BLOCK}.ff.net.0.proj", "mlp", "mlp_in"),
    Linear(f"{_BLOCK}.ff.net.2", "mlp", "mlp_out", gelu=0),
)

_EMBEDDERS = {
    "t_embedder": "timestep_embedder",
    "csize_embedder": "resolution_embedder",
    "ar_embedder": "aspect_ratio_embedder",
}
_SIZE, _RATIO = (f"adaln_single.emb.{_EMBEDDERS[k]}" for k in ("csize_embedder", "ar_embedder"))
_ORIGINAL = (
    Entry("x_embedder.proj.*", ("pos_embed.proj.*",)),
    *(
        Entry(f"{theirs}.mlp.{place}.*", (f"adaln_single.emb.{ours}.linear_{number}.*",))
        for theirs, ours in _EMBEDDERS.items()
        for place, number in ((0, 1), (2, 2))
    ),
    Entry("t_block.1.*", ("adaln_single.linear.*",)),
    Entry("y_embedder.y_proj.fc1.*", ("caption_projection.linear_1.*",)),
    Entry("y_embedder.y_proj.fc2.*", ("caption_projection.linear_2.*",)),
    Entry(f"{_THEIRS}.scale_shift_table", (f"{_BLOCK}.scale_shift_table",)),
    Entry(f"{_THEIRS}.attn.qkv.*", tuple(f"{name}.*" for name in _QKV)),
    Entry(f"{_THEIRS}.attn.proj.*", (f"{_SELF}.to_out.0.*",)),
    Entry(f"{_THEIRS}.cross_attn.q_linear.*", (f"{_CROSS}.to_q.*",)),
    Entry(f"{_THEIRS}.cross_attn.kv_linear.*", tuple(f"{name}.*" for name in _KV)),
    Entry(f"{_THEIRS}.cross_attn.proj.*", (f"{_CROSS}.to_out.0.*",)),
    Entry(f"{_THEIRS}.mlp.fc1.*", (f"{_BLOCK}.ff.net.0.proj.*",)),
    Entry(f"{_THEIRS}.mlp.fc2.*", (f"{_BLOCK}.ff.net.2.*",)),
    Entry("final_layer.linear.*", ("proj_out.*",)),
    Entry("final_layer.scale_shift_table", ("scale_shift_table",)),
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The PixArtTransformer2DModel config that the shapes imply."""
    hidden, channels, patch, _ = infos["pos_embed.proj.weight"].shape
    return {
        "_class_name": "PixArtTransformer2DModel",
        "num_attention_heads": _HEADS,
        "attention_head_dim": hidden // _HEADS,
        "in_channels": channels,
        "out_channels": infos["proj_out.weight"].shape[0] // patch**2,
        "num_layers": depth(infos, "transformer_blocks"),
        "cross_attention_dim": infos["transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "sample_size": 128,
        "patch_size": patch,
        "use_additional_conditions": f"{_SIZE}.linear_1.weight" in infos,
        "caption_channels": infos["caption_projection.linear_1.weight"].shape[1],
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _variant(infos: Infos, config: Mapping[str, Any]) -> str:
    """Alpha is told the size, or its config gives positions no scale, as all of Sigma do."""
    told = f"{_SIZE}.linear_1.weight" in infos
    scaled = config.get("interpolation_scale") or config.get("sample_size") != 64
    return "" if scaled and not told else "alpha"


_ALIASES = {
    "pixart-sigma": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    "pixart-sigma-512": "PixArt-alpha/PixArt-Sigma-XL-2-512-MS",
    "pixart-sigma-2k": "PixArt-alpha/PixArt-Sigma-XL-2-2K-MS",
    "pixart-alpha": "PixArt-alpha/PixArt-XL-2-1024-MS",
    "pixart-alpha-512": "PixArt-alpha/PixArt-XL-2-512x512",
}

FAMILY = Family(
    name="pixart",
    title="PixArt",
    aliases=_ALIASES,
    licenses={"pixart-sigma": "openrail++", "pixart-alpha": "openrail++"},
    classes=("PixArtTransformer2DModel", "Transformer2DModel"),
    signature=(
        "pos_embed.proj.weight",
        "adaln_single.linear.weight",
        "adaln_single.emb.timestep_embedder.linear_1.weight",
        "caption_projection.linear_1.weight",
        "scale_shift_table",
        "transformer_blocks.0.scale_shift_table",
        "transformer_blocks.0.attn2.to_k.weight",
        "transformer_blocks.0.ff.net.0.proj.weight",
    ),
    hidden="pos_embed.proj.weight",
    optional=(_SIZE, _RATIO),
    blocks=("transformer_blocks",),
    linears=_LINEARS,
    dialects={"diffusers": (), "original": _ORIGINAL},
    # Positions are made anew, and the empty caption was for training.
    unread=("pos_embed", "y_embedder.y_embedding"),
    config_of=_config_of,
    assumed=("num_attention_heads", "attention_head_dim", "sample_size"),
    facts=_facts,
    # Neither has code for it (vLLM-Omni's registry, SGLang's folder dits, 2026).
    unrun=("sglang", "vllm"),
    sensitive=(f"{_SELF}.to_out.0", f"{_CROSS}.to_out.0"),
    # All blocks read one time projection, so none can divide its own shift and scale.
    folds=(
        Fold((f"{_SELF}.to_out.0",), values=(f"{_SELF}.to_v",)),
        Fold((f"{_CROSS}.to_out.0",), values=(f"{_CROSS}.to_v",)),
    ),
    variant=_variant,
    pipelines={"": "PixArtSigmaPipeline", "alpha": "PixArtAlphaPipeline"},
    encoders={"text_encoder": "t5"},
)
