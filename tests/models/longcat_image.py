"""LongCat-Image: what the tests know of it; see README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def config(**changes: Any) -> dict[str, Any]:
    """The config of LongCat-Image, with changes."""
    return {
        "_class_name": "LongCatImageTransformer2DModel",
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 10,
        "num_single_layers": 20,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "pooled_projection_dim": 3584,
        "axes_dims_rope": [16, 56, 56],
    } | changes


def run(model: Any, noise: Callable[..., Tensor]) -> Any:
    return model(
        hidden_states=noise(1, 6, model.config.in_channels),
        encoder_hidden_states=noise(1, 5, model.config.joint_attention_dim),
        timestep=noise(1).abs(),
        img_ids=torch.arange(18.0).reshape(6, 3),
        txt_ids=torch.zeros(5, 3),
        return_dict=False,
    )


TEXT = {"joint_attention_dim": 128, "pooled_projection_dim": 128}
TINY = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2}

CONFIGS = (config(**TINY, **TEXT),)
REAL = {"longcat-image": config()}
INPUTS = {"LongCatImageTransformer2DModel": run}
CONVERTER = None
