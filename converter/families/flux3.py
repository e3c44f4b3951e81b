"""FLUX.3 (image klein, base and distilled), of any width and depth.

Image, reference image and text have blocks of their own, then joint ones; nothing has a bias.
Names: diffusers/models/transformers/transformer_flux3.py; original: the authors' single files, as
diffusers/loaders/single_file_utils.py reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.family import Entry, Family, Infos, Linear, depth

_MODES = ("image", "image_cond")
_STREAMS = (*_MODES, "txt")
_BLOCKS = {
    **{f"content_mode_blocks.{mode}": f"mode_blocks.{mode}" for mode in _MODES},
    "txt_mode_blocks": "txt_mode_blocks",
    "single_blocks": "single_transformer_blocks",
}
_MODULATIONS = tuple(
    f"{kind}_stream_modulations.{name}" for kind in ("early", "single") for name in _STREAMS
)
_TIME, _TARGET = "timestep_embedder", "target_timestep_embedder"
_PARTS = {
    "q_proj": "attn.to_q",
    "k_proj": "attn.to_k",
    "v_proj": "attn.to_v",
    "attn_out": "attn.to_out.0",
    "mlp_in": "ff.linear_in",
    "mlp_out": "ff.linear_out",
}


def _linears(blocks: str) -> tuple[Linear, ...]:
    """Attention and feed-forward read the same: they lie side by side."""
    block = f"{blocks}.{{i}}"
    site = f"{block}.attn.to_q"
    return (
        *(Linear(f"{block}.attn.to_{x}", "attention", "qkv_mlp", site) for x in "qkv"),
        Linear(f"{block}.ff.linear_in", "mlp", "qkv_mlp", site),
        Linear(f"{block}.attn.to_out.0", "attention", "attention_out"),
        Linear(f"{block}.ff.linear_out", "mlp", "mlp_out"),
    )


def _matrix(theirs: str, ours: str) -> Entry:
    return Entry(f"{theirs}.*", (f"{ours}.*",), bias=False)


def _block(theirs: str, ours: str) -> tuple[Entry, ...]:
    theirs, ours = f"{theirs}.{{i}}", f"{ours}.{{i}}"
    return (
        *(_matrix(f"{theirs}.{part}", f"{ours}.{name}") for part, name in _PARTS.items()),
        Entry(f"{theirs}.norm.query_norm.scale", (f"{ours}.attn.norm_q.weight",)),
        Entry(f"{theirs}.norm.key_norm.scale", (f"{ours}.attn.norm_k.weight",)),
    )


_ORIGINAL = (
    *(_matrix(f"emb_in.{mode}", f"x_embedders.{mode}") for mode in _MODES),
    _matrix("txt_in", "context_embedder"),
    _matrix("time_in.in_layer", f"{_TIME}.linear_1"),
    _matrix("time_in.out_layer", f"{_TIME}.linear_2"),
    _matrix("ref_time_in.in_layer", f"{_TARGET}.linear_1"),
    _matrix("ref_time_in.out_layer", f"{_TARGET}.linear_2"),
    *(_matrix(f"{name}.lin", f"{name}.linear") for name in _MODULATIONS),
    *(entry for theirs, ours in _BLOCKS.items() for entry in _block(theirs, ours)),
    # BFL's final layer takes (shift, scale), diffusers' Flux3AdaLayerNorm (scale, shift).
    Entry("final_layer.image.adaLN_modulation.1.*", ("norm_out.linear.*",), swap=True, bias=False),
    _matrix("final_layer.image.linear", "proj_out"),
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The Flux3Transformer2DModel config that the shapes imply."""
    hidden, channels = infos["x_embedders.image.weight"].shape
    head = infos["single_transformer_blocks.0.attn.norm_q.weight"].shape[0]
    return {
        "_class_name": "Flux3Transformer2DModel",
        "in_channels": channels,
        "cond_in_channels": infos["x_embedders.image_cond.weight"].shape[1],
        "num_layers": depth(infos, "txt_mode_blocks"),
        "num_single_layers": depth(infos, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": infos["context_embedder.weight"].shape[1],
        "timestep_channels": infos[f"{_TIME}.linear_1.weight"].shape[1],
        "mlp_ratio": infos["single_transformer_blocks.0.ff.linear_out.weight"].shape[1] / hidden,
        "axes_dims_rope": [head // 4] * 4,
        "rope_theta": 10000,
        "eps": 1e-6,
        "flow_map": f"{_TARGET}.linear_1.weight" in infos,
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _variant(infos: Infos, config: Mapping[str, Any]) -> str:
    return "distilled" if f"{_TARGET}.linear_1.weight" in infos else "base"


_HUB = "black-forest-labs/flux-3-image-klein"
_KEPT = {"modulation": None}

FAMILY = Family(
    name="flux3",
    title="FLUX.3",
    aliases={"flux3-image-klein": _HUB, "flux3-image-klein-base": f"{_HUB}-base"},
    licenses={},
    classes=("Flux3Transformer2DModel",),
    signature=(
        "x_embedders.image.weight",
        "x_embedders.image_cond.weight",
        "context_embedder.weight",
        "mode_blocks.image.0.attn.to_q.weight",
        "txt_mode_blocks.0.attn.to_q.weight",
        "single_transformer_blocks.0.ff.linear_in.weight",
    ),
    hidden="x_embedders.image.weight",
    optional=(_TARGET,),
    blocks=tuple(_BLOCKS.values()),
    linears=(
        *(linear for blocks in _BLOCKS.values() for linear in _linears(blocks)),
        *(Linear(f"{name}.linear", "modulation", splits=3) for name in _MODULATIONS),
    ),
    dialects={"diffusers": (), "original": _ORIGINAL},
    unread=("repa_projectors.",),  # heads that only training uses
    config_of=_config_of,
    facts=_facts,
    # SGLang's class of that name makes videos; ComfyUI has none (August 2026).
    unrun=("comfyui", "sglang", "vllm"),
    # One modulation for all blocks of a kind.
    policies={"diffusers": _KEPT},
    sensitive=tuple(f"{blocks}.{{i}}.attn.to_out.0" for blocks in _BLOCKS.values()),
    # No folds: a modulation serves all blocks of a kind, and linears have no bias.
    variant=_variant,
    pipelines={"": "Flux3ModularPipeline", "distilled": "Flux3DistilledModularPipeline"},
    fields=("prompt", "negative_prompt", "image"),
    encoders={"text_encoder": "qwen3_vl"},
)
