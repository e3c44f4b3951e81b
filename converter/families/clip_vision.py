"""The image encoder of Wan: the visual half of CLIP ViT-H with XLM-RoBERTa, as a component.

Names: Wan-Video wan/modules/clip.py, which LightX2V shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.family import Entry, Family, Infos, Linear, depth

_BLOCK = "visual.transformer.{i}"
_HEAD = 80
"""Width of an attention head of ViT-H; q, k and v stand in one tensor, which does not tell."""

_LINEARS = (
    Linear(f"{_BLOCK}.attn.to_qkv", "attention", "qkv"),
    Linear(f"{_BLOCK}.attn.proj", "attention", "attention_out"),
    Linear(f"{_BLOCK}.mlp.0", "mlp", "mlp_in"),
    Linear(f"{_BLOCK}.mlp.2", "mlp", "mlp_out", gelu=0),
)
_NAMES = (
    "log_scale",
    "visual.cls_embedding",
    "visual.pos_embedding",
    "visual.patch_embedding.weight",
    "visual.pre_norm.*",
    *(f"{linear.name}.*" for linear in _LINEARS),
    f"{_BLOCK}.norm1.*",
    f"{_BLOCK}.norm2.*",
    "visual.post_norm.*",
    "visual.head",
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The sizes that the shapes imply, in the words of transformers' CLIPVisionConfig."""
    hidden, channels, patch, _ = infos["visual.patch_embedding.weight"].shape
    places = infos["visual.pos_embedding"].shape[1] - 1
    return {
        "_class_name": "CLIPVisionModel",
        "hidden_size": hidden,
        "intermediate_size": infos["visual.transformer.0.mlp.0.weight"].shape[0],
        "projection_dim": infos["visual.head"].shape[1],
        "num_hidden_layers": depth(infos, "visual.transformer"),
        "num_attention_heads": hidden // _HEAD,
        "num_channels": channels,
        "image_size": round(places**0.5) * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"component": "clip"}


FAMILY = Family(
    name="clip_vision",
    title="CLIP image encoder",
    task="",
    aliases={},
    licenses={},
    signature=(
        "visual.cls_embedding",
        "visual.pos_embedding",
        "visual.patch_embedding.weight",
        "visual.head",
        "visual.transformer.0.attn.to_qkv.weight",
    ),
    hidden="visual.pre_norm.weight",
    blocks=("visual.transformer",),
    linears=_LINEARS,
    dialects={"native": tuple(Entry(name, (name,)) for name in _NAMES), "lightx2v": ()},
    sources=("native",),
    prefixes=(),
    unread=("textual.",),
    config_of=_config_of,
    assumed=("num_attention_heads",),
    facts=_facts,
)
