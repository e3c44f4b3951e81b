"""Wan-Animate-2: what the tests know of it; see README.md."""

from __future__ import annotations

from typing import Any


def config(**changes: Any) -> dict[str, Any]:
    """The config of Wan2.2-Animate-2-14B, with changes."""
    return {
        "_class_name": "WanAnimate2Transformer3DModel",
        "patch_size": (1, 2, 2),
        "in_dim": 36,
        "dim": 5120,
        "ffn_dim": 13824,
        "freq_dim": 256,
        "text_dim": 4096,
        "out_dim": 16,
        "num_heads": 40,
        "num_layers": 40,
        "use_img_emb": True,
    } | changes


TINY = {"dim": 256, "ffn_dim": 384, "text_dim": 96, "num_heads": 2, "num_layers": 2}

CONFIGS = (config(**TINY), config(**TINY, use_img_emb=False, in_dim=16))
REAL = {"wan2.2-animate-2-14b": config()}
# It reads its own cache of a reference video, which is no input of a test.
INPUTS: dict[str, Any] = {}
CONVERTER = "convert_wan_animate_2_transformer_to_diffusers"
