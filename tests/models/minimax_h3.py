"""MiniMax-H3: what the tests know of it; see README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def config(**changes: Any) -> dict[str, Any]:
    """The config of MiniMax-H3, with changes."""
    return {
        "_class_name": "MiniMaxH3Transformer3DModel",
        "num_attention_heads": 56,
        "attention_head_dim": 128,
        "hidden_size": 5376,
        "num_layers": 50,
        "num_refiner_layers": 2,
        "ffn_dim": 14336,
        "in_channels": 24,
        "audio_in_channels": 32,
        "patch_size": (1, 2, 2),
        "text_dim": 5120,
        "freq_dim": 256,
        "time_embed_hidden_dim": 5376,
        "time_embed_dim": 2688,
    } | changes


def run(model: Any, noise: Callable[..., Tensor]) -> Any:
    """Three tokens of text, two of sound and four of video, at two times."""
    known = model.config
    return model(
        hidden_states=noise(1, 4, known.in_channels * 4),
        audio_hidden_states=noise(1, 2, known.audio_in_channels),
        encoder_hidden_states=noise(1, 3, known.text_dim),
        timestep=noise(2).abs(),
        timestep_indices=torch.tensor([0, 0, 0, 1, 1, 0, 0, 0, 0]),
        token_tags=torch.tensor([1, 1, 1, 2, 2, 0, 0, 0, 0]),
        position_ids=torch.arange(27).reshape(9, 3) % 5,
        video_indices=torch.arange(5, 9),
        audio_indices=torch.arange(3, 5),
        text_indices=torch.arange(3),
        return_dict=False,
    )


# The heads together are wider than the model, as in the released one.
CONFIGS = (
    config(
        num_attention_heads=3,
        hidden_size=256,
        num_layers=2,
        ffn_dim=320,
        text_dim=96,
        freq_dim=64,
        time_embed_hidden_dim=192,
        time_embed_dim=160,
    ),
)
REAL = {"minimax-h3": config()}
INPUTS = {"MiniMaxH3Transformer3DModel": run}
CONVERTER = "convert_minimax_h3_transformer_checkpoint_to_diffusers"
