"""Late imports of the optional packages: they take seconds, and calibration alone needs them."""

from __future__ import annotations

import importlib
from typing import Any

from dqconvert.quantizers.errors import MissingExtra


def require(package: str, module: str = "") -> Any:
    """A package of the extra [calibration], or a module in it."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError:
        raise MissingExtra(package, "calibration", "calibration") from None
    return importlib.import_module(f"{package}.{module}" if module else package)
