"""Stable Diffusion XL's U-Net."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def config(**changes: Any) -> dict[str, Any]:
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    } | changes


SMALL = {
    "block_out_channels": (64, 128, 256),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": 128,
    "projection_class_embeddings_input_dim": 1600,
}
SHALLOW = {"transformer_layers_per_block": (1, 1, 1)}
CONFIGS = (config(**SMALL), config(**SMALL, in_channels=9))
REAL = {"sdxl": config()}
CONVERTER = "convert_ldm_unet_checkpoint"


def _forward(model: Any, noise: Callable[..., Tensor]) -> Any:
    pooled = model.config.projection_class_embeddings_input_dim - 6 * 256
    return model(
        noise(1, model.config.in_channels, 8, 8),
        torch.tensor([400]),
        encoder_hidden_states=noise(1, 5, model.config.cross_attention_dim),
        added_cond_kwargs={"text_embeds": noise(1, pooled), "time_ids": torch.ones(1, 6)},
        return_dict=False,
    )


INPUTS = {"UNet2DConditionModel": _forward}


def PREPARE(checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: N802
    """The converter looks for the names of an all-in-one checkpoint."""
    return {f"model.diffusion_model.{name}": tensor for name, tensor in checkpoint.items()}
