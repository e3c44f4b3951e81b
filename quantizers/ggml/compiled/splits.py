"""The search of IQ1: sorted weights, two cuts between them, and the scale for what they give.

With levels -1, 0 and 1 a best choice gives the low weights of a sub-block -1, the high ones 1 and
those between 0, so every pair of cuts i <= j is tried, with all levels shifted up or down by an
eighth. The pair with the largest (Σ w x q)² / Σ w q² wins, q = level + shift. IQ1_S shifts a
sub-block of 32, where the sums are differences of running sums; IQ1_M shifts both halves of 16 on
their own and adds term by term. From quantize_row_iq1_s_impl and quantize_row_iq1_m_impl of
ggml-quants.c; the C library sorts equal weights stably, up to glibc 2.36.

Pairs stand in the lanes of vectors. Whether any lane beats the best one so far is asked of many
at once; only where one does, they are gone through in order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dqconvert.quantizers.ggml.jit import kernel

Floats = NDArray[np.float32]

CUTS = 48
"""Lanes for the 33 places of the second cut among 32 weights."""

PAIRS = 160
"""Lanes for the 153 pairs of cuts among 16 weights; the last pair fills what is left."""

SIDE = 32

UP = np.float32(0.125)
DOWN = np.float32(-0.125)
_NONE = np.float32(-3.4028235e38)
_ZERO, _ONE = np.float32(0), np.float32(1)


class Split(NamedTuple):
    """Room for a search.

    ranks, order        [32] int32      where a weight stands among the sorted, and the inverse
    totals              [2, CUTS] float32   Σ w x and Σ w of the weights before a cut
    cuts                [2, PAIRS] int32    the pairs
    products, squares   [4, PAIRS] float32  Σ w x q and Σ w q², for each pair of shifts
    """

    ranks: NDArray[np.int32]
    order: NDArray[np.int32]
    totals: Floats
    cuts: NDArray[np.int32]
    products: Floats
    squares: Floats


class Best(NamedTuple):
    """The best pair of cuts so far; shifts is -1 where none is."""

    score: np.float32
    scale: np.float32
    low: np.int64
    high: np.int64
    shifts: np.int64


def split() -> Split:
    """Room for a search, with the pairs in ggml's order."""
    pairs = [(low, high) for low in range(17) for high in range(low, 17)]
    pairs += pairs[-1:] * (PAIRS - len(pairs))
    return Split(
        ranks=np.empty(32, np.int32),
        order=np.empty(32, np.int32),
        totals=np.zeros((2, CUTS), np.float32),
        cuts=np.ascontiguousarray(np.array(pairs, np.int32).T),
        products=np.empty((4, PAIRS), np.float32),
        squares=np.empty((4, PAIRS), np.float32),
    )


@kernel
def sort(split: Split, x: Floats) -> None:
    """The order of weights, equal ones as they come."""
    for i in range(len(x)):
        split.ranks[i] = 0
    for i in range(len(x)):
        pivot = x[i]
        for j in range(i):
            split.ranks[j] += np.int32(pivot < x[j])
        for j in range(i + 1, len(x)):
            split.ranks[j] += np.int32(pivot <= x[j])
    for i in range(len(x)):
        split.order[split.ranks[i]] = i


@kernel
def none() -> Best:
    """No pair of cuts."""
    return Best(_NONE, _ZERO, np.int64(0), np.int64(0), np.int64(-1))


@kernel
def beats(product: np.float32, square: np.float32, score: np.float32) -> np.bool_:
    """Whether a fit is better than a score."""
    return (square > _ZERO) & (product * product > score * square)


@kernel
def cut_whole(split: Split, x: Floats, weight: Floats) -> Best:
    """The best cuts of 32 weights with one shift: 0 is up, 1 is down."""
    sort(split, x)
    product, count = _ZERO, _ZERO
    for place in range(32):
        i = split.order[place]
        product += weight[i] * x[i]
        count += weight[i]
        split.totals[0, place + 1] = product
        split.totals[1, place + 1] = count
    best = none()
    for low in range(33):
        _fit_whole(split, low, UP, 0)
        _fit_whole(split, low, DOWN, 1)
        if _any_whole(split, best.score):
            best = _scan_whole(split, low, best)
    return best


@kernel
def _fit_whole(split: Split, low: int, shift: np.float32, row: int) -> None:
    """Sums for one first cut and all second ones."""
    a, b, c = shift - _ONE, shift, shift + _ONE
    xs, ws = split.totals[0], split.totals[1]
    products, squares = split.products[row], split.squares[row]
    x_low, w_low, x_all, w_all = xs[low], ws[low], xs[32], ws[32]
    product, square = x_low * a, w_low * a * a
    for high in range(CUTS):
        products[high] = product + (xs[high] - x_low) * b + (x_all - xs[high]) * c
        squares[high] = square + (ws[high] - w_low) * b * b + (w_all - ws[high]) * c * c


@kernel
def _any_whole(split: Split, score: np.float32) -> np.bool_:
    found = np.int32(0)
    for row in range(2):
        products, squares = split.products[row], split.squares[row]
        for high in range(CUTS):
            found |= np.int32(beats(products[high], squares[high], score))
    return found > 0


@kernel
def _scan_whole(split: Split, low: int, best: Best) -> Best:
    for high in range(low, 33):
        for shift in range(2):
            product, square = split.products[shift, high], split.squares[shift, high]
            if beats(product, square, best.score):
                scale = product / square
                cuts = np.int64(low), np.int64(high), np.int64(shift)
                best = Best(np.float32(scale * product), np.float32(scale), *cuts)
    return best


@kernel
def cut_halves(split: Split, x: Floats, weight: Floats) -> Best:
    """The best cuts of 16 weights with a shift for each half: bit 1 the first's, bit 0 the last's.

    A bit that is set is a shift down.
    """
    sort(split, x)
    for shifts in range(4):
        _fit_halves(split, x, weight, np.int64(shifts))
    best = none()
    for first in range(0, PAIRS, SIDE):
        if _any_halves(split, first, best.score):
            best = _scan_halves(split, first, best)
    return best


@kernel
def _fit_halves(split: Split, x: Floats, weight: Floats, shifts: np.int64) -> None:
    """Sums for all pairs of cuts."""
    products, squares = split.products[shifts], split.squares[shifts]
    lows, highs = split.cuts[0], split.cuts[1]
    for pair in range(PAIRS):
        products[pair] = _ZERO
        squares[pair] = _ZERO
    for place in range(16):
        i = split.order[place]
        shift = shift_of(shifts, i // 8)
        a, b, c = shift - _ONE, shift, shift + _ONE
        wa, wb, wc = weight[i] * a, weight[i] * b, weight[i] * c
        xa, xb, xc = wa * x[i], wb * x[i], wc * x[i]
        qa, qb, qc = wa * a, wb * b, wc * c
        for pair in range(PAIRS):
            products[pair] += xa if place < lows[pair] else (xb if place < highs[pair] else xc)
            squares[pair] += qa if place < lows[pair] else (qb if place < highs[pair] else qc)


@kernel
def shift_of(shifts: np.int64, half: int) -> np.float32:
    """The shift of a half, the first or the second one."""
    return DOWN if (shifts >> (1 - half)) & 1 else UP


@kernel
def _any_halves(split: Split, first: int, score: np.float32) -> np.bool_:
    found = np.int32(0)
    for row in range(4):
        products, squares = split.products[row], split.squares[row]
        for pair in range(SIDE):
            found |= np.int32(beats(products[first + pair], squares[first + pair], score))
    return found > 0


@kernel
def _scan_halves(split: Split, first: int, best: Best) -> Best:
    for pair in range(first, first + SIDE):
        for shifts in range(4):
            product, square = split.products[shifts, pair], split.squares[shifts, pair]
            if beats(product, square, best.score):
                scale = product / square
                low, high = split.cuts[0, pair], split.cuts[1, pair]
                cuts = np.int64(low), np.int64(high), np.int64(shifts)
                best = Best(np.float32(scale * product), np.float32(scale), *cuts)
    return best


@kernel
def spread(split: Split, best: Best, levels: NDArray[np.uint8]) -> None:
    """Levels 0, 1, 2 that two cuts give; the other way round where the scale is negative."""
    for place in range(len(levels)):
        level = np.int64(place >= best.low) + np.int64(place >= best.high)
        levels[split.order[place]] = 2 - level if best.scale < _ZERO else level
