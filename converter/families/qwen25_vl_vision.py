"""The vision tower of Qwen2.5-VL, for Qwen-Image-Edit: what llama.cpp calls an mmproj file.

Canonical names are those of transformers' checkpoints with q, k and v apart, and with the two
frames of the patch embedding apart, as llama.cpp has them: its convolutions have two dimensions.
gguf: llama.cpp's names. ComfyUI-GGUF (loader.py) joins both again; it looks for the file beside
that of the language model, with "mmproj" in its name and all of the other's name but the type at
its end. stable-diffusion.cpp (name_conversion.cpp) takes the names as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.family import Entry, Family, Infos, Linear, depth, single

_BLOCK = "visual.blocks.{i}"
_HEADS = 16
"""Of all sizes; q, k and v do not tell."""

_QKV = tuple(f"{_BLOCK}.attn.{name}" for name in "qkv")
_MLP = ("gate_proj", "up_proj", "down_proj")
_GATE = f"{_BLOCK}.mlp.gate_proj"
_PATCHES = tuple(f"visual.patch_embed.proj.{frame}.weight" for frame in (0, 1))
_LINEARS = (
    *(Linear(name, "attention", "qkv", _QKV[0]) for name in _QKV),
    Linear(f"{_BLOCK}.attn.proj", "attention", "attention_out"),
    Linear(_GATE, "mlp", "mlp_in", _GATE),
    Linear(f"{_BLOCK}.mlp.up_proj", "mlp", "mlp_in", _GATE),
    Linear(f"{_BLOCK}.mlp.down_proj", "mlp", "mlp_out"),
)


def _same(name: str) -> Entry:
    return Entry(name, (name,))


_TRANSFORMERS = (
    Entry("visual.patch_embed.proj.weight", _PATCHES, frames=True),
    Entry(f"{_BLOCK}.attn.qkv.*", tuple(f"{name}.*" for name in _QKV)),
    _same(f"{_BLOCK}.attn.proj.*"),
    *(_same(f"{_BLOCK}.mlp.{name}.*") for name in _MLP),
    _same(f"{_BLOCK}.norm1.weight"),
    _same(f"{_BLOCK}.norm2.weight"),
    _same("visual.merger.ln_q.weight"),
    _same("visual.merger.mlp.0.*"),
    _same("visual.merger.mlp.2.*"),
)
_GGUF = (
    Entry("v.patch_embd.weight", _PATCHES[:1]),
    Entry("v.patch_embd.weight.1", _PATCHES[1:]),
    *(
        Entry(f"v.blk.{{i}}.attn_{x}.*", (f"{name}.*",))
        for x, name in zip("qkv", _QKV, strict=True)
    ),
    Entry("v.blk.{i}.attn_out.*", (f"{_BLOCK}.attn.proj.*",)),
    *(
        Entry(f"v.blk.{{i}}.ffn_{name.removesuffix('_proj')}.*", (f"{_BLOCK}.mlp.{name}.*",))
        for name in _MLP
    ),
    Entry("v.blk.{i}.ln1.weight", (f"{_BLOCK}.norm1.weight",)),
    Entry("v.blk.{i}.ln2.weight", (f"{_BLOCK}.norm2.weight",)),
    Entry("v.post_ln.weight", ("visual.merger.ln_q.weight",)),
    Entry("mm.0.*", ("visual.merger.mlp.0.*",)),
    Entry("mm.2.*", ("visual.merger.mlp.2.*",)),
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The sizes that the shapes imply, in the words of Qwen2_5_VLVisionConfig."""
    hidden, channels, patch, _ = infos[_PATCHES[0]].shape
    merged = infos["visual.merger.mlp.0.weight"].shape[0]
    return {
        "_class_name": "Qwen2_5_VLVisionModel",
        "depth": depth(infos, "visual.blocks"),
        "hidden_size": hidden,
        "intermediate_size": infos[f"{_GATE.replace('{i}', '0')}.weight"].shape[0],
        "num_heads": _HEADS,
        "in_channels": channels,
        "patch_size": patch,
        "spatial_merge_size": round((merged / hidden) ** 0.5),
        "out_hidden_size": infos["visual.merger.mlp.2.weight"].shape[0],
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What llama.cpp's clip.cpp wants to be told; every eighth block attends to the whole image."""
    if dialect != "gguf":
        return {}
    return {
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "qwen2.5vl_merger",
        "clip.use_silu": True,
        "clip.vision.image_size": 560,
        "clip.vision.patch_size": config["patch_size"],
        "clip.vision.embedding_length": config["hidden_size"],
        "clip.vision.feed_forward_length": config["intermediate_size"],
        "clip.vision.projection_dim": config["out_hidden_size"],
        "clip.vision.block_count": config["depth"],
        "clip.vision.attention.head_count": config["num_heads"],
        "clip.vision.attention.layer_norm_epsilon": single(1e-6),
        "clip.vision.n_wa_pattern": 8,
        "clip.vision.image_mean": [single(x) for x in (0.48145466, 0.4578275, 0.40821073)],
        "clip.vision.image_std": [single(x) for x in (0.26862954, 0.26130258, 0.27577711)],
    }


FAMILY = Family(
    name="qwen25_vl_vision",
    title="vision tower of Qwen2.5-VL",
    task="",
    aliases={},
    licenses={},
    signature=(
        *_PATCHES,
        "visual.blocks.0.attn.q.weight",
        "visual.blocks.0.mlp.gate_proj.weight",
        "visual.merger.ln_q.weight",
        "visual.merger.mlp.0.weight",
    ),
    hidden="visual.merger.ln_q.weight",
    blocks=("visual.blocks",),
    linears=_LINEARS,
    dialects={"transformers": _TRANSFORMERS, "gguf": _GGUF},
    sources=("transformers", "gguf"),
    prefixes=("model.",),
    unread=("model.", "lm_head."),
    config_of=_config_of,
    assumed=("num_heads",),
    facts=_facts,
    architecture="clip",
)
