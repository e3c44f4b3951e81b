"""Levels by coordinate descent, of many sub-blocks at once (ggml-quants.c, make_q3_quants).

16 weights x get levels in -4 .. 3 and a scale lx / ll, where lx and ll are the sums of w x l and
w l l, w = x^2. Rounding to -4 / m, m the first weight of largest magnitude, is the start. A sweep
then goes through the weights: each gets the level that suits the scale of the others, if
lx^2 / ll grows by it. ggml sweeps until nothing changes, 5 times at most.

Tiles are float32 [16, LANES] as in symmetric_search. All lanes are swept once. One in five has
changed then, and only those are swept again: they are gathered side by side, and put back.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dqconvert.quantizers.ggml.compiled.floats import nearest
from dqconvert.quantizers.ggml.compiled.symmetric_search import (
    LANES,
    SMALLEST,
    Bytes,
    Floats,
    Integers,
    aligned,
    extremes,
)
from dqconvert.quantizers.ggml.jit import kernel

_ZERO = np.float32(0)
_SWEEPS = 5
_VECTOR = 16


class Descent(NamedTuple):
    """Where the lanes stand: levels [16, LANES] float32, sums and flags [LANES]."""

    x: Floats
    levels: Floats
    lx: Floats
    ll: Floats
    changed: Integers


def descent() -> Descent:
    """Room for lanes."""
    tiles, sums = aligned((2, 16, LANES)), aligned((2, LANES))
    return Descent(tiles[0], tiles[1], sums[0], sums[1], np.empty(LANES, np.int32))


@kernel
def descend(state: Descent, busy: Descent, scale: Floats, kept: Bytes) -> None:
    """Scales [LANES] and levels + 4 of the tile state.x; 0 where a lane holds zeros."""
    extremes(state.x, scale)
    _start(state, scale)
    _sweep(state, LANES)
    for _ in range(_SWEEPS - 1):
        if not _sweep_again(state, busy):
            break
    _finish(state, scale, kept)


@kernel
def _start(state: Descent, extreme: Floats) -> None:
    x, levels, lx, ll = state.x, state.levels, state.lx, state.ll
    least, most = np.float32(-4), np.float32(3)
    for j in range(LANES):
        lx[j] = _ZERO
        ll[j] = _ZERO
    for i in range(16):
        for j in range(LANES):
            level = min(max(np.rint(least / extreme[j] * x[i, j]), least), most)
            weight = x[i, j] * x[i, j]
            levels[i, j] = level
            lx[j] += weight * x[i, j] * level
            ll[j] += weight * level * level


@kernel
def _sweep(state: Descent, lanes: int) -> None:
    """One sweep of the first lanes."""
    x, levels, lx, ll, changed = state.x, state.levels, state.lx, state.ll, state.changed
    for j in range(lanes):
        changed[j] = 0
    for i in range(16):
        for j in range(lanes):
            old, weight = levels[i, j], x[i, j] * x[i, j]
            rest_lx = lx[j] - weight * x[i, j] * old
            rest_ll = ll[j] - weight * old * old
            new = nearest(x[i, j] * rest_ll / rest_lx)
            level = np.float32(min(max(new, np.int32(-4)), np.int32(3)))
            new_lx = rest_lx + weight * x[i, j] * level
            new_ll = rest_ll + weight * level * level
            wins = new_lx * new_lx * ll[j] > lx[j] * lx[j] * new_ll
            wins = wins & (rest_lx > _ZERO) & (new_ll > _ZERO) & (level != old)
            levels[i, j] = level if wins else old
            lx[j] = new_lx if wins else lx[j]
            ll[j] = new_ll if wins else ll[j]
            changed[j] |= np.int32(1) if wins else np.int32(0)


@kernel
def _sweep_again(state: Descent, busy: Descent) -> int:
    """One sweep of the lanes that the last one changed; how many these are."""
    count = 0
    lanes = np.empty(LANES, np.int32)
    for j in range(LANES):
        lanes[count] = j
        count += state.changed[j]
    if not count:
        return 0
    width = (count + _VECTOR - 1) // _VECTOR * _VECTOR
    lanes[count:width] = lanes[0]
    for i in range(16):
        for j in range(width):
            busy.x[i, j] = state.x[i, lanes[j]]
            busy.levels[i, j] = state.levels[i, lanes[j]]
    for j in range(width):
        busy.lx[j] = state.lx[lanes[j]]
        busy.ll[j] = state.ll[lanes[j]]
    _sweep(busy, width)
    for i in range(16):
        for j in range(count):
            state.levels[i, lanes[j]] = busy.levels[i, j]
    for j in range(count):
        state.lx[lanes[j]] = busy.lx[j]
        state.ll[lanes[j]] = busy.ll[j]
        state.changed[lanes[j]] = busy.changed[j]
    return count


@kernel
def _finish(state: Descent, scale: Floats, kept: Bytes) -> None:
    """Scales and levels, where scale has been the extremes until now."""
    for i in range(16):
        for j in range(LANES):
            level = np.int32(state.levels[i, j]) + np.int32(4)
            kept[i, j] = np.uint8(level if abs(scale[j]) >= SMALLEST else np.int32(0))
    for j in range(LANES):
        found = (abs(scale[j]) >= SMALLEST) & (state.ll[j] > _ZERO)
        scale[j] = state.lx[j] / state.ll[j] if found else _ZERO
