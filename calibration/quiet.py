"""Keeps the libraries that run the pipeline from talking to the user. Restores what it finds."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from dqconvert.calibration.require import require


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, warnings or log lines below an error, from diffusers and transformers.

    Nor from what these import, which speaks before anyone could ask it not to.
    """
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with _voices_down():
            yield
    finally:
        logging.disable(before)


@contextmanager
def _voices_down() -> Iterator[None]:
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
