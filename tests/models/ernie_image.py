"""ERNIE-Image: what the tests know of it; see README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def config(**changes: Any) -> dict[str, Any]:
    """The config of ERNIE-Image, with changes."""
    return {
        "_class_name": "ErnieImageTransformer2DModel",
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_layers": 36,
        "ffn_hidden_size": 12288,
        "in_channels": 128,
        "out_channels": 128,
        "patch_size": 1,
        "text_in_dim": 3072,
        "rope_theta": 256,
        "rope_axes_dim": (32, 48, 48),
        "eps": 1e-6,
        "qk_layernorm": True,
    } | changes


def run(model: Any, noise: Callable[..., Tensor]) -> Any:
    return model(
        hidden_states=noise(1, model.config.in_channels, 4, 4),
        timestep=torch.tensor([400]),
        text_bth=noise(1, 5, model.config.text_in_dim),
        text_lens=torch.tensor([4]),
        return_dict=False,
    )


TINY = {"hidden_size": 256, "num_attention_heads": 2, "num_layers": 3, "ffn_hidden_size": 512}

CONFIGS = (
    config(**TINY, text_in_dim=128),
    config(**TINY, text_in_dim=256, in_channels=16, out_channels=16, patch_size=2),
)
REAL = {"ernie-image": config(), "ernie-image-turbo": config()}
INPUTS = {"ErnieImageTransformer2DModel": run}
CONVERTER = None  # names are the same: diffusers' takes a prefix away and no more
