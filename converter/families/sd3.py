"""Stable Diffusion 3 and 3.5 (medium, large, large-turbo), of any width and depth.

Names: diffusers/models/transformers/transformer_sd3.py; original: Stability-AI/sd3.5 mmditx.py,
which ComfyUI shares. The last block computes no text: it lacks what comes behind attention there,
and its text norm is an AdaLayerNormContinuous, whose (scale, shift) are the original's (shift,
scale). The first blocks of 3.5 medium have a second attention, among image tokens alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.family import LAST, Entry, Family, Fold, Infos, Linear, depth

_BLOCK = "transformer_blocks.{i}"
_HEAD = 64
"""Width of an attention head of every model so far; without norms the shapes do not tell."""

_IMAGE, _TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


def _qkv(attention: str, names: tuple[str, str, str]) -> tuple[str, ...]:
    return tuple(f"{_BLOCK}.{attention}.{name}" for name in names)


def _attention(names: tuple[str, ...], shares: str) -> tuple[Linear, ...]:
    return tuple(Linear(name, "attention", shares, names[0]) for name in names)


_LINEARS = (
    Linear(f"{_BLOCK}.norm1.linear", "modulation", splits=6),
    Linear(f"{_BLOCK}.norm1_context.linear", "modulation", splits=6),
    *_attention(_qkv("attn", _IMAGE), "image_qkv"),
    *_attention(_qkv("attn", _TEXT), "text_qkv"),
    Linear(f"{_BLOCK}.attn.to_out.0", "attention", "attention_out"),
    Linear(f"{_BLOCK}.attn.to_add_out", "attention", "attention_out"),
    *_attention(_qkv("attn2", _IMAGE), "image_qkv2"),
    Linear(f"{_BLOCK}.attn2.to_out.0", "attention", "attention_out2"),
    Linear(f"{_BLOCK}.ff.net.0.proj", "mlp", "image_mlp_in"),
    Linear(f"{_BLOCK}.ff.net.2", "mlp", "image_mlp_out", gelu=0),
    Linear(f"{_BLOCK}.ff_context.net.0.proj", "mlp", "text_mlp_in"),
    Linear(f"{_BLOCK}.ff_context.net.2", "mlp", "text_mlp_out", gelu=0),
)


def _fused(
    theirs: str, attention: str, names: tuple[str, str, str], norms: str
) -> tuple[Entry, ...]:
    """q, k and v of one stream, and their norms."""
    theirs, ours = f"joint_blocks.{{i}}.{theirs}", f"{_BLOCK}.{attention}"
    return (
        Entry(f"{theirs}.qkv.*", tuple(f"{name}.*" for name in _qkv(attention, names))),
        Entry(f"{theirs}.ln_q.weight", (f"{ours}.{norms}_q.weight",)),
        Entry(f"{theirs}.ln_k.weight", (f"{ours}.{norms}_k.weight",)),
    )


def _stream(theirs: str, ours: Mapping[str, str], swap: bool | str = False) -> tuple[Entry, ...]:
    """What else a block holds of one of the two streams, image and text."""
    theirs = f"joint_blocks.{{i}}.{theirs}"
    return (
        Entry(f"{theirs}.attn.proj.*", (f"{_BLOCK}.attn.{ours['out']}.*",)),
        Entry(f"{theirs}.adaLN_modulation.1.*", (f"{_BLOCK}.{ours['mod']}.linear.*",), swap=swap),
        Entry(f"{theirs}.mlp.fc1.*", (f"{_BLOCK}.{ours['mlp']}.net.0.proj.*",)),
        Entry(f"{theirs}.mlp.fc2.*", (f"{_BLOCK}.{ours['mlp']}.net.2.*",)),
    )


def _embedder(theirs: str, ours: str) -> tuple[Entry, ...]:
    ours = f"time_text_embed.{ours}"
    return (
        Entry(f"{theirs}.mlp.0.*", (f"{ours}.linear_1.*",)),
        Entry(f"{theirs}.mlp.2.*", (f"{ours}.linear_2.*",)),
    )


_ORIGINAL = (
    Entry("pos_embed", ("pos_embed.pos_embed",)),
    Entry("x_embedder.proj.*", ("pos_embed.proj.*",)),
    *_embedder("t_embedder", "timestep_embedder"),
    *_embedder("y_embedder", "text_embedder"),
    Entry("context_embedder.*", ("context_embedder.*",)),
    *_fused("x_block.attn", "attn", _IMAGE, "norm"),
    *_fused("context_block.attn", "attn", _TEXT, "norm_added"),
    *_fused("x_block.attn2", "attn2", _IMAGE, "norm"),
    Entry("joint_blocks.{i}.x_block.attn2.proj.*", (f"{_BLOCK}.attn2.to_out.0.*",)),
    *_stream("x_block", {"out": "to_out.0", "mod": "norm1", "mlp": "ff"}),
    *_stream(
        "context_block",
        {"out": "to_add_out", "mod": "norm1_context", "mlp": "ff_context"},
        swap=LAST,
    ),
    Entry("final_layer.adaLN_modulation.1.*", ("norm_out.linear.*",), swap=True),
    Entry("final_layer.linear.*", ("proj_out.*",)),
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The SD3Transformer2DModel config that the shapes imply."""
    hidden, channels, patch, _ = infos["pos_embed.proj.weight"].shape
    blocks = depth(infos, "transformer_blocks")
    norm = infos.get("transformer_blocks.0.attn.norm_q.weight")
    head = norm.shape[0] if norm else _HEAD
    projected, joint = infos["context_embedder.weight"].shape
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "num_layers": blocks,
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": joint,
        "caption_projection_dim": projected,
        "pooled_projection_dim": infos["time_text_embed.text_embedder.linear_1.weight"].shape[1],
        "out_channels": infos["proj_out.weight"].shape[0] // patch**2,
        "pos_embed_max_size": round(infos["pos_embed.pos_embed"].shape[1] ** 0.5),
        "dual_attention_layers": [
            i for i in range(blocks) if f"transformer_blocks.{i}.attn2.to_q.weight" in infos
        ],
        "qk_norm": "rms_norm" if norm else None,
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


_HUB = "stabilityai/stable-diffusion-3"

FAMILY = Family(
    name="sd3",
    title="Stable Diffusion 3",
    aliases={
        "sd3-medium": f"{_HUB}-medium-diffusers",
        "sd3.5-medium": f"{_HUB}.5-medium",
        "sd3.5-large": f"{_HUB}.5-large",
        "sd3.5-large-turbo": f"{_HUB}.5-large-turbo",
    },
    licenses={
        "sd3-medium": "stabilityai-nc-research-community",
        "sd3.5-medium": "stabilityai-ai-community",
        "sd3.5-large": "stabilityai-ai-community",
        "sd3.5-large-turbo": "stabilityai-ai-community",
    },
    architecture="sd3",
    classes=("SD3Transformer2DModel",),
    signature=(
        "pos_embed.pos_embed",
        "pos_embed.proj.weight",
        "context_embedder.weight",
        "time_text_embed.text_embedder.linear_1.weight",
        "transformer_blocks.0.norm1_context.linear.weight",
        "transformer_blocks.0.attn.add_q_proj.weight",
        "transformer_blocks.0.ff.net.0.proj.weight",
    ),
    hidden="pos_embed.proj.weight",
    optional=(f"{_BLOCK}.attn.norm_",),
    scattered=(f"{_BLOCK}.attn2.norm_", f"{_BLOCK}.attn2"),
    cut=(f"{_BLOCK}.attn.to_add_out", f"{_BLOCK}.ff_context"),
    blocks=("transformer_blocks",),
    linears=_LINEARS,
    dialects={"diffusers": (), "original": _ORIGINAL},
    config_of=_config_of,
    assumed=("sample_size", "attention_head_dim", "num_attention_heads"),
    facts=_facts,
    unrun=("sglang", "vllm"),  # both build its linears unquantized, whatever the config says
    sensitive=(f"{_BLOCK}.attn.to_out.0", f"{_BLOCK}.attn.to_add_out"),
    # Rows of norm1: shift, scale, gate before attention, then before the MLP, then, where there is
    # one, before the second attention. Those of norm1_context stand otherwise in the last block.
    folds=(
        Fold(_qkv("attn", _IMAGE), f"{_BLOCK}.norm1.linear"),
        Fold((f"{_BLOCK}.ff.net.0.proj",), f"{_BLOCK}.norm1.linear", shift=3, scale=4),
    ),
    unguided=("turbo",),
    pipelines={"": "StableDiffusion3Pipeline"},
    encoders={"text_encoder": "clip_text", "text_encoder_2": "clip_text", "text_encoder_3": "t5"},
)
