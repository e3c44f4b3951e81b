"""Stable Diffusion 3: what the tests know of it; see README.md. test_sd3.py has the converter."""

from __future__ import annotations

import runpy
from pathlib import Path

_CONFIGS = runpy.run_path(str(Path(__file__).parents[1] / "configs.py"))
_config, _MEDIUM, _DUAL = (_CONFIGS[name] for name in ("sd3_config", "SD3_MEDIUM", "DUAL"))

CONFIGS = tuple(config for config in _CONFIGS["CONFIGS"]["sd3"] if config["num_layers"] < 19)
REAL = {
    "sd3-medium": _config(**_MEDIUM, qk_norm=None),
    "sd3.5-medium": _config(**_MEDIUM, **_DUAL),
    "sd3.5-large": _config(),
}
INPUTS: dict[str, object] = {}
CONVERTER = None
