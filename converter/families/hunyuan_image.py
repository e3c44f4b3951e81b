"""HunyuanImage 2.1 (also distilled), of any width and depth: FLUX.1's blocks behind a refiner.

Names: diffusers/models/transformers/transformer_hunyuanimage.py; original: what ComfyUI reads, as
HunyuanVideo's (comfy/ldm/hunyuan_video/model.py), with q, k and v stacked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.families import flux, hunyuan_video
from dqconvert.converter.family import Entry, Family, Infos, depth

_DOUBLE, _SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
_REFINERS = "context_embedder.token_refiner.refiner_blocks"
_REFINER = f"{_REFINERS}.{{i}}"
_TIME, _GLYPHS = "time_guidance_embed", "context_embedder_2"
_EMBEDDERS = ("timestep_embedder", "timestep_embedder_r", "guidance_embedder")
_NAMES = (
    *(
        f"{name}.*"
        for name in (
            "x_embedder.proj",
            "context_embedder.proj_in",
            *(
                f"{embedder}.linear_{number}"
                for embedder in (
                    *(
                        f"context_embedder.time_text_embed.{x}_embedder"
                        for x in ("timestep", "text")
                    ),
                    *(f"{_TIME}.{name}" for name in _EMBEDDERS),
                )
                for number in (1, 2)
            ),
            *(f"{_GLYPHS}.{name}" for name in ("norm", "linear_1", "linear_2", "linear_3")),
            *(f"{_REFINER}.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
            *(f"{_REFINER}.{name}" for name in ("norm1", "norm2", "norm_out.linear")),
            *(f"{_REFINER}.ff.net.{name}" for name in ("0.proj", "2")),
            *(linear.name for linear in flux.LINEARS),
            "norm_out.linear",
            "proj_out",
        )
    ),
    *(f"{_DOUBLE}.attn.norm_{name}.weight" for name in ("q", "k", "added_q", "added_k")),
    *(f"{_SINGLE}.attn.norm_{name}.weight" for name in "qk"),
)

_POOLED = "time_text_embed.text_embedder.linear_1.weight"
_ORIGINAL = (
    *hunyuan_video.SHARED,
    *hunyuan_video.FUSED,
    *hunyuan_video.SINGLE,
    *hunyuan_video.mlp("time_in", f"{_TIME}.timestep_embedder"),
    *hunyuan_video.mlp("time_r_in", f"{_TIME}.timestep_embedder_r"),
    *hunyuan_video.mlp("guidance_in", f"{_TIME}.guidance_embedder"),
    Entry("byt5_in.layernorm.*", (f"{_GLYPHS}.norm.*",)),
    *(Entry(f"byt5_in.fc{i}.*", (f"{_GLYPHS}.linear_{i}.*",)) for i in (1, 2, 3)),
    # HunyuanVideo is read as far, so that it is not taken for HunyuanImage.
    Entry("vector_in.in_layer.weight", (_POOLED,)),
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The HunyuanImageTransformer2DModel config that the shapes imply."""
    hidden, channels, *patch = infos["x_embedder.proj.weight"].shape
    head = infos["transformer_blocks.0.attn.norm_q.weight"].shape[0]
    glyphs = infos.get(f"{_GLYPHS}.linear_1.weight")
    return {
        "_class_name": "HunyuanImageTransformer2DModel",
        "in_channels": channels,
        "out_channels": infos["proj_out.weight"].shape[0] // (patch[0] * patch[-1]),
        "num_attention_heads": hidden // head,
        "attention_head_dim": head,
        "num_layers": depth(infos, "transformer_blocks"),
        "num_single_layers": depth(infos, "single_transformer_blocks"),
        "num_refiner_layers": depth(infos, _REFINERS),
        "mlp_ratio": infos["transformer_blocks.0.ff.net.0.proj.weight"].shape[0] / hidden,
        "patch_size": list(patch),
        "guidance_embeds": f"{_TIME}.guidance_embedder.linear_1.weight" in infos,
        "text_embed_dim": infos["context_embedder.proj_in.weight"].shape[1],
        "text_embed_2_dim": glyphs.shape[1] if glyphs else None,
        "rope_theta": 256.0,
        "rope_axes_dim": [head // len(patch)] * len(patch),
        "use_meanflow": f"{_TIME}.timestep_embedder_r.linear_1.weight" in infos,
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


_HUB = "hunyuanvideo-community/HunyuanImage-2.1"
_ALIASES = {
    "hunyuanimage-2.1": f"{_HUB}-Diffusers",
    "hunyuanimage-2.1-distilled": f"{_HUB}-Distilled-Diffusers",
}

FAMILY = Family(
    name="hunyuan_image",
    title="HunyuanImage 2.1",
    aliases=_ALIASES,
    licenses=dict.fromkeys(_ALIASES, "tencent-hunyuan-community"),
    classes=("HunyuanImageTransformer2DModel",),
    signature=(
        "x_embedder.proj.weight",
        "context_embedder.proj_in.weight",
        f"{_TIME}.timestep_embedder.linear_1.weight",
        f"{_REFINERS}.0.attn.to_q.weight",
        "transformer_blocks.0.norm1_context.linear.weight",
        "single_transformer_blocks.0.proj_mlp.weight",
    ),
    hidden="x_embedder.proj.weight",
    foreign=(_POOLED,),
    optional=(f"{_TIME}.timestep_embedder_r", f"{_TIME}.guidance_embedder", _GLYPHS, _POOLED),
    blocks=("transformer_blocks", "single_transformer_blocks", _REFINERS),
    linears=flux.LINEARS,
    dialects={
        "diffusers": tuple(Entry(name, (name,)) for name in _NAMES),
        "original": _ORIGINAL,
    },
    sources=("diffusers", "original"),
    config_of=_config_of,
    assumed=("rope_theta", "rope_axes_dim"),
    facts=_facts,
    # Both have code for HunyuanImage 3 alone (2026).
    unrun=("sglang", "vllm"),
    policies=flux.BITSANDBYTES,
    outside=(flux.PROJ_OUT,),
    sensitive=flux.FAMILY.sensitive,
    folds=flux.FOLDS,
    pipelines={"": "HunyuanImagePipeline"},
    encoders={"text_encoder": "qwen25_vl", "text_encoder_2": "t5"},
)
