"""Ovis-Image, of any width and depth: FLUX.1's blocks with gated feed-forwards.

Names: diffusers/models/transformers/transformer_ovis_image.py. ComfyUI's have the two halves of a
feed-forward apart, which one linear holds here, so its files are not written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dqconvert.converter.families import flux
from dqconvert.converter.family import Entry, Family, Infos, depth

_DOUBLE, _SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
_LINEARS = tuple(replace(linear, gelu=None) for linear in flux.LINEARS)
_NAMES = (
    *(
        f"{name}.*"
        for name in (
            "timestep_embedder.linear_1",
            "timestep_embedder.linear_2",
            "context_embedder",
            "x_embedder",
            "norm_out.linear",
            "proj_out",
            *(linear.name for linear in _LINEARS),
        )
    ),
    "context_embedder_norm.weight",
    *(f"{_DOUBLE}.attn.norm_{name}.weight" for name in ("q", "k", "added_q", "added_k")),
    *(f"{_SINGLE}.attn.norm_{name}.weight" for name in "qk"),
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The OvisImageTransformer2DModel config that the shapes imply."""
    hidden, channels = infos["x_embedder.weight"].shape
    head = infos["transformer_blocks.0.attn.norm_q.weight"].shape[0]
    return {
        "_class_name": "OvisImageTransformer2DModel",
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": infos["proj_out.weight"].shape[0],
        "num_layers": depth(infos, "transformer_blocks"),
        "num_single_layers": depth(infos, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": infos["context_embedder.weight"].shape[1],
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


FAMILY = Family(
    name="ovis_image",
    title="Ovis-Image",
    aliases={"ovis-image-7b": "AIDC-AI/Ovis-Image-7B"},
    licenses={"ovis-image-7b": "apache-2.0"},
    classes=("OvisImageTransformer2DModel",),
    signature=(
        "x_embedder.weight",
        "context_embedder.weight",
        "context_embedder_norm.weight",
        "timestep_embedder.linear_1.weight",
        "transformer_blocks.0.norm1_context.linear.weight",
        "single_transformer_blocks.0.proj_mlp.weight",
    ),
    hidden="x_embedder.weight",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    linears=_LINEARS,
    dialects={"diffusers": tuple(Entry(name, (name,)) for name in _NAMES)},
    sources=("diffusers",),
    config_of=_config_of,
    assumed=("patch_size", "in_channels", "out_channels"),
    facts=_facts,
    unrun=("sglang", "vllm"),  # both build its linears unquantized, whatever the config says
    policies=flux.BITSANDBYTES,
    outside=(flux.PROJ_OUT,),
    sensitive=flux.FAMILY.sensitive,
    folds=flux.FOLDS,
    pipelines={"": "OvisImagePipeline"},
    encoders={"text_encoder": "qwen3"},
)
