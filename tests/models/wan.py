"""Wan, and SkyReels-V2 where it is told the frame rate: what the tests know; see README.md."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_KNOWN = runpy.run_path(str(Path(__file__).parents[1] / "configs.py"))
config, I2V, TI2V = _KNOWN["wan_config"], _KNOWN["I2V"], _KNOWN["TI2V"]


def skyreels(**changes: Any) -> dict[str, Any]:
    """The config of SkyReels-V2-DF-1.3B-540P, with changes."""
    found: dict[str, Any] = config(
        _class_name="SkyReelsV2Transformer3DModel",
        num_attention_heads=12,
        ffn_dim=8960,
        num_layers=30,
        inject_sample_info=True,
    )
    return found | changes


def run_skyreels(model: Any, noise: Callable[..., Tensor]) -> Any:
    return model(
        hidden_states=noise(1, model.config.in_channels, 2, 4, 4),
        timestep=torch.tensor([400]),
        encoder_hidden_states=noise(1, 512, model.config.text_dim),
        fps=[1],
        return_dict=False,
    )


SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
FLF2V = I2V | {"pos_embed_seq_len": 514}
TINY = {"num_layers": 2, "num_attention_heads": 2, "text_dim": 96, "ffn_dim": 384}

CONFIGS = (*_KNOWN["CONFIGS"]["wan"], skyreels(**TINY))
REAL = {
    "wan2.1-t2v-1.3b": config(**SMALL),
    "wan2.1-t2v-14b": config(),
    "wan2.1-i2v-14b-480p": config(**I2V),
    "wan2.1-flf2v-14b-720p": config(**FLF2V),
    "wan2.2-t2v-a14b": config(),
    "wan2.2-i2v-a14b": config(in_channels=36),
    "wan2.2-ti2v-5b": config(**TI2V),
    "skyreels-v2-df-1.3b-540p": skyreels(),
}
INPUTS = {"SkyReelsV2Transformer3DModel": run_skyreels}
CONVERTER = "convert_wan_transformer_to_diffusers"
WIDE = _KNOWN["CONFIGS"]["wan"][:2]
