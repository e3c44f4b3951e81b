"""Lumina-Image 2.0, of any width and depth.

Names: diffusers/models/transformers/transformer_lumina2.py; original: ComfyUI
comfy/ldm/lumina/model.py, whose Z-Image has other modulation and tokens of its own. Attention is
grouped: queries have more heads than keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.family import GROUPED, Entry, Family, Infos, Linear, depth

_MODULATED, _PLAIN = ("noise_refiner", "layers"), ("context_refiner",)
_BLOCKS = tuple(f"{name}.{{i}}" for name in (*_MODULATED, *_PLAIN))
_QKV = ("to_q", "to_k", "to_v")


def _linears(block: str) -> tuple[Linear, ...]:
    forward = f"{block}.feed_forward"
    modulation = Linear(f"{block}.norm1.linear", "modulation", splits=4)
    return (
        *([modulation] if block.startswith(_MODULATED) else []),
        *(Linear(f"{block}.attn.{x}", "attention", "qkv", f"{block}.attn.to_q") for x in _QKV),
        Linear(f"{block}.attn.to_out.0", "attention", "attention_out"),
        Linear(f"{forward}.linear_1", "mlp", "mlp_in", f"{forward}.linear_1"),
        Linear(f"{forward}.linear_3", "mlp", "mlp_in", f"{forward}.linear_1"),
        Linear(f"{forward}.linear_2", "mlp", "mlp_out"),
    )


def _norm(block: str, theirs: str, ours: str) -> Entry:
    return Entry(f"{block}.{theirs}.weight", (f"{block}.{ours}.weight",))


def _block(block: str) -> tuple[Entry, ...]:
    modulated = block.startswith(_MODULATED)
    theirs, ours = f"{block}.attention", f"{block}.attn"
    modulation = Entry(f"{block}.adaLN_modulation.1.*", (f"{block}.norm1.linear.*",))
    return (
        *([modulation] if modulated else []),
        Entry(f"{theirs}.qkv.*", tuple(f"{ours}.{x}.*" for x in _QKV), bias=False, share=GROUPED),
        Entry(f"{theirs}.out.*", (f"{ours}.to_out.0.*",), bias=False),
        Entry(f"{theirs}.q_norm.weight", (f"{ours}.norm_q.weight",)),
        Entry(f"{theirs}.k_norm.weight", (f"{ours}.norm_k.weight",)),
        *(
            Entry(
                f"{block}.feed_forward.w{n}.*", (f"{block}.feed_forward.linear_{n}.*",), bias=False
            )
            for n in (1, 2, 3)
        ),
        _norm(block, "attention_norm1", "norm1.norm" if modulated else "norm1"),
        _norm(block, "attention_norm2", "norm2"),
        _norm(block, "ffn_norm1", "ffn_norm1"),
        _norm(block, "ffn_norm2", "ffn_norm2"),
    )


_EMBEDDER = "time_caption_embed"
_ORIGINAL = (
    Entry("x_embedder.*", ("x_embedder.*",)),
    Entry("t_embedder.mlp.0.*", (f"{_EMBEDDER}.timestep_embedder.linear_1.*",)),
    Entry("t_embedder.mlp.2.*", (f"{_EMBEDDER}.timestep_embedder.linear_2.*",)),
    Entry("cap_embedder.0.weight", (f"{_EMBEDDER}.caption_embedder.0.weight",)),
    Entry("cap_embedder.1.*", (f"{_EMBEDDER}.caption_embedder.1.*",)),
    *(entry for block in _BLOCKS for entry in _block(block)),
    Entry("final_layer.adaLN_modulation.1.*", ("norm_out.linear_1.*",)),
    Entry("final_layer.linear.*", ("norm_out.linear_2.*",)),
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The Lumina2Transformer2DModel config that the shapes imply."""
    hidden, patch = infos["x_embedder.weight"].shape
    head = infos["layers.0.attn.norm_q.weight"].shape[0]
    wide = infos["layers.0.feed_forward.linear_1.weight"].shape[0]
    out = infos["norm_out.linear_2.weight"].shape[0]
    return {
        "_class_name": "Lumina2Transformer2DModel",
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": patch // 4,
        "out_channels": None if out == patch else out // 4,
        "hidden_size": hidden,
        "num_layers": depth(infos, "layers"),
        "num_refiner_layers": depth(infos, "noise_refiner"),
        "num_attention_heads": hidden // head,
        "num_kv_heads": infos["layers.0.attn.to_k.weight"].shape[0] // head,
        "multiple_of": 256,
        "ffn_dim_multiplier": None if wide == 4 * hidden else wide / (4 * hidden),
        "norm_eps": 1e-5,
        "scaling_factor": 1.0,
        "axes_dim_rope": [head // 3] * 3,
        "axes_lens": [300, 512, 512],
        "cap_feat_dim": infos[f"{_EMBEDDER}.caption_embedder.0.weight"].shape[0],
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


_REFINERS = dict.fromkeys(
    linear.name for block in _BLOCKS if "refiner" in block for linear in _linears(block)
)

FAMILY = Family(
    name="lumina2",
    title="Lumina-Image 2.0",
    aliases={"lumina-image-2.0": "Alpha-VLLM/Lumina-Image-2.0"},
    licenses={"lumina-image-2.0": "apache-2.0"},
    architecture="lumina2",
    classes=("Lumina2Transformer2DModel",),
    signature=(
        "x_embedder.weight",
        f"{_EMBEDDER}.caption_embedder.1.weight",
        f"{_EMBEDDER}.timestep_embedder.linear_1.weight",
        "layers.0.norm1.linear.weight",
        "layers.0.attn.to_q.weight",
        "layers.0.feed_forward.linear_3.weight",
        "noise_refiner.0.attn.to_q.weight",
        "context_refiner.0.attn.to_q.weight",
        "norm_out.linear_2.weight",
    ),
    hidden="x_embedder.weight",
    blocks=("noise_refiner", "context_refiner", "layers"),
    linears=tuple(linear for block in _BLOCKS for linear in _linears(block)),
    dialects={"diffusers": (), "original": _ORIGINAL},
    unread=("norm_final.weight",),
    config_of=_config_of,
    assumed=("sample_size", "patch_size", "in_channels", "out_channels", "multiple_of"),
    facts=_facts,
    unrun=("vllm",),  # no entry in its registry (2026)
    policies={"gguf": _REFINERS},  # as lcpp.patch of ComfyUI-GGUF
    sensitive=tuple(f"{block}.attn.to_out.0" for block in _BLOCKS),
    pipelines={"": "Lumina2Pipeline"},
    encoders={"text_encoder": "gemma2"},
    # No folds: norms have a scale without a shift, and linears have no bias.
)
