"""What a checkpoint is, from its headers alone. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqconvert.converter.dequantized import DequantizedSource
from dqconvert.converter.detect import some, unknown
from dqconvert.converter.generic import is_generic
from dqconvert.converter.opening import open_model
from dqconvert.converter.reopen import NoFamily, reopen
from dqconvert.converter.resolve import TRANSFORMER, folder_of, is_folder_of_one, read_json
from dqconvert.formats.gguf_readers import readers
from dqconvert.formats.gguf_source import GGUFSource, decoded_types
from dqconvert.formats.source import Source, open_source
from dqconvert.formats.targets import recognize
from dqconvert.formats.words import told
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.spec import TensorInfo

BY_NAMES = "no family that is known: linears are told by their names alone"


@dataclass(frozen=True, slots=True)
class Inspection:
    """facts: one line each, by name; formats: layers (or tensors) by format; problems."""

    facts: dict[str, str]
    formats: dict[str, int]
    problems: tuple[str, ...] = ()


def inspect(path: Path) -> Inspection:
    """Look at a quantized file of ours, or at a checkpoint to be quantized.

    Raises SourceError if it is neither.
    """
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    inside = (path / "model_index.json").exists() or is_folder_of_one(path)
    weights = path / folder_of(path, TRANSFORMER) if inside else path
    try:
        source = open_source(weights)
    except SourceError as error:
        return _in_parts(path, error)
    beside = source.files[0].parent / "config.json"
    config = read_json(beside) if beside.exists() else {}
    if recognize(source.infos, told(source), config) or decoded_types(source):
        try:
            return _quantized(path)
        except NoFamily:  # in names that the runtime does not read
            pass
        except SourceError as error:  # in a way that the runtime does not write
            return _read(weights, source, config, error)
    return _read(weights, source, config)


def _read(
    weights: Path, source: Source, config: Mapping[str, Any], error: SourceError | None = None
) -> Inspection:
    """A checkpoint as it would be converted; error: why no runtime's layout explains it, which is
    raised where nothing else does."""
    try:
        found = open_model(weights, config)
    except SourceError as other:
        raise error or other from None
    facts = {
        "family": found.family.title,
        **_variant(found.family.variant(found.infos, config)),
        "dialect": found.dialect,
        "files": ", ".join(file.name for file in source.files),
        "tensors": str(len(source.infos)),
        "size": _size(source.infos.values()),
        "config": ", ".join(
            f"{key} {value}"
            for key, value in found.family.config_of(found.infos).items()
            if not key.startswith("_")
        ),
    }
    if found.ignored:
        facts["ignored"] = f"{found.ignored} tensors of other components"
    strange = unknown(found)
    if strange:
        facts["unknown"] = f"{len(strange)} tensors, kept as they are: {some(strange)}"
    notes = [*found.notes, *([BY_NAMES] if is_generic(found.family) else [])]
    notes += [str(error)] if error else []
    facts |= {f"note {number}": note for number, note in enumerate(notes, start=1)}
    held = dict.fromkeys(at.tensor for at in found.origins.values())
    read = [name for name in held if name in source.infos] or source.infos
    types = Counter(source.infos[name].dtype for name in read)
    return Inspection(facts, dict(types))


def _in_parts(path: Path, error: SourceError) -> Inspection:
    """An output of several files, such as one for each block; the error where it is none."""
    try:
        return _quantized(path)
    except SourceError:
        raise error from None


def _quantized(path: Path) -> Inspection:
    try:
        found = reopen(path)
    except SourceError:
        if path.suffix != ".gguf":
            raise
        return _stranger(path)
    infos = found.source.infos
    facts = {
        "family": found.family.title,
        **_variant(found.family.variant(DequantizedSource(found).infos, found.config)),
        "dialect": found.dialect,
        "target": found.target.NAME,
        "scheme": found.recognized.scheme or "none for all layers",
        "files": ", ".join(file.name for file in found.source.files),
        "tensors": str(len(infos)),
        "size": _size(infos.values()),
    }
    if found.recognized.rank:
        facts["rank"] = str(found.recognized.rank)
    metadata = found.source.metadata
    facts |= _said(metadata)
    formats = Counter(
        f"{layer.form.spec.code} {'modulation' if layer.form.splits else 'linear'}"
        for layer in found.layers
    )
    formats["kept"] = len(found.kept)
    if found.path.suffix == ".gguf":
        facts |= {f"read by {name}": said for name, said in readers(infos, metadata).items()}
    problems = [*found.problems(), *(f"{name}: missing" for name in found.missing())]
    return Inspection(facts, dict(formats), tuple(problems))


def _stranger(path: Path) -> Inspection:
    """A GGUF file of a model that is not known: what its header says, and who can read it."""
    source = GGUFSource((path,))
    infos, metadata = source.infos, source.metadata
    facts = {"family": "not known", "files": path.name, "tensors": str(len(infos))}
    facts |= {"size": _size(infos.values()), **_said(metadata)}
    facts |= {f"read by {name}": said for name, said in readers(infos, metadata).items()}
    return Inspection(facts, dict(Counter(info.dtype for info in infos.values())))


def _variant(name: str) -> dict[str, str]:
    """Which of the family's models it is, where there are several."""
    return {"variant": name} if name else {}


def _said(metadata: Mapping[str, Any]) -> dict[str, str]:
    return {f"metadata {key}": _short(str(value)) for key, value in metadata.items()}


def _size(infos: Iterable[TensorInfo]) -> str:
    return f"{sum(info.nbytes for info in infos) / 1e9:.3f} GB"


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."
