"""Importance matrices: what a file of llama.cpp or stable-diffusion.cpp knows of the inputs.

It has the mean square of each input channel under the name of the weight in a GGUF file. Read,
it stands for statistics that know no more than that; written, it is made of ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dqconvert.converter.canonical import CanonicalSource, entries_of
from dqconvert.converter.family import fill
from dqconvert.converter.plan import Plan
from dqconvert.formats import imatrix
from dqconvert.formats.targets import gguf
from dqconvert.quantizers.errors import OutputError, PlanError
from dqconvert.quantizers.tensors import LayerStats

Stats = Mapping[str, LayerStats]

PREFIXES = ("", "model.diffusion_model.", "text_encoders.t5xxl.transformer.")
"""What programs put before the names of a GGUF file."""


def read(path: Path, plan: Plan) -> tuple[Stats, int]:
    """Statistics by canonical site from a file, and how many quantized layers it does not know.

    Raises SourceError where the file is broken, PlanError where it is another model's.
    """
    found = imatrix.read(path)
    stats: dict[str, LayerStats] = {}
    problems, unknown, layers = [], 0, [layer for layer in plan.layers if layer.form]
    for layer in layers:
        values = next(
            (v for p in PREFIXES if (v := found.get(f"{p}{layer.name}.weight")) is not None), None
        )
        assert layer.form is not None
        if values is None:
            unknown += 1
        elif values.shape != layer.form.shape[1:]:
            problems.append(
                f"{path}: {layer.name} has {layer.form.shape[1]} inputs, the file {len(values)}"
            )
        else:
            stats[layer.site] = _known(values)
    if problems:
        raise PlanError(problems)
    if not stats:
        raise PlanError([f"{path}: knows none of the layers; is it another model's?"])
    return stats, unknown


def check(path: Path) -> None:
    """Find out before the work whether it can be written. OutputError otherwise."""
    if path.suffix not in (".dat", ".gguf"):
        raise OutputError(f"{path}: must end in .dat or .gguf")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path.parent}: no such folder")


def write(path: Path, source: CanonicalSource, stats: Stats) -> None:
    """The mean squares of a model's calibration, by weight.

    In .dat under the names of stable-diffusion.cpp, its only reader for such models; in .gguf
    under those of the GGUF file, as llama-quantize looks for them.
    """
    prefix = "" if path.suffix == ".gguf" else PREFIXES[1]
    values = {
        prefix + name: stats[site].mean_square.float()
        for name, site in _sites(source)
        if site in stats
    }
    imatrix.write(path, values)


def _sites(source: CanonicalSource) -> Iterator[tuple[str, str]]:
    """Weights by their names in a GGUF file, and the canonical linears where they are observed."""
    family = source.family
    for entry, index in entries_of(
        family, family.dialect_of(gguf.NAME, gguf.DIALECT), source.infos
    ):
        module = fill(entry.ours[0], index).removesuffix(".*")
        row = family.linear(module) if entry.theirs.endswith(".*") else None
        if row is not None:
            name = fill(entry.theirs, index).removesuffix(".*")
            yield f"{name}.weight", fill(row[0].site or row[0].name, row[1])


def _known(mean_square: Tensor) -> LayerStats:
    """Statistics that know the mean squares [K] alone."""
    width = len(mean_square)
    zeros = torch.zeros(width)
    return LayerStats(0, mean_square.sqrt(), zeros, mean_square, None, torch.empty(0, width))
