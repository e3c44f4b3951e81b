"""IQ4_NL and IQ4_XS of ggml-quants.c: 4-bit codes of 16 uneven levels.

    IQ4_NL   18 bytes for 32 weights     x = d * level
             d, codes[16]
    IQ4_XS  136 bytes for 256 weights    x = d * scale[s] * level, a scale for each 32 weights
             d, high[2], low[4], codes[128]
             scale + 32 has 6 bits: nibble s of low, and bits 2 s of high

d is a half; byte i of a sub-block's codes has weight i in its low 4 bits, weight i + 16 above.
Without importance the errors weigh x^2, with it importance * sqrt(x^2 + 2 mean(x^2)).

A tile holds LANES sub-blocks: lane = sub-block * side + block, side blocks in all.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dqconvert.quantizers.ggml.compiled.floats import halves, nearest, put_half
from dqconvert.quantizers.ggml.compiled.iq4_search import LANES, ROWS, SCALE, codes, search
from dqconvert.quantizers.ggml.compiled.symmetric_search import Bytes, Floats, aligned
from dqconvert.quantizers.ggml.jit import kernel
from dqconvert.quantizers.ggml.plain.iq4 import LEVELS

_ZERO, _ONE = np.float32(0), np.float32(1)


class Room(NamedTuple):
    """Scratch of a kernel.

    x, weights  float32 [32, LANES]
    state       of the search
    inverse     float32 [LANES], 1 over what multiplies a level
    packed      uint8 [16, LANES]
    """

    x: Floats
    weights: Floats
    state: Floats
    inverse: Floats
    packed: Bytes


def room() -> Room:
    """Room for a kernel that goes through a weight."""
    tiles = aligned((2, 32, LANES))
    packed = np.empty((16, LANES), np.uint8)
    return Room(tiles[0], tiles[1], aligned((ROWS * LANES,)), aligned((LANES,)), packed)


@kernel
def load(blocks: Floats, first: int, tile: Floats) -> None:
    """Lays blocks first, first + 1 .. of [n, weights] into a tile; after the last, the first."""
    subs = blocks.shape[1] // 32
    side = LANES // subs
    for b in range(side):
        block = blocks[(first + b) % blocks.shape[0]]
        for s in range(subs):
            for i in range(32):
                tile[i, s * side + b] = block[32 * s + i]


@kernel
def square(x: Floats, out: Floats) -> None:
    """out = x^2."""
    for i in range(32):
        for j in range(LANES):
            out[i, j] = x[i, j] * x[i, j]


@kernel
def weigh(x: Floats, weights: Floats, side: int, mean: Floats) -> None:
    """weights, an importance, times the root of x^2 + 2 mean(x^2) of a block. mean is scratch."""
    for b in range(side):
        mean[b] = _ZERO
    for s in range(0, LANES, side):
        for i in range(32):
            for b in range(side):
                mean[b] += x[i, s + b] * x[i, s + b]
    for b in range(side):
        mean[b] *= np.float32(2) / np.float32(32 * LANES // side)
    for s in range(side, LANES):
        mean[s] = mean[s - side]
    for i in range(32):
        for j in range(LANES):
            weights[i, j] *= np.sqrt(mean[j] + x[i, j] * x[i, j])


@kernel
def fit(rows: Floats, importance: Floats, first: int, room: Room) -> None:
    """Finds the scales of a tile."""
    load(rows, first, room.x)
    if importance.shape[0]:
        load(importance, first, room.weights)
        weigh(room.x, room.weights, LANES * 32 // rows.shape[1], room.inverse)
    else:
        square(room.x, room.weights)
    search(room.x, room.weights, room.state)


@kernel
def encode_nl(rows: Floats, importance: Floats, out: Bytes, room: Room) -> None:
    """Blocks [n, 32] to [n, 18]; importance [blocks of a row, 32], none is x^2."""
    for first in range(0, rows.shape[0], LANES):
        fit(rows, importance, first, room)
        for j in range(LANES):
            scale = room.state[SCALE + j]
            room.inverse[j] = _ONE / scale if scale != _ZERO else _ZERO
        codes(room.x, room.inverse, room.packed)
        for b in range(min(LANES, rows.shape[0] - first)):
            put_half(out[first + b], 0, room.state[SCALE + b])
            for i in range(16):
                out[first + b, 2 + i] = room.packed[i, b]


@kernel
def encode_xs(rows: Floats, importance: Floats, out: Bytes, room: Room) -> None:
    """Blocks [n, 256] to [n, 136]; importance [blocks of a row, 256], none is x^2."""
    side = LANES // 8
    for first in range(0, rows.shape[0], side):
        fit(rows, importance, first, room)
        count = min(side, rows.shape[0] - first)
        for b in range(count):
            round_scales(room, b, out[first + b])
        codes(room.x, room.inverse, room.packed)
        for b in range(count):
            for s in range(8):
                for i in range(16):
                    out[first + b, 8 + 16 * s + i] = room.packed[i, s * side + b]


@kernel
def round_scales(room: Room, lane: int, block: Bytes) -> None:
    """The first 8 bytes of a block, and room.inverse of its lanes, by a d that is no half yet."""
    side = LANES // 8
    largest = _ZERO
    for s in range(8):
        scale = room.state[SCALE + s * side + lane]
        largest = scale if abs(scale) > abs(largest) else largest
    d = -largest / np.float32(32)
    inverse = _ONE / d if d != _ZERO else _ZERO
    block[:8] = 0
    put_half(block, 0, d)
    for s in range(8):
        scale = nearest(inverse * room.state[SCALE + s * side + lane])
        scale = min(max(scale, np.int32(-32)), np.int32(31))
        step = d * np.float32(scale)
        room.inverse[s * side + lane] = _ONE / step if step != _ZERO else _ZERO
        scale += np.int32(32)
        block[2 + s // 4] |= (scale >> 4) << s % 4 * 2
        block[4 + s // 2] |= (scale & 15) << s % 2 * 4


_NONE = np.empty((0, 1), np.float32)


def _iq4_nl(rows: Floats, out: Bytes) -> None:
    encode_nl(rows.reshape(-1, 32), _NONE, out.reshape(-1, 18), room())


def _iq4_nl_weighted(rows: Floats, importance: Floats, out: Bytes) -> None:
    encode_nl(rows.reshape(-1, 32), importance.reshape(-1, 32), out.reshape(-1, 18), room())


def _iq4_xs(rows: Floats, out: Bytes) -> None:
    encode_xs(rows.reshape(-1, 256), _NONE, out.reshape(-1, 136), room())


def _iq4_xs_weighted(rows: Floats, importance: Floats, out: Bytes) -> None:
    encode_xs(rows.reshape(-1, 256), importance.reshape(-1, 256), out.reshape(-1, 136), room())


@kernel
def _spread(codes: Bytes, step: np.float32, levels: Floats, out: Floats) -> None:
    """32 weights of one scale."""
    for i in range(16):
        out[i] = step * levels[codes[i] & 15]
    for i in range(16):
        out[i + 16] = step * levels[codes[i] >> 4]


@kernel
def _decode_nl(blocks: Bytes, halves: Floats, levels: Floats, out: Floats) -> None:
    for n in range(blocks.shape[0]):
        d = halves[np.int64(blocks[n, 0]) | np.int64(blocks[n, 1]) << 8]
        _spread(blocks[n, 2:], d, levels, out[n])


@kernel
def _decode_xs(blocks: Bytes, halves: Floats, levels: Floats, out: Floats) -> None:
    for n in range(blocks.shape[0]):
        block = blocks[n]
        d = halves[np.int64(block[0]) | np.int64(block[1]) << 8]
        for s in range(8):
            low, high = block[4 + s // 2] >> s % 2 * 4, block[2 + s // 4] >> s % 4 * 2
            step = d * np.float32(((low & 15) | (high & 3) << 4) - 32)
            _spread(block[8 + 16 * s :], step, levels, out[n, 32 * s :])


_LEVELS = np.array(LEVELS, np.float32)


def iq4_nl(blocks: Bytes, out: Floats) -> None:
    """Blocks [N, row bytes] to weights [N, K]."""
    _decode_nl(blocks.reshape(-1, 18), halves(), _LEVELS, out.reshape(-1, 32))


def iq4_xs(blocks: Bytes, out: Floats) -> None:
    """Blocks [N, row bytes] to weights [N, K]."""
    _decode_xs(blocks.reshape(-1, 136), halves(), _LEVELS, out.reshape(-1, 256))


QUANTIZERS = {"iq4_nl": (_iq4_nl, _iq4_nl_weighted), "iq4_xs": (_iq4_xs, _iq4_xs_weighted)}
DEQUANTIZERS = {"iq4_nl": iq4_nl, "iq4_xs": iq4_xs}
