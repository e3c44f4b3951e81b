"""HiDream-I1 (Full, Dev, Fast) and HiDream-E1, of any width and depth.

Names: diffusers/models/transformers/transformer_hidream_image.py, which ComfyUI shares. A block's
image tokens go through one shared expert and through two of four others, which a router chooses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.family import Entry, Family, Fold, Infos, Linear, depth

_DOUBLE, _SINGLE = "double_stream_blocks.{i}.block", "single_stream_blocks.{i}.block"
_EXPERTS = ("shared_experts", *(f"experts.{number}" for number in range(4)))
"""The feed-forwards of every model so far. Each sees tokens of its own."""

_QKV = ("to_q", "to_k", "to_v")


def _attention(block: str, suffix: str, label: str) -> tuple[Linear, ...]:
    names = [f"{block}.attn1.{name}{suffix}" for name in _QKV]
    return tuple(Linear(name, "attention", f"{label}qkv", names[0]) for name in names)


def _forward(name: str, label: str) -> tuple[Linear, ...]:
    return (
        Linear(f"{name}.w1", "mlp", f"{label}_in", f"{name}.w1"),
        Linear(f"{name}.w3", "mlp", f"{label}_in", f"{name}.w1"),
        Linear(f"{name}.w2", "mlp", f"{label}_out"),
    )


def _linears(block: str, chunks: int) -> tuple[Linear, ...]:
    return (
        Linear(f"{block}.adaLN_modulation.1", "modulation", splits=chunks),
        *_attention(block, "", "image_"),
        Linear(f"{block}.attn1.to_out", "attention", "attention_out"),
        *(
            linear
            for expert in _EXPERTS
            for linear in _forward(f"{block}.ff_i.{expert}", expert.replace(".", "_"))
        ),
    )


_LINEARS = (
    *_linears(_DOUBLE, 12),
    *_attention(_DOUBLE, "_t", "text_"),
    Linear(f"{_DOUBLE}.attn1.to_out_t", "attention", "attention_out"),
    *_forward(f"{_DOUBLE}.ff_t", "text_mlp"),
    *_linears(_SINGLE, 6),
)

_BIASED = (
    "t_embedder.timestep_embedder.linear_1",
    "t_embedder.timestep_embedder.linear_2",
    "p_embedder.pooled_embedder.linear_1",
    "p_embedder.pooled_embedder.linear_2",
    "x_embedder.proj",
    "final_layer.adaLN_modulation.1",
    "final_layer.linear",
)
_NORMS = (
    *(f"{_DOUBLE}.attn1.{x}_rms_norm{stream}" for x in "qk" for stream in ("", "_t")),
    *(f"{_SINGLE}.attn1.{x}_rms_norm" for x in "qk"),
)
_NAMES = (
    *(Entry(f"{name}.*", (f"{name}.*",)) for name in _BIASED),
    Entry("caption_projection.{i}.linear.*", ("caption_projection.{i}.linear.*",), bias=False),
    *(
        Entry(f"{linear.name}.*", (f"{linear.name}.*",), bias=linear.role != "mlp")
        for linear in _LINEARS
    ),
    *(
        Entry(f"{name}.weight", (f"{name}.weight",))
        for name in (*_NORMS, f"{_DOUBLE}.ff_i.gate", f"{_SINGLE}.ff_i.gate")
    ),
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The HiDreamImageTransformer2DModel config that the shapes imply.

    They do not tell which layers of Llama are read; released models read each once, the last ones
    of their blocks the last layer.
    """
    hidden, patch = infos["x_embedder.proj.weight"].shape
    double = depth(infos, "double_stream_blocks")
    blocks = double + depth(infos, "single_stream_blocks")
    llama = infos["caption_projection.0.linear.weight"].shape[1]
    t5 = infos[f"caption_projection.{blocks}.linear.weight"].shape[1]
    experts = {k.split(".experts.")[1].split(".")[0] for k in infos if ".experts." in k}
    return {
        "_class_name": "HiDreamImageTransformer2DModel",
        "patch_size": 2,
        "in_channels": patch // 4,
        "out_channels": infos["final_layer.linear.weight"].shape[0] // 4,
        "num_layers": double,
        "num_single_layers": blocks - double,
        "attention_head_dim": 128,
        "num_attention_heads": hidden // 128,
        "caption_channels": [t5, llama],
        "text_emb_dim": infos["p_embedder.pooled_embedder.linear_1.weight"].shape[1],
        "num_routed_experts": len(experts),
        "num_activated_experts": 2,
        "axes_dims_rope": [64, 32, 32],
        "max_resolution": [128, 128],
        "llama_layers": [min(i, 31) for i in range(blocks)],
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _folds() -> tuple[Fold, ...]:
    """Chunks of a modulation: shift, scale, gate before attention, then before the feed-forward.

    In double blocks those of the image come first, then those of the text. What experts read stays
    as it is: they have no bias, and the router reads it as well.
    """
    q, k, v = (tuple(f"{_DOUBLE}.attn1.{x}{y}" for y in ("", "_t")) for x in _QKV)
    return (
        Fold((q[0], k[0], v[0]), f"{_DOUBLE}.adaLN_modulation.1"),
        Fold((q[1], k[1], v[1]), f"{_DOUBLE}.adaLN_modulation.1", shift=6, scale=7),
        Fold((f"{_DOUBLE}.attn1.to_out", f"{_DOUBLE}.attn1.to_out_t"), values=v),
        Fold(tuple(f"{_SINGLE}.attn1.{x}" for x in _QKV), f"{_SINGLE}.adaLN_modulation.1"),
        Fold((f"{_SINGLE}.attn1.to_out",), values=(f"{_SINGLE}.attn1.to_v",)),
    )


_ALIASES = {
    "hidream-i1-full": "HiDream-ai/HiDream-I1-Full",
    "hidream-i1-dev": "HiDream-ai/HiDream-I1-Dev",
    "hidream-i1-fast": "HiDream-ai/HiDream-I1-Fast",
}

FAMILY = Family(
    name="hidream",
    title="HiDream-I1",
    aliases=_ALIASES,
    licenses=dict.fromkeys(_ALIASES, "mit"),
    architecture="hidream",
    classes=("HiDreamImageTransformer2DModel",),
    signature=(
        "x_embedder.proj.weight",
        "p_embedder.pooled_embedder.linear_1.weight",
        "caption_projection.0.linear.weight",
        "double_stream_blocks.0.block.attn1.to_q_t.weight",
        "double_stream_blocks.0.block.ff_i.gate.weight",
        "double_stream_blocks.0.block.ff_i.experts.0.w1.weight",
        "single_stream_blocks.0.block.ff_i.shared_experts.w1.weight",
    ),
    hidden="x_embedder.proj.weight",
    blocks=("double_stream_blocks", "single_stream_blocks", "caption_projection"),
    linears=_LINEARS,
    dialects={"diffusers": _NAMES, "original": ()},
    sources=("diffusers",),
    config_of=_config_of,
    assumed=("patch_size", "in_channels", "out_channels", "attention_head_dim"),
    facts=_facts,
    # SGLang has code for HiDream-O1 alone (2026); vLLM-Omni builds its linears unquantized.
    unrun=("sglang", "vllm"),
    sensitive=(f"{_DOUBLE}.attn1.to_out", f"{_DOUBLE}.attn1.to_out_t", f"{_SINGLE}.attn1.to_out"),
    folds=_folds(),
    unguided=("dev", "fast"),
    pipelines={"": "HiDreamImagePipeline"},
    encoders={
        "text_encoder": "clip_text",
        "text_encoder_2": "clip_text",
        "text_encoder_3": "t5",
        "text_encoder_4": "llama",
    },
)
