"""Qwen-Image 2.1, which draws and edits, of any width and depth.

Names: diffusers/models/transformers/transformer_qwenimage21.py; ComfyUI's stack the gate and the
other half of the feed-forward: convert_qwen_image21_transformer_checkpoint_to_diffusers in
diffusers/loaders/single_file_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.family import EQUAL, Entry, Family, Infos, Linear, depth

_BLOCK = "transformer_blocks.{i}"
_QKV = tuple(f"{_BLOCK}.attn.{name}" for name in ("to_q", "to_k", "to_v"))
_OUT = f"{_BLOCK}.attn.to_out.0"
_HALVES = (f"{_BLOCK}.img_mlp.gate_layer", f"{_BLOCK}.img_mlp.proj")

_LINEARS = (
    *(Linear(name, "attention", "qkv", _QKV[0]) for name in _QKV),
    Linear(_OUT, "attention", "attention_out"),
    *(Linear(name, "mlp", "mlp_in", _HALVES[0]) for name in _HALVES),
    Linear(f"{_BLOCK}.img_mlp.out", "mlp", "mlp_out"),
)

_NAMES = (
    "img_in",
    "txt_in.text_norm",
    "txt_in.in_layer",
    "txt_in.out_layer",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "modulation.1",
    *_QKV,
    _OUT,
    f"{_BLOCK}.attn.norm_q",
    f"{_BLOCK}.attn.norm_k",
    f"{_BLOCK}.img_mlp.out",
    "norm_out.linear",
    "proj_out",
)

_ORIGINAL = (
    *(Entry(f"{name}.*", (f"{name}.*",), bias=False) for name in _NAMES),
    Entry(
        f"{_BLOCK}.img_mlp.gate_up.*",
        tuple(f"{name}.*" for name in _HALVES),
        bias=False,
        share=EQUAL,
    ),
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The QwenImage21Transformer2DModel config that the shapes imply."""
    hidden, channels = infos["img_in.weight"].shape
    head = infos["transformer_blocks.0.attn.norm_q.weight"].shape[0]
    return {
        "_class_name": "QwenImage21Transformer2DModel",
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": infos["proj_out.weight"].shape[0],
        "num_layers": depth(infos, "transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "context_in_dim": infos["txt_in.in_layer.weight"].shape[1],
        "mlp_ratio": infos["transformer_blocks.0.img_mlp.proj.weight"].shape[0] // hidden,
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],
        "causal_condition": True,
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


FAMILY = Family(
    name="qwen_image_21",
    title="Qwen-Image 2.1",
    aliases={"qwen-image-2.1": "Qwen/Qwen-Image-2.1"},
    licenses={"qwen-image-2.1": "qwen-research"},
    architecture="qwen_image",
    classes=("QwenImage21Transformer2DModel",),
    signature=(
        "img_in.weight",
        "txt_in.text_norm.weight",
        "txt_in.in_layer.weight",
        "modulation.1.weight",
        "transformer_blocks.0.attn.to_q.weight",
        "transformer_blocks.0.img_mlp.gate_layer.weight",
    ),
    hidden="img_in.weight",
    blocks=("transformer_blocks",),
    linears=_LINEARS,
    dialects={"diffusers": (), "original": _ORIGINAL},
    config_of=_config_of,
    assumed=("patch_size", "in_channels", "out_channels", "causal_condition"),
    facts=_facts,
    sensitive=(_OUT,),
    # Its authors sample without guidance.
    unguided=("2.1",),
    pipelines={"": "QwenImage21Pipeline"},
    encoders={"text_encoder": "qwen3_vl"},
    # No folds: linears have no bias, and modulation has no shift.
)
