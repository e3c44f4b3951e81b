"""SANA-Sprint: see README.md."""

from typing import Any


def _config(**changes: Any) -> dict[str, Any]:
    return {
        "_class_name": "SanaTransformer2DModel",
        "in_channels": 32,
        "out_channels": 32,
        "num_attention_heads": 70,
        "attention_head_dim": 32,
        "num_layers": 20,
        "num_cross_attention_heads": 20,
        "cross_attention_head_dim": 112,
        "cross_attention_dim": 2240,
        "caption_channels": 2304,
        "mlp_ratio": 2.5,
        "sample_size": 32,
        "patch_size": 1,
        "guidance_embeds": True,
        "qk_norm": "rms_norm_across_heads",
    } | changes


CONFIGS = (
    _config(
        num_attention_heads=14,
        num_cross_attention_heads=4,
        cross_attention_dim=448,
        caption_channels=96,
        num_layers=2,
    ),
)
REAL = {
    "sana-sprint-0.6b": _config(
        num_attention_heads=36,
        num_layers=28,
        num_cross_attention_heads=16,
        cross_attention_head_dim=72,
        cross_attention_dim=1152,
    ),
    "sana-sprint-1.6b": _config(),
}
INPUTS: dict[str, Any] = {}
CONVERTER = None
