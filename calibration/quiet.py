"""Keeps the libraries that run the pipeline from talking to the user. Restores what it finds."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from dqconvert.calibration.require import require


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, warnings or log lines below an error, from diffusers and transformers."""
    voices = [require(name, "utils.logging") for name in ("diffusers", "transformers")]
    levels = [voice.get_verbosity() for voice in voices]
    bars = [getattr(voice, "_tqdm_active", True) for voice in voices]
    for voice in voices:
        voice.set_verbosity_error()
        voice.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for voice, level, bar in zip(voices, levels, bars, strict=True):
            voice.set_verbosity(level)
            if bar:
                voice.enable_progress_bar()
