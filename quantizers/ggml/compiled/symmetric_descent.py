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

_ZERO = np.float32(0)
_SWEEPS = 5
_VECTOR = 16


class Lanes(NamedTuple):
    """Where lanes stand: weights and levels [16, lanes], sums and flags [lanes]."""

    x: Floats
    levels: Floats
    lx: Floats
    ll: Floats
    changed: Integers


class Descent(NamedTuple):
    """The tiles of a group [GROUP, ..], and room for those lanes that are swept again."""

    x: Floats
    levels: Floats
    lx: Floats
    ll: Floats
    changed: Integers
    extreme: Floats
    places: Integers
    busy: Lanes


def descent() -> Descent:
    """Room for a group."""
    count = GROUP * LANES
    tiles, sums = aligned((2, GROUP, 16, LANES)), aligned((3, GROUP, LANES))
    wide, totals = aligned((2, 16, count + _VECTOR)), aligned((2, count))
    busy = Lanes(wide[0], wide[1], totals[0], totals[1], np.empty(count, np.int32))
    changed = np.empty((GROUP, LANES), np.int32)
    places = np.empty(count, np.int32)
    return Descent(tiles[0], tiles[1], sums[0], sums[1], changed, sums[2], places, busy)


@kernel
def begin(state: Descent, t: int) -> None:
    """Levels of tile t of state.x by the largest weights, and one sweep."""
    extremes(state.x[t], state.extreme[t])
    lanes = Lanes(state.x[t], state.levels[t], state.lx[t], state.ll[t], state.changed[t])
    _start(lanes, state.extreme[t])
    _sweep(lanes, LANES)


@kernel
def settle(state: Descent, tiles: int) -> None:
    """The other sweeps of the first tiles."""
    for _ in range(_SWEEPS - 1):
        count = _gather(state, tiles)
        if not count:
            break
        _sweep(state.busy, (count + _VECTOR - 1) // _VECTOR * _VECTOR)
        _scatter(state, count)


@kernel
def finish(state: Descent, t: int, scale: Floats, kept: Bytes) -> None:
    """Scales [LANES] and levels + 4 [16, LANES] of tile t; 0 where a lane holds zeros."""
    levels, lx, ll, extreme = state.levels[t], state.lx[t], state.ll[t], state.extreme[t]
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
def _gather(state: Descent, tiles: int) -> int:
    """Copies the lanes that the last sweep changed to state.busy, whole vectors; how many."""
    busy, places, changed = state.busy, state.places, state.changed.reshape(-1)
    count = 0
    for j in range(tiles * LANES):
        places[count] = j
        count += changed[j]
    width = (count + _VECTOR - 1) // _VECTOR * _VECTOR
    places[count:width] = places[0]
    x, levels = state.x.reshape(-1), state.levels.reshape(-1)
    for i in range(16):
        for j in range(width):
            at = places[j] // LANES * 16 * LANES + places[j] % LANES + i * LANES
            busy.x[i, j] = x[at]
            busy.levels[i, j] = levels[at]
    lx, ll = state.lx.reshape(-1), state.ll.reshape(-1)
    for j in range(width):
        busy.lx[j] = lx[places[j]]
        busy.ll[j] = ll[places[j]]
    return count


@kernel
def _scatter(state: Descent, count: int) -> None:
    """Copies busy lanes back."""
    busy, places, levels = state.busy, state.places, state.levels.reshape(-1)
    for i in range(16):
        for j in range(count):
            at = places[j] // LANES * 16 * LANES + places[j] % LANES + i * LANES
            levels[at] = busy.levels[i, j]
    lx, ll, changed = state.lx.reshape(-1), state.ll.reshape(-1), state.changed.reshape(-1)
    for j in range(count):
        lx[places[j]] = busy.lx[j]
        ll[places[j]] = busy.ll[j]
        changed[places[j]] = busy.changed[j]
