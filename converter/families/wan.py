"""Wan 2.1 and 2.2, text and image to video, of any width and depth.

SkyReels-V2 and ChronoEdit have the same tensors, but for one that tells how a few SkyReels-V2 were
fed; config.json alone tells them apart. Names: diffusers/models/transformers/transformer_wan.py and
transformer_skyreels_v2.py; original: Wan-Video wan/modules/model.py, which ComfyUI and LightX2V
share.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from dqconvert.converter.family import Entry, Family, Fold, Infos, Linear, depth

_BLOCK, _EMBEDDER = "blocks.{i}", "condition_embedder"
VACE, ANIMATE = "vace_patch_embedding.weight", "pose_patch_embedding.weight"
"""Tensors that tell the models that are built upon Wan."""

_HEAD = 128
"""Width of an attention head in every Wan; norms over all heads at once do not tell."""


def block_linears(blocks: str) -> tuple[Linear, ...]:
    """The linears of a list of blocks, text attention and feed-forward as Wan has them."""
    block = f"{blocks}.{{i}}"
    return (
        *(
            Linear(f"{block}.attn1.{name}", "attention", "qkv", f"{block}.attn1.to_q")
            for name in ("to_q", "to_k", "to_v")
        ),
        Linear(f"{block}.attn1.to_out.0", "attention", "attention_out"),
        Linear(f"{block}.attn2.to_q", "attention", "cross_q"),
        *(
            Linear(f"{block}.attn2.{name}", "attention", "text_kv", f"{block}.attn2.to_k")
            for name in ("to_k", "to_v")
        ),
        *(
            Linear(f"{block}.attn2.{name}", "attention", "image_kv", f"{block}.attn2.add_k_proj")
            for name in ("add_k_proj", "add_v_proj")
        ),
        Linear(f"{block}.attn2.to_out.0", "attention", "cross_out"),
        Linear(f"{block}.ffn.net.0.proj", "mlp", "mlp_in"),
        Linear(f"{block}.ffn.net.2", "mlp", "mlp_out", gelu=0),
    )


def _attention(theirs: str, ours: str) -> tuple[Entry, ...]:
    return (
        Entry(f"{theirs}.q.*", (f"{ours}.to_q.*",)),
        Entry(f"{theirs}.k.*", (f"{ours}.to_k.*",)),
        Entry(f"{theirs}.v.*", (f"{ours}.to_v.*",)),
        Entry(f"{theirs}.o.*", (f"{ours}.to_out.0.*",)),
        Entry(f"{theirs}.norm_q.weight", (f"{ours}.norm_q.weight",)),
        Entry(f"{theirs}.norm_k.weight", (f"{ours}.norm_k.weight",)),
    )


def block_entries(blocks: str) -> tuple[Entry, ...]:
    """A list of blocks in the original names, which has the same name there."""
    block = f"{blocks}.{{i}}"
    return (
        *_attention(f"{block}.self_attn", f"{block}.attn1"),
        *_attention(f"{block}.cross_attn", f"{block}.attn2"),
        Entry(f"{block}.cross_attn.k_img.*", (f"{block}.attn2.add_k_proj.*",)),
        Entry(f"{block}.cross_attn.v_img.*", (f"{block}.attn2.add_v_proj.*",)),
        Entry(f"{block}.cross_attn.norm_k_img.weight", (f"{block}.attn2.norm_added_k.weight",)),
        Entry(f"{block}.norm3.*", (f"{block}.norm2.*",)),
        Entry(f"{block}.ffn.0.*", (f"{block}.ffn.net.0.proj.*",)),
        Entry(f"{block}.ffn.2.*", (f"{block}.ffn.net.2.*",)),
        Entry(f"{block}.modulation", (f"{block}.scale_shift_table",)),
    )


ENTRIES = (
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
    *block_entries("blocks"),
    Entry("head.head.*", ("proj_out.*",)),
    Entry("head.modulation", ("scale_shift_table",)),
)
"""What every Wan has, in the original names."""

_ORIGINAL = (
    *ENTRIES,
    Entry("fps_embedding.weight", ("fps_embedding.weight",)),
    Entry("fps_projection.0.*", ("fps_projection.net.0.proj.*",)),
    Entry("fps_projection.2.*", ("fps_projection.net.2.*",)),
    # What only VACE and Animate have is read, so that they are not taken for less than they are.
    Entry("vace_patch_embedding.weight", (VACE,)),
    Entry("pose_patch_embedding.weight", (ANIMATE,)),
)


def shared_config(infos: Infos) -> dict[str, Any]:
    """The WanTransformer3DModel config that the shapes of what every Wan has imply."""
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


def _config_of(infos: Infos) -> dict[str, Any]:
    """The config of WanTransformer3DModel, or of the SkyReels-V2 that is told the frame rate."""
    found = shared_config(infos)
    if "fps_embedding.weight" not in infos:
        return found
    return found | {"_class_name": "SkyReelsV2Transformer3DModel", "inject_sample_info": True}


def _variant(infos: Infos, config: Mapping[str, Any]) -> str:
    """What it makes videos of. Text to video has the same tensors in Wan 2.1 and both experts."""
    kind = _CLASSES.get(config.get("_class_name", ""))
    if kind or "fps_embedding.weight" in infos:
        return kind or "skyreels-v2"
    channels = infos["patch_embedding.weight"].shape[1]
    made = infos["proj_out.weight"].shape[0] // prod(infos["patch_embedding.weight"].shape[2:])
    if f"{_EMBEDDER}.image_embedder.pos_embed" in infos:
        return "flf2v"
    if channels > made:
        return "i2v"
    return "ti2v" if channels == _TI2V_CHANNELS else "t2v"


_CLASSES = {
    "SkyReelsV2Transformer3DModel": "skyreels-v2",
    "ChronoEditTransformer3DModel": "chronoedit",
}
_TI2V_CHANNELS = 48
"""Latent channels of Wan 2.2's own VAE, which the model for text and image is made for."""


IMAGE_MODULES = (
    f"{_EMBEDDER}.image_embedder.pos_embed",
    f"{_EMBEDDER}.image_embedder",
    f"{_BLOCK}.attn2.add_k_proj",
    f"{_BLOCK}.attn2.add_v_proj",
    f"{_BLOCK}.attn2.norm_added_k",
)
"""Modules that only models that see an image have."""


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
    "skyreels-v2-df-1.3b-540p": "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers",
}

FAMILY = Family(
    name="wan",
    title="Wan",
    task="text-to-video",
    aliases=_ALIASES,
    licenses={name: "apache-2.0" for name in _ALIASES if name.startswith("wan")},
    architecture="wan",
    classes=("WanTransformer3DModel", *_CLASSES),
    signature=(
        "patch_embedding.weight",
        "condition_embedder.time_proj.weight",
        "condition_embedder.text_embedder.linear_1.weight",
        "blocks.0.scale_shift_table",
        "blocks.0.attn1.to_q.weight",
        "blocks.0.attn2.to_k.weight",
        "blocks.0.ffn.net.0.proj.weight",
    ),
    foreign=(VACE, ANIMATE),
    hidden="patch_embedding.weight",
    optional=(*IMAGE_MODULES, "fps_", VACE, ANIMATE),
    blocks=("blocks",),
    linears=block_linears("blocks"),
    dialects={"diffusers": (), "original": _ORIGINAL, "lightx2v": _ORIGINAL},
    config_of=_config_of,
    assumed=("num_attention_heads", "attention_head_dim"),
    facts=_facts,
    video=True,
    sensitive=(f"{_BLOCK}.attn1.to_out.0", f"{_BLOCK}.attn2.to_out.0"),
    # All blocks read one time projection, so none can divide its own shift and scale. Cross
    # attention to an image adds to that to the text: two averages, of which one must not move.
    folds=(Fold((f"{_BLOCK}.attn1.to_out.0",), values=(f"{_BLOCK}.attn1.to_v",)),),
    variant=_variant,
    pipelines={
        "t2v": "WanPipeline",
        "ti2v": "WanPipeline",
        "i2v": "WanImageToVideoPipeline",
        "flf2v": "WanImageToVideoPipeline",
        "skyreels-v2": "SkyReelsV2DiffusionForcingPipeline",
        "chronoedit": "ChronoEditPipeline",
    },
    fields=("prompt", "negative_prompt", "image"),
    encoders={"text_encoder": "umt5", "image_encoder": "clip_vision"},
)
