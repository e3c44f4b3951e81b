"""Checkpoints read lazily: headers at once, each tensor when asked for. Torch-free until read.

Bytes are read into fresh memory instead of being mapped, so that a checkpoint of any size leaves
no trace in the process's resident memory.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dqconvert.formats import header
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.spec import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

INDEX_SUFFIX = ".safetensors.index.json"
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
_OTHER_FORMATS = {".gguf", ".pt", ".pth", ".ckpt", ".bin", ".sft"}


class Source(Protocol):
    """A checkpoint: what it holds, and how to read it."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...

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


class SafetensorsSource:
    """One or several safetensors files as one checkpoint.

    prefix: taken off the names; tensors without it are left out. Raises SourceError where a file
    is missing, truncated or no safetensors, or where two files hold a tensor of the same name.
    """

    def __init__(self, files: tuple[Path, ...], prefix: str = "") -> None:
        self.files, self._prefix = files, prefix
        self._headers = {path: header.read(path) for path in files}
        self._file_of: dict[str, Path] = {}
        for path, head in self._headers.items():
            for name in head.extents:
                if name in self._file_of:
                    raise SourceError(f"{path}: tensor {name} is also in {self._file_of[name]}")
                self._file_of[name] = path

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What the headers say, in file order."""
        return {
            name.removeprefix(self._prefix): extent.info
            for head in self._headers.values()
            for name, extent in head.extents.items()
            if name.startswith(self._prefix)
        }

    @property
    def metadata(self) -> Mapping[str, str]:
        """The first file's metadata."""
        return next(iter(self._headers.values())).metadata

    def where(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._file_of[self._prefix + name]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or its rows start .. stop, in fresh memory; SourceError if bytes lack."""
        import torch

        from dqconvert.quantizers.tensors import TORCH_DTYPES

        info = self.infos[name]
        shape = info.shape if rows is None else (rows[1] - rows[0], *info.shape[1:])
        out = torch.empty(shape, dtype=TORCH_DTYPES[info.dtype])
        self.fill(name, out, rows)
        return out

    def fill(self, name: str, out: Tensor, rows: tuple[int, int] | None = None) -> None:
        """The same into a contiguous tensor of its dtype and size; SourceError if bytes lack."""
        import torch

        path = self.where(name)
        extent = self._headers[path].extents[self._prefix + name]
        start = 0 if rows is None else rows[0]
        row = extent.info.nbytes // max(extent.info.shape[0] if extent.info.shape else 1, 1)
        _fill(path, extent.offset + start * row, out.view(-1).view(torch.uint8).numpy().data)


def _fill(path: Path, offset: int, target: memoryview) -> None:
    try:
        with path.open("rb", buffering=0) as file:
            done = 0
            while done < len(target):
                count = os.preadv(file.fileno(), [target[done:]], offset + done)
                if count == 0:
                    raise SourceError(f"{path}: became shorter while it was being read")
                done += count
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from error


def open_source(path: Path) -> Source:
    """The checkpoint at a path: a safetensors file, an index, or a folder of either.

    Raises SourceError that names what is missing.
    """
    if path.is_dir():
        return SafetensorsSource(_files_in(path))
    if path.name.endswith(INDEX_SUFFIX):
        return SafetensorsSource(_indexed(path))
    if path.suffix in _OTHER_FORMATS:
        raise SourceError(f"{path}: {path.suffix} files cannot be read; give a .safetensors file")
    if not path.exists():
        raise SourceError(f"{path}: no such file")
    return SafetensorsSource((path,))


def _files_in(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a folder that holds one checkpoint."""
    indexes = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if len(indexes) == 1:
        return _indexed(indexes[0])
    found = sorted(folder.glob("*.safetensors"))
    sets = {_SHARD.sub(r" of \2", path.name) for path in found}
    if len(sets) == 1 and _SHARD.search(found[0].name):
        return _complete(folder, found)
    if len(found) == 1 and not indexes:
        return (found[0],)
    if not found and not indexes:
        raise SourceError(f"{folder}: holds no .safetensors file")
    names = ", ".join(path.name for path in [*indexes, *found])
    raise SourceError(f"{folder}: holds several checkpoints ({names}); name one of them")


def _indexed(index: Path) -> tuple[Path, ...]:
    """The shards that an index names; SourceError lists those that are missing."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
        files = tuple(index.parent / name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{index}: not a safetensors index ({error})") from error
    _all_there(index, files)
    source = SafetensorsSource(files)
    lost = [name for name in weight_map if name not in source.infos]
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
