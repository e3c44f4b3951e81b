"""Super-blocks of 16 sub-blocks of 16 weights, eight in a tile: what Q6_K and Q3_K share.

A tile is float32 [16, LANES], LANES = 128: weight i of a sub-block in row i, and sub-block s of
super-block b in lane 8 s + b. GROUP tiles hold LANES super-blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dqconvert.quantizers.ggml.compiled.floats import nearest, to_half
from dqconvert.quantizers.ggml.compiled.symmetric_search import (
    LANES,
    Bytes,
    Fit,
    Floats,
    Integers,
    aligned,
    fit,
)
from dqconvert.quantizers.ggml.jit import kernel

SIDE = 8
GROUP = LANES // SIDE

_ZERO = np.float32(0)


class Room(NamedTuple):
    """Scratch of a kernel.

    x, weights, moments  a tile each
    found                its fit
    steps                float32 [SIDE, 256], d * scale of every weight
    levels               uint8 [SIDE, 256]
    """

    x: Floats
    weights: Floats
    moments: Floats
    found: Fit
    steps: Floats
    levels: Bytes


def room() -> Room:
    """Room for a kernel that goes through a weight."""
    tiles, levels = aligned((3, 16, LANES)), np.empty((SIDE, 256), np.uint8)
    return Room(tiles[0], tiles[1], tiles[2], fit(), aligned((SIDE, 256)), levels)


class Coded(NamedTuple):
    """What super-blocks are coded with; of a group, or without the first dimension of a tile.

    d        float32 [GROUP, SIDE]
    rounded  int32 [GROUP, LANES], the scales over d
    kept     uint8 [GROUP, 16, LANES], the levels of the fit, from 0 up
    """

    d: Floats
    rounded: Integers
    kept: Bytes


def coded() -> Coded:
    """Room for a group."""
    rounded, kept = np.empty((GROUP, LANES), np.int32), np.empty((GROUP, 16, LANES), np.uint8)
    return Coded(np.empty((GROUP, SIDE), np.float32), rounded, kept)


@kernel
def tile_of(group: Coded, tile: int) -> Coded:
    """One tile of a group."""
    return Coded(group.d[tile], group.rounded[tile], group.kept[tile])


@kernel
def load(blocks: Floats, first: int, tile: Floats) -> None:
    """Lays super-blocks first, first + 1 .. of [n, 256] into a tile; after the last, the first."""
    for b in range(SIDE):
        block = blocks[(first + b) % blocks.shape[0]]
        for s in range(16):
            for i in range(16):
                tile[i, s * SIDE + b] = block[16 * s + i]


@kernel
def square(x: Floats, out: Floats) -> None:
    """out = x^2."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            out[i, j] = x[i, j] * x[i, j]


@kernel
def round_scales(scales: Floats, bound: int, smallest: np.float32, coded: Coded) -> None:
    """coded.rounded = scales [LANES] over coded.d, -bound .. bound - 1.

    d is a super-block's largest scale over -bound. Where that is below smallest, d is 0 and the
    rounded scales are -bound.
    """
    largest, inverse = coded.d, np.empty(SIDE, np.float32)
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
            coded.rounded[s * SIDE + b] = scale if abs(largest[b]) >= smallest else np.int32(-bound)
    for b in range(SIDE):
        coded.d[b] = np.float32(1) / inverse[b] if abs(largest[b]) >= smallest else _ZERO


@kernel
def requantize(blocks: Floats, top: int, halves: Floats, coded: Coded, room: Room) -> None:
    """room.levels = those of the super-blocks [.., 256] + top, by their d as a half and scales."""
    for b in range(blocks.shape[0]):
        d = halves[to_half(coded.d[b])]
        for s in range(16):
            step = d * np.float32(coded.rounded[s * SIDE + b])
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
                    room.levels[b, 16 * s + i] = coded.kept[i, s * SIDE + b]
