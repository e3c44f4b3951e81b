"""The search that IQ2 and IQ3 share: the best scale of a sub-block, and points on a grid for it.

A sub-block of 16 or 32 magnitudes tries a row of inverse scales. Each rounds its weights to
levels; a group of 4 or 8 levels that is not on the grid is replaced by the neighbour at the least
weighted distance; the scale with the largest (Σ w x q)² / Σ w q² wins, q = 2 level + 1. Groups off
the grid are then searched once more with the winning scale. This is what quantize_row_iq2_*_impl
and quantize_row_iq3_*_impl of ggml-quants.c have in common; a Rule holds how they differ.

The scales of a sub-block run in the lanes of vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dqconvert.quantizers.ggml.compiled.floats import nearest
from dqconvert.quantizers.ggml.compiled.neighbours import (
    FARTHEST,
    POINT,
    SIDE,
    Lattice,
    ranked,
    term,
)
from dqconvert.quantizers.ggml.jit import kernel

Floats = NDArray[np.float32]

LANES = 32
BLOCK = 256

REDO_OFF = 0
REDO_ALL = 1
REDO_ALWAYS = 2


class Rule(NamedTuple):
    """How a type searches.

    sub     weights that share a scale
    dims    weights of a point
    base    levels of a weight
    steps   [LANES] float32, what is divided by a peak to give the inverse scales to try
    tries   how many of them there are
    redo    which groups are searched again with the winning scale
    sign    the bits of a sign byte; 127 makes the number of minus signs even
    least   peaks below are none
    spread  of the mean square that goes into weights
    """

    sub: int
    dims: int
    base: int
    steps: NDArray[np.float32]
    tries: int
    redo: int
    sign: int
    least: np.float32
    spread: np.float32


class Work(NamedTuple):
    """One block of 256 weights in the making.

    x, weight, root  [256] float32         magnitudes, weights of errors and their roots
    signs            [32] uint8
    peaks            [256 / sub] float32   what divides the steps; 0 leaves a sub-block empty
    scales           [256 / sub] float32   in: of a sub-block that no step suits; out: found
    chosen           [256 / dims] int32    the points found

    and of one sub-block, for every scale it tries:

    codes            [sub / 4, LANES] int32     what the scale rounds to, in fours or in groups
    tried            [sub / dims, LANES] int32  the points for it
    odds             [sub, LANES] float32       their 2 level + 1
    inverse, scale   [LANES] float32
    sums             [2, LANES] float32         Σ w x q and Σ w q²
    levels, again    [sub] int32, float32       levels and 2 level + 1 for the scale that won
    """

    x: NDArray[np.float32]
    weight: NDArray[np.float32]
    root: NDArray[np.float32]
    signs: NDArray[np.uint8]
    peaks: NDArray[np.float32]
    scales: NDArray[np.float32]
    chosen: NDArray[np.int32]
    codes: NDArray[np.int32]
    tried: NDArray[np.int32]
    odds: NDArray[np.float32]
    inverse: NDArray[np.float32]
    scale: NDArray[np.float32]
    sums: NDArray[np.float32]
    levels: NDArray[np.int32]
    again: NDArray[np.float32]


Tools = tuple[Lattice, Rule, Work]


def steps(middle: int, step: float, last: int) -> NDArray[np.float32]:
    """middle + step i for the whole numbers i of -last .. last, then copies of the last one."""
    whole = np.minimum(np.arange(-last, LANES - last), last).astype(np.float32)
    return np.float32(middle) + whole * np.float32(step)


def work(rule: Rule) -> Work:
    """Room for a block."""
    floats, ints = np.float32, np.int32
    groups = rule.sub // rule.dims
    return Work(
        x=np.empty(BLOCK, floats),
        weight=np.empty(BLOCK, floats),
        root=np.empty(BLOCK, floats),
        signs=np.empty(BLOCK // 8, np.uint8),
        peaks=np.empty(BLOCK // rule.sub, floats),
        scales=np.empty(BLOCK // rule.sub, floats),
        chosen=np.empty(BLOCK // rule.dims, ints),
        codes=np.empty((rule.sub // 4, LANES), ints),
        tried=np.empty((groups, LANES), ints),
        odds=np.empty((rule.sub, LANES), floats),
        inverse=np.empty(LANES, floats),
        scale=np.empty(LANES, floats),
        sums=np.empty((2, LANES), floats),
        levels=np.empty(rule.sub, ints),
        again=np.empty(rule.sub, floats),
    )


@kernel
def fit(lattice: Lattice, rule: Rule, work: Work) -> None:
    """Scales and points of a block from its magnitudes, weights, peaks and first scales."""
    for part in range(BLOCK // rule.sub):
        if work.peaks[part] > np.float32(0):
            _fit_part(lattice, rule, work, part)
            if work.scales[part] < np.float32(0):
                _flip(rule, work, part)
        else:
            work.scales[part] = np.float32(0)
            _clear(rule, work, part)


@kernel
def _clear(rule: Rule, work: Work, part: int) -> None:
    for point in range(part * rule.sub // rule.dims, (part + 1) * rule.sub // rule.dims):
        work.chosen[point] = 0
    for byte in range(part * rule.sub // 8, (part + 1) * rule.sub // 8):
        work.signs[byte] = 0


@kernel
def _flip(rule: Rule, work: Work, part: int) -> None:
    """A positive scale and all signs the other way."""
    work.scales[part] = -work.scales[part]
    for byte in range(part * rule.sub // 8, (part + 1) * rule.sub // 8):
        work.signs[byte] = ~work.signs[byte] & rule.sign


@kernel
def _fit_part(lattice: Lattice, rule: Rule, work: Work, part: int) -> None:
    at = part * rule.sub
    peak = work.peaks[part]
    for lane in range(LANES):
        work.inverse[lane] = rule.steps[lane] / peak
        work.scale[lane] = np.float32(1) / work.inverse[lane]
    for quad in range(rule.sub // 4):
        _round_quad(rule, work, at + 4 * quad, quad)
    if rule.dims == 4:
        _snap_quads(lattice, rule, work, at)
    else:
        _snap_octets(lattice, rule, work, at)
    _sum(rule, work, at)
    won = _choose(rule, work, part)
    _keep(work, part, won)
    again = rule.redo == REDO_ALWAYS or _off_grid(lattice, rule, work, won)
    if again and work.scales[part] > np.float32(0):
        _redo(lattice, rule, work, part, won)


@kernel
def _round_quad(rule: Rule, work: Work, at: int, quad: int) -> None:
    """Codes of four weights, for all scales."""
    base = np.int32(rule.base)
    top = np.int32(rule.base - 1)
    a, b, c, d = work.x[at], work.x[at + 1], work.x[at + 2], work.x[at + 3]
    for lane in range(LANES):
        inverse = work.inverse[lane]
        code = level(inverse, d, top)
        code = code * base + level(inverse, c, top)
        code = code * base + level(inverse, b, top)
        work.codes[quad, lane] = code * base + level(inverse, a, top)


@kernel
def level(inverse: np.float32, x: np.float32, top: np.int32) -> np.int32:
    """The level whose 2 level + 1 is next to a scaled magnitude."""
    found = nearest(np.float32(0.5) * (inverse * x - np.float32(1)))
    found = found if found > 0 else np.int32(0)
    return found if found < top else top


@kernel
def _snap_quads(lattice: Lattice, rule: Rule, work: Work, at: int) -> None:
    for group in range(rule.sub // 4):
        for lane in range(rule.tries):
            code = work.codes[group, lane]
            point = lattice.found[code]
            if point < 0:
                point = _nearest(lattice, work, at + 4 * group, code, work.scale[lane], 4)
            work.tried[group, lane] = point
            for i in range(4):
                work.odds[4 * group + i, lane] = lattice.points[point, i]


@kernel
def _snap_octets(lattice: Lattice, rule: Rule, work: Work, at: int) -> None:
    for group in range(rule.sub // 8):
        for lane in range(rule.tries):
            code = work.codes[2 * group, lane] + np.int32(81) * work.codes[2 * group + 1, lane]
            work.codes[group, lane] = code
            point = lattice.found[code]
            if point < 0:
                point = _nearest(lattice, work, at + 8 * group, code, work.scale[lane], 8)
            work.tried[group, lane] = point
            for i in range(8):
                work.odds[8 * group + i, lane] = lattice.points[point, i]


@kernel
def _sum(rule: Rule, work: Work, at: int) -> None:
    """Σ w x q and Σ w q², for all scales."""
    for lane in range(LANES):
        work.sums[0, lane] = np.float32(0)
        work.sums[1, lane] = np.float32(0)
    for i in range(rule.sub):
        weight = work.weight[at + i]
        weighted = weight * work.x[at + i]
        for lane in range(LANES):
            odd = work.odds[i, lane]
            work.sums[0, lane] += weighted * odd
            work.sums[1, lane] += weight * odd * odd


@kernel
def _choose(rule: Rule, work: Work, part: int) -> int:
    """The lane that wins, which leaves its scale; -1 where none does."""
    won = -1
    best = np.float32(0)
    for lane in range(rule.tries):
        product, square = work.sums[0, lane], work.sums[1, lane]
        if square > np.float32(0) and product * product > best * square:
            scale = product / square
            best = scale * product
            work.scales[part] = scale
            won = lane
    return won


@kernel
def _keep(work: Work, part: int, won: int) -> None:
    groups = len(work.tried)
    for group in range(groups):
        work.chosen[part * groups + group] = work.tried[group, won] if won >= 0 else 0


@kernel
def _off_grid(lattice: Lattice, rule: Rule, work: Work, won: int) -> bool:
    """Whether a group of the winning lane had to leave its own levels."""
    if won < 0:
        return rule.redo != REDO_OFF
    least = 0
    for group in range(len(work.tried)):
        least = min(least, lattice.found[work.codes[group, won]])
    return least < 0


@kernel
def _redo(lattice: Lattice, rule: Rule, work: Work, part: int, won: int) -> None:
    """Points for the scale that won, and the scale that suits them."""
    at = part * rule.sub
    groups = len(work.tried)
    scale = work.scales[part]
    _round_all(rule, work, at, np.float32(1) / scale)
    for group in range(groups):
        point = work.chosen[part * groups + group]
        if rule.redo != REDO_OFF or lattice.found[work.codes[group, won]] < 0:
            point = _snap(lattice, rule, work, at, group, scale)
            work.chosen[part * groups + group] = point
        for i in range(rule.dims):
            work.again[group * rule.dims + i] = lattice.points[point, i]
    product, square = np.float32(0), np.float32(0)
    for i in range(rule.sub):
        odd, weight = work.again[i], work.weight[at + i]
        product += weight * work.x[at + i] * odd
        square += weight * odd * odd
    if square > np.float32(0):
        work.scales[part] = product / square


@kernel
def _round_all(rule: Rule, work: Work, at: int, inverse: np.float32) -> None:
    """Levels of a sub-block's weights for one scale."""
    top = np.int32(rule.base - 1)
    x = work.x[at : at + rule.sub]
    for i in range(rule.sub):
        work.levels[i] = level(inverse, x[i], top)


@kernel
def _snap(
    lattice: Lattice, rule: Rule, work: Work, at: int, group: int, scale: np.float32
) -> np.int64:
    """The point for the levels of a group."""
    first = group * rule.dims
    code = np.int64(0)
    for i in range(first + rule.dims - 1, first - 1, -1):
        code = code * rule.base + work.levels[i]
    if rule.dims == 4:
        return _nearest(lattice, work, at + first, code, scale, 4)
    return _nearest(lattice, work, at + first, code, scale, 8)


@kernel
def _nearest(
    lattice: Lattice, work: Work, at: int, code: np.int64, scale: np.float32, dims: int
) -> np.int64:
    """Of a code's list the point at the least weighted distance to the magnitudes from at on.

    As iq2_find_best_neighbour and iq3_find_best_neighbour of ggml-quants.c. Callers name dims as a
    number, for the compiler to unroll the sum.
    """
    x, root = work.x[at : at + dims], work.root[at : at + dims]
    best = FARTHEST
    for chunk in range(lattice.starts[code], lattice.starts[code + 1]):
        odds = lattice.odds[chunk]
        for j in range(SIDE):
            distance = np.float32(0)
            for i in range(dims):
                distance += term(scale, odds[i, j], x[i], root[i])
            best = min(best, ranked(distance, lattice.near[chunk, j]))
    return best & POINT
