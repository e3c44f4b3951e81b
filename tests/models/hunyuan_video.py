"""HunyuanVideo and FramePack: what the tests know of them; see README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def config(**changes: Any) -> dict[str, Any]:
    """The config of HunyuanVideo, with changes."""
    return {
        "_class_name": "HunyuanVideoTransformer3DModel",
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "num_layers": 20,
        "num_single_layers": 40,
        "num_refiner_layers": 2,
        "mlp_ratio": 4.0,
        "patch_size": 2,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": 4096,
        "pooled_projection_dim": 768,
        "image_condition_type": None,
    } | changes


def framepack(**changes: Any) -> dict[str, Any]:
    """The config of FramePack, with changes."""
    found = config(
        _class_name="HunyuanVideoFramepackTransformer3DModel",
        has_image_proj=True,
        image_proj_dim=1152,
        has_clean_x_embedder=True,
    )
    return found | changes


def run(model: Any, noise: Callable[..., Tensor]) -> Any:
    known = model.config
    guidance = {"guidance": torch.tensor([6000.0]).to(model.dtype)}
    return model(
        hidden_states=noise(1, known.in_channels, 2, 4, 4),
        timestep=torch.tensor([400]),
        encoder_hidden_states=noise(1, 5, known.text_embed_dim),
        encoder_attention_mask=torch.ones(1, 5, dtype=torch.bool),
        pooled_projections=noise(1, known.pooled_projection_dim),
        return_dict=False,
        **(guidance if known.guidance_embeds else {}),
    )


def run_framepack(model: Any, noise: Callable[..., Tensor]) -> Any:
    known = model.config
    return model(
        hidden_states=noise(1, known.in_channels, 2, 8, 8),
        timestep=torch.tensor([400]),
        encoder_hidden_states=noise(1, 5, known.text_embed_dim),
        encoder_attention_mask=torch.ones(1, 5, dtype=torch.bool),
        pooled_projections=noise(1, known.pooled_projection_dim),
        image_embeds=noise(1, 3, known.image_proj_dim),
        indices_latents=torch.arange(2),
        guidance=torch.tensor([6000.0]).to(model.dtype),
        latents_clean=noise(1, known.in_channels, 1, 8, 8),
        indices_latents_clean=torch.arange(1),
        latents_history_2x=noise(1, known.in_channels, 2, 8, 8),
        indices_latents_history_2x=torch.arange(2),
        latents_history_4x=noise(1, known.in_channels, 4, 8, 8),
        indices_latents_history_4x=torch.arange(4),
        return_dict=False,
    )


TINY = {
    "num_layers": 2,
    "num_single_layers": 2,
    "text_embed_dim": 96,
    "pooled_projection_dim": 48,
}
I2V = {"in_channels": 33, "guidance_embeds": False, "image_condition_type": "latent_concat"}

CONFIGS = (
    config(**TINY, num_attention_heads=2),
    config(**TINY, **I2V, num_attention_heads=2, mlp_ratio=3.0),
    framepack(**TINY, num_attention_heads=2, image_proj_dim=40),
)
REAL = {
    "hunyuanvideo": config(),
    "hunyuanvideo-i2v": config(**I2V),
    "framepack-i2v": framepack(),
}
INPUTS = {
    "HunyuanVideoTransformer3DModel": run,
    "HunyuanVideoFramepackTransformer3DModel": run_framepack,
}
CONVERTER = "convert_hunyuan_video_transformer_to_diffusers"
# It knows one width only and nothing of prefixes or FramePack.
WIDE = (config(**TINY | {"num_layers": 1}), config(**TINY | {"num_layers": 1}, **I2V))
