"""LTX-Video: what the tests know of it; see README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def config(**changes: Any) -> dict[str, Any]:
    """The config of LTX-Video 0.9.5, with changes."""
    return {
        "_class_name": "LTXVideoTransformer3DModel",
        "in_channels": 128,
        "out_channels": 128,
        "num_attention_heads": 32,
        "attention_head_dim": 64,
        "cross_attention_dim": 2048,
        "num_layers": 28,
        "caption_channels": 4096,
    } | changes


def run(model: Any, noise: Callable[..., Tensor]) -> Any:
    return model(
        hidden_states=noise(1, 8, model.config.in_channels),
        encoder_hidden_states=noise(1, 5, model.config.caption_channels),
        timestep=torch.tensor([400]),
        encoder_attention_mask=torch.ones(1, 5, dtype=torch.bool),
        num_frames=2,
        height=2,
        width=2,
        return_dict=False,
    )


WIDER = {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48}

CONFIGS = (
    config(num_layers=2, attention_head_dim=4, cross_attention_dim=128, caption_channels=96),
)
REAL = {
    "ltx-video-0.9.5": config(),
    "ltx-video-0.9.7": config(**WIDER),
}
INPUTS = {"LTXVideoTransformer3DModel": run}
CONVERTER = "convert_ltx_transformer_checkpoint_to_diffusers"
