"""Checkpoint files read lazily, whatever container they are in: see header.py, gguf_header.py.

Bytes are read into fresh memory instead of being mapped, so that a checkpoint of any size leaves
no trace in the process's resident memory. Torch-free until read.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dqconvert.formats.header import Header
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.spec import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


class Container:
    """One or several files as one checkpoint.

    prefix: taken off the names; tensors without it are left out. Raises SourceError where a file
    is missing, truncated or in another container, or where two files hold a tensor of the same
    name.
    """

    def __init__(self, files: tuple[Path, ...], prefix: str = "") -> None:
        self.files, self.prefix = files, prefix
        self._headers = {path: self.header(path) for path in files}
        self._file_of: dict[str, Path] = {}
        for path, head in self._headers.items():
            for name in head.extents:
                if name in self._file_of:
                    raise SourceError(f"{path}: tensor {name} is also in {self._file_of[name]}")
                self._file_of[name] = path

    @staticmethod
    @abstractmethod
    def header(path: Path) -> Header:
        """A file's header."""

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What the headers say, in file order."""
        return {
            name.removeprefix(self.prefix): extent.info
            for head in self._headers.values()
            for name, extent in head.extents.items()
            if name.startswith(self.prefix)
        }

    @property
    def outside(self) -> int:
        """How many tensors lack the prefix."""
        return len(self._file_of) - len(self.infos)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The first file's metadata."""
        return next(iter(self._headers.values())).metadata

    def where(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._file_of[self.prefix + name]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor as it is stored, or its rows start .. stop, in fresh memory.

        Raises SourceError if bytes lack.
        """
        import torch

        from dqconvert.quantizers.tensors import TORCH_DTYPES

        info = self.infos[name].stored
        shape = info.shape if rows is None else (rows[1] - rows[0], *info.shape[1:])
        out = torch.empty(shape, dtype=TORCH_DTYPES[info.dtype])
        self.fill(name, out, rows)
        return out

    def stored(self, name: str) -> bytes:
        """The bytes of a small tensor as they lie in the file, without torch."""
        path = self.where(name)
        extent = self._headers[path].extents[self.prefix + name]
        out = bytearray(extent.info.nbytes)
        _fill(path, extent.offset, memoryview(out))
        return bytes(out)

    def fill(self, name: str, out: Tensor, rows: tuple[int, int] | None = None) -> None:
        """The same into a contiguous tensor of its dtype and size; SourceError if bytes lack."""
        import torch

        path = self.where(name)
        extent = self._headers[path].extents[self.prefix + name]
        stored = extent.info.stored
        start = 0 if rows is None else rows[0]
        row = stored.nbytes // max(stored.shape[0] if stored.shape else 1, 1)
        _fill(path, extent.offset + start * row, out.view(-1).view(torch.uint8).numpy().data)


class Held(Protocol):
    """What is asked of a checkpoint that another is made of."""

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    @property
    def files(self) -> tuple[Path, ...]: ...

    def where(self, name: str) -> Path: ...


class Derived:
    """A checkpoint that is another one, read otherwise."""

    source: Held

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The first file's metadata."""
        return self.source.metadata

    @property
    def files(self) -> tuple[Path, ...]:
        """The files read."""
        return self.source.files

    def where(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.source.where(name)


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
