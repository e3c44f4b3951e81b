"""Checkpoints read lazily: headers at once, each tensor when asked for. Torch-free until read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dqconvert.formats import header
from dqconvert.formats.container import Container
from dqconvert.formats.gguf_source import Decoded, GGUFSource
from dqconvert.formats.pickle_source import ENDINGS as PICKLES
from dqconvert.formats.pickle_source import PickleSource
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.spec import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

INDEX_SUFFIX = ".safetensors.index.json"
BIN_INDEX = ".bin.index.json"
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
_VARIANT = re.compile(r"\.(fp16|fp32|bf16|fp8|non_ema)(?=[.-])")
GGUF_SUFFIX = ".gguf"


class Source(Protocol):
    """A checkpoint: what it holds, and how to read it.

    Sources that decode also have kept, {name: dtype that a tensor has where it stays unquantized},
    and notes for the user: see kept_dtypes and notes_of.
    """

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    @property
    def files(self) -> tuple[Path, ...]: ...

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or its rows start .. stop, in fresh memory."""
        ...

    def fill(self, name: str, out: Tensor, rows: tuple[int, int] | None = None) -> None:
        """The same into a contiguous tensor of its dtype and size."""
        ...

    def where(self, name: str) -> Path:
        """The file that holds a tensor."""
        ...


class SafetensorsSource(Container):
    """Safetensors files as one checkpoint; see Container."""

    @staticmethod
    def header(path: Path) -> header.Header:
        """See header.read."""
        return header.read(path)


def kept_dtypes(source: Source) -> Mapping[str, str]:
    """The dtype that decoded tensors have where they stay unquantized; read() may be wider."""
    found: Mapping[str, str] = getattr(source, "kept", {})
    return found


def notes_of(source: Source) -> tuple[str, ...]:
    """What the user should know of how a checkpoint is read."""
    found: tuple[str, ...] = getattr(source, "notes", ())
    return found


def open_source(path: Path) -> Source:
    """The checkpoint at a path: a safetensors, GGUF or torch file, an index, or a folder of these.

    GGUF is decoded. Raises SourceError that names what is missing.
    """
    if path.is_dir():
        files = _files_in(path)
    elif path.name.endswith((INDEX_SUFFIX, BIN_INDEX)):
        files = _indexed(path)
    elif not path.exists():
        raise SourceError(f"{path}: no such file")
    else:
        files = (path,)
    return _opened(files)


def _opened(files: tuple[Path, ...]) -> Source:
    if any(file.suffix == GGUF_SUFFIX for file in files):
        return Decoded(GGUFSource(files))
    if any(file.suffix in PICKLES for file in files):
        return PickleSource(files)
    return SafetensorsSource(files)


def _files_in(folder: Path) -> tuple[Path, ...]:
    """The files of a folder that holds one checkpoint: torch files only where there is no other."""
    indexes = _plain(folder.glob("*.safetensors.index*.json"))
    blocks = sorted(folder.glob(f"*{GGUF_SUFFIX}"))
    if len(indexes) == 1 and not blocks:
        return _indexed(indexes[0])
    found = _plain(path for end in (".safetensors", ".sft") for path in folder.glob(f"*{end}"))
    if not (indexes or found or blocks):
        indexes = _plain(folder.glob(f"*{BIN_INDEX}"))
        found = _plain(path for end in PICKLES for path in folder.glob(f"*{end}"))
        if len(indexes) == 1:
            return _indexed(indexes[0])
    sets = {_SHARD.sub(r" of \2", path.name) for path in found}
    if len(sets) == 1 and _SHARD.search(found[0].name) and not blocks:
        return _complete(folder, found)
    files = [*indexes, *found, *blocks]
    if not files:
        raise SourceError(f"{folder}: holds no .safetensors file and no .gguf file")
    if len(files) == 1 and not indexes:
        return (files[0],)
    names = ", ".join(path.name for path in files)
    raise SourceError(f"{folder}: holds several checkpoints ({names}); name one of them")


def _plain(paths: Iterable[Path]) -> list[Path]:
    """Files by name, without the variants (x.fp16.safetensors) of sets that are there as well."""
    found = sorted(paths)
    sets = {path: _SHARD.sub(".safetensors", _VARIANT.sub("", path.name)) for path in found}
    plain = {name for path, name in sets.items() if not _VARIANT.search(path.name)}
    return [path for path in found if not _VARIANT.search(path.name) or sets[path] not in plain]


def _indexed(index: Path) -> tuple[Path, ...]:
    """The shards that an index names; SourceError lists those that are missing."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
        files = tuple(index.parent / name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{index}: not a safetensors index ({error})") from error
    _all_there(index, files)
    held = _opened(files).infos
    lost = [name for name in weight_map if name not in held]
    if lost:
        raise SourceError(f"{index}: names {lost[0]}, which is in none of its shards")
    return files


def _complete(folder: Path, shards: list[Path]) -> tuple[Path, ...]:
    """All shards of an unindexed set, by the numbers in their names."""
    match = _SHARD.search(shards[0].name)
    assert match is not None
    stem = shards[0].name[: match.start()]
    total = int(match[2])
    files = tuple(
        folder / f"{stem}-{number:05}-of-{total:05}.safetensors" for number in range(1, total + 1)
    )
    _all_there(folder, files)
    return files


def _all_there(origin: Path, files: tuple[Path, ...]) -> None:
    missing = [path.name for path in files if not path.exists()]
    if missing:
        raise SourceError(f"{origin}: missing shard {', '.join(missing)}; download it again")
