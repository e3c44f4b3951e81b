"""Wan 2.1 and 2.2, text and image to video, of any width and depth.

Names: diffusers/models/transformers/transformer_wan.py; original: Wan-Video wan/modules/model.py,
which ComfyUI and LightX2V share.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from dqconvert.converter.family import Entry, Family, Fold, Infos, Linear, depth

_BLOCK, _EMBEDDER = "blocks.{i}", "condition_embedder"
_HEAD = 128
"""Width of an attention head in every Wan; norms over all heads at once do not tell."""

_LINEARS = (
    *(
        Linear(f"{_BLOCK}.attn1.{name}", "attention", "qkv", f"{_BLOCK}.attn1.to_q")
        for name in ("to_q", "to_k", "to_v")
    ),
    Linear(f"{_BLOCK}.attn1.to_out.0", "attention", "attention_out"),
    Linear(f"{_BLOCK}.attn2.to_q", "attention", "cross_q"),
    *(
        Linear(f"{_BLOCK}.attn2.{name}", "attention", "text_kv", f"{_BLOCK}.attn2.to_k")
        for name in ("to_k", "to_v")
    ),
    *(
        Linear(f"{_BLOCK}.attn2.{name}", "attention", "image_kv", f"{_BLOCK}.attn2.add_k_proj")
        for name in ("add_k_proj", "add_v_proj")
    ),
    Linear(f"{_BLOCK}.attn2.to_out.0", "attention", "cross_out"),
    Linear(f"{_BLOCK}.ffn.net.0.proj", "mlp", "mlp_in"),
    Linear(f"{_BLOCK}.ffn.net.2", "mlp", "mlp_out", gelu=0),
)


def _attention(theirs: str, ours: str) -> tuple[Entry, ...]:
    theirs, ours = f"{_BLOCK}.{theirs}", f"{_BLOCK}.{ours}"
    return (
        Entry(f"{theirs}.q.*", (f"{ours}.to_q.*",)),
        Entry(f"{theirs}.k.*", (f"{ours}.to_k.*",)),
        Entry(f"{theirs}.v.*", (f"{ours}.to_v.*",)),
        Entry(f"{theirs}.o.*", (f"{ours}.to_out.0.*",)),
        Entry(f"{theirs}.norm_q.weight", (f"{ours}.norm_q.weight",)),
        Entry(f"{theirs}.norm_k.weight", (f"{ours}.norm_k.weight",)),
    )


_ORIGINAL = (
    Entry("patch_embedding.*", ("patch_embedding.*",)),
    Entry("text_embedding.0.*", (f"{_EMBEDDER}.text_embedder.linear_1.*",)),
    Entry("text_embedding.2.*", (f"{_EMBEDDER}.text_embedder.linear_2.*",)),
    Entry("time_embedding.0.*", (f"{_EMBEDDER}.time_embedder.linear_1.*",)),
    Entry("time_embedding.2.*", (f"{_EMBEDDER}.time_embedder.linear_2.*",)),
    Entry("time_projection.1.*", (f"{_EMBEDDER}.time_proj.*",)),
    Entry("img_emb.emb_pos", (f"{_EMBEDDER}.image_embedder.pos_embed",)),
    Entry("img_emb.proj.0.*", (f"{_EMBEDDER}.image_embedder.norm1.*",)),
    Entry("img_emb.proj.1.*", (f"{_EMBEDDER}.image_embedder.ff.net.0.proj.*",)),
    Entry("img_emb.proj.3.*", (f"{_EMBEDDER}.image_embedder.ff.net.2.*",)),
    Entry("img_emb.proj.4.*", (f"{_EMBEDDER}.image_embedder.norm2.*",)),
    *_attention("self_attn", "attn1"),
    *_attention("cross_attn", "attn2"),
    Entry(f"{_BLOCK}.cross_attn.k_img.*", (f"{_BLOCK}.attn2.add_k_proj.*",)),
    Entry(f"{_BLOCK}.cross_attn.v_img.*", (f"{_BLOCK}.attn2.add_v_proj.*",)),
    Entry(f"{_BLOCK}.cross_attn.norm_k_img.weight", (f"{_BLOCK}.attn2.norm_added_k.weight",)),
    Entry(f"{_BLOCK}.norm3.*", (f"{_BLOCK}.norm2.*",)),
    Entry(f"{_BLOCK}.ffn.0.*", (f"{_BLOCK}.ffn.net.0.proj.*",)),
    Entry(f"{_BLOCK}.ffn.2.*", (f"{_BLOCK}.ffn.net.2.*",)),
    Entry(f"{_BLOCK}.modulation", (f"{_BLOCK}.scale_shift_table",)),
    Entry("head.head.*", ("proj_out.*",)),
    Entry("head.modulation", ("scale_shift_table",)),
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The WanTransformer3DModel config that the shapes imply."""
    hidden, channels, *patch = infos["patch_embedding.weight"].shape
    images = infos.get(f"{_EMBEDDER}.image_embedder.norm1.weight")
    places = infos.get(f"{_EMBEDDER}.image_embedder.pos_embed")
    added = infos.get("blocks.0.attn2.add_k_proj.weight")
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": patch,
        "num_attention_heads": hidden // _HEAD,
        "attention_head_dim": _HEAD,
        "in_channels": channels,
        "out_channels": infos["proj_out.weight"].shape[0] // prod(patch),
        "text_dim": infos[f"{_EMBEDDER}.text_embedder.linear_1.weight"].shape[1],
        "freq_dim": infos[f"{_EMBEDDER}.time_embedder.linear_1.weight"].shape[1],
        "ffn_dim": infos["blocks.0.ffn.net.0.proj.weight"].shape[0],
        "num_layers": depth(infos, "blocks"),
        "image_dim": images.shape[0] if images else None,
        "added_kv_proj_dim": added.shape[1] if added else None,
        "pos_embed_seq_len": places.shape[1] if places else None,
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


_ALIASES = {
    "wan2.1-t2v-1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "wan2.1-t2v-14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "wan2.1-i2v-14b-480p": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    "wan2.1-i2v-14b-720p": "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
    "wan2.1-flf2v-14b-720p": "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
    "wan2.2-t2v-a14b": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "wan2.2-i2v-a14b": "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
    "wan2.2-ti2v-5b": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
}

FAMILY = Family(
    name="wan",
    title="Wan",
    task="text-to-video",
    aliases=_ALIASES,
    licenses=dict.fromkeys(_ALIASES, "apache-2.0"),
    architecture="wan",
    signature=(
        "patch_embedding.weight",
        "condition_embedder.time_proj.weight",
        "condition_embedder.text_embedder.linear_1.weight",
        "blocks.0.scale_shift_table",
        "blocks.0.attn1.to_q.weight",
        "blocks.0.attn2.to_k.weight",
        "blocks.0.ffn.net.0.proj.weight",
    ),
    hidden="patch_embedding.weight",
    optional=(
        f"{_EMBEDDER}.image_embedder.pos_embed",
        f"{_EMBEDDER}.image_embedder",
        f"{_BLOCK}.attn2.add_k_proj",
        f"{_BLOCK}.attn2.add_v_proj",
        f"{_BLOCK}.attn2.norm_added_k",
    ),
    blocks=("blocks",),
    linears=_LINEARS,
    dialects={"diffusers": (), "original": _ORIGINAL, "lightx2v": _ORIGINAL},
    config_of=_config_of,
    assumed=("num_attention_heads", "attention_head_dim"),
    facts=_facts,
    video=True,
    sensitive=(f"{_BLOCK}.attn1.to_out.0", f"{_BLOCK}.attn2.to_out.0"),
    # All blocks read one time projection, so none can divide its own shift and scale. Cross
    # attention to an image adds to that to the text: two averages, of which one must not move.
    folds=(Fold((f"{_BLOCK}.attn1.to_out.0",), values=(f"{_BLOCK}.attn1.to_v",)),),
)
