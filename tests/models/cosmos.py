"""Cosmos-Predict: what the tests know of it; see README.md."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def config(**changes: Any) -> dict[str, Any]:
    """The config of Cosmos-Predict2-2B-Text2Image, with changes."""
    return {
        "_class_name": "CosmosTransformer3DModel",
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": 16,
        "attention_head_dim": 128,
        "num_layers": 28,
        "mlp_ratio": 4.0,
        "text_embed_dim": 1024,
        "adaln_lora_dim": 256,
        "patch_size": (1, 2, 2),
        "rope_scale": (1.0, 4.0, 4.0),
        "concat_padding_mask": True,
        "extra_pos_embed_type": None,
        "use_crossattn_projection": False,
        "crossattn_proj_in_channels": 1024,
        "encoder_hidden_states_channels": 1024,
        "img_context_dim_in": None,
        "img_context_dim_out": 2048,
    } | changes


def run(model: Any, noise: Callable[..., Tensor]) -> Any:
    """Without torchvision, which would resize the mask to the size that it has."""
    from diffusers.models.transformers import transformer_cosmos as module

    resize = SimpleNamespace(resize=lambda mask, size, interpolation: mask)
    modes = SimpleNamespace(NEAREST="nearest")
    vars(module).setdefault(
        "transforms", SimpleNamespace(functional=resize, InterpolationMode=modes)
    )
    known = model.config
    text = known.crossattn_proj_in_channels if known.use_crossattn_projection else None
    return model(
        hidden_states=noise(1, known.in_channels, 2, 4, 4),
        timestep=torch.tensor([400]),
        encoder_hidden_states=noise(1, 5, text or known.text_embed_dim),
        fps=16,
        padding_mask=torch.zeros(1, 1, 4, 4, dtype=model.dtype),
        return_dict=False,
    )


VIDEO = {"in_channels": 17, "rope_scale": (1.0, 3.0, 3.0)}
BIG = {"num_attention_heads": 40, "num_layers": 36}
TINY = {
    "num_attention_heads": 2,
    "num_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": 96,
    "adaln_lora_dim": 48,
}
PROJECTED = {
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 64,
    "encoder_hidden_states_channels": 96,
}
LEARNT = {"extra_pos_embed_type": "learnable", "rope_scale": (2.0, 1.0, 1.0)}

CONFIGS = (config(**TINY), config(**TINY, **VIDEO, **PROJECTED), config(**TINY, **LEARNT))
REAL = {
    "cosmos-predict2-2b-t2i": config(),
    "cosmos-predict2-2b-i2v": config(**VIDEO),
    "cosmos-predict2-14b-t2i": config(**BIG),
}
INPUTS = {"CosmosTransformer3DModel": run}
CONVERTER = "convert_cosmos_transformer_checkpoint_to_diffusers"
WIDE = CONFIGS[:2]
