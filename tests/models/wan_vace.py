"""Wan VACE: what the tests know of it; see README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def config(**changes: Any) -> dict[str, Any]:
    """The config of Wan2.1-VACE-14B, with changes."""
    return {
        "_class_name": "WanVACETransformer3DModel",
        "patch_size": (1, 2, 2),
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 13824,
        "num_layers": 40,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "pos_embed_seq_len": None,
        "vace_layers": [0, 5, 10, 15, 20, 25, 30, 35],
        "vace_in_channels": 96,
    } | changes


def run(model: Any, noise: Callable[..., Tensor]) -> Any:
    return model(
        hidden_states=noise(1, model.config.in_channels, 2, 4, 4),
        timestep=torch.tensor([400]),
        encoder_hidden_states=noise(1, 512, model.config.text_dim),
        control_hidden_states=noise(1, model.config.vace_in_channels, 2, 4, 4),
        control_hidden_states_scale=torch.ones(len(model.config.vace_layers), dtype=model.dtype),
        return_dict=False,
    )


TINY = {"num_attention_heads": 2, "text_dim": 96, "ffn_dim": 384, "vace_in_channels": 24}

CONFIGS = (
    config(**TINY, num_layers=4, vace_layers=[0, 2]),
    config(**TINY, num_layers=3, vace_layers=[0, 1, 2]),
)
REAL = {
    "wan2.1-vace-1.3b": config(
        num_attention_heads=12, ffn_dim=8960, num_layers=30, vace_layers=list(range(0, 30, 2))
    ),
    "wan2.1-vace-14b": config(),
}
INPUTS = {"WanVACETransformer3DModel": run}
CONVERTER = "convert_wan_transformer_to_diffusers"
