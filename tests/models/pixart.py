"""PixArt: see README.md."""

from typing import Any

import torch


def _config(**changes: Any) -> dict[str, Any]:
    return {
        "_class_name": "PixArtTransformer2DModel",
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "cross_attention_dim": 1152,
        "sample_size": 128,
        "patch_size": 2,
        "use_additional_conditions": False,
        "caption_channels": 4096,
    } | changes


def _run(model: Any, noise: Any) -> Any:
    told = {"resolution": noise(1, 2).abs(), "aspect_ratio": noise(1, 1).abs()}
    return model(
        hidden_states=noise(1, model.config.in_channels, 4, 4),
        encoder_hidden_states=noise(1, 5, model.config.caption_channels),
        timestep=torch.tensor([400]),
        added_cond_kwargs=told if model.config.use_additional_conditions else None,
        return_dict=False,
    )


_SMALL = {
    "attention_head_dim": 24,
    "cross_attention_dim": 384,
    "caption_channels": 96,
    "num_layers": 2,
}
_TOLD = {"use_additional_conditions": True}
CONFIGS = (_config(**_SMALL), _config(**_SMALL, **_TOLD))
REAL = {"pixart-sigma": _config(), "pixart-alpha": _config(**_TOLD)}
INPUTS = {"PixArtTransformer2DModel": _run}
CONVERTER = None
