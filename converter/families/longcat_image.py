"""LongCat-Image (also Edit), of any width and depth: FLUX.1's blocks, without a pooled embedding.

Names: diffusers/models/transformers/transformer_longcat_image.py, which LightX2V shares; original:
those of FLUX.1, by which ComfyUI knows it (LongCatImage in comfy/supported_models.py), with the
scales of norms as weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.families import flux
from dqconvert.converter.family import Entry, Family, Infos, Linear, depth

_DOUBLE, _SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
_TIME = "time_embed.timestep_embedder"
_AROUND = (
    *(
        Linear(name, "embedder")
        for name in ("x_embedder", "context_embedder", f"{_TIME}.linear_1", f"{_TIME}.linear_2")
    ),
    Linear("norm_out.linear", "final", splits=2),
    Linear("proj_out", "final"),
)
_NORMS = (
    *(f"{_DOUBLE}.attn.{name}" for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")),
    *(f"{_SINGLE}.attn.{name}" for name in ("norm_q", "norm_k")),
)
_NAMES = (
    *(f"{linear.name}.*" for linear in (*_AROUND, *flux.LINEARS)),
    *(f"{name}.weight" for name in _NORMS),
)

_POOLED = "time_text_embed.text_embedder.linear_1.weight"
_ORIGINAL = (
    Entry("time_in.in_layer.*", (f"{_TIME}.linear_1.*",)),
    Entry("time_in.out_layer.*", (f"{_TIME}.linear_2.*",)),
    *(one for one in flux.SAVED if not one.ours[0].startswith("time_text_embed.")),
    # FLUX.1 is read as far, so that it is not taken for LongCat-Image.
    Entry("vector_in.in_layer.weight", (_POOLED,)),
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The LongCatImageTransformer2DModel config that the shapes imply."""
    hidden, channels = infos["x_embedder.weight"].shape
    head = infos["single_transformer_blocks.0.attn.norm_q.weight"].shape[0]
    context = infos["context_embedder.weight"].shape[1]
    return {
        "_class_name": "LongCatImageTransformer2DModel",
        "patch_size": 1,
        "in_channels": channels,
        "num_layers": depth(infos, "transformer_blocks"),
        "num_single_layers": depth(infos, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": context,
        "pooled_projection_dim": context,  # of which the model makes nothing
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


FAMILY = Family(
    name="longcat_image",
    title="LongCat-Image",
    aliases={
        "longcat-image": "meituan-longcat/LongCat-Image",
        "longcat-image-edit": "meituan-longcat/LongCat-Image-Edit",
    },
    licenses=dict.fromkeys(("longcat-image", "longcat-image-edit"), "apache-2.0"),
    classes=("LongCatImageTransformer2DModel",),
    signature=(
        "x_embedder.weight",
        "context_embedder.weight",
        f"{_TIME}.linear_1.weight",
        "transformer_blocks.0.norm1_context.linear.weight",
        "single_transformer_blocks.0.norm.linear.weight",
        "single_transformer_blocks.0.proj_mlp.weight",
    ),
    foreign=(_POOLED,),
    hidden="x_embedder.weight",
    optional=(_POOLED,),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    linears=(*flux.LINEARS, *_AROUND),
    dialects={
        "diffusers": tuple(Entry(name, (name,)) for name in _NAMES),
        "original": _ORIGINAL,
        "lightx2v": (),
    },
    sources=("diffusers", "original"),
    assumed=("pooled_projection_dim",),
    config_of=_config_of,
    facts=_facts,
    unrun=("sglang", "vllm"),  # both build its linears unquantized, whatever the config says
    policies={
        # LightX2V builds every linear with the one scheme, those around the blocks as well.
        "lightx2v": {"embedder": "weight", "final": "weight"},
        **flux.BITSANDBYTES,
    },
    sensitive=flux.FAMILY.sensitive,
    folds=flux.FOLDS,
    pipelines={"": "LongCatImagePipeline", "edit": "LongCatImageEditPipeline"},
    fields=("prompt", "negative_prompt", "image"),
    encoders={"text_encoder": "qwen25_vl"},
)
