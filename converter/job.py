"""What is asked for, and what was done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Job:
    """One conversion asked for, in the words of the command line (`dqconvert --help`)."""

    model: str
    scheme: str
    target: str | None = None
    component: str = "transformer"
    calib: Path | None = None
    calib_steps: int | None = None
    calib_samples: int | None = None
    size: tuple[int, int] | None = None
    imatrix: Path | None = None
    bits: float | None = None
    pipeline: str | None = None
    output: Path | None = None
    rank: int | None = None
    rounding: str | None = None
    smooth: str = "auto"
    keep: str | None = None
    overrides: tuple[tuple[str, str], ...] = ()
    layout: str | None = None
    group_size: int | None = None
    zero_points: bool = False
    precondition: str = "off"
    settings: Mapping[str, str] = field(default_factory=dict)
    loras: tuple[tuple[Path, float], ...] = ()
    lora_mode: str = "merge"
    lora_partial: bool = False
    rank_cap: int | None = None
    overwrite: bool = False
    workers: int | None = None
    device: str = "cpu"
    encoder_scheme: str | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a stage is: "calibrate" counts denoising steps, "measure" layers, "convert" bytes
    read."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What quantizing one layer lost.

    weight_error: ||W' - W|| / ||W||, None where there is no W to compare with; output_error:
    ||Y' - Y|| / ||Y - mean Y|| on held calibration rows, activations quantized as the runtime
    does, None without calibration; seconds: of all layers of its group; scheme: its own, where a
    conversion mixes several.
    """

    name: str
    format: str
    shape: tuple[int, int]
    nbytes: int
    weight_error: float | None
    output_error: float | None = None
    seconds: float = 0.0
    scheme: str | None = None

    @property
    def error(self) -> float:
        """The error to rank layers by."""
        return self.weight_error or 0.0 if self.output_error is None else self.output_error


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did.

    weights: files inside the output that hold the tensors; files: all that it holds, with sizes and
    hashes; precondition: {first of the linears that read an input: kind}.
    """

    output: Path
    layers: tuple[LayerReport, ...]
    source_bytes: int
    output_bytes: int
    seconds: float
    peak_memory: int
    notes: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    precondition: Mapping[str, str] = field(default_factory=dict)

    @property
    def worst(self) -> LayerReport:
        """The layer that lost most, by output error where there is one."""
        return max(self.layers, key=lambda layer: layer.error)

    def mean(self, error: str) -> float | None:
        """Mean of "weight_error" or "output_error" over the layers that have one."""
        found = [getattr(layer, error) for layer in self.layers]
        found = [value for value in found if value is not None]
        return sum(found) / len(found) if found else None
