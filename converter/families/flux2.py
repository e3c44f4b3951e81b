"""FLUX.2 (dev, klein 4B and 9B), of any width and depth.

All blocks of a kind share one modulation, and nothing has a bias. Names:
diffusers/models/transformers/transformer_flux2.py, which LightX2V shares; original:
black-forest-labs/flux2 src/flux2/model.py, which ComfyUI shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.families import flux
from dqconvert.converter.family import Entry, Family, Infos, Linear, depth

_DOUBLE, _SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
_IMAGE, _TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
_TIME = "time_guidance_embed.timestep_embedder"
_GUIDANCE = "time_guidance_embed.guidance_embedder"
_MODULATION = {
    "double_stream_modulation_img": 6,
    "double_stream_modulation_txt": 6,
    "single_stream_modulation": 3,
}
_EMBEDDERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": f"{_TIME}.linear_1",
    "time_in.out_layer": f"{_TIME}.linear_2",
    "guidance_in.in_layer": f"{_GUIDANCE}.linear_1",
    "guidance_in.out_layer": f"{_GUIDANCE}.linear_2",
}


def _attention(names: tuple[str, str, str], shares: str) -> tuple[Linear, ...]:
    site = f"{_DOUBLE}.attn.{names[0]}"
    return tuple(Linear(f"{_DOUBLE}.attn.{name}", "attention", shares, site) for name in names)


_LINEARS = (
    *_attention(_IMAGE, "image_qkv"),
    *_attention(_TEXT, "text_qkv"),
    Linear(f"{_DOUBLE}.attn.to_out.0", "attention", "attention_out"),
    Linear(f"{_DOUBLE}.attn.to_add_out", "attention", "attention_out"),
    Linear(f"{_DOUBLE}.ff.linear_in", "mlp", "image_mlp_in"),
    Linear(f"{_DOUBLE}.ff.linear_out", "mlp", "image_mlp_out"),
    Linear(f"{_DOUBLE}.ff_context.linear_in", "mlp", "text_mlp_in"),
    Linear(f"{_DOUBLE}.ff_context.linear_out", "mlp", "text_mlp_out"),
    Linear(f"{_SINGLE}.attn.to_qkv_mlp_proj", "attention", "qkv_mlp"),
    Linear(f"{_SINGLE}.attn.to_out", "attention", "out"),
    *(Linear(f"{name}.linear", "modulation", splits=n) for name, n in _MODULATION.items()),
    *(Linear(name, "embedder") for name in _EMBEDDERS.values()),
    Linear("norm_out.linear", "final", splits=2),
    Linear("proj_out", "final"),
)


def _matrix(theirs: str, *ours: str) -> Entry:
    return Entry(f"{theirs}.*", tuple(f"{name}.*" for name in ours), bias=False)


def _stream(theirs: str, qkv: tuple[str, str, str], ours: tuple[str, ...]) -> tuple[Entry, ...]:
    """One of the two streams of a double block; ours: norms of q and k, output, feed-forward."""
    prefix = f"double_blocks.{{i}}.{theirs}"
    norm_q, norm_k, out, mlp = ours
    return (
        _matrix(f"{prefix}_attn.qkv", *(f"{_DOUBLE}.attn.{name}" for name in qkv)),
        Entry(f"{prefix}_attn.norm.query_norm.scale", (f"{_DOUBLE}.attn.{norm_q}.weight",)),
        Entry(f"{prefix}_attn.norm.key_norm.scale", (f"{_DOUBLE}.attn.{norm_k}.weight",)),
        _matrix(f"{prefix}_attn.proj", f"{_DOUBLE}.attn.{out}"),
        _matrix(f"{prefix}_mlp.0", f"{_DOUBLE}.{mlp}.linear_in"),
        _matrix(f"{prefix}_mlp.2", f"{_DOUBLE}.{mlp}.linear_out"),
    )


_ORIGINAL = (
    *(_matrix(theirs, ours) for theirs, ours in _EMBEDDERS.items()),
    *(_matrix(f"{name}.lin", f"{name}.linear") for name in _MODULATION),
    *_stream("img", _IMAGE, ("norm_q", "norm_k", "to_out.0", "ff")),
    *_stream("txt", _TEXT, ("norm_added_q", "norm_added_k", "to_add_out", "ff_context")),
    _matrix("single_blocks.{i}.linear1", f"{_SINGLE}.attn.to_qkv_mlp_proj"),
    _matrix("single_blocks.{i}.linear2", f"{_SINGLE}.attn.to_out"),
    Entry("single_blocks.{i}.norm.query_norm.scale", (f"{_SINGLE}.attn.norm_q.weight",)),
    Entry("single_blocks.{i}.norm.key_norm.scale", (f"{_SINGLE}.attn.norm_k.weight",)),
    # BFL's final layer takes (shift, scale), diffusers' AdaLayerNormContinuous (scale, shift).
    Entry("final_layer.adaLN_modulation.1.*", ("norm_out.linear.*",), swap=True, bias=False),
    _matrix("final_layer.linear", "proj_out"),
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The Flux2Transformer2DModel config that the shapes imply."""
    hidden, channels = infos["x_embedder.weight"].shape
    head = infos["single_transformer_blocks.0.attn.norm_q.weight"].shape[0]
    out_channels = infos["proj_out.weight"].shape[0]
    return {
        "_class_name": "Flux2Transformer2DModel",
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": out_channels if out_channels != channels else None,
        "num_layers": depth(infos, "transformer_blocks"),
        "num_single_layers": depth(infos, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": infos["context_embedder.weight"].shape[1],
        "timestep_guidance_channels": infos[f"{_TIME}.linear_1.weight"].shape[1],
        "mlp_ratio": infos["transformer_blocks.0.ff.linear_out.weight"].shape[1] / hidden,
        "axes_dims_rope": [head // 4] * 4,
        "rope_theta": 2000,
        "eps": 1e-6,
        "guidance_embeds": f"{_GUIDANCE}.linear_1.weight" in infos,
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _variant(infos: Infos, config: Mapping[str, Any]) -> str:
    return "guidance" if f"{_GUIDANCE}.linear_1.weight" in infos else "klein"


_HUB = "black-forest-labs/FLUX.2-"
_KLEIN = ("klein-4B", "klein-9B", "klein-base-4B", "klein-base-9B", "klein-9b-kv")
# One modulation for all blocks, which sees one row per image.
_KEPT = {"modulation": None}

FAMILY = Family(
    name="flux2",
    title="FLUX.2",
    aliases={f"flux2-{name.lower()}": f"{_HUB}{name}" for name in ("dev", *_KLEIN)},
    licenses={
        "flux2-dev": "flux-non-commercial-license",
        **{
            f"flux2-{name.lower()}": (
                "apache-2.0" if name.endswith("4B") else "flux-non-commercial-license"
            )
            for name in _KLEIN
        },
    },
    architecture="flux",  # ComfyUI-GGUF's tools tell it by FLUX.1's blocks
    classes=("Flux2Transformer2DModel",),
    signature=(
        "x_embedder.weight",
        "context_embedder.weight",
        f"{_TIME}.linear_1.weight",
        "double_stream_modulation_img.linear.weight",
        "single_stream_modulation.linear.weight",
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight",
    ),
    hidden="x_embedder.weight",
    optional=(_GUIDANCE,),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    linears=_LINEARS,
    dialects={
        "diffusers": (),
        "original": _ORIGINAL,
        "saved": flux.saved(_ORIGINAL),
        "lightx2v": (),
    },
    sources=("original", "saved", "diffusers"),
    config_of=_config_of,
    facts=_facts,
    policies={
        "comfyui": _KEPT,
        "diffusers": _KEPT,
        # LightX2V builds every linear with the one scheme, those around the blocks as well.
        "lightx2v": {"embedder": "weight", "final": "weight"},
    },
    sensitive=(f"{_DOUBLE}.attn.to_out.0", f"{_DOUBLE}.attn.to_add_out"),
    # No folds: a modulation serves all blocks, and linears have no bias.
    variant=_variant,
    pipelines={"": "Flux2Pipeline", "klein": "Flux2KleinPipeline", "kv": "Flux2KleinKVPipeline"},
    fields=("prompt", "image"),
    encoders={"text_encoder": "mistral3"},
)
