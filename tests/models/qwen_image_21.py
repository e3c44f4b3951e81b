"""Qwen-Image 2.1: see README.md."""

from typing import Any

import torch


def _config(**changes: Any) -> dict[str, Any]:
    return {
        "_class_name": "QwenImage21Transformer2DModel",
        "patch_size": 1,
        "in_channels": 64,
        "out_channels": 64,
        "num_layers": 32,
        "attention_head_dim": 128,
        "num_attention_heads": 32,
        "context_in_dim": 4096,
        "mlp_ratio": 3,
        "axes_dims_rope": (16, 56, 56),
        "causal_condition": True,
    } | changes


def _run(model: Any, noise: Any) -> Any:
    """Three words, then one picture of 2 x 4 tokens: two slots of four."""
    return model(
        hidden_states=noise(1, 8, model.config.in_channels),
        encoder_hidden_states=noise(1, 3, model.config.context_in_dim),
        timestep=noise(1).abs(),
        img_shapes=[[(1, 2, 4)]],
        img_mask=torch.tensor([[False, False, False, True, True]]),
        return_dict=False,
    )


CONFIGS = (
    _config(num_layers=2, num_attention_heads=2, context_in_dim=96),
    _config(num_layers=1, num_attention_heads=4, mlp_ratio=2, attention_head_dim=64,
            axes_dims_rope=(8, 28, 28)),
)  # fmt: skip
REAL = {"qwen-image-2.1": _config()}
INPUTS = {"QwenImage21Transformer2DModel": _run}
CONVERTER = "convert_qwen_image21_transformer_checkpoint_to_diffusers"
