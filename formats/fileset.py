"""The files of one output, filled together: each tensor goes to the file that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dqconvert.formats.writer import StreamWriter
from dqconvert.quantizers.spec import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


class FileSet:
    """A context manager over one StreamWriter for each file; raises what they raise.

    files: {path: names of its tensors}; every tensor of infos is in exactly one of them.
    """

    def __init__(
        self,
        files: Mapping[Path, tuple[str, ...]],
        infos: Mapping[str, TensorInfo],
        metadata: Mapping[str, Any],
    ) -> None:
        if sorted(name for names in files.values() for name in names) != sorted(infos):
            raise ValueError("the files do not hold each tensor once")
        self._writers = {
            path: StreamWriter(path, {name: infos[name] for name in names}, metadata)
            for path, names in files.items()
        }
        self._of = {name: self._writers[path] for path, names in files.items() for name in names}
        self._stack = ExitStack()

    @property
    def digests(self) -> dict[Path, str]:
        """SHA-256 of each finished file."""
        return {path: writer.sha256 for path, writer in self._writers.items()}

    def write(self, name: str, tensor: Tensor, row: int | None = None) -> None:
        """See StreamWriter.write."""
        self._of[name].write(name, tensor, row)

    def __enter__(self) -> FileSet:
        with ExitStack() as stack:
            for writer in self._writers.values():
                stack.enter_context(writer)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)
