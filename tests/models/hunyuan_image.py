"""HunyuanImage 2.1: see README.md."""

from typing import Any

import torch


def _config(**changes: Any) -> dict[str, Any]:
    return {
        "_class_name": "HunyuanImageTransformer2DModel",
        "in_channels": 64,
        "out_channels": 64,
        "num_attention_heads": 28,
        "attention_head_dim": 128,
        "num_layers": 20,
        "num_single_layers": 40,
        "num_refiner_layers": 2,
        "mlp_ratio": 4.0,
        "patch_size": (1, 1),
        "guidance_embeds": False,
        "text_embed_dim": 3584,
        "text_embed_2_dim": 1472,
        "rope_theta": 256.0,
        "rope_axes_dim": (64, 64),
        "use_meanflow": False,
    } | changes


def _run(model: Any, noise: Any) -> Any:
    config = model.config
    return model(
        hidden_states=noise(1, config.in_channels, 2, 2),
        timestep=torch.tensor([400.0]).to(model.dtype),
        encoder_hidden_states=noise(1, 3, config.text_embed_dim),
        encoder_attention_mask=torch.ones(1, 3, dtype=torch.bool),
        timestep_r=torch.tensor([300.0]).to(model.dtype) if config.use_meanflow else None,
        encoder_hidden_states_2=noise(1, 2, config.text_embed_2_dim or 1),
        encoder_attention_mask_2=torch.ones(1, 2, dtype=torch.bool),
        guidance=torch.tensor([3500.0]).to(model.dtype) if config.guidance_embeds else None,
        return_dict=False,
    )


_SMALL = {
    "num_attention_heads": 2,
    "num_layers": 1,
    "num_single_layers": 2,
    "text_embed_dim": 96,
    "text_embed_2_dim": 48,
    "num_refiner_layers": 1,
}
CONFIGS = (
    _config(**_SMALL),
    _config(**_SMALL | {"text_embed_2_dim": None}, guidance_embeds=True, use_meanflow=True),
)
REAL = {"hunyuanimage-2.1": _config()}
INPUTS = {"HunyuanImageTransformer2DModel": _run}
CONVERTER = None
