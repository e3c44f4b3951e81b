"""HunyuanVideo 1.5: what the tests know of it; see README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def config(**changes: Any) -> dict[str, Any]:
    """The config of HunyuanVideo-1.5 480p t2v, with changes."""
    return {
        "_class_name": "HunyuanVideo15Transformer3DModel",
        "in_channels": 65,
        "out_channels": 32,
        "num_attention_heads": 16,
        "attention_head_dim": 128,
        "num_layers": 54,
        "num_refiner_layers": 2,
        "mlp_ratio": 4.0,
        "patch_size": 1,
        "patch_size_t": 1,
        "text_embed_dim": 3584,
        "text_embed_2_dim": 1472,
        "image_embed_dim": 1152,
        "target_size": 640,
        "task_type": "i2v",
        "use_meanflow": False,
    } | changes


def run(model: Any, noise: Callable[..., Tensor]) -> Any:
    known = model.config
    return model(
        hidden_states=noise(1, known.in_channels, 2, 2, 2),
        timestep=torch.tensor([400.0]).to(model.dtype),
        encoder_hidden_states=noise(1, 5, known.text_embed_dim),
        encoder_attention_mask=torch.ones(1, 5),
        timestep_r=torch.tensor([300.0]).to(model.dtype) if known.use_meanflow else None,
        encoder_hidden_states_2=noise(1, 4, known.text_embed_2_dim),
        encoder_attention_mask_2=torch.ones(1, 4),
        image_embeds=noise(1, 3, known.image_embed_dim),
        return_dict=False,
    )


TINY = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "text_embed_dim": 96,
    "text_embed_2_dim": 48,
    "image_embed_dim": 40,
}

CONFIGS = (config(**TINY), config(**TINY, use_meanflow=True, in_channels=98))
REAL = {
    "hunyuanvideo1.5-480p-t2v": config(),
}
INPUTS = {"HunyuanVideo15Transformer3DModel": run}
CONVERTER = None
