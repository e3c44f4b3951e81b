"""HiDream-I1: see README.md."""

from typing import Any

import torch


def _config(double: int, single: int, **changes: Any) -> dict[str, Any]:
    return {
        "_class_name": "HiDreamImageTransformer2DModel",
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": double,
        "num_single_layers": single,
        "attention_head_dim": 128,
        "num_attention_heads": 20,
        "caption_channels": [4096, 4096],
        "text_emb_dim": 2048,
        "num_routed_experts": 4,
        "num_activated_experts": 2,
        "axes_dims_rope": (64, 32, 32),
        "max_resolution": (128, 128),
        "llama_layers": [min(i, 31) for i in range(double + single)],
    } | changes


def _run(model: Any, noise: Any) -> Any:
    t5, llama = model.config.caption_channels
    return model(
        hidden_states=noise(1, model.config.in_channels, 8, 8),
        timesteps=torch.tensor([400]),
        encoder_hidden_states_t5=noise(1, 3, t5),
        encoder_hidden_states_llama3=noise(32, 1, 4, llama),
        pooled_embeds=noise(1, model.config.text_emb_dim),
        return_dict=False,
    )


CONFIGS = (_config(2, 1, num_attention_heads=1, caption_channels=[96, 64], text_emb_dim=48),)
REAL = {"hidream-i1-full": _config(16, 32)}
INPUTS = {"HiDreamImageTransformer2DModel": _run}
CONVERTER = None
