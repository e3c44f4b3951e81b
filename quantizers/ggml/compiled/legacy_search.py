"""The types of compiled/legacy.py with importance: a scale that is searched, block by block.

An error counts importance * sqrt(mean square of the row + x^2). quantize_row_q4_0_impl and
quantize_row_q5_0_impl of ggml-quants.c search a symmetric scale with that, quantize_row_q4_1_impl
and quantize_row_q5_1_impl a scale and a minimum.
"""

from __future__ import annotations

import numpy as np

from dqconvert.quantizers.ggml.compiled import affine_search, symmetric_search
from dqconvert.quantizers.ggml.compiled.affine_search import (
    FIELDS,
    LANES,
    MINIMUM,
    ORIGIN,
    ROWS,
    SCALE,
    SLOPE,
    L,
    W,
    X,
    at,
    clip,
)
from dqconvert.quantizers.ggml.compiled.floats import nearest
from dqconvert.quantizers.ggml.compiled.legacy_blocks import (
    FOUR,
    WEIGHTS,
    Bytes,
    Floats,
    write_five,
    write_four,
    write_half,
)
from dqconvert.quantizers.ggml.compiled.symmetric_search import Fit
from dqconvert.quantizers.ggml.jit import kernel

_ZERO, _ONE = np.float32(0), np.float32(1)


def symmetric(rows: Floats, importance: Floats, out: Bytes, reach: int) -> None:
    """Blocks [B, bytes] of rows [N, K] with codes 0 .. 2 reach - 1."""
    tiles = symmetric_search.aligned((3, WEIGHTS, symmetric_search.LANES))
    _symmetric(rows, importance, out, reach, tiles, symmetric_search.fit())


def affine(rows: Floats, importance: Floats, out: Bytes, top: int) -> None:
    """Blocks [B, bytes] of rows [N, K] with codes 0 .. top."""
    _affine(rows, importance, out, affine_search.plan(WEIGHTS, top, -0.9, 0.05, 36))


@kernel
def _symmetric(
    rows: Floats, importance: Floats, out: Bytes, reach: int, tiles: Floats, found: Fit
) -> None:
    """tiles [3, 32, lanes]: weights, what their errors count, scratch."""
    levels = np.empty(tiles.shape[1:], np.uint8)
    codes = np.empty((tiles.shape[2], WEIGHTS), np.float32)
    line = (_ZERO, _ONE, _ZERO, np.float32(2 * reach - 1))
    means = _mean_squares(rows)
    for first in range(0, len(out), tiles.shape[2]):
        blocks = out[first : first + tiles.shape[2]]
        _load(rows, importance, means, first, tiles)
        symmetric_search.search(tiles[0], tiles[1], tiles[2], reach, found)
        symmetric_search.levels(tiles[0], found, reach, levels)
        for lane in range(len(blocks)):
            for i in range(WEIGHTS):
                codes[lane, i] = levels[i, lane]
            write_half(blocks, lane, 0, found.scale[lane])
            if line[3] == FOUR:
                write_four(codes, lane, line, blocks, 2)
            else:
                write_five(codes, lane, line, blocks, 2)


@kernel
def _affine(rows: Floats, importance: Floats, out: Bytes, task: affine_search.Task) -> None:
    tile = affine_search.aligned(ROWS * LANES)
    state = affine_search.aligned(FIELDS * LANES)
    tiles = tile[: L * LANES].reshape(2, W - X, LANES)
    codes = np.empty((LANES, WEIGHTS), np.float32)
    line = (_ZERO, _ONE, _ZERO, np.float32(task[1]))
    means = _mean_squares(rows)
    for first in range(0, len(out), LANES):
        blocks = out[first : first + LANES]
        _load(rows, importance, means, first, tiles)
        affine_search.search(tile, state, task)
        for lane in range(len(blocks)):
            slope, origin = state[at(SLOPE, lane)], state[at(ORIGIN, lane)]
            for i in range(WEIGHTS):
                codes[lane, i] = clip(nearest(slope * (tiles[0, i, lane] - origin)), task[1])
            write_half(blocks, lane, 0, state[at(SCALE, lane)])
            write_half(blocks, lane, 2, state[at(MINIMUM, lane)])
            if line[3] == FOUR:
                write_four(codes, lane, line, blocks, 4)
            else:
                write_five(codes, lane, line, blocks, 4)


@kernel
def _mean_squares(rows: Floats) -> Floats:
    """Of each row, added in order."""
    found = np.empty(len(rows), np.float32)
    for r in range(len(rows)):
        total = _ZERO
        for j in range(rows.shape[1]):
            total += rows[r, j] * rows[r, j]
        found[r] = total / np.float32(rows.shape[1])
    return found


@kernel
def _load(rows: Floats, importance: Floats, means: Floats, first: int, tiles: Floats) -> None:
    """Lays blocks side by side in tiles [2 ..., 32, lanes], from one on, as far as they go."""
    width = rows.shape[1] // WEIGHTS
    for lane in range(min(tiles.shape[2], len(rows) * width - first)):
        r, start = (first + lane) // width, (first + lane) % width * WEIGHTS
        for i in range(WEIGHTS):
            x = rows[r, start + i]
            tiles[0, i, lane] = x
            tiles[1, i, lane] = importance[start + i] * np.sqrt(means[r] + x * x)
