"""LTX-Video, of any width and depth.

Names: diffusers/models/transformers/transformer_ltx.py; original: Lightricks/LTX-Video
ltx_video/models/transformers, which ComfyUI shares (comfy/ldm/lightricks/model.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dqconvert.converter.family import Entry, Family, Fold, Infos, Linear, depth

BLOCK = "transformer_blocks.{i}"
HEADS = 32
"""Attention heads of every LTX; norms over all heads at once do not tell."""

AUDIO = "audio_proj_in.weight"
"""A tensor that tells LTX-2, which has all of LTX-Video's names."""


def cross(name: str, query: str, keys: str) -> tuple[Linear, ...]:
    """The linears of an attention to other tokens: the labels of its two inputs."""
    block = f"{BLOCK}.{name}"
    return (
        Linear(f"{block}.to_q", "attention", query),
        Linear(f"{block}.to_k", "attention", keys),
        Linear(f"{block}.to_v", "attention", keys, f"{block}.to_k"),
        Linear(f"{block}.to_out.0", "attention", f"{name}_out"),
    )


def itself(name: str) -> tuple[Linear, ...]:
    """The linears of an attention of tokens to one another."""
    block = f"{BLOCK}.{name}"
    return (
        *(
            Linear(f"{block}.{one}", "attention", f"{name}_qkv", f"{block}.to_q")
            for one in ("to_q", "to_k", "to_v")
        ),
        Linear(f"{block}.to_out.0", "attention", f"{name}_out"),
    )


def feed_forward(name: str) -> tuple[Linear, ...]:
    """The two linears of a feed-forward."""
    return (
        Linear(f"{BLOCK}.{name}.net.0.proj", "mlp", f"{name}_in"),
        Linear(f"{BLOCK}.{name}.net.2", "mlp", f"{name}_out", gelu=0),
    )


def attention_entries(name: str) -> tuple[Entry, ...]:
    """An attention in the original names, which differ in the norms alone."""
    block = f"{BLOCK}.{name}"
    return (
        *same(*(f"{block}.{one}" for one in ("to_q", "to_k", "to_v", "to_out.0"))),
        Entry(f"{block}.q_norm.weight", (f"{block}.norm_q.weight",)),
        Entry(f"{block}.k_norm.weight", (f"{block}.norm_k.weight",)),
    )


def same(*modules: str) -> tuple[Entry, ...]:
    """Modules that both call alike."""
    return tuple(Entry(f"{module}.*", (f"{module}.*",)) for module in modules)


def table(theirs: str, ours: str) -> tuple[Entry, ...]:
    """What makes shift and scale of a time."""
    modules = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
    return tuple(Entry(f"{theirs}.{one}.*", (f"{ours}.{one}.*",)) for one in modules)


ENTRIES = (
    Entry("patchify_proj.*", ("proj_in.*",)),
    *table("adaln_single", "time_embed"),
    *same("caption_projection.linear_1", "caption_projection.linear_2", "proj_out"),
    Entry("scale_shift_table", ("scale_shift_table",)),
    Entry(f"{BLOCK}.scale_shift_table", (f"{BLOCK}.scale_shift_table",)),
    *attention_entries("attn1"),
    *attention_entries("attn2"),
    *same(f"{BLOCK}.ff.net.0.proj", f"{BLOCK}.ff.net.2"),
)
"""What LTX-Video and LTX-2 have, in the original names."""


def shared_config(infos: Infos) -> dict[str, Any]:
    """What the shapes imply of the config of either."""
    hidden, channels = infos["proj_in.weight"].shape
    return {
        "in_channels": channels,
        "out_channels": infos["proj_out.weight"].shape[0],
        "num_attention_heads": HEADS,
        "attention_head_dim": hidden // HEADS,
        "cross_attention_dim": infos["transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "num_layers": depth(infos, "transformer_blocks"),
    }


def _config_of(infos: Infos) -> dict[str, Any]:
    """The LTXVideoTransformer3DModel config that the shapes imply."""
    return shared_config(infos) | {
        "_class_name": "LTXVideoTransformer3DModel",
        "caption_channels": infos["caption_projection.linear_1.weight"].shape[1],
    }


def told(transformer: Mapping[str, Any]) -> dict[str, Any]:
    """What ComfyUI reads in the header rather than in the shapes (model_detection.py there)."""
    return {"metadata": {"config": json.dumps({"transformer": transformer})}}


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    if dialect != "original":
        return {}
    names = (
        "in_channels",
        "out_channels",
        "num_attention_heads",
        "attention_head_dim",
        "cross_attention_dim",
        "caption_channels",
        "num_layers",
    )
    # The models of 13B are of 0.9.7 and later, which count the first frame once. Those of 2B may
    # be of either kind, and ComfyUI's own habit is that of the first.
    later = {"causal_temporal_positioning": True} if config["cross_attention_dim"] > 2048 else {}
    return told({name: config[name] for name in names} | later)


_ALIASES = {
    "ltx-video": "Lightricks/LTX-Video",
    "ltx-video-0.9.5": "Lightricks/LTX-Video-0.9.5",
    "ltx-video-0.9.7": "Lightricks/LTX-Video-0.9.7-dev",
    "ltx-video-0.9.7-distilled": "Lightricks/LTX-Video-0.9.7-distilled",
}

FAMILY = Family(
    name="ltx",
    title="LTX-Video",
    task="text-to-video",
    aliases=_ALIASES,
    licenses={},
    architecture="ltxv",
    classes=("LTXVideoTransformer3DModel",),
    signature=(
        "proj_in.weight",
        "time_embed.emb.timestep_embedder.linear_1.weight",
        "caption_projection.linear_1.weight",
        "transformer_blocks.0.scale_shift_table",
        "transformer_blocks.0.attn1.norm_q.weight",
        "transformer_blocks.0.attn2.norm_k.weight",
        "transformer_blocks.0.ff.net.0.proj.weight",
    ),
    foreign=(AUDIO,),
    hidden="proj_in.weight",
    optional=(AUDIO,),
    blocks=("transformer_blocks",),
    linears=(*itself("attn1"), *cross("attn2", "cross_q", "text_kv"), *feed_forward("ff")),
    dialects={
        "diffusers": (),
        # LTX-2 is read as far, so that it is not taken for LTX-Video.
        "original": (*ENTRIES, Entry("audio_patchify_proj.weight", (AUDIO,))),
    },
    config_of=_config_of,
    assumed=("num_attention_heads", "attention_head_dim"),
    facts=_facts,
    # Both have code for LTX-2 alone (2026).
    unrun=("sglang", "vllm"),
    video=True,
    sensitive=(f"{BLOCK}.attn1.to_out.0", f"{BLOCK}.attn2.to_out.0"),
    # All blocks read one time projection, so none can divide its own shift and scale.
    folds=tuple(
        Fold((f"{BLOCK}.{name}.to_out.0",), values=(f"{BLOCK}.{name}.to_v",))
        for name in ("attn1", "attn2")
    ),
    unguided=("distilled",),
    pipelines={"": "LTXPipeline"},
    encoders={"text_encoder": "t5"},
)
