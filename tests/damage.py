"""Files of a target with one tensor missing or wrong, for the tests of what it says of them."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from dqconvert.formats.targets import Target
from dqconvert.quantizers.spec import Scheme, TensorInfo

samples = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("samples.py"))))

Infos = dict[str, TensorInfo]


def damages(infos: Infos, optional: frozenset[str]) -> Iterator[tuple[str, Infos]]:
    """(name of a tensor, header where it is missing or of other dtype or shape).

    optional: suffixes of tensors that a layer may lack.
    """
    for name, info in infos.items():
        suffix = name.rpartition(".")[2]
        if name == "norm.weight" or suffix == "bias":
            continue
        if suffix not in optional:
            yield name, {key: value for key, value in infos.items() if key != name}
        for wrong in (replace(info, dtype="F64"), replace(info, shape=(*info.shape, 7))):
            yield name, infos | {name: wrong}


def unnamed(
    runtime: Target, scheme: Scheme, layout: str, optional: frozenset[str] = frozenset()
) -> list[str]:
    """Damaged tensors that no line of the target's report names."""
    context, infos = samples.context_of(runtime, scheme, layout)
    metadata, config = runtime.metadata(context), runtime.config(context) or {}
    missed = []
    for name, broken in damages(infos, optional):
        file = runtime.recognize(broken, metadata, config)
        layer = name.rpartition(".")[0]
        if file is None or not any(line.startswith(f"{layer}.") for line in file.problems):
            missed.append(name)
    return missed
