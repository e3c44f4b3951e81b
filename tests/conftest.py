"""What tests of several files share: outputs that are converted once."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import diffusers.quantizers.bfl.utils  # noqa: F401  (its tables must not be made while loading)
import pytest


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The outputs that tests of verify damage."""
    workshop = runpy.run_path(str(Path(__file__).with_name("workshop.py")))
    return workshop["Workshop"](tmp_path_factory.mktemp("shop"))
