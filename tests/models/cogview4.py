"""CogView4: see README.md."""

from typing import Any

import torch


def _config(**changes: Any) -> dict[str, Any]:
    return {
        "_class_name": "CogView4Transformer2DModel",
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 28,
        "attention_head_dim": 128,
        "num_attention_heads": 32,
        "text_embed_dim": 4096,
        "time_embed_dim": 512,
        "condition_dim": 256,
        "pos_embed_max_size": 128,
        "sample_size": 128,
        "rope_axes_dim": (256, 256),
    } | changes


def _run(model: Any, noise: Any) -> Any:
    size = torch.tensor([[64.0, 64.0]])
    return model(
        hidden_states=noise(1, model.config.in_channels, 4, 4),
        encoder_hidden_states=noise(1, 3, model.config.text_embed_dim),
        timestep=torch.tensor([400]),
        original_size=size,
        target_size=size,
        crop_coords=torch.zeros(1, 2),
        return_dict=False,
    )


CONFIGS = (_config(num_layers=2, num_attention_heads=2, text_embed_dim=96, time_embed_dim=128),)
REAL = {"cogview4-6b": _config()}
INPUTS = {"CogView4Transformer2DModel": _run}
CONVERTER = None
