"""Ovis-Image: see README.md."""

from typing import Any

import torch


def _config(**changes: Any) -> dict[str, Any]:
    return {
        "_class_name": "OvisImageTransformer2DModel",
        "patch_size": 1,
        "in_channels": 64,
        "out_channels": 64,
        "num_layers": 6,
        "num_single_layers": 27,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 2048,
        "axes_dims_rope": (16, 56, 56),
    } | changes


def _run(model: Any, noise: Any) -> Any:
    return model(
        hidden_states=noise(1, 4, model.config.in_channels),
        encoder_hidden_states=noise(1, 3, model.config.joint_attention_dim),
        timestep=noise(1).abs(),
        img_ids=torch.zeros(4, 3),
        txt_ids=torch.zeros(3, 3),
        return_dict=False,
    )


CONFIGS = (
    _config(num_layers=1, num_single_layers=2, num_attention_heads=2, joint_attention_dim=96),
)
REAL = {"ovis-image-7b": _config()}
INPUTS = {"OvisImageTransformer2DModel": _run}
CONVERTER = None
