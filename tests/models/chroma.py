"""Chroma: what the tests know of it; see README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def config(**changes: Any) -> dict[str, Any]:
    """The config of Chroma1-HD, with changes."""
    return {
        "_class_name": "ChromaTransformer2DModel",
        "patch_size": 1,
        "in_channels": 64,
        "out_channels": None,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "axes_dims_rope": (16, 56, 56),
        "approximator_num_channels": 64,
        "approximator_hidden_dim": 5120,
        "approximator_layers": 5,
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


TINY = {"num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 128}
APPROXIMATOR = {"approximator_hidden_dim": 128, "approximator_layers": 3}

CONFIGS = (
    config(**TINY, **APPROXIMATOR, num_attention_heads=2),
    config(**TINY, **APPROXIMATOR, num_attention_heads=1, out_channels=32),
)
REAL = {"chroma1-hd": config()}
INPUTS = {"ChromaTransformer2DModel": run}
CONVERTER = "convert_chroma_transformer_checkpoint_to_diffusers"
WIDE = (config(**TINY, **APPROXIMATOR),)
