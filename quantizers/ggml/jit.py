"""numba where it is installed: how kernels are compiled, and where the results are kept."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def available() -> bool:
    """Whether kernels can be compiled."""
    return importlib.util.find_spec("numba") is not None


def kernel(function: F) -> F:
    """A function for numba to compile when it is first called; the machine code is kept on disk.

    Floats are IEEE 754's: no contraction, no reassociation. Division by zero gives infinity, as
    in C, instead of an error, and the interpreter's lock is released.
    """
    import numba

    options = {"nogil": True, "error_model": "numpy", "fastmath": False}
    try:
        return cast(F, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # no folder to keep it in
        return cast(F, numba.njit(**options)(function))
