"""HunyuanVideo 1.5, text and image to video.

Names: diffusers/models/transformers/transformer_hunyuan_video15.py; tencent: Tencent-Hunyuan/
HunyuanVideo-1.5 hyvideo/models/transformers, which LightX2V shares; original: what ComfyUI reads,
Tencent's with q, k and v in one linear as HunyuanVideo had them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.families import hunyuan_video
from dqconvert.converter.families.hunyuan_video import BLOCK, IMAGE, REFINER, TEXT
from dqconvert.converter.family import Entry, Family, Infos

_TIMESTEP = "time_embed.timestep_embedder"


def _projections(stream: str, names: tuple[str, ...]) -> tuple[Entry, ...]:
    """q, k and v of one of the two streams, as Tencent has them."""
    return tuple(
        Entry(f"double_blocks.{{i}}.{stream}_attn_{letter}.*", (f"{BLOCK}.attn.{name}.*",))
        for letter, name in zip("qkv", names, strict=True)
    )


_EMBEDDERS = (
    *hunyuan_video.mlp("time_in", _TIMESTEP),
    *hunyuan_video.mlp("time_r_in", f"{_TIMESTEP}_r"),
    Entry("byt5_in.layernorm.*", ("context_embedder_2.norm.*",)),
    *(Entry(f"byt5_in.fc{i}.*", (f"context_embedder_2.linear_{i}.*",)) for i in (1, 2, 3)),
    Entry("vision_in.proj.0.*", ("image_embedder.norm_in.*",)),
    Entry("vision_in.proj.1.*", ("image_embedder.linear_1.*",)),
    Entry("vision_in.proj.3.*", ("image_embedder.linear_2.*",)),
    Entry("vision_in.proj.4.*", ("image_embedder.norm_out.*",)),
    Entry("cond_type_embedding.weight", ("cond_type_embed.weight",)),
)
_TENCENT = (
    *hunyuan_video.SHARED,
    *_projections("img", IMAGE),
    *_projections("txt", TEXT),
    *_EMBEDDERS,
)
_COMFYUI = (*hunyuan_video.SHARED, *hunyuan_video.FUSED, *_EMBEDDERS)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The HunyuanVideo15Transformer3DModel config that the shapes imply.

    Neither the size of pictures it was trained for nor its task shows; text to video models of
    480p, the first, say 640 and i2v.
    """
    return hunyuan_video.shared_config(infos) | {
        "_class_name": "HunyuanVideo15Transformer3DModel",
        "text_embed_2_dim": infos["context_embedder_2.linear_1.weight"].shape[1],
        "image_embed_dim": infos["image_embedder.linear_1.weight"].shape[1],
        "target_size": 640,
        "task_type": "i2v",
        "use_meanflow": f"{_TIMESTEP}_r.linear_1.weight" in infos,
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _variant(infos: Infos, config: Mapping[str, Any]) -> str:
    """Told by config.json alone."""
    return str(config.get("task_type", "t2v"))


_HUB = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-"
_ALIASES = {
    "hunyuanvideo1.5-480p-t2v": f"{_HUB}480p_t2v",
    "hunyuanvideo1.5-720p-t2v": f"{_HUB}720p_t2v",
    "hunyuanvideo1.5-480p-i2v": f"{_HUB}480p_i2v",
    "hunyuanvideo1.5-720p-i2v": f"{_HUB}720p_i2v",
}

FAMILY = Family(
    name="hunyuan_video15",
    title="HunyuanVideo 1.5",
    task="text-to-video",
    aliases=_ALIASES,
    licenses=dict.fromkeys(_ALIASES, "tencent-hunyuan-community"),
    architecture="hyvid",
    classes=("HunyuanVideo15Transformer3DModel",),
    signature=(
        "x_embedder.proj.weight",
        "context_embedder.proj_in.weight",
        "context_embedder_2.linear_3.weight",
        "image_embedder.linear_1.weight",
        "cond_type_embed.weight",
        f"{REFINER}.0.norm_out.linear.weight",
        "transformer_blocks.0.attn.to_q.weight",
    ),
    hidden="x_embedder.proj.weight",
    optional=(f"{_TIMESTEP}_r",),
    blocks=("transformer_blocks", REFINER),
    linears=hunyuan_video.LINEARS,
    prefixes=("model.diffusion_model.", "model.model."),
    dialects={
        "diffusers": (),
        "original": _COMFYUI,
        "tencent": _TENCENT,
        "lightx2v": _TENCENT,
    },
    sources=("original", "tencent", "diffusers"),
    config_of=_config_of,
    assumed=("target_size", "task_type"),
    facts=_facts,
    # SGLang has code for the first HunyuanVideo alone (2026).
    unrun=("sglang",),
    video=True,
    sensitive=(f"{BLOCK}.attn.to_out.0", f"{BLOCK}.attn.to_add_out"),
    folds=hunyuan_video.FOLDS,
    unguided=("distilled",),
    variant=_variant,
    pipelines={
        "t2v": "HunyuanVideo15Pipeline",
        "i2v": "HunyuanVideo15ImageToVideoPipeline",
    },
    fields=("prompt", "negative_prompt", "image"),
    encoders={"text_encoder": "qwen25_vl", "text_encoder_2": "t5"},
)
