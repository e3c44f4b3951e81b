"""Q3_K, 110 bytes for 256 weights (ggml-quants.c): x = d * scale[s] * level, levels -4 .. 3.

high[32]     bit g of byte l: level 32 g + l is not negative
low[64]      level & 3: byte l of a half has those of its weights l, l + 32, l + 64, l + 96
scales[12]   scale + 32, 6 bits: low 4 of s and s + 8 in byte s, high 2 of s in byte 8 + s % 4
d            a half
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dqconvert.quantizers.ggml.compiled.floats import halves, put_half
from dqconvert.quantizers.ggml.compiled.symmetric_blocks import (
    GROUP,
    SIDE,
    Coded,
    Room,
    load,
    requantize,
    round_scales,
    tile_of,
)
from dqconvert.quantizers.ggml.compiled.symmetric_descent import Descent, begin, finish, settle
from dqconvert.quantizers.ggml.compiled.symmetric_search import (
    LANES,
    Bytes,
    Fit,
    Floats,
    aligned,
    fit,
    levels,
    search,
)
from dqconvert.quantizers.ggml.jit import kernel

_ZERO = np.float32(0)
_LEAST = np.float32(1e-45)  # the smallest float above 0


class Scales(NamedTuple):
    """The scales of a group's super-blocks, a lane for each: tiles, the fit, and the halves."""

    x: Floats
    weights: Floats
    moments: Floats
    fine: Bytes
    found: Fit
    halves: Floats


def scales() -> Scales:
    """Room for a group."""
    tiles = aligned((3, 16, LANES))
    tiles[:] = 0
    return Scales(tiles[0], tiles[1], tiles[2], np.empty((16, LANES), np.uint8), fit(), halves())


@kernel
def encode(
    rows: Floats, out: Bytes, room: Room, state: Descent, group: Coded, halves: Floats
) -> None:
    """Super-blocks [n, 256] to [n, 110]."""
    for first in range(0, rows.shape[0], LANES):
        tiles = min(GROUP, (rows.shape[0] - first + SIDE - 1) // SIDE)
        for t in range(tiles):
            load(rows, first + t * SIDE, state.lanes[t, :16])
            begin(state, t)
        settle(state, tiles)
        for t in range(tiles):
            coded = tile_of(group, t)
            finish(state, t, room.found.scale, coded.kept)
            round_scales(room.found.scale, 32, _LEAST, coded)
        _store_group(rows[first : first + LANES], group, room, halves, out[first : first + LANES])


@kernel
def encode_weighted(
    rows: Floats, importance: Floats, out: Bytes, room: Room, group: Coded, scales: Scales
) -> None:
    """The same; importance [blocks of a row, 256]."""
    halves = scales.halves
    for first in range(0, rows.shape[0], LANES):
        tiles = min(GROUP, (rows.shape[0] - first + SIDE - 1) // SIDE)
        for t in range(tiles):
            load(rows, first + t * SIDE, room.x)
            load(importance, first + t * SIDE, room.weights)
            _weigh(room)
            search(room.x, room.weights, room.moments, 4, room.found)
            levels(room.x, room.found, 4, group.kept[t])
            _collect(room, t * SIDE, scales)
        search(scales.x, scales.weights, scales.moments, 32, scales.found)
        levels(scales.x, scales.found, 32, scales.fine)
        for t in range(tiles):
            _distribute(scales, t * SIDE, tile_of(group, t))
        _store_group(rows[first : first + LANES], group, room, halves, out[first : first + LANES])


@kernel
def _weigh(room: Room) -> None:
    """room.weights, an importance, times the root of x^2 + 2 mean(x^2) of a super-block."""
    x, mean = room.x, np.empty(SIDE, np.float32)
    mean[:] = _ZERO
    for s in range(16):
        for i in range(16):
            for b in range(SIDE):
                mean[b] += x[i, s * SIDE + b] * x[i, s * SIDE + b]
    spread = room.moments[0]
    for s in range(16):
        for b in range(SIDE):
            spread[s * SIDE + b] = np.float32(2) * mean[b] / np.float32(256)
    for i in range(16):
        for j in range(LANES):
            room.weights[i, j] *= np.sqrt(spread[j] + x[i, j] * x[i, j])


@kernel
def _collect(room: Room, lane: int, scales: Scales) -> None:
    """Lays the scales of a tile and the sums of its weights into 8 lanes.

    A scale that squares too large for a float have spoilt has level 0 in ggml, so no weight.
    """
    totals = room.moments[0]
    totals[:] = _ZERO
    for i in range(16):
        for j in range(LANES):
            totals[j] += room.weights[i, j]
    for s in range(16):
        for b in range(SIDE):
            scale, weight = room.found.scale[s * SIDE + b], totals[s * SIDE + b]
            scales.x[s, lane + b] = scale
            scales.weights[s, lane + b] = weight if np.isfinite(scale) else weight * _ZERO


@kernel
def _distribute(scales: Scales, lane: int, coded: Coded) -> None:
    """d and rounded scales of a tile from its 8 lanes."""
    for s in range(16):
        for b in range(SIDE):
            coded.rounded[s * SIDE + b] = np.int32(scales.fine[s, lane + b]) - np.int32(32)
    coded.d[:] = scales.found.scale[lane : lane + SIDE]


@kernel
def _store_group(rows: Floats, group: Coded, room: Room, halves: Floats, out: Bytes) -> None:
    """Super-blocks [.., 256] of a group to their bytes."""
    for first in range(0, rows.shape[0], SIDE):
        coded = tile_of(group, first // SIDE)
        blocks = rows[first : first + SIDE]
        requantize(blocks, 4, halves, coded, room)
        for b in range(blocks.shape[0]):
            _store(b, coded, room.levels[b], out[first + b])


@kernel
def _store(lane: int, coded: Coded, q: Bytes, block: Bytes) -> None:
    """Super-block `lane` of a tile to its bytes."""
    _pack(q, block)
    scales = block[96:]
    for s in range(8):
        scales[s] = _scale(coded, lane, s) & 15 | (_scale(coded, lane, s + 8) & 15) << 4
    for s in range(4):
        low = _scale(coded, lane, s) >> 4 | _scale(coded, lane, s + 4) >> 4 << 2
        high = _scale(coded, lane, s + 8) >> 4 | _scale(coded, lane, s + 12) >> 4 << 2
        scales[8 + s] = low | high << 4
    put_half(block, 108, coded.d[lane])


@kernel
def _scale(coded: Coded, lane: int, s: int) -> np.int32:
    """Scale s + 32 of a super-block."""
    return np.int32(coded.rounded[s * SIDE + lane] + 32)


@kernel
def _pack(q: Bytes, block: Bytes) -> None:
    """256 levels 0 .. 7 to the first 96 bytes of a block."""
    for j in range(32):
        low = (q[j] & 4) >> 2 | (q[j + 32] & 4) >> 1 | (q[j + 64] & 4) | (q[j + 96] & 4) << 1
        at = j + 128
        high = (q[at] & 4) >> 2 | (q[at + 32] & 4) >> 1 | (q[at + 64] & 4) | (q[at + 96] & 4) << 1
        block[j] = low | high << 4
    for half in range(2):
        at = 128 * half
        for j in range(32):
            low = (q[at + j] & 3) | (q[at + j + 32] & 3) << 2
            block[32 + 32 * half + j] = low | (q[at + j + 64] & 3) << 4 | (q[at + j + 96] & 3) << 6
