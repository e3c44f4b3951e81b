"""SANA: see README.md."""

from typing import Any

import torch


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
        "guidance_embeds": False,
        "qk_norm": None,
    } | changes


def _run(model: Any, noise: Any) -> Any:
    return model(
        hidden_states=noise(1, model.config.in_channels, 4, 4),
        encoder_hidden_states=noise(1, 5, model.config.caption_channels),
        timestep=noise(1).abs(),
        return_dict=False,
    )


def _prepare(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """With what the authors' files hold besides."""
    return checkpoint | {"pos_embed": torch.ones(2), "y_embedder.y_embedding": torch.ones(2)}


_SMALL = {
    "num_attention_heads": 14,
    "num_cross_attention_heads": 4,
    "cross_attention_dim": 448,
    "caption_channels": 96,
    "num_layers": 2,
}
_600M = {
    "num_attention_heads": 36,
    "num_layers": 28,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
_RMS = {"qk_norm": "rms_norm_across_heads"}
CONFIGS = (_config(**_SMALL), _config(**_SMALL, **_RMS))
WIDE = (_config(**_SMALL),)
REAL = {
    "sana-600m-1024": _config(**_600M),
    "sana-1600m-1024": _config(),
    "sana1.5-1.6b": _config(**_RMS),
    "sana1.5-4.8b": _config(**_RMS, num_layers=60),
}
INPUTS = {"SanaTransformer2DModel": _run}
CONVERTER = "convert_sana_transformer_to_diffusers"
PREPARE = _prepare
