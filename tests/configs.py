"""Configs of diffusers' models to try for each family, besides FLUX: small ones, then real ones."""

from __future__ import annotations

from typing import Any


def qwen_image_config(**changes: Any) -> dict[str, Any]:
    """The config of Qwen-Image, with changes."""
    return {
        "_class_name": "QwenImageTransformer2DModel",
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 60,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "guidance_embeds": False,
        "axes_dims_rope": (16, 56, 56),
        "zero_cond_t": False,
        "use_additional_t_cond": False,
        "use_layer3d_rope": False,
    } | changes


QWEN_SMALL = {"num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 96}
LAYERED = {"use_additional_t_cond": True, "use_layer3d_rope": True}
CONFIGS = {
    "qwen_image": (
        qwen_image_config(**QWEN_SMALL),
        qwen_image_config(**QWEN_SMALL, **LAYERED),
        qwen_image_config(**QWEN_SMALL | {"attention_head_dim": 64, "axes_dims_rope": (8, 28, 28)}),
        qwen_image_config(),
    ),
}
