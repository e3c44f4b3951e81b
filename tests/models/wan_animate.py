"""Wan Animate: what the tests know of it; see README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def config(**changes: Any) -> dict[str, Any]:
    """The config of Wan2.2-Animate-14B, with changes."""
    return {
        "_class_name": "WanAnimateTransformer3DModel",
        "patch_size": (1, 2, 2),
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "in_channels": 36,
        "latent_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 13824,
        "num_layers": 40,
        "image_dim": 1280,
        "added_kv_proj_dim": 5120,
        "pos_embed_seq_len": None,
        "motion_encoder_channel_sizes": None,
        "motion_style_dim": 512,
        "motion_dim": 20,
        "motion_encoder_dim": 512,
        "face_encoder_hidden_dim": 1024,
        "face_encoder_num_heads": 4,
        "inject_face_latents_blocks": 5,
    } | changes


def run(model: Any, noise: Callable[..., Tensor]) -> Any:
    return model(
        hidden_states=noise(1, model.config.in_channels, 3, 4, 4),
        timestep=torch.tensor([400]),
        encoder_hidden_states=noise(1, 512, model.config.text_dim),
        encoder_hidden_states_image=noise(1, 6, model.config.image_dim),
        pose_hidden_states=noise(1, model.config.latent_channels, 2, 4, 4),
        face_pixel_values=noise(1, 3, 5, 512, 512),
        return_dict=False,
    )


CONFIGS = (
    config(
        num_layers=4,
        num_attention_heads=2,
        text_dim=96,
        ffn_dim=384,
        image_dim=64,
        added_kv_proj_dim=256,
        motion_encoder_channel_sizes={str(4 << i): 4 + i for i in reversed(range(8))},
        motion_style_dim=32,
        motion_dim=6,
        motion_encoder_dim=40,
        face_encoder_hidden_dim=24,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    ),
)
REAL = {"wan2.2-animate-14b": config()}
INPUTS = {"WanAnimateTransformer3DModel": run}
CONVERTER = "convert_wan_transformer_to_diffusers"
