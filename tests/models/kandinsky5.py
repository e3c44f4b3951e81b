"""Kandinsky 5: see README.md."""

from typing import Any

import torch


def _config(**changes: Any) -> dict[str, Any]:
    return {
        "_class_name": "Kandinsky5Transformer3DModel",
        "in_visual_dim": 16,
        "in_text_dim": 3584,
        "in_text_dim2": 768,
        "time_dim": 512,
        "out_visual_dim": 16,
        "patch_size": (1, 2, 2),
        "model_dim": 1792,
        "ff_dim": 7168,
        "num_text_blocks": 2,
        "num_visual_blocks": 32,
        "axes_dims": (16, 24, 24),
        "visual_cond": True,
    } | changes


def _run(model: Any, noise: Any) -> Any:
    channels = model.visual_embeddings.in_layer.in_features // 4
    return model(
        hidden_states=noise(1, 2, 4, 4, channels),
        encoder_hidden_states=noise(1, 5, model.config.in_text_dim),
        timestep=noise(1).abs() * 400,
        pooled_projections=noise(1, model.config.in_text_dim2),
        visual_rope_pos=[torch.arange(n) for n in (2, 2, 2)],
        text_rope_pos=torch.arange(5),
        return_dict=False,
    )


_SMALL = {
    "in_text_dim": 96,
    "in_text_dim2": 48,
    "time_dim": 128,
    "model_dim": 256,
    "ff_dim": 384,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
}
CONFIGS = (
    _config(**_SMALL),
    _config(**_SMALL, visual_cond=False, axes_dims=(32, 48, 48)),
)
REAL = {"kandinsky5-t2v-lite": _config()}
INPUTS = {"Kandinsky5Transformer3DModel": _run}
CONVERTER = None
