"""Z-Image; how it runs is in tests/tiny_models.py, its single files in test_families_more.py."""

from __future__ import annotations

import runpy
from pathlib import Path

_CONFIGS = runpy.run_path(str(Path(__file__).parents[1] / "configs.py"))
CONFIGS = _CONFIGS["CONFIGS"]["z_image"]
REAL = dict.fromkeys(("z-image", "z-image-turbo"), _CONFIGS["z_image_config"]())
INPUTS: dict[str, object] = {}
CONVERTER = None
