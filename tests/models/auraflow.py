"""AuraFlow: see README.md."""

from typing import Any

import torch


def _config(**changes: Any) -> dict[str, Any]:
    return {
        "_class_name": "AuraFlowTransformer2DModel",
        "sample_size": 64,
        "patch_size": 2,
        "in_channels": 4,
        "num_mmdit_layers": 4,
        "num_single_dit_layers": 32,
        "attention_head_dim": 256,
        "num_attention_heads": 12,
        "joint_attention_dim": 2048,
        "caption_projection_dim": 3072,
        "out_channels": 4,
        "pos_embed_max_size": 1024,
    } | changes


def _run(model: Any, noise: Any) -> Any:
    return model(
        hidden_states=noise(1, model.config.in_channels, 4, 4),
        encoder_hidden_states=noise(1, 5, model.config.joint_attention_dim),
        timestep=torch.tensor([0.4]).to(model.dtype),
        return_dict=False,
    )


CONFIGS = (
    _config(
        num_mmdit_layers=2,
        num_single_dit_layers=1,
        num_attention_heads=1,
        joint_attention_dim=96,
        caption_projection_dim=256,
        pos_embed_max_size=16,
    ),
)
REAL = {
    "auraflow": _config(pos_embed_max_size=4096),
    "auraflow-v0.3": _config(pos_embed_max_size=9216),
}
INPUTS = {"AuraFlowTransformer2DModel": _run}
CONVERTER = "convert_auraflow_transformer_checkpoint_to_diffusers"
