"""Levels by coordinate descent, of many sub-blocks at once (ggml-quants.c, make_q3_quants).

16 weights x get levels in -4 .. 3 and a scale lx / ll, where lx and ll are the sums of w x l and
w l l, w = x^2. Rounding to -4 / m, m the first weight of largest magnitude, is the start. A sweep
then goes through the weights: each gets the level that suits the scale of the others, if
lx^2 / ll grows by it. ggml sweeps until nothing changes, 5 times at most.

The tiles of a group are swept once. One lane in five has changed then, and only those are swept
again: they are gathered side by side, and put back.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dqconvert.quantizers.ggml.compiled.floats import nearest
from dqconvert.quantizers.ggml.compiled.symmetric_blocks import GROUP
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

Places = NDArray[np.int64]

_ZERO = np.float32(0)
_SWEEPS = 5
_VECTOR = 16
_ROWS = 34


class Lanes(NamedTuple):
    """Where lanes stand: weights and levels [16, lanes], sums and flags [lanes]."""

    x: Floats
    levels: Floats
    lx: Floats
    ll: Floats
    changed: Integers


class Descent(NamedTuple):
    """The lanes of a group, and room for those that are swept again.

    lanes, busy  float32 [GROUP, 34, LANES] and [34, any]: 16 weights, 16 levels, lx, ll
    places       int64 [any], where in lanes a busy one begins
    changed      int32 [GROUP, LANES] and, busy_changed, [any]: what the last sweep changed
    extreme      float32 [GROUP, LANES], the first weight of largest magnitude
    """

    lanes: Floats
    changed: Integers
    extreme: Floats
    busy: Floats
    busy_changed: Integers
    places: Places


def descent() -> Descent:
    """Room for a group."""
    count = GROUP * LANES
    return Descent(
        aligned((GROUP, _ROWS, LANES)),
        np.empty((GROUP, LANES), np.int32),
        aligned((GROUP, LANES)),
        aligned((_ROWS, count + _VECTOR)),
        np.empty(count, np.int32),
        np.empty(count, np.int64),
    )


@kernel
def begin(state: Descent, t: int) -> None:
    """Levels of tile t, state.lanes[t, :16], by the largest weights, and one sweep."""
    lanes = _view(state.lanes[t], state.changed[t])
    extremes(lanes.x, state.extreme[t])
    _start(lanes, state.extreme[t])
    _sweep(lanes, LANES)


@kernel
def settle(state: Descent, tiles: int) -> None:
    """The other sweeps of the first tiles."""
    count = 0
    for t in range(tiles):
        for j in range(LANES):
            state.places[count] = t * _ROWS * LANES + j
            count += state.changed[t, j]
    for _ in range(_SWEEPS - 1):
        if not count:
            break
        width = (count + _VECTOR - 1) // _VECTOR * _VECTOR
        _gather(state, count, width)
        _sweep(_view(state.busy, state.busy_changed), width)
        count = _scatter(state, count)


@kernel
def _view(lanes: Floats, changed: Integers) -> Lanes:
    return Lanes(lanes[:16], lanes[16:32], lanes[32], lanes[33], changed)


@kernel
def finish(state: Descent, t: int, scale: Floats, kept: Bytes) -> None:
    """Scales [LANES] and levels + 4 [16, LANES] of tile t; 0 where a lane holds zeros."""
    lanes, extreme = _view(state.lanes[t], state.changed[t]), state.extreme[t]
    levels, lx, ll = lanes.levels, lanes.lx, lanes.ll
    for i in range(16):
        for j in range(LANES):
            level = np.int32(levels[i, j]) + np.int32(4)
            kept[i, j] = np.uint8(level if abs(extreme[j]) >= SMALLEST else np.int32(0))
    for j in range(LANES):
        found = (abs(extreme[j]) >= SMALLEST) & (ll[j] > _ZERO)
        scale[j] = lx[j] / ll[j] if found else _ZERO


@kernel
def _start(state: Lanes, extreme: Floats) -> None:
    x, levels, lx, ll = state.x, state.levels, state.lx, state.ll
    least, most = np.float32(-4), np.float32(3)
    inverse = np.empty(LANES, np.float32)
    for j in range(LANES):
        inverse[j] = least / extreme[j]
        lx[j] = _ZERO
        ll[j] = _ZERO
    for i in range(16):
        for j in range(LANES):
            level = min(max(np.rint(inverse[j] * x[i, j]), least), most)
            weight = x[i, j] * x[i, j]
            levels[i, j] = level
            lx[j] += weight * x[i, j] * level
            ll[j] += weight * level * level


@kernel
def _sweep(state: Lanes, lanes: int) -> None:
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
def _gather(state: Descent, count: int, width: int) -> None:
    """Copies lanes to state.busy; the first of them fills the last vector."""
    lanes, busy, places = state.lanes.reshape(-1), state.busy, state.places
    places[count:width] = places[0]
    for i in range(_ROWS):
        for j in range(width):
            busy[i, j] = lanes[places[j] + i * LANES]


@kernel
def _scatter(state: Descent, count: int) -> int:
    """Copies busy lanes back, and keeps the places of those that changed; how many these are."""
    lanes, busy, places = state.lanes.reshape(-1), state.busy, state.places
    for i in range(16, _ROWS):
        for j in range(count):
            lanes[places[j] + i * LANES] = busy[i, j]
    left = 0
    for j in range(count):
        places[left] = places[j]
        left += state.busy_changed[j]
    return left
