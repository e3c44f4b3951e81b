"""Q6_K and Q3_K of ggml-quants.c: super-blocks of 256 weights, a scale for each 16 of them.

x = d * scale[s] * level, d a half. Bytes of a super-block, w = weight / 128, l = weight % 32:

    Q6_K 210    low[128]     levels' low 4 bits: weights 0 .. 63 of a half low, 64 .. 127 high
                high[64]     levels' high 2 bits: byte l of a half, 2 bits for each 32 weights
                scales[16]   int8
                d            of -32 .. 31 levels, + 32
    Q3_K 110    high[32]     byte l, bit weight / 32: the level is not negative
                low[64]      byte l of a half, 2 bits for each 32 weights: level & 3
                scales[12]   6 bits, + 32: 16 low nibbles (s, s + 8), then 2 bits for s % 4
                d            of -4 .. 3 levels

Both ways fit a scale to each sub-block, round the scales to multiples of a common d, and round the
weights again with what the file will say. A sub-block whose d * scale is 0 keeps the levels of its
fit. A tile holds 8 super-blocks in 128 lanes: lane = sub-block * 8 + super-block.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dqconvert.quantizers.ggml.compiled.floats import halves, nearest, put_half, to_half
from dqconvert.quantizers.ggml.compiled.symmetric_decode import DEQUANTIZERS
from dqconvert.quantizers.ggml.compiled.symmetric_descent import Descent, descend, descent
from dqconvert.quantizers.ggml.compiled.symmetric_search import (
    LANES,
    SMALLEST,
    Bytes,
    Fit,
    Floats,
    Integers,
    aligned,
    fit,
    levels,
    search,
)
from dqconvert.quantizers.ggml.jit import kernel

SIDE = 8
"""Super-blocks of a tile."""

_ZERO = np.float32(0)
_LEAST = np.float32(1e-45)  # the smallest float above 0


class Room(NamedTuple):
    """Scratch of a kernel: a tile with its fit, its super-blocks, and one super-block's weights.

    x, weights, moments  float32 [16, LANES]
    kept                 uint8 [16, LANES], the levels of the fit
    d                    float32 [SIDE],
    rounded              int32 [LANES], the scales over d
    steps                float32 [SIDE, 256], d * scale of every weight
    levels               uint8 [SIDE, 256]
    """

    x: Floats
    weights: Floats
    moments: Floats
    found: Fit
    kept: Bytes
    d: Floats
    rounded: Integers
    steps: Floats
    levels: Bytes


def room() -> Room:
    """Room for a kernel that goes through a weight."""
    tiles = aligned((3, 16, LANES))
    kept, rounded = np.empty((16, LANES), np.uint8), np.empty(LANES, np.int32)
    d, steps = np.empty(SIDE, np.float32), aligned((SIDE, 256))
    levels = np.empty((SIDE, 256), np.uint8)
    return Room(tiles[0], tiles[1], tiles[2], fit(), kept, d, rounded, steps, levels)


@kernel
def load(blocks: Floats, first: int, tile: Floats) -> None:
    """Lays super-blocks first, first + 1 .. of [n, 256] into a tile; after the last, the first."""
    for b in range(SIDE):
        block = blocks[(first + b) % blocks.shape[0]]
        for s in range(16):
            for i in range(16):
                tile[i, s * SIDE + b] = block[16 * s + i]


@kernel
def round_scales(scales: Floats, bound: int, smallest: np.float32, room: Room) -> None:
    """room.rounded = scales [LANES] over room.d, -bound .. bound - 1.

    d is a super-block's largest scale over -bound. Where that is below smallest, d is 0 and the
    rounded scales are -bound.
    """
    largest, inverse = room.d, room.steps[0]
    largest[:] = _ZERO
    for s in range(16):
        for b in range(SIDE):
            scale = scales[s * SIDE + b]
            largest[b] = scale if abs(scale) > abs(largest[b]) else largest[b]
    for b in range(SIDE):
        inverse[b] = np.float32(-bound) / largest[b]
    for s in range(16):
        for b in range(SIDE):
            scale = min(np.int32(bound - 1), nearest(inverse[b] * scales[s * SIDE + b]))
            room.rounded[s * SIDE + b] = scale if abs(largest[b]) >= smallest else np.int32(-bound)
    for b in range(SIDE):
        room.d[b] = np.float32(1) / inverse[b] if abs(largest[b]) >= smallest else _ZERO


@kernel
def requantize(blocks: Floats, top: int, halves: Floats, room: Room) -> None:
    """room.levels = those of the super-blocks [.., 256] + top, by their d as a half and scales."""
    for b in range(blocks.shape[0]):
        d = halves[to_half(room.d[b])]
        for s in range(16):
            step = d * np.float32(room.rounded[s * SIDE + b])
            for i in range(16):
                room.steps[b, 16 * s + i] = step
    least, most = np.int32(-top), np.int32(top - 1)
    for b in range(blocks.shape[0]):
        for i in range(256):
            level = min(max(nearest(blocks[b, i] / room.steps[b, i]), least), most)
            room.levels[b, i] = np.uint8(level - least)
    for b in range(blocks.shape[0]):
        for s in range(16):
            if room.steps[b, 16 * s] == _ZERO:
                for i in range(16):
                    room.levels[b, 16 * s + i] = room.kept[i, s * SIDE + b]


@kernel
def pack6(q: Bytes, block: Bytes) -> None:
    """256 levels 0 .. 63 to the first 192 bytes of a block."""
    for half in range(2):
        at = 128 * half
        for j in range(64):
            block[64 * half + j] = (q[at + j] & 15) | (q[at + j + 64] & 15) << 4
        for j in range(32):
            low, high = (q[at + j] >> 4) | (q[at + j + 32] >> 4) << 2, q[at + j + 64] >> 4
            block[128 + 32 * half + j] = low | high << 4 | (q[at + j + 96] >> 4) << 6


@kernel
def store6(lane: int, room: Room, block: Bytes) -> None:
    """Super-block `lane` of a tile to its bytes."""
    if room.d[lane] == _ZERO:
        block[:] = 0
        return
    pack6(room.levels[lane], block)
    for s in range(16):
        block[192 + s] = room.rounded[s * SIDE + lane] & 255
    put_half(block, 208, room.d[lane])


@kernel
def encode6(rows: Floats, importance: Floats, out: Bytes, room: Room, halves: Floats) -> None:
    """Super-blocks [n, 256] to [n, 210]; importance [blocks of a row, 256], none is x^2."""
    for first in range(0, rows.shape[0], SIDE):
        load(rows, first, room.x)
        if importance.shape[0]:
            load(importance, first, room.weights)
        else:
            square(room.x, room.weights)
        search(room.x, room.weights, room.moments, 32, room.found)
        round_scales(room.found.scale, 128, SMALLEST, room)
        levels(room.x, room.found, 32, room.kept)
        blocks = rows[first : first + SIDE]
        requantize(blocks, 32, halves, room)
        for b in range(blocks.shape[0]):
            store6(b, room, out[first + b])


@kernel
def square(x: Floats, out: Floats) -> None:
    """out = x^2."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            out[i, j] = x[i, j] * x[i, j]


@kernel
def pack3(q: Bytes, block: Bytes) -> None:
    """256 levels 0 .. 7 to the first 96 bytes of a block."""
    for j in range(32):
        high = np.uint8(0)
        for group in range(8):
            high |= np.uint8((q[32 * group + j] >> 2) << group)
        block[j] = high
    for half in range(2):
        at = 128 * half
        for j in range(32):
            low = (q[at + j] & 3) | (q[at + j + 32] & 3) << 2
            block[32 + 32 * half + j] = low | (q[at + j + 64] & 3) << 4 | (q[at + j + 96] & 3) << 6


@kernel
def store3(lane: int, room: Room, block: Bytes) -> None:
    """Super-block `lane` of a tile to its bytes."""
    pack3(room.levels[lane], block)
    block[96:108] = 0
    for s in range(16):
        scale = room.rounded[s * SIDE + lane] + 32
        block[96 + s % 8] |= (scale & 15) << s // 8 * 4
        block[104 + s % 4] |= (scale >> 4) << s // 4 * 2
    put_half(block, 108, room.d[lane])


@kernel
def finish3(blocks: Floats, room: Room, halves: Floats, out: Bytes) -> None:
    """Super-blocks [.., 256] of a tile with its scales to their bytes."""
    requantize(blocks, 4, halves, room)
    for b in range(blocks.shape[0]):
        store3(b, room, out[b])


@kernel
def encode3(
    rows: Floats, out: Bytes, room: Room, state: Descent, busy: Descent, halves: Floats
) -> None:
    """Super-blocks [n, 256] to [n, 110]."""
    for first in range(0, rows.shape[0], SIDE):
        load(rows, first, state.x)
        descend(state, busy, room.found.scale, room.kept)
        round_scales(room.found.scale, 32, _LEAST, room)
        last = first + SIDE
        finish3(rows[first:last], room, halves, out[first:last])


@kernel
def weigh3(room: Room) -> None:
    """room.weights, an importance, times the root of x^2 + 2 mean(x^2) of a super-block."""
    x, mean = room.x, room.d
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
def total(weights: Floats, totals: Floats) -> None:
    """The sums of the lanes."""
    totals[:] = _ZERO
    for i in range(16):
        for j in range(LANES):
            totals[j] += weights[i, j]


@kernel
def fit_scales(room: Room, totals: Floats, found: Fit) -> None:
    """room.d and room.rounded from the search over a super-block's scales."""
    scales, weights = room.found.scale.reshape(16, SIDE), totals.reshape(16, SIDE)
    moments = room.moments.reshape(-1)[:LANES].reshape(16, SIDE)
    search(scales, weights, moments, 32, found)
    fine = room.levels.reshape(-1)[:LANES].reshape(16, SIDE)
    levels(scales, found, 32, fine)
    for s in range(16):
        for b in range(SIDE):
            room.rounded[s * SIDE + b] = np.int32(fine[s, b]) - np.int32(32)
    room.d[:] = found.scale


@kernel
def encode3_weighted(
    rows: Floats, importance: Floats, out: Bytes, room: Room, found: Fit, halves: Floats
) -> None:
    """Super-blocks [n, 256] to [n, 110]; importance [blocks of a row, 256], found of SIDE lanes."""
    totals = np.empty(LANES, np.float32)
    for first in range(0, rows.shape[0], SIDE):
        load(rows, first, room.x)
        load(importance, first, room.weights)
        weigh3(room)
        total(room.weights, totals)
        search(room.x, room.weights, room.moments, 4, room.found)
        levels(room.x, room.found, 4, room.kept)
        fit_scales(room, totals, found)
        last = first + SIDE
        finish3(rows[first:last], room, halves, out[first:last])


_NONE = np.empty((0, 256), np.float32)


def _q6_k(rows: Floats, out: Bytes) -> None:
    encode6(rows.reshape(-1, 256), _NONE, out.reshape(-1, 210), room(), halves())


def _q6_k_weighted(rows: Floats, importance: Floats, out: Bytes) -> None:
    blocks = importance.reshape(-1, 256)
    encode6(rows.reshape(-1, 256), blocks, out.reshape(-1, 210), room(), halves())


def _q3_k(rows: Floats, out: Bytes) -> None:
    blocks = out.reshape(-1, 110)
    encode3(rows.reshape(-1, 256), blocks, room(), descent(), descent(), halves())


def _q3_k_weighted(rows: Floats, importance: Floats, out: Bytes) -> None:
    blocks = out.reshape(-1, 110)
    weights = importance.reshape(-1, 256)
    encode3_weighted(rows.reshape(-1, 256), weights, blocks, room(), fit(SIDE), halves())


QUANTIZERS = {"q3_k": (_q3_k, _q3_k_weighted), "q6_k": (_q6_k, _q6_k_weighted)}

__all__ = ["DEQUANTIZERS", "QUANTIZERS"]
