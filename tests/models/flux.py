"""FLUX.1: what the tests know of it; see README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def config(**changes: Any) -> dict[str, Any]:
    """The config of FLUX.1-dev, with changes."""
    return {
        "_class_name": "FluxTransformer2DModel",
        "in_channels": 64,
        "out_channels": None,
        "patch_size": 1,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    } | changes


def run(model: Any, noise: Callable[..., Tensor]) -> Any:
    return model(
        hidden_states=noise(1, 6, model.config.in_channels),
        encoder_hidden_states=noise(1, 5, model.config.joint_attention_dim),
        pooled_projections=noise(1, model.config.pooled_projection_dim),
        timestep=noise(1).abs(),
        guidance=noise(1).abs() if model.config.guidance_embeds else None,
        img_ids=torch.arange(18.0).reshape(6, 3),
        txt_ids=torch.zeros(5, 3),
        return_dict=False,
    )


SMALL = {"num_layers": 2, "num_single_layers": 3, "num_attention_heads": 2}
NARROW = {"attention_head_dim": 64, "axes_dims_rope": (8, 28, 28)}
SCHNELL = {"guidance_embeds": False}
FILL = {"in_channels": 384, "out_channels": 64}
CONTROL = {"in_channels": 128, "out_channels": 64}

CONFIGS = (
    config(**SMALL),
    config(**SMALL, **SCHNELL),
    config(**SMALL | {"num_attention_heads": 4, "num_layers": 1}),
    config(**SMALL, **NARROW, **SCHNELL),
    config(**SMALL, **FILL),
    config(**SMALL, **CONTROL),
)
REAL = {
    "flux1-dev": config(),
    "flux1-schnell": config(**SCHNELL),
    "flux1-fill-dev": config(**FILL),
    "flux1-canny-dev": config(**CONTROL),
}
INPUTS = {"FluxTransformer2DModel": run}
CONVERTER = "convert_flux_transformer_checkpoint_to_diffusers"
WIDE = (config(num_layers=2, num_single_layers=2),)
