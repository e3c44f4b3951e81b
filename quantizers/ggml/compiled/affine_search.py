"""The search for the scale and the minimum of many sub-blocks at once.

A sub-block of n weights x becomes scale * l + minimum with codes l in 0 .. top and minimum <= 0.
The search tries slopes: each rounds the weights to codes, fits scale and minimum to these by
weighted least squares, and the fit with the smallest error wins. The winner's minimum is also the
origin of the slopes that follow. Formula and order of operations are those of make_qkx2_quants
and make_qkx3_quants in ggml-quants.c; how they count a sub-block's weights is their callers'.

Lanes. LANES sub-blocks stand side by side in two flat float32 arrays; at(row, lane) is an element:

    tile   [ROWS, LANES]     row X + i: weight i of each sub-block, i < n <= 32, n divisible by 8
                             row W + i: how much its squared error counts
                             row L + i: scratch, a code
    state  [FIELDS, LANES]   SCALE     the winner's scale; 0 where all weights are the same
                             MINIMUM   the winner's minimum; ggml's the_min is its negative
                             SLOPE     with ORIGIN, the winner's codes:
                             ORIGIN    clip(nearest(SLOPE * (x - ORIGIN)), top)
                             TOTAL     the sum of the rows W
                             the other rows are scratch

Each lane does ggml's arithmetic in ggml's order on its own column, so lanes without a sub-block
may hold anything. Flat arrays, unsigned indices and a constant LANES let the compiler see that
rows do not overlap; without, it leaves the loops scalar, eight times slower.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dqconvert.quantizers.ggml.compiled.floats import nearest
from dqconvert.quantizers.ggml.jit import kernel

Floats = NDArray[np.float32]
Task = tuple[int, np.int32, np.float32, np.float32, int, bool]

LANES = 32
X, W, L, ROWS = 0, 32, 64, 96
SCALE, MINIMUM, SLOPE, ORIGIN, TOTAL, FIELDS = 0, 1, 2, 3, 4, 15
_MOMENT, _HIGH, _ERROR, _BEST = 5, 6, 7, 8  # sum of w * x; largest x; error now; smallest so far
_TRIED, _FITTED, _LOWEST = 9, 10, 11  # slope now; scale and minimum that fit its codes
_SUM_L, _SUM_LL, _SUM_XL = 12, 13, 14  # sums of w * l, w * l * l and w * l * x

_STRIDE = np.uint64(LANES)
UNROLLED = 8
_ZERO, _ONE, _NAN = np.float32(0), np.float32(1), np.float32(np.nan)
_NOTHING = np.float32(-0.0)  # a sum that begins with it is its first term, of either sign of zero


def plan(n: int, top: int, first: float, delta: float, steps: int, absolute: bool = False) -> Task:
    """What search is told about sub-blocks of n weights, in the types that it counts in.

    Slope s of 0 .. steps spans top + first + delta * s codes. Errors count by their magnitude
    instead of their square where absolute is true.
    """
    return n, np.int32(top), np.float32(first), np.float32(delta), steps, absolute


@kernel
def at(row: int, lane: int) -> np.uint64:
    """The index of an element of a flat array of LANES columns."""
    return np.uint64(row) * _STRIDE + np.uint64(lane)


@kernel
def aligned(size: int) -> Floats:
    """Zeros that start at a cache line, so that no vector of a row straddles two."""
    floats = np.zeros(size + 16, np.float32)
    start = -(floats.ctypes.data // 4) % 16
    return floats[start : start + size]


@kernel
def clip(code: np.int32, top: np.int32) -> np.int32:
    """An int32 limited to 0 .. top."""
    code = np.int32(0) if code < 0 else code
    return top if code > top else code


@kernel
def search(tile: Floats, state: Floats, task: Task) -> None:
    """Fills the named rows of state from the rows X and W of tile; task is plan's result."""
    n, top, first, delta, steps, absolute = task
    _describe(tile, state, n)
    _open(state, np.float32(top))
    _fit(tile, state, n, top)
    _measure(tile, state, n, absolute)
    _settle(state, first + np.float32(top))
    for step in range(1, steps + 2):
        _fit(tile, state, n, top)
        _solve(state)
        _measure(tile, state, n, absolute)
        _choose(state, first + delta * np.float32(step) + np.float32(top))


@kernel
def _describe(tile: Floats, state: Floats, n: int) -> None:
    """Range and sums of the weights."""
    for lane in range(LANES):
        state[at(MINIMUM, lane)] = tile[at(X, lane)]
        state[at(_HIGH, lane)] = tile[at(X, lane)]
        state[at(TOTAL, lane)] = _NOTHING
        state[at(_MOMENT, lane)] = _NOTHING
    for start in range(0, n, UNROLLED):
        for lane in range(LANES):
            low, high = state[at(MINIMUM, lane)], state[at(_HIGH, lane)]
            total, moment = state[at(TOTAL, lane)], state[at(_MOMENT, lane)]
            for i in range(UNROLLED):
                x, w = tile[at(X + start + i, lane)], tile[at(W + start + i, lane)]
                low = x if x < low else low
                high = x if x > high else high
                total += w
                moment += w * x
            state[at(MINIMUM, lane)] = low
            state[at(_HIGH, lane)] = high
            state[at(TOTAL, lane)] = total
            state[at(_MOMENT, lane)] = moment


@kernel
def _open(state: Floats, span: np.float32) -> None:
    """The first candidate is the plain range, unfitted. The minimum is 0 at most."""
    for lane in range(LANES):
        low = state[at(MINIMUM, lane)]
        low = _ZERO if low > _ZERO else low
        slope = span / (state[at(_HIGH, lane)] - low)
        state[at(MINIMUM, lane)] = low
        state[at(_TRIED, lane)] = slope
        state[at(_FITTED, lane)] = _ONE / slope
        state[at(_LOWEST, lane)] = low


@kernel
def _fit(tile: Floats, state: Floats, n: int, top: np.int32) -> None:
    """The codes of the slope tried, and the sums of their normal equations."""
    for lane in range(LANES):
        state[at(_SUM_L, lane)] = _ZERO
        state[at(_SUM_LL, lane)] = _ZERO
        state[at(_SUM_XL, lane)] = _ZERO
    for start in range(0, n, UNROLLED):
        for lane in range(LANES):
            slope, origin = state[at(_TRIED, lane)], state[at(MINIMUM, lane)]
            l1, l2 = state[at(_SUM_L, lane)], state[at(_SUM_LL, lane)]
            xl = state[at(_SUM_XL, lane)]
            for i in range(UNROLLED):
                x = tile[at(X + start + i, lane)]
                code = np.float32(clip(nearest(slope * (x - origin)), top))
                tile[at(L + start + i, lane)] = code
                weighted = tile[at(W + start + i, lane)] * code
                l1 += weighted
                l2 += weighted * code
                xl += weighted * x
            state[at(_SUM_L, lane)] = l1
            state[at(_SUM_LL, lane)] = l2
            state[at(_SUM_XL, lane)] = xl


@kernel
def _solve(state: Floats) -> None:
    """Scale and minimum of least error; NaN, which loses every comparison, where there is none."""
    for lane in range(LANES):
        total, moment = state[at(TOTAL, lane)], state[at(_MOMENT, lane)]
        l1, l2, xl = state[at(_SUM_L, lane)], state[at(_SUM_LL, lane)], state[at(_SUM_XL, lane)]
        determinant = total * l2 - l1 * l1
        lowest = (l2 * moment - l1 * xl) / determinant
        above = lowest > _ZERO
        rise = xl if above else total * xl - moment * l1
        scale = rise / (l2 if above else determinant)
        state[at(_LOWEST, lane)] = _ZERO if above else lowest
        state[at(_FITTED, lane)] = scale if determinant > _ZERO else _NAN


@kernel
def _measure(tile: Floats, state: Floats, n: int, absolute: bool) -> None:
    """The candidate's weighted error."""
    for lane in range(LANES):
        state[at(_ERROR, lane)] = _ZERO
    if absolute:
        _measure_magnitudes(tile, state, n)
    else:
        _measure_squares(tile, state, n)


@kernel
def _measure_squares(tile: Floats, state: Floats, n: int) -> None:
    for start in range(0, n, UNROLLED):
        for lane in range(LANES):
            scale, lowest = state[at(_FITTED, lane)], state[at(_LOWEST, lane)]
            error = state[at(_ERROR, lane)]
            for i in range(UNROLLED):
                row = start + i
                off = scale * tile[at(L + row, lane)] + lowest - tile[at(X + row, lane)]
                error += tile[at(W + row, lane)] * (off * off)
            state[at(_ERROR, lane)] = error


@kernel
def _measure_magnitudes(tile: Floats, state: Floats, n: int) -> None:
    for start in range(0, n, UNROLLED):
        for lane in range(LANES):
            scale, lowest = state[at(_FITTED, lane)], state[at(_LOWEST, lane)]
            error = state[at(_ERROR, lane)]
            for i in range(UNROLLED):
                row = start + i
                off = scale * tile[at(L + row, lane)] + lowest - tile[at(X + row, lane)]
                error += tile[at(W + row, lane)] * abs(off)
            state[at(_ERROR, lane)] = error


@kernel
def _settle(state: Floats, span: np.float32) -> None:
    """The first candidate is the best so far; the next slope makes the range span codes."""
    for lane in range(LANES):
        slope, origin = state[at(_TRIED, lane)], state[at(MINIMUM, lane)]
        state[at(_BEST, lane)] = state[at(_ERROR, lane)]
        state[at(SCALE, lane)] = state[at(_FITTED, lane)]
        state[at(SLOPE, lane)] = slope
        state[at(ORIGIN, lane)] = origin
        state[at(_TRIED, lane)] = span / (state[at(_HIGH, lane)] - origin)


@kernel
def _choose(state: Floats, span: np.float32) -> None:
    """The candidate takes over wherever its error is smaller; then the next slope, as above."""
    for lane in range(LANES):
        error, best = state[at(_ERROR, lane)], state[at(_BEST, lane)]
        tried, slope = state[at(_TRIED, lane)], state[at(SLOPE, lane)]
        fitted, scale = state[at(_FITTED, lane)], state[at(SCALE, lane)]
        lowest, minimum = state[at(_LOWEST, lane)], state[at(MINIMUM, lane)]
        origin = state[at(ORIGIN, lane)]
        wins = error < best
        state[at(_BEST, lane)] = error if wins else best
        state[at(SCALE, lane)] = fitted if wins else scale
        state[at(SLOPE, lane)] = tried if wins else slope
        state[at(ORIGIN, lane)] = minimum if wins else origin
        minimum = lowest if wins else minimum
        state[at(MINIMUM, lane)] = minimum
        state[at(_TRIED, lane)] = span / (state[at(_HIGH, lane)] - minimum)
