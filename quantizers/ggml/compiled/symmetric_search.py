"""The search for a symmetric scale, of many sub-blocks at once (ggml-quants.c, make_qx_quants).

n weights x get levels l in -top .. top - 1 and a scale, so that the sum of w (x - scale l)^2 is
small. The inverse scales that ggml tries are -(top + s / 10) / m, where m is the first weight of
largest magnitude: s = 0, then -9 .. 9 without 0. Each rounds the weights to levels, least squares
fits a scale to them, and the fit that explains most of the weights wins.

Lanes. Sub-blocks stand side by side: a tile is float32 [n, LANES] in C order, and tile[i, lane] is
number i of sub-block `lane`. A lane does ggml's arithmetic in ggml's order, so its result depends
on its own column alone: unused lanes may hold any finite numbers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dqconvert.quantizers.ggml.compiled.floats import nearest
from dqconvert.quantizers.ggml.jit import kernel

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Integers = NDArray[np.int32]

LANES = 128
SMALLEST = np.float32(1e-15)
"""Sub-blocks without a larger magnitude are zeros (GROUP_MAX_EPS)."""

_ZERO = np.float32(0)
_TENTH = np.float32(0.1)
_STEPS = tuple((s, s + 1) if s != -1 else (-1, 1) for s in (-9, -7, -5, -3, -1, 2, 4, 6, 8))


class Fit(NamedTuple):
    """What the search keeps of each lane, float32 [LANES] each.

    scale and inverse are its result: the fitted scale, and the inverse scale that rounds to the
    winner's levels (see levels). Both are 0 where a lane holds zeros. Two inverse scales are tried
    at a time: tried, and the sums lx of w x l and ll of w l l, are [2, LANES].
    """

    scale: Floats
    inverse: Floats
    extreme: Floats
    best: Floats
    tried: Floats
    lx: Floats
    ll: Floats


def fit() -> Fit:
    """Room for a search."""
    one, two = aligned((4, LANES)), aligned((3, 2, LANES))
    return Fit(one[0], one[1], one[2], one[3], two[0], two[1], two[2])


def aligned(shape: tuple[int, ...]) -> Floats:
    """An empty float32 array that starts with a cache line: vectors of 64 bytes do not straddle."""
    count = math.prod(shape)
    buffer = np.empty(count + 16, np.float32)
    start = -buffer.ctypes.data % 64 // 4
    return buffer[start : start + count].reshape(shape)


@kernel
def search(x: Floats, weights: Floats, moments: Floats, top: int, found: Fit) -> None:
    """Fills found for the tiles x and weights; the tile moments is scratch."""
    extremes(x, found.extreme)
    for i in range(x.shape[0]):
        for j in range(LANES):
            moments[i, j] = weights[i, j] * x[i, j]
    _try(x, weights, moments, top, (0, 0), found)
    for j in range(LANES):
        lx, ll = found.lx[0, j], found.ll[0, j]
        found.scale[j] = lx / ll if ll != _ZERO else _ZERO
        found.best[j] = found.scale[j] * lx
        found.inverse[j] = found.tried[0, j]
    for first, second in _STEPS:
        _try(x, weights, moments, top, (first, second), found)
        _choose(found.tried[0], found.lx[0], found.ll[0], found)
        _choose(found.tried[1], found.lx[1], found.ll[1], found)
    for j in range(LANES):
        empty = abs(found.extreme[j]) < SMALLEST
        found.scale[j] = _ZERO if empty else found.scale[j]


@kernel
def extremes(x: Floats, extreme: Floats) -> None:
    """extreme[lane] = the first number of largest magnitude of a lane."""
    for j in range(LANES):
        extreme[j] = _ZERO
    for i in range(x.shape[0]):
        for j in range(LANES):
            extreme[j] = x[i, j] if abs(x[i, j]) > abs(extreme[j]) else extreme[j]


@kernel
def levels(x: Floats, found: Fit, top: int, out: Bytes) -> None:
    """out uint8 [n, LANES] = the levels + top that the search found; 0 where lanes hold zeros."""
    extreme, inverse = found.extreme, found.inverse
    least, most = np.int32(-top), np.int32(top - 1)
    for i in range(x.shape[0]):
        for j in range(LANES):
            level = min(max(nearest(inverse[j] * x[i, j]), least), most) - least
            out[i, j] = np.uint8(level if abs(extreme[j]) >= SMALLEST else np.int32(0))


@kernel
def _open(row: int, numerator: np.float32, found: Fit) -> None:
    """The inverse scale of every lane; no sums yet."""
    for j in range(LANES):
        found.tried[row, j] = numerator / found.extreme[j]
        found.lx[row, j] = _ZERO
        found.ll[row, j] = _ZERO


@kernel
def _clip(level: np.float32, least: np.float32, most: np.float32) -> np.float32:
    """level within its limits; the least for NaN, so that a weight of 0 leaves it out."""
    level = level if level > least else least
    return level if level < most else most


@kernel
def _try(
    x: Floats, weights: Floats, moments: Floats, top: int, steps: tuple[int, int], found: Fit
) -> None:
    """The sums of w x l and w l l for the levels of two inverse scales."""
    least, most = -np.float32(top), np.float32(top - 1)
    for row in range(2):
        numerator = np.float32(np.float32(top) + _TENTH * np.float32(steps[row]))
        _open(row, -numerator, found)
    a, b = found.tried[0], found.tried[1]
    a_lx, a_ll, b_lx, b_ll = found.lx[0], found.ll[0], found.lx[1], found.ll[1]
    for i in range(x.shape[0]):
        for j in range(LANES):
            level = _clip(np.rint(a[j] * x[i, j]), least, most)
            a_lx[j] += moments[i, j] * level
            a_ll[j] += weights[i, j] * level * level
            level = _clip(np.rint(b[j] * x[i, j]), least, most)
            b_lx[j] += moments[i, j] * level
            b_ll[j] += weights[i, j] * level * level


@kernel
def _choose(tried: Floats, lx: Floats, ll: Floats, found: Fit) -> None:
    """Takes what was tried where it explains more."""
    best, scale, inverse = found.best, found.scale, found.inverse
    for j in range(LANES):
        better = (ll[j] > _ZERO) & (lx[j] * lx[j] > best[j] * ll[j])
        inverse[j] = tried[j] if better else inverse[j]
    for j in range(LANES):
        better = (ll[j] > _ZERO) & (lx[j] * lx[j] > best[j] * ll[j])
        fitted = lx[j] / ll[j]
        scale[j] = fitted if better else scale[j]
        best[j] = fitted * lx[j] if better else best[j]
