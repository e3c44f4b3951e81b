"""SANA and SANA 1.5 (0.6B, 1.6B, 4.8B), of any width and depth.

Names: diffusers/models/transformers/sana_transformer.py; original: NVlabs/Sana, by
scripts/convert_sana_to_diffusers.py of diffusers. The feed-forwards are convolutions, half of the
weights, which stay as they are. No ComfyUI of Comfy-Org runs the family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.family import Entry, Family, Fold, Infos, Linear, depth

_BLOCK, _THEIRS = "transformer_blocks.{i}", "blocks.{i}"
_HEAD = 32
"""Width of a head of linear attention in every model; that of cross attention is one of these."""

_CROSS_HEADS = (112, 72)
SELF, CROSS = f"{_BLOCK}.attn1", f"{_BLOCK}.attn2"
GUIDANCE = "time_embed.guidance_embedder"
"""What SANA-Sprint has and SANA has not."""

LINEARS = (
    *(
        Linear(f"{SELF}.{name}", "attention", "qkv", f"{SELF}.to_q")
        for name in ("to_q", "to_k", "to_v")
    ),
    Linear(f"{SELF}.to_out.0", "attention", "attention_out"),
    Linear(f"{CROSS}.to_q", "attention", "cross_q"),
    *(
        Linear(f"{CROSS}.{name}", "attention", "text_kv", f"{CROSS}.to_k")
        for name in ("to_k", "to_v")
    ),
    Linear(f"{CROSS}.to_out.0", "attention", "cross_out"),
)


def _norms(theirs: str, ours: str) -> tuple[Entry, ...]:
    return tuple(
        Entry(f"{_THEIRS}.{theirs}.{x}_norm.weight", (f"{ours}.norm_{x}.weight",)) for x in "qk"
    )


def original(time: str) -> tuple[Entry, ...]:
    """The authors' names. time: the canonical module that embeds the time step."""
    return (
        Entry("x_embedder.proj.*", ("patch_embed.proj.*",)),
        Entry("t_embedder.mlp.0.*", (f"{time}.linear_1.*",)),
        Entry("t_embedder.mlp.2.*", (f"{time}.linear_2.*",)),
        Entry("cfg_embedder.mlp.0.*", (f"{GUIDANCE}.linear_1.*",)),
        Entry("cfg_embedder.mlp.2.*", (f"{GUIDANCE}.linear_2.*",)),
        Entry("t_block.1.*", ("time_embed.linear.*",)),
        Entry("y_embedder.y_proj.fc1.*", ("caption_projection.linear_1.*",)),
        Entry("y_embedder.y_proj.fc2.*", ("caption_projection.linear_2.*",)),
        Entry("attention_y_norm.weight", ("caption_norm.weight",)),
        Entry(f"{_THEIRS}.scale_shift_table", (f"{_BLOCK}.scale_shift_table",)),
        Entry(
            f"{_THEIRS}.attn.qkv.*",
            tuple(f"{SELF}.{name}.*" for name in ("to_q", "to_k", "to_v")),
            bias=False,
        ),
        Entry(f"{_THEIRS}.attn.proj.*", (f"{SELF}.to_out.0.*",)),
        Entry(f"{_THEIRS}.cross_attn.q_linear.*", (f"{CROSS}.to_q.*",)),
        Entry(f"{_THEIRS}.cross_attn.kv_linear.*", (f"{CROSS}.to_k.*", f"{CROSS}.to_v.*")),
        Entry(f"{_THEIRS}.cross_attn.proj.*", (f"{CROSS}.to_out.0.*",)),
        *_norms("attn", SELF),
        *_norms("cross_attn", CROSS),
        Entry(f"{_THEIRS}.mlp.inverted_conv.conv.*", (f"{_BLOCK}.ff.conv_inverted.*",)),
        Entry(f"{_THEIRS}.mlp.depth_conv.conv.*", (f"{_BLOCK}.ff.conv_depth.*",)),
        Entry(f"{_THEIRS}.mlp.point_conv.conv.weight", (f"{_BLOCK}.ff.conv_point.weight",)),
        Entry("final_layer.linear.*", ("proj_out.*",)),
        Entry("final_layer.scale_shift_table", ("scale_shift_table",)),
    )


def config_of(infos: Infos) -> dict[str, Any]:
    """The SanaTransformer2DModel config that the shapes imply."""
    hidden, channels, patch, _ = infos["patch_embed.proj.weight"].shape
    cross = next((head for head in _CROSS_HEADS if hidden % head == 0), _HEAD)
    first = "transformer_blocks.0"
    return {
        "_class_name": "SanaTransformer2DModel",
        "in_channels": channels,
        "out_channels": infos["proj_out.weight"].shape[0] // patch**2,
        "num_attention_heads": hidden // _HEAD,
        "attention_head_dim": _HEAD,
        "num_layers": depth(infos, "transformer_blocks"),
        "num_cross_attention_heads": hidden // cross,
        "cross_attention_head_dim": cross,
        "cross_attention_dim": infos[f"{first}.attn2.to_k.weight"].shape[1],
        "caption_channels": infos["caption_projection.linear_1.weight"].shape[1],
        "mlp_ratio": infos[f"{first}.ff.conv_inverted.weight"].shape[0] / (2 * hidden),
        "sample_size": 32,
        "patch_size": patch,
        "guidance_embeds": f"{GUIDANCE}.linear_1.weight" in infos,
        "qk_norm": "rms_norm_across_heads" if f"{first}.attn1.norm_q.weight" in infos else None,
    }


def facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing beside the tensors."""
    return {}


SIGNATURE = (
    "patch_embed.proj.weight",
    "caption_norm.weight",
    "caption_projection.linear_1.weight",
    "time_embed.linear.weight",
    "transformer_blocks.0.attn2.to_k.weight",
    "transformer_blocks.0.ff.conv_inverted.weight",
    "transformer_blocks.0.ff.conv_point.weight",
)
ASSUMED = (
    "sample_size",
    "num_attention_heads",
    "attention_head_dim",
    "num_cross_attention_heads",
    "cross_attention_head_dim",
)
UNREAD = ("pos_embed", "y_embedder.y_embedding", "logvar_linear.")
# All blocks read one time projection, so none can divide its own shift and scale, and linear
# attention has values without a bias.
FOLDS = (Fold((f"{CROSS}.to_out.0",), values=(f"{CROSS}.to_v",)),)

_HUB = "Efficient-Large-Model"
FAMILY = Family(
    name="sana",
    title="SANA",
    aliases={
        "sana-600m-512": f"{_HUB}/Sana_600M_512px_diffusers",
        "sana-600m-1024": f"{_HUB}/Sana_600M_1024px_diffusers",
        "sana-1600m-512": f"{_HUB}/Sana_1600M_512px_diffusers",
        "sana-1600m-1024": f"{_HUB}/Sana_1600M_1024px_BF16_diffusers",
        "sana-1600m-2k": f"{_HUB}/Sana_1600M_2Kpx_BF16_diffusers",
        "sana-1600m-4k": f"{_HUB}/Sana_1600M_4Kpx_BF16_diffusers",
        "sana1.5-1.6b": f"{_HUB}/SANA1.5_1.6B_1024px_diffusers",
        "sana1.5-4.8b": f"{_HUB}/SANA1.5_4.8B_1024px_diffusers",
    },
    licenses={},
    classes=("SanaTransformer2DModel",),
    signature=(*SIGNATURE, "time_embed.emb.timestep_embedder.linear_1.weight"),
    foreign=(f"{GUIDANCE}.linear_1.weight",),
    hidden="patch_embed.proj.weight",
    optional=(f"{SELF}.norm_", f"{CROSS}.norm_", GUIDANCE),
    blocks=("transformer_blocks",),
    linears=LINEARS,
    dialects={"diffusers": (), "original": original("time_embed.emb.timestep_embedder")},
    unread=UNREAD,
    config_of=config_of,
    assumed=ASSUMED,
    facts=facts,
    sensitive=(f"{SELF}.to_out.0", f"{CROSS}.to_out.0"),
    folds=FOLDS,
    # vLLM-Omni has no code for it, and SGLang builds its linears unquantized (2026).
    unrun=("comfyui", "sglang", "vllm"),
    pipelines={"": "SanaPipeline"},
    encoders={"text_encoder": "gemma2"},
)
