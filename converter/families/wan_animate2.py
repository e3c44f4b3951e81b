"""Wan-Animate-2: Wan that reads a reference video through a cache of its keys and values.

Names: diffusers/models/transformers/transformer_wan_animate_2.py, which are Wan's own but for the
attention; original: what diffusers/loaders/single_file_utils.py reads, each block in a module.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from dqconvert.converter.family import Entry, Family, Fold, Infos, Linear, depth

_BLOCK = "blocks.{i}"
_HEAD = 128
"""Width of an attention head in every Wan; norms over all heads at once do not tell."""

_LINEARS = (
    *(
        Linear(f"{_BLOCK}.self_attn.{name}", "attention", "qkv", f"{_BLOCK}.self_attn.to_q")
        for name in ("to_q", "to_k", "to_v")
    ),
    Linear(f"{_BLOCK}.self_attn.to_out.0", "attention", "attention_out"),
    Linear(f"{_BLOCK}.cross_attn.to_q", "attention", "cross_q"),
    *(
        Linear(f"{_BLOCK}.cross_attn.{name}", "attention", "text_kv", f"{_BLOCK}.cross_attn.to_k")
        for name in ("to_k", "to_v")
    ),
    *(
        Linear(
            f"{_BLOCK}.cross_attn.{name}",
            "attention",
            "image_kv",
            f"{_BLOCK}.cross_attn.add_k_proj",
        )
        for name in ("add_k_proj", "add_v_proj")
    ),
    Linear(f"{_BLOCK}.cross_attn.to_out.0", "attention", "cross_out"),
    Linear(f"{_BLOCK}.ffn.0", "mlp", "mlp_in"),
    Linear(f"{_BLOCK}.ffn.2", "mlp", "mlp_out", gelu=0),
)

_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_IMAGE = {"k_img": "add_k_proj", "v_img": "add_v_proj"}


def _attention(name: str, projections: Mapping[str, str]) -> tuple[Entry, ...]:
    theirs, ours = f"blocks.{{i}}.block.{name}", f"{_BLOCK}.{name}"
    return (
        *(Entry(f"{theirs}.{x}.*", (f"{ours}.{y}.*",)) for x, y in projections.items()),
        Entry(f"{theirs}.norm_q.weight", (f"{ours}.norm_q.weight",)),
        Entry(f"{theirs}.norm_k.weight", (f"{ours}.norm_k.weight",)),
    )


_ORIGINAL = (
    *(
        Entry(f"{name}.*", (f"{name}.*",))
        for name in (
            "patch_embedding",
            "text_embedding.0",
            "text_embedding.2",
            "time_embedding.0",
            "time_embedding.2",
            "time_projection.1",
            "head.head",
            *(f"img_emb.proj.{i}" for i in (0, 1, 3, 4)),
        )
    ),
    Entry("head.modulation", ("head.modulation",)),
    *_attention("self_attn", _PROJECTIONS),
    *_attention("cross_attn", _PROJECTIONS | _IMAGE),
    Entry(
        "blocks.{i}.block.cross_attn.norm_k_img.weight",
        (f"{_BLOCK}.cross_attn.norm_added_k.weight",),
    ),
    Entry("blocks.{i}.block.norm3.*", (f"{_BLOCK}.norm3.*",)),
    Entry("blocks.{i}.block.ffn.0.*", (f"{_BLOCK}.ffn.0.*",)),
    Entry("blocks.{i}.block.ffn.2.*", (f"{_BLOCK}.ffn.2.*",)),
    Entry("blocks.{i}.block.modulation", (f"{_BLOCK}.modulation",)),
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The WanAnimate2Transformer3DModel config that the shapes imply."""
    hidden, channels, *patch = infos["patch_embedding.weight"].shape
    return {
        "_class_name": "WanAnimate2Transformer3DModel",
        "patch_size": patch,
        "in_dim": channels,
        "dim": hidden,
        "ffn_dim": infos["blocks.0.ffn.0.weight"].shape[0],
        "freq_dim": infos["time_embedding.0.weight"].shape[1],
        "text_dim": infos["text_embedding.0.weight"].shape[1],
        "out_dim": infos["head.head.weight"].shape[0] // prod(patch),
        "num_heads": hidden // _HEAD,
        "num_layers": depth(infos, "blocks"),
        "use_img_emb": "img_emb.proj.1.weight" in infos,
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


FAMILY = Family(
    name="wan_animate2",
    title="Wan-Animate-2",
    task="video-to-video",
    aliases={"wan2.2-animate-2-14b": "Wan-AI/Wan2.2-Animate-2-14B-Diffusers"},
    licenses={"wan2.2-animate-2-14b": "apache-2.0"},
    classes=("WanAnimate2Transformer3DModel",),
    signature=(
        "patch_embedding.weight",
        "time_projection.1.weight",
        "head.modulation",
        "blocks.0.modulation",
        "blocks.0.self_attn.to_q.weight",
        "blocks.0.cross_attn.to_k.weight",
        "blocks.0.ffn.0.weight",
    ),
    hidden="patch_embedding.weight",
    optional=(
        "img_emb",
        f"{_BLOCK}.cross_attn.add_k_proj",
        f"{_BLOCK}.cross_attn.add_v_proj",
        f"{_BLOCK}.cross_attn.norm_added_k",
    ),
    blocks=("blocks",),
    linears=_LINEARS,
    dialects={"diffusers": (), "original": _ORIGINAL, "lightx2v": _ORIGINAL},
    config_of=_config_of,
    assumed=("num_heads",),
    facts=_facts,
    # The ComfyUI that was read (February 2026) and vLLM-Omni have no code for it.
    unrun=("comfyui", "vllm"),
    video=True,
    sensitive=(f"{_BLOCK}.self_attn.to_out.0", f"{_BLOCK}.cross_attn.to_out.0"),
    # As in Wan: only what self attention averages, the keys and values of the cache among it.
    folds=(Fold((f"{_BLOCK}.self_attn.to_out.0",), values=(f"{_BLOCK}.self_attn.to_v",)),),
    # diffusers runs it in modular blocks alone, so it has no pipeline class here.
    encoders={"text_encoder": "umt5", "image_encoder": "clip_vision"},
)
