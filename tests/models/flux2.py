"""FLUX.2: what the tests know of it; see README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def config(**changes: Any) -> dict[str, Any]:
    """The config of FLUX.2-dev, with changes."""
    return {
        "_class_name": "Flux2Transformer2DModel",
        "patch_size": 1,
        "in_channels": 128,
        "out_channels": None,
        "num_layers": 8,
        "num_single_layers": 48,
        "attention_head_dim": 128,
        "num_attention_heads": 48,
        "joint_attention_dim": 15360,
        "timestep_guidance_channels": 256,
        "mlp_ratio": 3.0,
        "axes_dims_rope": (32, 32, 32, 32),
        "rope_theta": 2000,
        "eps": 1e-6,
        "guidance_embeds": True,
    } | changes


def run(model: Any, noise: Callable[..., Tensor]) -> Any:
    guided = model.config.guidance_embeds
    return model(
        hidden_states=noise(1, 6, model.config.in_channels),
        encoder_hidden_states=noise(1, 5, model.config.joint_attention_dim),
        timestep=noise(1).abs(),
        guidance=noise(1).abs() if guided else None,
        img_ids=torch.arange(24.0).reshape(6, 4),
        txt_ids=torch.zeros(5, 4),
        return_dict=False,
    )


TINY = {"num_layers": 2, "num_single_layers": 3, "joint_attention_dim": 384}
KLEIN = {"guidance_embeds": False}
KLEIN_4B = KLEIN | {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
}
KLEIN_9B = KLEIN | {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}

CONFIGS = (
    config(**TINY, num_attention_heads=2),
    config(**TINY, **KLEIN, num_attention_heads=1, in_channels=64, mlp_ratio=4.0),
)
REAL = {
    "flux2-dev": config(),
    "flux2-klein-4b": config(**KLEIN_4B),
    "flux2-klein-9b": config(**KLEIN_9B),
}
INPUTS = {"Flux2Transformer2DModel": run}
CONVERTER = "convert_flux2_transformer_checkpoint_to_diffusers"
