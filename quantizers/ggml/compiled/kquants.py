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
_RUN = 16  # weights that surely share a scale
_ZERO = np.float32(0)


@kernel
def quantize(weights: Floats, importance: Floats, out: Bytes, table: Floats, form: Form) -> None:
    """Blocks [B, bytes] of weights [B, 256]; importance is [blocks of a row, 256] or [0, 256]."""
    n = form.task[0]
    subs = WEIGHTS // n
    tiles = np.zeros(subs // 2 * _TILE, np.float32)
    series = np.zeros((_SLOPES + subs) * LANES, np.float32)
    codes = np.empty(WEIGHTS, np.uint8)
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
            _put_levels(out[first + lane], series, lane, form)
            _encode(weights[first + lane], out[first + lane], series[lane:], codes, table, form)
            put_codes(out[first + lane], form.bits, codes)


@kernel
def dequantize(blocks: Bytes, bits: int, out: Floats, table: Floats) -> None:
    """Weights [B, 256] of blocks [B, bytes]; table is halves()."""
    codes = np.empty(WEIGHTS, np.uint8)
    for b in range(blocks.shape[0]):
        get_codes(blocks[b], bits, codes)
        weights = out[b]
        for run in range(WEIGHTS // _RUN):
            scale, low = _scale(blocks[b], bits, run, table)
            start = run * _RUN
            for i in range(_RUN):
                weights[start + i] = scale * np.float32(codes[start + i]) - low


@kernel
def _scale(block: Bytes, bits: int, run: int, table: Floats) -> tuple[np.float32, np.float32]:
    """What a code of 1 adds to a weight of a run of 16, and what is taken off."""
    head = halves_at(bits)
    d = table[block[head] | (block[head + 1] << 8)]
    dmin = table[block[head + 2] | (block[head + 3] << 8)]
    scale, minimum = levels(block, bits, run if bits == 2 else run >> 1)
    return d * scale, dmin * minimum


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
        for i in range(n):
            for lane in range(LANES):
                x = tiles[at(top + X + i, lane)]
                tiles[at(top + L, lane)] += x * x
        for lane in range(LANES):
            mean = tiles[at(top + L, lane)] / np.float32(32)
            tiles[at(top + L, lane)] = np.sqrt(mean) if n == 32 else _ZERO
        for i in range(n):
            for lane in range(LANES):
                size = abs(tiles[at(top + X + i, lane)])
                tiles[at(top + W + i, lane)] = tiles[at(top + L, lane)] + size


@kernel
def _weigh_by_importance(tiles: Floats, n: int) -> None:
    """Turns importance into importance * sqrt(m + x^2)."""
    for lane in range(LANES):
        tiles[at(L, lane)] = _ZERO
    for sub in range(WEIGHTS // n):
        top, side = (sub >> 1) * affine_search.ROWS + X, (sub & 1) * BATCH
        for i in range(n):
            for b in range(BATCH):
                x = tiles[at(top + i, side + b)]
                tiles[at(L, b)] += x * x
    for b in range(BATCH):
        total = tiles[at(L, b)]
        mean = (total if n == 16 else np.float32(2) * total) / np.float32(WEIGHTS)
        tiles[at(L, b)] = mean
        tiles[at(L, BATCH + b)] = mean
    for group in range(WEIGHTS // (2 * n)):
        top = group * affine_search.ROWS
        for i in range(n):
            for lane in range(LANES):
                x = tiles[at(top + X + i, lane)]
                tiles[at(top + W + i, lane)] *= np.sqrt(tiles[at(L, lane)] + x * x)


@kernel
def _search(tiles: Floats, series: Floats, form: Form) -> None:
    """The scales and the minima of a tile's sub-blocks, as series for the search of levels."""
    state = np.zeros(affine_search.FIELDS * LANES, np.float32)
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


@kernel
def _encode(
    weights: Floats, block: Bytes, column: Floats, codes: Bytes, table: Floats, form: Form
) -> None:
    """The codes nearest with the levels kept; the search's where the scale is 0.

    column: series from the block's lane on.
    """
    top, n = form.task[1], form.task[0]
    for run in range(WEIGHTS // _RUN):
        scale, low = _scale(block, form.bits, run, table)
        start = run * _RUN
        sub = start // n
        slope, origin = column[at(_SLOPES + sub, 0)], column[at(_SLOPES + sub, BATCH)]
        if scale == _ZERO:
            for i in range(_RUN):
                code = clip(nearest(slope * (weights[start + i] - origin)), top)
                codes[start + i] = np.uint8(code)
        else:
            for i in range(_RUN):
                code = clip(nearest((weights[start + i] + low) / scale), top)
                codes[start + i] = np.uint8(code)


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
