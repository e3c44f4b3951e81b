"""Qwen-Image; how it runs is in tests/tiny_models.py, its single files in test_families_more.py."""

from __future__ import annotations

import runpy
from pathlib import Path

_CONFIGS = runpy.run_path(str(Path(__file__).parents[1] / "configs.py"))
CONFIGS = _CONFIGS["CONFIGS"]["qwen_image"]
_config, _LAYERED = _CONFIGS["qwen_image_config"], _CONFIGS["LAYERED"]
REAL = {"qwen-image": _config(), "qwen-image-layered": _config(**_LAYERED)}
INPUTS: dict[str, object] = {}
CONVERTER = None
