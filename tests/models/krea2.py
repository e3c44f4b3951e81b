"""Krea 2: what the tests know of it; see README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def config(**changes: Any) -> dict[str, Any]:
    """The config of Krea 2, with changes."""
    return {
        "_class_name": "Krea2Transformer2DModel",
        "in_channels": 64,
        "num_layers": 28,
        "attention_head_dim": 128,
        "num_attention_heads": 48,
        "num_key_value_heads": 12,
        "intermediate_size": 16384,
        "timestep_embed_dim": 256,
        "text_hidden_dim": 2560,
        "num_text_layers": 12,
        "text_num_attention_heads": 20,
        "text_num_key_value_heads": 20,
        "text_intermediate_size": 6912,
        "num_layerwise_text_blocks": 2,
        "num_refiner_text_blocks": 2,
        "axes_dims_rope": (32, 48, 48),
        "rope_theta": 1000.0,
        "norm_eps": 1e-5,
    } | changes


def run(model: Any, noise: Callable[..., Tensor]) -> Any:
    text = (model.config.num_text_layers, model.config.text_hidden_dim)
    return model(
        hidden_states=noise(1, 6, model.config.in_channels),
        encoder_hidden_states=noise(1, 5, *text),
        timestep=noise(1).abs(),
        position_ids=torch.arange(33.0).reshape(11, 3),
        return_dict=False,
    )


TINY = {
    "num_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 768,
}
TEXT = {
    "text_hidden_dim": 256,
    "num_text_layers": 3,
    "text_num_attention_heads": 2,
    "text_num_key_value_heads": 2,
    "text_intermediate_size": 512,
}

CONFIGS = (config(**TINY, **TEXT), config(**TINY | TEXT, num_layerwise_text_blocks=1))
REAL = {"krea2-raw": config(), "krea2-turbo": config()}
INPUTS = {"Krea2Transformer2DModel": run}
CONVERTER = "convert_krea2_transformer_checkpoint_to_diffusers"
