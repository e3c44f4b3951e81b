"""Errors that a user can cause, each with its cause, its place and the way out.

    DQConvertError              anything below; the command line prints it in one line and exits 1
    |-- UnknownName             a scheme, target, family or alias that does not exist
    |-- SourceError             a checkpoint that is missing, truncated or not what it should be
    |-- PlanError               a conversion that cannot be written; lists every problem
    |-- DataError               a tensor whose values cannot be quantized (NaN, infinity)
    |-- CalibrationError        prompts or a pipeline that cannot be run
    |-- OutputError             the output exists, the disk is full, a file cannot be written
    `-- MissingExtra            an optional package is not installed

Our own mistakes stay plain exceptions.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DQConvertError(Exception):
    """A problem of the user's input or machine."""


class SourceError(DQConvertError):
    """A checkpoint is missing, truncated or not what it should be."""


class DataError(DQConvertError):
    """A tensor holds values that cannot be quantized."""


class CalibrationError(DQConvertError):
    """The prompts or the pipeline cannot be run."""


class OutputError(DQConvertError):
    """The output cannot be written."""


class PlanError(DQConvertError):
    """A conversion that cannot be written as asked.

    problems: every reason found, one line each, each naming its layer.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(f"{len(self.problems)} problem(s); nothing was written{lines}")


class UnknownName(DQConvertError):
    """A name that no registry knows; proposes near ones.

    kind: what was looked up ("scheme"); name: as typed; known: all valid names.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, tuple(known)
        near = difflib.get_close_matches(name, self.known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(self.known)}"
        super().__init__(f"no {kind} is called '{name}'; {hint}")


class MissingExtra(DQConvertError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed; "
            f"run: pip install 'dqconvert[{extra}]'"
        )
