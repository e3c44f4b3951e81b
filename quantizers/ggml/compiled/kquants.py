"""ggml's block types of 256 weights whose sub-blocks have a scale and a minimum.

kquants_pack has the layout of their bytes. Each sub-block's scale and minimum come from
affine_search, their levels and the block's d and dmin from scale_search; the codes are those
nearest with what the levels stand for. Without importance (quantize_row_q*_K_ref) a weight's
squared error counts |x| + root mean square of its sub-block, and in q2_k its absolute error |x|;
with it (quantize_row_q*_K_impl) importance * sqrt(m + x^2), where m is the mean square of the
block in q2_k and twice that in the others.

Lanes. Tiles of 16 blocks: two sub-blocks of each are the 32 lanes of a group of the search, and
the scales and the minima of each are two series of the level search.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dqconvert.quantizers.ggml.compiled import affine_search, scale_search
from dqconvert.quantizers.ggml.compiled.affine_search import (
    LANES,
    MINIMUM,
    ORIGIN,
    SCALE,
    SLOPE,
    TOTAL,
    UNROLLED,
    Floats,
    L,
    Task,
    W,
    X,
    at,
    clip,
)
from dqconvert.quantizers.ggml.compiled.floats import halves, nearest, put_half
from dqconvert.quantizers.ggml.compiled.kquants_pack import (
    WEIGHTS,
    Bytes,
    get_codes,
    halves_at,
    levels,
    put_codes,
    put_levels,
)
from dqconvert.quantizers.ggml.compiled.scale_search import COUNT, LEVEL, UNIT, VALUE
from dqconvert.quantizers.ggml.jit import kernel
from dqconvert.quantizers.spec import BLOCKS

BATCH = LANES // 2
"""Blocks of a tile."""


class Form(NamedTuple):
    """A way to quantize to a block type."""

    bits: int
    task: Task
    top: np.int32  # the largest level searched for
    limit: np.float32  # the largest level kept


def _form(bits: int, task: Task, limit: int) -> Form:
    return Form(bits, task, np.int32(15 if bits == 2 else 63), np.float32(limit))


PLAIN = {
    2: _form(2, affine_search.plan(16, 3, -0.5, 0.1, 15, absolute=True), 255),
    4: _form(4, affine_search.plan(32, 15, -1.0, 0.1, 20), 63),
    5: _form(5, affine_search.plan(32, 31, -0.5, 0.1, 15), 63),
}
WEIGHTED = {
    2: _form(2, affine_search.plan(16, 3, -0.9, 0.05, 36), 255),
    4: _form(4, affine_search.plan(32, 15, -0.9, 0.05, 36), 255),
    5: _form(5, affine_search.plan(32, 31, -0.9, 0.05, 36), 63),
}

_TILE = affine_search.ROWS * LANES
_SLOPES = scale_search.ROWS  # rows of the searches' slopes and, in the lanes of minima, origins
_ZERO = np.float32(0)


@kernel
def quantize(weights: Floats, importance: Floats, out: Bytes, table: Floats, form: Form) -> None:
    """Blocks [B, bytes] of weights [B, 256]; importance is [blocks of a row, 256] or [0, 256]."""
    n = form.task[0]
    subs = WEIGHTS // n
    tiles = affine_search.aligned(subs // 2 * _TILE)
    series = affine_search.aligned((_SLOPES + subs) * LANES)
    codes, lines = np.empty(WEIGHTS, np.uint8), np.empty(2 * WEIGHTS, np.float32)
    for first in range(0, weights.shape[0], BATCH):
        _load(weights, first, tiles, n, X)
        if importance.shape[0]:
            _load(importance, first, tiles, n, W)
            _weigh_by_importance(tiles, n)
        else:
            _weigh_by_size(tiles, n)
        _search(tiles, series, form)
        if importance.shape[0]:
            scale_search.search(series, subs, form.top, form.limit)
        else:
            scale_search.spread(series, subs, form.top, form.limit)
        for lane in range(min(BATCH, weights.shape[0] - first)):
            block = out[first + lane]
            _put_levels(block, series, lane, form)
            _draw(block, form.bits, lines, table)
            _round(weights[first + lane], lines, codes, form.task[1])
            _keep_searched(weights[first + lane], lines, codes, series[lane:], form)
            put_codes(block, form.bits, codes)


@kernel
def dequantize(blocks: Bytes, bits: int, out: Floats, table: Floats) -> None:
    """Weights [B, 256] of blocks [B, bytes]; table is halves()."""
    codes, lines = np.empty(WEIGHTS, np.uint8), np.empty(2 * WEIGHTS, np.float32)
    for b in range(blocks.shape[0]):
        get_codes(blocks[b], bits, codes)
        _draw(blocks[b], bits, lines, table)
        weights = out[b]
        for i in range(WEIGHTS):
            at_i, low = np.uint64(i), np.uint64(WEIGHTS + i)
            weights[at_i] = lines[at_i] * np.float32(codes[at_i]) - lines[low]


@kernel
def _draw(block: Bytes, bits: int, lines: Floats, table: Floats) -> None:
    """For 256 weights what a code of 1 adds, then for each what is taken off."""
    head = halves_at(bits)
    d = table[block[head] | (block[head + 1] << 8)]
    dmin = table[block[head + 2] | (block[head + 3] << 8)]
    n = 16 if bits == 2 else 32
    for start in range(0, WEIGHTS, n):
        level, minimum = levels(block, bits, start // n)
        lines[start : start + n] = d * level
        lines[WEIGHTS + start : WEIGHTS + start + n] = dmin * minimum


@kernel
def _round(weights: Floats, lines: Floats, codes: Bytes, top: np.int32) -> None:
    """The nearest codes."""
    for i in range(WEIGHTS):
        at_i, low = np.uint64(i), np.uint64(WEIGHTS + i)
        code = clip(nearest((weights[at_i] + lines[low]) / lines[at_i]), top)
        codes[at_i] = np.uint8(code)


@kernel
def _keep_searched(
    weights: Floats, lines: Floats, codes: Bytes, column: Floats, form: Form
) -> None:
    """Where a code adds nothing, the search's codes. column: series from the block's lane on."""
    n, top = form.task[0], form.task[1]
    for sub in range(WEIGHTS // n):
        if lines[sub * n] != _ZERO:
            continue
        slope, origin = column[at(_SLOPES + sub, 0)], column[at(_SLOPES + sub, BATCH)]
        for i in range(sub * n, (sub + 1) * n):
            codes[i] = np.uint8(clip(nearest(slope * (weights[i] - origin)), top))


@kernel
def _load(source: Floats, first: int, tiles: Floats, n: int, row: int) -> None:
    """Lays 16 of source's blocks from first on into the lanes, its first ones after the last."""
    for b in range(BATCH):
        block = source[(first + b) % source.shape[0]]
        for group in range(WEIGHTS // (2 * n)):
            top = group * affine_search.ROWS + row
            start = group * 2 * n
            for i in range(n):
                tiles[at(top + i, b)] = block[start + i]
                tiles[at(top + i, BATCH + b)] = block[start + n + i]


@kernel
def _weigh_by_size(tiles: Floats, n: int) -> None:
    """|x|, and in sub-blocks of 32 their root mean square besides."""
    for group in range(WEIGHTS // (2 * n)):
        top = group * affine_search.ROWS
        for lane in range(LANES):
            tiles[at(top + L, lane)] = _ZERO
        if n == 32:
            _add_squares(tiles, top, n)
        for lane in range(LANES):
            tiles[at(top + L, lane)] = np.sqrt(tiles[at(top + L, lane)] / np.float32(32))
        for start in range(0, n, UNROLLED):
            for lane in range(LANES):
                mean = tiles[at(top + L, lane)]
                for i in range(UNROLLED):
                    row = top + start + i
                    tiles[at(row + W, lane)] = mean + abs(tiles[at(row + X, lane)])


@kernel
def _add_squares(tiles: Floats, top: int, n: int) -> None:
    """Adds the squares of a group's weights to its first scratch row."""
    for start in range(0, n, UNROLLED):
        for lane in range(LANES):
            total = tiles[at(top + L, lane)]
            for i in range(UNROLLED):
                x = tiles[at(top + X + start + i, lane)]
                total += x * x
            tiles[at(top + L, lane)] = total


@kernel
def _weigh_by_importance(tiles: Floats, n: int) -> None:
    """Turns importance into importance * sqrt(m + x^2)."""
    means = affine_search.aligned(LANES)
    for sub in range(WEIGHTS // n):
        _add_squares_of_blocks(tiles, (sub >> 1) * affine_search.ROWS, (sub & 1) * BATCH, n, means)
    for b in range(BATCH):
        total = means[b] if n == 16 else np.float32(2) * means[b]
        means[b] = means[BATCH + b] = total / np.float32(WEIGHTS)
    for group in range(WEIGHTS // (2 * n)):
        for start in range(0, n, UNROLLED):
            top = group * affine_search.ROWS + start
            for lane in range(LANES):
                mean = means[at(0, lane)]
                for i in range(UNROLLED):
                    x = tiles[at(top + X + i, lane)]
                    tiles[at(top + W + i, lane)] *= np.sqrt(mean + x * x)


@kernel
def _add_squares_of_blocks(tiles: Floats, top: int, side: int, n: int, sums: Floats) -> None:
    """Adds to sums those of one sub-block of each block."""
    for start in range(0, n, UNROLLED):
        for b in range(BATCH):
            total = sums[at(0, b)]
            for i in range(UNROLLED):
                x = tiles[at(top + X + start + i, side + b)]
                total += x * x
            sums[at(0, b)] = total


@kernel
def _search(tiles: Floats, series: Floats, form: Form) -> None:
    """The scales and the minima of a tile's sub-blocks, as series for the search of levels."""
    state = affine_search.aligned(affine_search.FIELDS * LANES)
    for group in range(WEIGHTS // (2 * form.task[0])):
        affine_search.search(tiles[group * _TILE : (group + 1) * _TILE], state, form.task)
        for side in range(2):
            sub = 2 * group + side
            for b in range(BATCH):
                lane = side * BATCH + b
                series[at(VALUE + sub, b)] = state[at(SCALE, lane)]
                series[at(VALUE + sub, BATCH + b)] = -state[at(MINIMUM, lane)]
                series[at(COUNT + sub, b)] = state[at(TOTAL, lane)]
                series[at(COUNT + sub, BATCH + b)] = state[at(TOTAL, lane)]
                series[at(_SLOPES + sub, b)] = state[at(SLOPE, lane)]
                series[at(_SLOPES + sub, BATCH + b)] = state[at(ORIGIN, lane)]


@kernel
def _put_levels(block: Bytes, series: Floats, lane: int, form: Form) -> None:
    """Writes d, dmin and the levels of a block, which the lane has."""
    head = halves_at(form.bits)
    put_half(block, head, series[at(UNIT, lane)])
    put_half(block, head + 2, series[at(UNIT, BATCH + lane)])
    for sub in range(WEIGHTS // form.task[0]):
        scale, minimum = series[at(LEVEL + sub, lane)], series[at(LEVEL + sub, BATCH + lane)]
        put_levels(block, form.bits, sub, np.int64(scale), np.int64(minimum))


_Quantizer = Callable[..., None]


def _plain(bits: int) -> _Quantizer:
    def quantizer(rows: Floats, out: Bytes) -> None:
        quantize(*_blocks(rows, _NO_IMPORTANCE, out), halves(), PLAIN[bits])

    return quantizer


def _weighted(bits: int) -> _Quantizer:
    def quantizer(rows: Floats, importance: Floats, out: Bytes) -> None:
        quantize(*_blocks(rows, importance, out), halves(), WEIGHTED[bits])

    return quantizer


def _dequantizer(bits: int) -> _Quantizer:
    def dequantizer(blocks: Bytes, out: Floats) -> None:
        size = BLOCKS[f"Q{bits}_K"][1]
        dequantize(blocks.reshape(-1, size), bits, out.reshape(-1, WEIGHTS), halves())

    return dequantizer


_NO_IMPORTANCE: Floats = np.empty(0, np.float32)


def _blocks(rows: Floats, importance: Floats, out: Bytes) -> tuple[Floats, Floats, Bytes]:
    weights = rows.reshape(-1, WEIGHTS)
    return weights, importance.reshape(-1, WEIGHTS), out.reshape(weights.shape[0], -1)


QUANTIZERS: dict[str, Any] = {f"q{n}_k": (_plain(n), _weighted(n)) for n in PLAIN}
DEQUANTIZERS: dict[str, Any] = {f"q{n}_k": _dequantizer(n) for n in PLAIN}
