"""The search for a symmetric scale, of many sub-blocks at once (ggml-quants.c, make_qx_quants).

n weights x get levels l in -top .. top - 1 and a scale, so that the sum of w (x - scale l)^2 is
small. The inverse scales that ggml tries are -(top + s / 10) / m, where m is the first weight of
largest magnitude: s = 0, then -9 .. 9 without 0. Each rounds the weights to levels, least squares
fits a scale to them, and the fit that explains most of the weights wins.

Lanes. Sub-blocks stand side by side: a tile is float32 [n, lanes] in C order, and tile[i, lane] is
number i of sub-block `lane`. A lane does ggml's arithmetic in ggml's order, so its result depends
on its own column alone: unused lanes may hold any finite numbers. The number of lanes is free;
128 are fast, fewer than 16 are not.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dqconvert.quantizers.ggml.jit import kernel

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

LANES = 128
SMALLEST = np.float32(1e-15)
"""Sub-blocks without a larger magnitude are zeros (GROUP_MAX_EPS)."""

_ZERO = np.float32(0)
_TENTH = np.float32(0.1)
_STEPS = 9


class Fit(NamedTuple):
    """What the search keeps of each lane, float32 [lanes] each.

    scale and inverse are its result: the fitted scale, and the inverse scale that rounds to the
    winner's levels (see levels). Both are 0 where a lane holds zeros.
    """

    scale: Floats
    inverse: Floats
    extreme: Floats
    tried: Floats
    best: Floats
    lx: Floats
    ll: Floats


def fit(lanes: int = LANES) -> Fit:
    """Room for a search over so many lanes."""
    return Fit(*np.empty((len(Fit._fields), lanes), np.float32))


@kernel
def search(x: Floats, weights: Floats, moments: Floats, top: int, found: Fit) -> None:
    """Fills found, whose lanes are those of the tiles; the tile moments is scratch."""
    extremes(x, found.extreme)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            moments[i, j] = weights[i, j] * x[i, j]
    _try(x, weights, moments, (np.float32(top), np.float32(-top)), found)
    for j in range(x.shape[1]):
        scale = found.lx[j] / found.ll[j] if found.ll[j] != _ZERO else _ZERO
        found.scale[j] = scale
        found.best[j] = scale * found.lx[j]
        found.inverse[j] = found.tried[j]
    for step in range(-_STEPS, _STEPS + 1):
        if step != 0:
            numerator = -np.float32(np.float32(top) + _TENTH * np.float32(step))
            _try(x, weights, moments, (np.float32(top), numerator), found)
            _choose(found)
    for j in range(x.shape[1]):
        empty = abs(found.extreme[j]) < SMALLEST
        found.scale[j] = _ZERO if empty else found.scale[j]
        found.inverse[j] = _ZERO if empty else found.inverse[j]


@kernel
def extremes(x: Floats, extreme: Floats) -> None:
    """extreme[lane] = the first number of largest magnitude of a lane."""
    for j in range(x.shape[1]):
        extreme[j] = x[0, j]
    for i in range(1, x.shape[0]):
        for j in range(x.shape[1]):
            extreme[j] = x[i, j] if abs(x[i, j]) > abs(extreme[j]) else extreme[j]


@kernel
def levels(x: Floats, inverse: Floats, top: int, out: Bytes) -> None:
    """out uint8 [n, lanes] = the levels + top that the search found; 0 where lanes hold zeros."""
    base = np.float32(top)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            rounded = min(max(np.rint(inverse[j] * x[i, j]), -base), base - np.float32(1))
            found = np.int32(rounded + base)
            out[i, j] = np.uint8(found if inverse[j] != _ZERO else np.int32(0))


@kernel
def _try(
    x: Floats, weights: Floats, moments: Floats, limits: tuple[np.float32, np.float32], found: Fit
) -> None:
    """The sums of w x l and w l l for the levels of one inverse scale; limits: top, numerator."""
    top, numerator = limits
    least, most = -top, top - np.float32(1)
    tried, lx, ll = found.tried, found.lx, found.ll
    for j in range(x.shape[1]):
        tried[j] = numerator / found.extreme[j]
        lx[j] = _ZERO
        ll[j] = _ZERO
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            rounded = min(max(np.rint(tried[j] * x[i, j]), least), most)
            lx[j] += moments[i, j] * rounded
            ll[j] += weights[i, j] * rounded * rounded


@kernel
def _choose(found: Fit) -> None:
    """Takes what was tried where it explains more."""
    lx, ll, best = found.lx, found.ll, found.best
    for j in range(lx.shape[0]):
        better = (ll[j] > _ZERO) & (lx[j] * lx[j] > best[j] * ll[j])
        scale = lx[j] / ll[j]
        found.scale[j] = scale if better else found.scale[j]
        found.best[j] = scale * lx[j] if better else best[j]
        found.inverse[j] = found.tried[j] if better else found.inverse[j]
