"""FLUX.3: what the tests know of it; see README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def config(**changes: Any) -> dict[str, Any]:
    """The config of FLUX.3 image klein base, with changes."""
    return {
        "_class_name": "Flux3Transformer2DModel",
        "in_channels": 128,
        "cond_in_channels": 128,
        "num_layers": 5,
        "num_single_layers": 28,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 20480,
        "timestep_channels": 256,
        "mlp_ratio": 3.0,
        "axes_dims_rope": (32, 32, 32, 32),
        "rope_theta": 10000,
        "eps": 1e-6,
        "flow_map": False,
    } | changes


def run(model: Any, noise: Callable[..., Tensor]) -> Any:
    return model(
        hidden_states=noise(1, 6, model.config.in_channels),
        encoder_hidden_states=noise(1, 5, model.config.joint_attention_dim),
        image_cond_hidden_states=noise(1, 4, model.config.cond_in_channels),
        timestep=noise(1).abs(),
        target_timestep=noise(1).abs() if model.config.flow_map else None,
        img_ids=torch.arange(24.0).reshape(6, 4),
        txt_ids=torch.zeros(5, 4),
        image_cond_ids=torch.ones(4, 4),
        return_dict=False,
    )


TINY = {"num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 512}

CONFIGS = (
    config(**TINY, num_attention_heads=2),
    config(**TINY, num_attention_heads=1, cond_in_channels=64, flow_map=True),
)
REAL = {"flux3-image-klein": config(flow_map=True), "flux3-image-klein-base": config()}
INPUTS = {"Flux3Transformer2DModel": run}


def unprefixed(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """The converter reads names without a prefix alone."""
    return {key.removeprefix("model.diffusion_model."): t for key, t in checkpoint.items()}


CONVERTER = "convert_flux3_transformer_checkpoint_to_diffusers"
PREPARE = unprefixed
