"""CogView4, of any width and depth.

Names: diffusers/models/transformers/transformer_cogview4.py, the only runtime of its files. One
set of linears reads text and image, each modulated by shifts and scales of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.family import Entry, Family, Fold, Infos, Linear, depth

_BLOCK = "transformer_blocks.{i}"
_HEAD = 128
"""Width of an attention head of every model so far; norms without weights do not tell."""

_QKV = tuple(f"{_BLOCK}.attn1.{name}" for name in ("to_q", "to_k", "to_v"))
_OUT = f"{_BLOCK}.attn1.to_out.0"
_LINEARS = (
    Linear(f"{_BLOCK}.norm1.linear", "modulation", splits=12),
    *(Linear(name, "attention", "qkv", _QKV[0]) for name in _QKV),
    Linear(_OUT, "attention", "attention_out"),
    Linear(f"{_BLOCK}.ff.net.0.proj", "mlp", "mlp_in"),
    Linear(f"{_BLOCK}.ff.net.2", "mlp", "mlp_out", gelu=0),
)
_EMBEDDERS = ("timestep_embedder", "condition_embedder")
_NAMES = (
    "patch_embed.proj",
    "patch_embed.text_proj",
    *(f"time_condition_embed.{name}.linear_{number}" for name in _EMBEDDERS for number in (1, 2)),
    *(linear.name for linear in _LINEARS),
    "norm_out.linear",
    "proj_out",
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The CogView4Transformer2DModel config that the shapes imply."""
    hidden, patch = infos["patch_embed.proj.weight"].shape
    rows, pooled = infos["time_condition_embed.condition_embedder.linear_1.weight"].shape
    return {
        "_class_name": "CogView4Transformer2DModel",
        "patch_size": 2,
        "in_channels": patch // 4,
        "out_channels": infos["proj_out.weight"].shape[0] // 4,
        "num_layers": depth(infos, "transformer_blocks"),
        "attention_head_dim": _HEAD,
        "num_attention_heads": hidden // _HEAD,
        "text_embed_dim": infos["patch_embed.text_proj.weight"].shape[1],
        "time_embed_dim": rows,
        "condition_dim": pooled // 6,
        "pos_embed_max_size": 128,
        "sample_size": 128,
        "rope_axes_dim": [256, 256],
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


FAMILY = Family(
    name="cogview4",
    title="CogView4",
    aliases={"cogview4-6b": "zai-org/CogView4-6B"},
    licenses={"cogview4-6b": "apache-2.0"},
    classes=("CogView4Transformer2DModel",),
    signature=(
        "patch_embed.proj.weight",
        "patch_embed.text_proj.weight",
        "time_condition_embed.timestep_embedder.linear_1.weight",
        "time_condition_embed.condition_embedder.linear_1.weight",
        "transformer_blocks.0.norm1.linear.weight",
        "transformer_blocks.0.attn1.to_q.weight",
        "transformer_blocks.0.ff.net.0.proj.weight",
    ),
    hidden="patch_embed.proj.weight",
    blocks=("transformer_blocks",),
    linears=_LINEARS,
    dialects={"diffusers": tuple(Entry(f"{name}.*", (f"{name}.*",)) for name in _NAMES)},
    sources=("diffusers",),
    config_of=_config_of,
    assumed=("patch_size", "attention_head_dim", "num_attention_heads", "pos_embed_max_size"),
    facts=_facts,
    # Neither has code for it (vLLM-Omni's registry, SGLang's folder dits, 2026).
    unrun=("sglang", "vllm"),
    sensitive=(_OUT,),
    # Linears behind the norms read both streams, which no one shift and scale makes.
    folds=(Fold((_OUT,), values=(f"{_BLOCK}.attn1.to_v",)),),
    pipelines={"": "CogView4Pipeline"},
)
