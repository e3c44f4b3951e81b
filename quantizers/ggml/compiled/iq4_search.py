"""The search for a scale of uneven levels, of many sub-blocks at once (quantize_row_iq4_nl_impl).

32 weights x get the nearest of 16 LEVELS and a scale that fits them by least squares. Inverse
scales that ggml (ggml-quants.c) tries: 127 / m, m the first weight of largest magnitude, then
(t - 127) / m for t in -7 .. 7; what explains most of the weights wins.

Where the nearest level changes are halves of integers, so a comparison with these is exact. And
over all t a weight meets one of them at most: the products grow by 134 / 120, the places where
levels change by 5 / 4 and more. So its level at the lowest product, the next one and the edge
between are found once, and each t takes one comparison.

Lanes. Tiles are float32 [32, LANES], a sub-block in each column. What is known of the lanes is a
float32 [ROWS * LANES] array, one row for each of SCALE, EXTREME, BEST, LOW, HIGH, EDGE and 15 for
each of TRIED (inverse scales), LX and LL (the sums of w x l and w l l). One array, so that the
compiler sees that rows do not overlap.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from dqconvert.quantizers.ggml.compiled.symmetric_search import SMALLEST, Bytes, Floats
from dqconvert.quantizers.ggml.jit import kernel
from dqconvert.quantizers.ggml.plain.iq4 import LEVELS

LANES = 64
TRIES = 15
ROWS = 6 + 3 * TRIES
SCALE, EXTREME, BEST, LOW, HIGH, EDGE, TRIED = (row * LANES for row in range(7))
LX, LL = TRIED + TRIES * LANES, TRIED + 2 * TRIES * LANES

_ZERO, _HALF = np.float32(0), np.float32(0.5)
_LEVELS = tuple(np.float32(level) for level in LEVELS)
_NEXT = (*_LEVELS[2:], _LEVELS[-1])
_EDGES = tuple(np.float32((low + high) / 2) for low, high in pairwise(LEVELS))
_CHANGES = len(_EDGES)


@kernel
def search(x: Floats, weights: Floats, state: Floats) -> None:
    """Fills state[SCALE : SCALE + LANES]; 0 where a lane holds zeros."""
    _extremes(x, state)
    _first(x, weights, state)
    _open(state)
    for i in range(32):
        _ends(x[i], state)
        _try(x[i], weights[i], state)
    for t in range(TRIES):
        _choose(state, t * LANES)
    for j in range(LANES):
        empty = abs(state[EXTREME + j]) < SMALLEST
        state[SCALE + j] = _ZERO if empty else state[SCALE + j]


@kernel
def codes(x: Floats, inverse: Floats, out: Bytes) -> None:
    """out uint8 [16, LANES] = the levels' places: weight i in the low 4 bits, i + 16 above."""
    for i in range(16):
        for j in range(LANES):
            out[i, j] = np.uint8(_code(inverse[j] * x[i, j]))
        for j in range(LANES):
            out[i, j] |= np.uint8(_code(inverse[j] * x[i + 16, j]) << np.int32(4))


@kernel
def _code(product: np.float32) -> np.int32:
    """The place of the nearest level, the higher one at ties; 15 for NaN."""
    code = np.int32(_CHANGES)
    for edge in _EDGES:
        code -= np.int32(1) if product < edge else np.int32(0)
    return code


@kernel
def _level(product: np.float32) -> np.float32:
    """The nearest level."""
    level = _LEVELS[0]
    for k in range(_CHANGES):
        level = _LEVELS[k + 1] if product >= _EDGES[k] else level
    return level


@kernel
def _extremes(x: Floats, state: Floats) -> None:
    for j in range(LANES):
        state[EXTREME + j] = _ZERO
    for i in range(32):
        for j in range(LANES):
            larger = abs(x[i, j]) > abs(state[EXTREME + j])
            state[EXTREME + j] = x[i, j] if larger else state[EXTREME + j]


@kernel
def _first(x: Floats, weights: Floats, state: Floats) -> None:
    """The fit to the first inverse scale, whose sign is not that of the others."""
    for j in range(LANES):
        state[TRIED + j] = np.float32(1) / (-state[EXTREME + j] / _LEVELS[0])
        state[LX + j] = _ZERO
        state[LL + j] = _ZERO
    for i in range(32):
        for j in range(LANES):
            level = _level(state[TRIED + j] * x[i, j])
            product = weights[i, j] * level
            state[LX + j] += product * x[i, j]
            state[LL + j] += product * level
    for j in range(LANES):
        lx, ll = state[LX + j], state[LL + j]
        scale = lx / ll if ll > _ZERO else _ZERO
        state[SCALE + j] = scale
        state[BEST + j] = scale * lx


@kernel
def _open(state: Floats) -> None:
    """The inverse scales to try; no sums yet."""
    for t in range(TRIES):
        numerator = np.float32(t - TRIES // 2) + _LEVELS[0]
        for j in range(LANES):
            state[TRIED + t * LANES + j] = numerator / state[EXTREME + j]
            state[LX + t * LANES + j] = _ZERO
            state[LL + t * LANES + j] = _ZERO


@kernel
def _ends(x: Floats, state: Floats) -> None:
    """Levels LOW and HIGH that a weight takes at the tries, and the EDGE from which it is HIGH."""
    last = TRIED + (TRIES - 1) * LANES
    for j in range(LANES):
        product = min(state[TRIED + j] * x[j], state[last + j] * x[j])
        low, high = _LEVELS[0], _LEVELS[1]
        for k in range(_CHANGES):
            above = product >= _EDGES[k]
            low = _LEVELS[k + 1] if above else low
            high = _NEXT[k] if above else high
        state[LOW + j] = low
        state[HIGH + j] = high
        state[EDGE + j] = _HALF * (low + high)


@kernel
def _try(x: Floats, weights: Floats, state: Floats) -> None:
    """Adds a weight of every lane to the sums of all inverse scales, three at a time."""
    for t in range(0, TRIES, 3):
        a, b, c = t * LANES, (t + 1) * LANES, (t + 2) * LANES
        for j in range(LANES):
            ends = state[LOW + j], state[EDGE + j], state[HIGH + j]
            a_lx, a_ll = _products(state[TRIED + a + j], x[j], weights[j], ends)
            b_lx, b_ll = _products(state[TRIED + b + j], x[j], weights[j], ends)
            c_lx, c_ll = _products(state[TRIED + c + j], x[j], weights[j], ends)
            state[LX + a + j] += a_lx
            state[LX + b + j] += b_lx
            state[LX + c + j] += c_lx
            state[LL + a + j] += a_ll
            state[LL + b + j] += b_ll
            state[LL + c + j] += c_ll


@kernel
def _products(
    inverse: np.float32, x: np.float32, weight: np.float32, ends: tuple[np.float32, ...]
) -> tuple[np.float32, np.float32]:
    """w x l and w l l."""
    low, edge, high = ends
    level = high if inverse * x >= edge else low
    return weight * level * x, weight * level * level


@kernel
def _choose(state: Floats, at: int) -> None:
    """Takes what was tried where it explains more."""
    for j in range(LANES):
        lx, ll, best = state[LX + at + j], state[LL + at + j], state[BEST + j]
        better = (ll > _ZERO) & (lx * lx > best * ll)
        scale = lx / ll
        state[SCALE + j] = scale if better else state[SCALE + j]
        state[BEST + j] = scale * lx if better else best
