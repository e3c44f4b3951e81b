"""An output folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path
from types import TracebackType

from dqconvert.quantizers.errors import OutputError

MANIFEST = "dqconvert.json"


class OutputFolder:
    """A context manager that yields a working folder beside the final one.

    Leaving it without an exception renames the working folder to the final name, replacing what
    is there if overwrite was asked for; leaving it with one deletes it. Raises OutputError where
    the output exists or cannot be made.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        self.path = path = path.resolve() if path.is_symlink() else path
        self._overwrite = overwrite
        self._working = path.parent / f"{path.name}.{os.getpid()}.partial"
        self._made: list[Path] = []

    def check(self) -> None:
        """Refuse early what would be refused at the end."""
        if not self.path.exists():
            return
        if not self._overwrite:
            raise OutputError(f"{self.path}: exists; choose another -o, or give --overwrite")
        if not (self.path / MANIFEST).exists():
            raise OutputError(
                f"{self.path}: was not written by dqconvert, so --overwrite will not replace it"
            )
        found = (path for path in self.path.rglob("*") if not path.is_dir())
        foreign = sorted({path.relative_to(self.path).as_posix() for path in found} - self._ours())
        if foreign:
            raise OutputError(
                f"{self.path}: holds {foreign[0]}, which dqconvert did not write and --overwrite "
                "would delete; move it away"
            )

    def _ours(self) -> set[str]:
        """Files that the manifest of an earlier output names, and those that go with it."""
        try:
            said = json.loads((self.path / MANIFEST).read_text())["files"]
        except (OSError, ValueError, KeyError, TypeError):
            said = ()
        return {MANIFEST, "README.md", *(said if isinstance(said, dict) else ())}

    def __enter__(self) -> Path:
        self.check()
        self._made = [parent for parent in self.path.parents if not parent.exists()]
        try:
            self._working.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror}") from error
        return self._working

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            shutil.rmtree(self._working, ignore_errors=True)
            for parent in self._made:  # the innermost first
                with contextlib.suppress(OSError):
                    parent.rmdir()
            return
        try:
            self.check()  # it may have appeared meanwhile
            self._exchange()
        except OSError as problem:
            taken = problem.errno in (errno.EEXIST, errno.ENOTEMPTY)
            reason = "appeared meanwhile; choose another -o" if taken else problem.strerror
            raise OutputError(f"{self.path}: {reason}") from problem
        finally:
            shutil.rmtree(self._working, ignore_errors=True)

    def _exchange(self) -> None:
        """Put the working folder into its place; what was there returns if that fails."""
        old = self._working.with_suffix(".old")
        if self.path.exists():
            self.path.rename(old)
        try:
            self._working.rename(self.path)
        except OSError:
            if old.exists():
                old.rename(self.path)
            raise
        shutil.rmtree(old, ignore_errors=True)
