"""`dqconvert verify` of what --component all wrote: every quantized part of a pipeline's folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dqconvert.converter.components import components
from dqconvert.converter.manifest_reader import read_manifest
from dqconvert.converter.resolve import INDEX, TRANSFORMER, read_json
from dqconvert.converter.verify import Verdict, changed, verify
from dqconvert.formats.folder import MANIFEST


def verify_any(out: Path, against: str | None = None) -> Verdict:
    """Check a file, a folder, or a pipeline with all its quantized parts.

    against: the model, or the pipeline, that it was made from.
    """
    parts = _quantized(out)
    if parts in ([], [TRANSFORMER]):
        return verify(out, against)
    verdicts = {name: verify(out / name, against) for name in parts}
    first = next(iter(verdicts.values()))
    seen = {
        f"{part}/{name}" for part in parts for name in read_manifest(out / part / MANIFEST).files
    }
    files = read_manifest(out / MANIFEST).files
    rest = {name: digest for name, digest in files.items() if name not in seen}
    problems = list(changed(out, rest))
    problems += [f"{part}: {problem}" for part, one in verdicts.items() for problem in one.problems]
    layers = [
        replace(layer, name=f"{part}.{layer.name}")
        for part, one in verdicts.items()
        for layer in one.layers
    ]
    title = "; ".join(f"{part}: {one.title}" for part, one in verdicts.items())
    return Verdict(title, first.target, first.scheme, tuple(layers), tuple(problems))


def _quantized(out: Path) -> list[str]:
    """The parts of a pipeline that have a manifest, or a config that says a quantization."""
    if not (out / INDEX).is_file():
        return []
    return [name for name in components(out) if any(_signs(out / name))]


def _signs(folder: Path) -> Iterator[bool]:
    yield (folder / MANIFEST).exists()
    config = folder / "config.json"
    yield config.exists() and "quantization_config" in read_json(config)
