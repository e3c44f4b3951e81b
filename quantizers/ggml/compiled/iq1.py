"""IQ1_S and IQ1_M: 1.5625 and 1.75 bits per weight on one grid of 8 levels of {-1, 0, 1}.

Layout (block_iq1_s and block_iq1_m of ggml-common.h), 256 weights, x = d (2 scale + 1) (level ± ⅛):

    iq1_s       50 bytes    half d, 32 low bytes of points, 8 words for 32 weights each: the
                            points' 3 high bits four times, 3 bits of scale, the shift's sign
    iq1_m       56 bytes    32 low bytes of points, 16 bytes with 3 high bits and the shift's sign
                            twice, 4 words of four 3-bit scales for 16 weights each and, highest,
                            a quarter of the half d

Algorithm: quantize_row_iq1_s_impl and quantize_row_iq1_m_impl of ggml-quants.c. The cuts are those
of splits.py; groups of 8 levels that are not on the grid go to the neighbour at the least weighted
distance, and the scale is fitted once more.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dqconvert.quantizers.ggml.compiled.floats import halves, put_half, to_half
from dqconvert.quantizers.ggml.compiled.lattice import BLOCK, level
from dqconvert.quantizers.ggml.compiled.magnitudes import by_blocks, mean_square, weigh
from dqconvert.quantizers.ggml.compiled.neighbours import (
    FARTHEST,
    POINT,
    SIDE,
    Lattice,
    lattice,
    ranked,
)
from dqconvert.quantizers.ggml.compiled.spelling import Bytes, Floats, half, word
from dqconvert.quantizers.ggml.compiled.splits import (
    Split,
    cut_halves,
    cut_whole,
    shift_of,
    split,
    spread,
)
from dqconvert.quantizers.ggml.grids import grid
from dqconvert.quantizers.ggml.jit import kernel

_ZERO, _ONE = np.float32(0), np.float32(1)
_LEAST_S = np.float32(1e-12)
_LEAST_M = np.float32(1e-7)


class Work(NamedTuple):
    """One block in the making: what its sub-blocks of 16 or 32 weights have come to.

    weight [256] float32, levels [256] uint8, chosen [32] int64 points, scales [16] float32,
    shifts [16] int64 of splits.py
    """

    weight: Floats
    levels: NDArray[np.uint8]
    chosen: NDArray[np.int64]
    scales: Floats
    shifts: NDArray[np.int64]


Tools = tuple[Lattice, Split, Work]


def _plain_m(rows: Floats, out: Bytes) -> None:
    _weighted("iq1_m", rows, np.empty(0, np.float32), out)


def _weighted(code: str, rows: Floats, importance: Floats, out: Bytes) -> None:
    blocks, counts = by_blocks(rows, importance)
    work = Work(
        weight=np.empty(BLOCK, np.float32),
        levels=np.empty(BLOCK, np.uint8),
        chosen=np.empty(BLOCK // 8, np.int64),
        scales=np.empty(16, np.float32),
        shifts=np.empty(16, np.int64),
    )
    run = _quantize_s if code == "iq1_s" else _quantize_m
    run((lattice("iq1_s"), split(), work), blocks, counts, out.reshape(len(blocks), -1))


@kernel
def _quantize_s(tools: Tools, blocks: Floats, importance: Floats, out: Bytes) -> None:
    lattice, split, work = tools
    for n in range(len(blocks)):
        block = blocks[n]
        _weigh(work, block, importance[n % len(importance)])
        for part in range(8):
            x, weight = block[32 * part : 32 * part + 32], work.weight[32 * part : 32 * part + 32]
            if _peak(x) < _LEAST_S:
                _leave(work, part, 4)
                continue
            best = cut_whole(split, x, weight)
            if best.shifts < 0:
                _leave(work, part, 4)
                continue
            spread(split, best, work.levels[32 * part : 32 * part + 32])
            turned = best.scale < _ZERO
            work.shifts[part] = 3 * (1 - best.shifts if turned else best.shifts)
            work.scales[part] = abs(best.scale)
            _snap(lattice, work, block, part, 4)
        _pack_s(work, out[n])


@kernel
def _weigh(work: Work, block: Floats, importance: Floats) -> None:
    if len(importance):
        weigh(work.weight, block, importance, mean_square(block, np.float32(2)))
    else:
        for i in range(BLOCK):
            work.weight[i] = block[i] * block[i]


@kernel
def _peak(x: Floats) -> np.float32:
    peak = _ZERO
    for i in range(len(x)):
        peak = max(peak, abs(x[i]))
    return peak


@kernel
def _leave(work: Work, part: int, groups: int) -> None:
    """A sub-block of nothing."""
    work.scales[part] = _ZERO
    work.shifts[part] = 0
    for group in range(groups * part, groups * part + groups):
        work.chosen[group] = 0


@kernel
def _shift(work: Work, part: int, group: int) -> np.float32:
    """The shift of one of a sub-block's groups."""
    return shift_of(work.shifts[part], group % 2)


@kernel
def _snap(lattice: Lattice, work: Work, block: Floats, part: int, groups: int) -> None:
    """Points for the levels of a sub-block; its scale again if one of them is another's."""
    off = False
    for group in range(groups * part, groups * part + groups):
        code = np.int64(0)
        for i in range(7, -1, -1):
            code = code * 3 + work.levels[8 * group + i]
        point = np.int64(lattice.found[code])
        if point < 0:
            off = True
            x, weight = block[8 * group : 8 * group + 8], work.weight[8 * group : 8 * group + 8]
            steps = work.scales[part], _shift(work, part, group)
            point = _nearest(lattice, x, weight, code, steps)
        work.chosen[group] = point
    if off:
        product, square = _ZERO, _ZERO
        for group in range(groups * part, groups * part + groups):
            sums = product, square
            product, square = _add(
                lattice, work, block, group, (_shift(work, part, group), _ONE), sums
            )
        if product > _ZERO and square > _ZERO:
            work.scales[part] = product / square


@kernel
def _add(
    lattice: Lattice,
    work: Work,
    block: Floats,
    group: int,
    steps: tuple[np.float32, np.float32],
    sums: tuple[np.float32, np.float32],
) -> tuple[np.float32, np.float32]:
    """Σ w q x and Σ w q² with those of a group added, q = (level + shift) factor."""
    product, square = sums
    shift, factor = steps
    for i in range(8):
        q = (_level(lattice.points[work.chosen[group], i]) + shift) * factor
        weighted = work.weight[8 * group + i] * q
        product += weighted * block[8 * group + i]
        square += weighted * q
    return product, square


@kernel
def _level(odd: np.float32) -> np.float32:
    """-1, 0 or 1 for 1, 3 or 5."""
    return (odd - np.float32(3)) * np.float32(0.5)


@kernel
def _nearest(
    lattice: Lattice,
    x: Floats,
    weight: Floats,
    code: np.int64,
    steps: tuple[np.float32, np.float32],
) -> np.int64:
    """The neighbour at the least weighted distance, for a scale and a shift."""
    scale, shift = steps
    best = FARTHEST
    for chunk in range(lattice.starts[code], lattice.starts[code + 1]):
        odds = lattice.odds[chunk]
        for j in range(SIDE):
            distance = _ZERO
            for i in range(8):
                off = scale * (_level(np.float32(odds[i, j])) + shift) - x[i]
                distance += weight[i] * off * off
            best = min(best, ranked(distance, lattice.near[chunk, j]))
    return best & POINT


@kernel
def _largest(work: Work, parts: int) -> np.float32:
    largest = _ZERO
    for part in range(parts):
        largest = max(largest, work.scales[part])
    return largest


@kernel
def _pack_s(work: Work, block: Bytes) -> None:
    largest = _largest(work, 8)
    step = largest / np.float32(15)
    put_half(block, 0, step * np.float32(1.125))
    for part in range(8):
        bits = np.int64(0)
        for i in range(4):
            point = work.chosen[4 * part + i]
            block[2 + 4 * part + i] = point & 255
            bits |= (point >> 8) << 3 * i
        if largest > _ZERO:
            scale = np.int64(level(_ONE / step, work.scales[part], np.int32(7)))
            bits |= (scale | np.int64(work.shifts[part] > 0) << 3) << 12
        block[34 + 2 * part] = bits & 255
        block[35 + 2 * part] = bits >> 8


@kernel
def _quantize_m(tools: Tools, blocks: Floats, importance: Floats, out: Bytes) -> None:
    lattice, split, work = tools
    for n in range(len(blocks)):
        block = blocks[n]
        _weigh(work, block, importance[n % len(importance)])
        for part in range(16):
            x, weight = block[16 * part : 16 * part + 16], work.weight[16 * part : 16 * part + 16]
            if _peak(x) < _LEAST_M:
                _leave(work, part, 2)
                continue
            best = cut_halves(split, x, weight)
            if best.shifts < 0:
                _leave(work, part, 2)
                continue
            spread(split, best, work.levels[16 * part : 16 * part + 16])
            work.shifts[part] = 3 - best.shifts if best.scale < _ZERO else best.shifts
            work.scales[part] = abs(best.scale)
            _snap(lattice, work, block, part, 2)
        _pack_m(lattice, work, block, out[n])


@kernel
def _pack_m(lattice: Lattice, work: Work, weights: Floats, block: Bytes) -> None:
    block[48:] = 0
    for part in range(16):
        low, high = work.chosen[2 * part], work.chosen[2 * part + 1]
        block[2 * part] = low & 255
        block[2 * part + 1] = high & 255
        block[32 + part] = low >> 8 | high >> 8 << 4
    largest = _largest(work, 16)
    if not largest > _ZERO:
        return
    step = largest / np.float32(15)
    inverse = _ONE / step
    product, square = _ZERO, _ZERO
    for part in range(16):
        scale = np.int64(level(inverse, work.scales[part], np.int32(7)))
        bits = scale << 3 * (part % 4)
        block[48 + part // 4 * 2] |= bits & 255
        block[49 + part // 4 * 2] |= bits >> 8
        block[32 + part] |= (work.shifts[part] >> 1) << 3 | (work.shifts[part] & 1) << 7
        for group in range(2 * part, 2 * part + 2):
            steps = _shift(work, part, group), np.float32(2 * scale + 1)
            product, square = _add(lattice, work, weights, group, steps, (product, square))
    if square > _ZERO:
        step = product / square
    bits = np.int64(to_half(step * np.float32(1.1125)))
    for quarter in range(4):
        block[49 + 2 * quarter] |= ((bits >> 4 * quarter) & 15) << 4


def _dequantize(code: str, blocks: Bytes, out: Floats) -> None:
    out = out.reshape(-1, BLOCK)
    read = _read_s if code == "iq1_s" else _read_m
    read(blocks.reshape(len(out), -1), grid(code).values, halves(), out)


@kernel
def _spell(out: Floats, values: Floats, step: np.float32, shift: np.float32) -> None:
    for i in range(8):
        out[i] = step * (values[i] + shift)


@kernel
def _read_s(blocks: Bytes, values: Floats, halves: Floats, out: Floats) -> None:
    for n in range(len(blocks)):
        block = blocks[n]
        d = half(block, halves)
        for group in range(32):
            at = 34 + group // 4 * 2
            bits = np.int64(block[at]) | np.int64(block[at + 1]) << 8
            step = d * np.float32(2 * ((bits >> 12) & 7) + 1)
            point = block[2 + group] | ((bits >> 3 * (group % 4)) & 7) << 8
            shift = shift_of(bits >> 15, 1)
            _spell(out[n, 8 * group : 8 * group + 8], values[point], step, shift)


@kernel
def _read_m(blocks: Bytes, values: Floats, halves: Floats, out: Floats) -> None:
    for n in range(len(blocks)):
        block = blocks[n]
        bits = np.int64(0)
        for quarter in range(4):
            bits |= np.int64(block[49 + 2 * quarter] >> 4) << 4 * quarter
        d = halves[bits]
        for group in range(32):
            part = group // 2
            scales = word(block, 48 + part // 4 * 2) if part < 12 else word(block, 52) >> 16
            step = d * np.float32(2 * ((scales >> 3 * (part % 4)) & 7) + 1)
            high = np.int64(block[32 + part]) >> 4 * (group % 2)
            point = block[group] | (high & 7) << 8
            shift = shift_of(high >> 3, 1)
            _spell(out[n, 8 * group : 8 * group + 8], values[point], step, shift)


QUANTIZERS = {
    "iq1_s": (None, partial(_weighted, "iq1_s")),
    "iq1_m": (_plain_m, partial(_weighted, "iq1_m")),
}
DEQUANTIZERS = {code: partial(_dequantize, code) for code in QUANTIZERS}
