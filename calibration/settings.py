"""What a calibration run is asked to do, and the key under which its result is kept.

Contract: torch-free. Equal keys mean equal statistics: the key covers the model, the prompts that
are really run (with the content of their pictures), the settings and the sites, but not the
device, nor how the same prompts were selected.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dqconvert.calibration.prompts import Prompt
from dqconvert.quantizers.errors import CalibrationError

DTYPES = ("float32", "bfloat16", "float16")
RULES = 2
"""Counts up when the same settings come to mean other statistics, so that old ones are refused."""


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """How to run the pipeline, and what to keep.

    steps: denoising steps, all of which are observed; height, width: pixels, None for the size that
    the VAE was made for; frames: of a video, None for the pipeline's own number; samples: cap on
    the number of prompts; guidance: None for the pipeline's own; seed: of the noise, and of the
    choice of held rows; rows: held rows per site at most; moments: whether XᵀX is kept, which takes
    4 K² bytes per site; max_sequence_length: of the text, None for the pipeline's own, or what its
    tokenizers are made for if that is less.
    """

    steps: int
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    samples: int | None = None
    guidance: float | None = None
    seed: int = 0
    rows: int = 512
    moments: bool = True
    dtype: str = "float32"
    device: str = "cpu"
    max_sequence_length: int | None = None

    def __post_init__(self) -> None:
        names = ("steps", "height", "width", "frames", "samples", "rows", "max_sequence_length")
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CalibrationError(f"calibration: {name} is {value}; it must be at least 1")
        if self.dtype not in DTYPES:
            raise CalibrationError(
                f"calibration: cannot run in '{self.dtype}'; choose {' or '.join(DTYPES)}"
            )

    def chosen(self, prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
        """The prompts to run, each with the seed of its noise and its guidance."""
        return tuple(
            replace(
                prompt,
                seed=self.seed + index if prompt.seed is None else prompt.seed,
                guidance=self.guidance if prompt.guidance is None else prompt.guidance,
            )
            for index, prompt in enumerate(prompts[: self.samples])
        )


@dataclass(frozen=True, slots=True)
class Site:
    """A place to observe.

    name: key of the result; module: dotted name of the module, within the transformer, whose
    input is observed.
    """

    name: str
    module: str


def stats_key(
    model_fingerprint: str,
    prompts: Sequence[Prompt],
    settings: CalibrationSettings,
    sites: Sequence[Site],
) -> str:
    """SHA-256 over everything that the statistics depend on."""
    asked = asdict(settings)
    del asked["device"], asked["samples"]
    content = {
        "rules": RULES,
        "model": model_fingerprint,
        "prompts": [_content(prompt) for prompt in settings.chosen(prompts)],
        "settings": asked,
        "sites": sorted((site.name, site.module) for site in sites),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _content(prompt: Prompt) -> list[str | float | None]:
    picture = None
    if prompt.image is not None:
        picture = hashlib.sha256(Path(prompt.image).read_bytes()).hexdigest()
    return [prompt.prompt, prompt.negative_prompt, prompt.seed, picture, prompt.guidance]
