"""LTX-2, 2.3 and 2.5: what the tests know of them; see README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def config(**changes: Any) -> dict[str, Any]:
    """The config of LTX-2, with changes."""
    return {
        "_class_name": "LTX2VideoTransformer3DModel",
        "in_channels": 128,
        "out_channels": 128,
        "num_attention_heads": 32,
        "attention_head_dim": 128,
        "cross_attention_dim": 4096,
        "num_layers": 48,
        "gated_attn": False,
        "cross_attn_mod": False,
        "audio_in_channels": 128,
        "audio_out_channels": 128,
        "audio_num_attention_heads": 32,
        "audio_attention_head_dim": 64,
        "audio_cross_attention_dim": 2048,
        "audio_gated_attn": False,
        "audio_cross_attn_mod": False,
        "caption_channels": 3840,
        "rope_type": "split",
        "use_prompt_embeddings": True,
        "perturbed_attn": False,
        "ff_bias": True,
        "audio_ff_bias": True,
        "use_prompt_adaln_single": True,
        "use_keyframes_abs_pos_embedding": False,
    } | changes


def run(model: Any, noise: Callable[..., Tensor]) -> Any:
    known = model.config
    text = known.caption_channels, known.caption_channels
    if not known.use_prompt_embeddings:
        text = known.cross_attention_dim, known.audio_cross_attention_dim
    return model(
        hidden_states=noise(1, 8, known.in_channels),
        audio_hidden_states=noise(1, 3, known.audio_in_channels),
        encoder_hidden_states=noise(1, 5, text[0]),
        audio_encoder_hidden_states=noise(1, 5, text[1]),
        timestep=torch.tensor([[400]]),
        sigma=torch.tensor([0.4]),
        num_frames=2,
        height=2,
        width=2,
        audio_num_frames=3,
        return_dict=False,
    )


TINY = {
    "num_layers": 2,
    "in_channels": 24,
    "out_channels": 24,
    "attention_head_dim": 8,
    "cross_attention_dim": 256,
    "audio_in_channels": 16,
    "audio_out_channels": 16,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 128,
}
V23 = {
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
}
V25 = V23 | {"ff_bias": False, "use_keyframes_abs_pos_embedding": True}

CONFIGS = (
    config(**TINY, caption_channels=96),
    config(**TINY, **V23),
    config(**TINY, **V25),
    config(**TINY, **V25 | {"use_prompt_adaln_single": False}),
)
REAL = {"ltx-2": config(), "ltx-2.5": config(**V25)}
INPUTS = {"LTX2VideoTransformer3DModel": run}
CONVERTER = "convert_ltx2_transformer_to_diffusers"
# It knows the names of 2.0 alone.
WIDE = (config(**TINY, caption_channels=96),)
