"""Kandinsky 5 (Lite and Pro; text to video, to image, and editing), of any width and depth.

Names: diffusers/models/transformers/transformer_kandinsky.py, which ComfyUI shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.family import Entry, Family, Fold, Infos, Linear, depth

_TEXT, _VISUAL = "text_transformer_blocks.{i}", "visual_transformer_blocks.{i}"
_SELF, _CROSS = "self_attention", "cross_attention"
_QKV = ("to_query", "to_key", "to_value")


def _names(block: str, attention: str) -> tuple[str, ...]:
    return tuple(f"{block}.{attention}.{name}" for name in _QKV)


def _common(block: str) -> tuple[Linear, ...]:
    """Self attention and the feed-forward."""
    qkv = _names(block, _SELF)
    return (
        *(Linear(name, "attention", "qkv", qkv[0]) for name in qkv),
        Linear(f"{block}.{_SELF}.out_layer", "attention", "attention_out"),
        Linear(f"{block}.feed_forward.in_layer", "mlp", "mlp_in"),
        Linear(f"{block}.feed_forward.out_layer", "mlp", "mlp_out", gelu=0),
    )


_QUERY, _KEY, _VALUE = _names(_VISUAL, _CROSS)
_LINEARS = (
    Linear(f"{_TEXT}.text_modulation.out_layer", "modulation", splits=6),
    *_common(_TEXT),
    Linear(f"{_VISUAL}.visual_modulation.out_layer", "modulation", splits=9),
    *_common(_VISUAL),
    Linear(_QUERY, "attention", "cross_q"),
    *(Linear(name, "attention", "text_kv", _KEY) for name in (_KEY, _VALUE)),
    Linear(f"{_VISUAL}.{_CROSS}.out_layer", "attention", "cross_out"),
)

_AROUND = (
    "time_embeddings.in_layer",
    "time_embeddings.out_layer",
    "text_embeddings.in_layer",
    "text_embeddings.norm",
    "pooled_text_embeddings.in_layer",
    "pooled_text_embeddings.norm",
    "visual_embeddings.in_layer",
    "out_layer.modulation.out_layer",
    "out_layer.out_layer",
)
_NORMS = tuple(
    f"{name}.{letter}_norm.weight"
    for name in (f"{_TEXT}.{_SELF}", f"{_VISUAL}.{_SELF}", f"{_VISUAL}.{_CROSS}")
    for letter in ("query", "key")
)
_NAMES = (
    *(Entry(f"{name}.*", (f"{name}.*",)) for name in _AROUND),
    *(
        Entry(f"{linear.name}.*", (f"{linear.name}.*",), bias=linear.role != "mlp")
        for linear in _LINEARS
    ),
    *(Entry(name, (name,)) for name in _NORMS),
)

# Rows of a modulation: shift, scale, gate before self attention, then cross attention, then the
# feed-forward, which has no bias.
_FOLDS = (
    Fold(_names(_TEXT, _SELF), f"{_TEXT}.text_modulation.out_layer"),
    Fold((f"{_TEXT}.{_SELF}.out_layer",), values=(f"{_TEXT}.{_SELF}.to_value",)),
    Fold(_names(_VISUAL, _SELF), f"{_VISUAL}.visual_modulation.out_layer"),
    Fold((_QUERY,), f"{_VISUAL}.visual_modulation.out_layer", shift=3, scale=4),
    Fold((f"{_VISUAL}.{_SELF}.out_layer",), values=(f"{_VISUAL}.{_SELF}.to_value",)),
    Fold((f"{_VISUAL}.{_CROSS}.out_layer",), values=(_VALUE,)),
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The Kandinsky5Transformer3DModel config that the shapes imply.

    What is drawn has as many channels as what is read, which in models that may be given a picture
    holds that and a mask as well.
    """
    hidden, patch = infos["visual_embeddings.in_layer.weight"].shape
    head = infos["visual_transformer_blocks.0.self_attention.query_norm.weight"].shape[0]
    channels = infos["out_layer.out_layer.weight"].shape[0] // 4
    forward = infos["visual_transformer_blocks.0.feed_forward.in_layer.weight"]
    return {
        "_class_name": "Kandinsky5Transformer3DModel",
        "in_visual_dim": channels,
        "in_text_dim": infos["text_embeddings.in_layer.weight"].shape[1],
        "in_text_dim2": infos["pooled_text_embeddings.in_layer.weight"].shape[1],
        "time_dim": infos["time_embeddings.out_layer.weight"].shape[0],
        "out_visual_dim": channels,
        "patch_size": [1, 2, 2],
        "model_dim": hidden,
        "ff_dim": forward.shape[0],
        "num_text_blocks": depth(infos, "text_transformer_blocks"),
        "num_visual_blocks": depth(infos, "visual_transformer_blocks"),
        "axes_dims": [head // 4, head * 3 // 8, head * 3 // 8],
        "visual_cond": patch == 4 * (2 * channels + 1),
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _variant(infos: Infos, config: Mapping[str, Any]) -> str:
    """The models of pictures are 2560 wide, as ComfyUI tells them."""
    return "image" if infos["visual_embeddings.in_layer.weight"].shape[0] == 2560 else ""


_HUB = "kandinskylab/Kandinsky-5.0-"
_ALIASES = {
    "kandinsky5-t2v-lite": f"{_HUB}T2V-Lite-sft-5s-Diffusers",
    "kandinsky5-t2v-lite-10s": f"{_HUB}T2V-Lite-sft-10s-Diffusers",
    "kandinsky5-t2v-lite-nocfg": f"{_HUB}T2V-Lite-nocfg-5s-Diffusers",
    "kandinsky5-t2v-lite-distilled": f"{_HUB}T2V-Lite-distilled16steps-5s-Diffusers",
    "kandinsky5-t2i-lite": f"{_HUB}T2I-Lite-sft-Diffusers",
    "kandinsky5-i2i-lite": f"{_HUB}I2I-Lite-sft-Diffusers",
}
_KEPT = {"modulation": None}

FAMILY = Family(
    name="kandinsky5",
    title="Kandinsky 5",
    task="text-to-video",
    aliases=_ALIASES,
    licenses=dict.fromkeys(_ALIASES, "mit"),
    classes=("Kandinsky5Transformer3DModel",),
    signature=(
        "visual_embeddings.in_layer.weight",
        "text_embeddings.in_layer.weight",
        "pooled_text_embeddings.in_layer.weight",
        "time_embeddings.out_layer.weight",
        "text_transformer_blocks.0.text_modulation.out_layer.weight",
        "visual_transformer_blocks.0.visual_modulation.out_layer.weight",
        "visual_transformer_blocks.0.cross_attention.key_norm.weight",
    ),
    hidden="visual_embeddings.in_layer.weight",
    blocks=("text_transformer_blocks", "visual_transformer_blocks"),
    linears=_LINEARS,
    dialects={"diffusers": _NAMES, "original": ()},
    sources=("diffusers",),
    config_of=_config_of,
    assumed=("in_visual_dim", "out_visual_dim", "visual_cond"),
    facts=_facts,
    # vLLM-Omni has no code for it, SGLang for Kandinsky 6 alone (2026).
    unrun=("sglang", "vllm"),
    # Modulation is computed in float32, and diffusers keeps it so whatever the rest is.
    policies=dict.fromkeys(("comfyui", "diffusers"), _KEPT),
    video=True,
    sensitive=(
        f"{_TEXT}.{_SELF}.out_layer",
        f"{_VISUAL}.{_SELF}.out_layer",
        f"{_VISUAL}.{_CROSS}.out_layer",
    ),
    folds=_FOLDS,
    unguided=("nocfg", "distilled"),
    variant=_variant,
    pipelines={"": "Kandinsky5T2VPipeline", "image": "Kandinsky5T2IPipeline"},
    encoders={"text_encoder": "qwen25_vl", "text_encoder_2": "clip_text"},
)
