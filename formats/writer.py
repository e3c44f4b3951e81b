"""A safetensors or GGUF file written while it is computed (see header.py and gguf_header.py).

The header goes down first, and zeros where tensors leave room between them; tensors fill their
places in any order, from any thread. The file carries the suffix `.partial` until every byte is
accounted for, and is hashed as it grows.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dqconvert.formats import gguf_header, header
from dqconvert.formats.hashing import FollowingHash
from dqconvert.quantizers.errors import OutputError
from dqconvert.quantizers.spec import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


class StreamWriter:
    """Fills a file whose tensors are known beforehand; GGUF where its name ends in .gguf.

    Used as a context manager: leaving it without an exception checks that every tensor was
    written, flushes to the disk and renames; leaving it with one deletes the file. The space is
    reserved at once, so that a full disk is noticed before the work. Raises OutputError.
    """

    def __init__(
        self, path: Path, infos: Mapping[str, TensorInfo], metadata: Mapping[str, Any]
    ) -> None:
        self.path = path
        self._partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        encode = gguf_header.encode if path.suffix == ".gguf" else header.encode
        self._start, self._header = encode(infos, metadata)
        self._missing = {name: info.nbytes for name, info in infos.items()}
        self._lock = threading.Lock()
        self._fd = -1
        self._hash: FollowingHash | None = None

    @property
    def sha256(self) -> str:
        """SHA-256 of the finished file, in hexadecimal."""
        assert self._hash is not None
        return self._hash.digest()

    def __enter__(self) -> StreamWriter:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
            self._fd = os.open(self._partial, flags, 0o644)
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(self._fd, 0, self._header.size)
            self._hash = FollowingHash(self._fd, self._header.size)
            self._put(memoryview(self._start), 0)
            for offset, size in self._gaps():
                self._put(memoryview(bytes(size)), offset)
        except OSError as error:
            self._discard()
            raise self._failed(error) from error
        return self

    def write(self, name: str, tensor: Tensor, row: int | None = None) -> None:
        """Put one tensor into its place, or some rows of it that begin at row.

        Of ggml's block types, the bytes: uint8 [..., row bytes]. What is not as promised, or
        comes twice, is our own mistake: ValueError.
        """
        from dqconvert.quantizers.tensors import DTYPE_NAMES

        extent = self._header.extents[name]
        found = TensorInfo(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        promised = extent.info.stored
        if row is not None:
            promised = TensorInfo(promised.dtype, (found.shape[0], *promised.shape[1:]))
        if found != promised:
            raise ValueError(f"{name}: promised {promised}, computed {found}")
        with self._lock:
            self._missing[name] = self._missing.get(name, 0) - found.nbytes
            if self._missing[name] < 0 or (row is None and self._missing[name]):
                raise ValueError(f"{name}: written twice")
            if not self._missing[name]:
                del self._missing[name]
        if not found.nbytes:
            return
        import torch

        start = 0 if row is None else row * (found.nbytes // found.shape[0])
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        try:
            self._put(data, extent.offset + start)
        except OSError as error:
            raise self._failed(error) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._discard()
            return
        if self._missing:
            self._discard()
            raise ValueError(f"{len(self._missing)} tensors were never written: {[*self._missing]}")
        try:
            os.fsync(self._fd)
            if self._hash is not None:
                self._hash.digest()
            fd, self._fd = self._fd, -1
            os.close(fd)
            self._partial.replace(self.path)
        except OSError as problem:
            self._discard()
            raise self._failed(problem) from problem

    def _gaps(self) -> Iterator[tuple[int, int]]:
        """Where no tensor will be: offsets and sizes."""
        end = len(self._start)
        for extent in sorted(self._header.extents.values(), key=lambda extent: extent.offset):
            if extent.offset > end:
                yield end, extent.offset - end
            end = max(end, extent.offset + extent.info.nbytes)
        if self._header.size > end:
            yield end, self._header.size - end

    def _put(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], offset + done)
        if self._hash is not None:
            self._hash.written(offset, len(data))

    def _discard(self) -> None:
        if self._hash is not None:
            self._hash.stop()
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1
        self._partial.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self.path}: {error.strerror}; {self._header.size / 1e9:.2f} GB are needed there"
        )
