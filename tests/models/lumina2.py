"""Lumina-Image 2.0: see README.md."""

from typing import Any

import torch


def _config(**changes: Any) -> dict[str, Any]:
    return {
        "_class_name": "Lumina2Transformer2DModel",
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": None,
        "hidden_size": 2304,
        "num_layers": 26,
        "num_refiner_layers": 2,
        "num_attention_heads": 24,
        "num_kv_heads": 8,
        "multiple_of": 256,
        "ffn_dim_multiplier": None,
        "norm_eps": 1e-5,
        "scaling_factor": 1.0,
        "axes_dim_rope": (32, 32, 32),
        "axes_lens": (300, 512, 512),
        "cap_feat_dim": 2304,
    } | changes


def _run(model: Any, noise: Any) -> Any:
    return model(
        hidden_states=noise(1, model.config.in_channels, 4, 4),
        timestep=noise(1).abs(),
        encoder_hidden_states=noise(1, 5, model.config.cap_feat_dim),
        encoder_attention_mask=torch.ones(1, 5, dtype=torch.bool),
        return_dict=False,
    )


_SMALL = {"hidden_size": 384, "num_attention_heads": 4, "num_kv_heads": 2, "cap_feat_dim": 96}
CONFIGS = (
    _config(**_SMALL, num_layers=2),
    _config(**_SMALL | {"num_kv_heads": 4}, num_layers=1, num_refiner_layers=1,
            ffn_dim_multiplier=1.5),
)  # fmt: skip
WIDE = (_config(num_layers=2),)
REAL = {"lumina-image-2.0": _config()}
INPUTS = {"Lumina2Transformer2DModel": _run}
CONVERTER = "convert_lumina2_to_diffusers"
