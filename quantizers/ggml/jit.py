"""numba where it is installed: how kernels are compiled, and where the results are kept."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])
_ONE = threading.Lock()


def available() -> bool:
    """Whether kernels can be compiled."""
    return importlib.util.find_spec("numba") is not None


def kernel(function: F) -> F:
    """A function for numba to compile when it is first called; the machine code is kept on disk.

    Kernels that call it have it inlined: a call counts the references of all arrays that it
    passes, which costs more than many a kernel does. Floats are IEEE 754's: no contraction, no
    reassociation. Division by zero gives infinity, as in C, instead of an error, and the
    interpreter's lock is released.
    """
    import numba

    options = {"nogil": True, "error_model": "numpy", "forceinline": True}
    with _ONE:  # the folder is a setting of all of numba, read when a function is wrapped
        before = numba.config.CACHE_DIR
        try:
            numba.config.CACHE_DIR = str(folder())
            return cast(F, numba.njit(cache=True, **options)(function))
        except (OSError, RuntimeError):  # no folder to keep it in
            return cast(F, numba.njit(**options)(function))
        finally:
            numba.config.CACHE_DIR = before


@cache
def folder() -> Path:
    """Where the machine code of these very sources is kept, $NUMBA_CACHE_DIR or the user's cache.

    numba would take code for current as long as the file of the kernel that calls others is.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    base = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "dqconvert" / "kernels" / digest.hexdigest()[:16]
