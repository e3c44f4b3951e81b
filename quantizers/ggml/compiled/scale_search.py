"""The levels of sub-blocks' scales: 6 or 4 bits each, and one fp16 scale for all of a block.

Lanes. A flat float32 array [ROWS, LANES] of affine_search.at holds the scales of up to LANES
series at once, such as a block's scales and a block's minima:

    row VALUE + i   value i of each series, i < n, 8 or 16
    row COUNT + i   how much its squared error counts; for search only
    row LEVEL + i   filled in: its level, of the uint8 that ggml keeps
    row UNIT        filled in: the value of a level of 1, before fp16
    other rows      scratch
"""

from __future__ import annotations

import numpy as np

from dqconvert.quantizers.ggml.compiled.affine_search import LANES, UNROLLED, Floats, at
from dqconvert.quantizers.ggml.compiled.floats import nearest
from dqconvert.quantizers.ggml.jit import kernel

VALUE, COUNT, LEVEL, UNIT, ROWS = 0, 16, 32, 48, 56
_HIGH, _SLOPE, _BEST, _XL, _LL = 49, 50, 51, 52, 53
_TRIED, _ERROR = 54, 55

_NOTHING = np.float32(1e-15)  # GROUP_MAX_EPS
_NUDGE = np.float32(0.1)
_ZERO, _ONE = np.float32(0), np.float32(1)
_STEPS, _ROUNDS = 9, 5


@kernel
def spread(series: Floats, n: int, top: np.int32, limit: np.float32) -> None:
    """Levels that put the largest value at top; none above limit. As quantize_row_q*_K_ref."""
    full = np.float32(top)
    for lane in range(LANES):
        high = _ZERO
        for i in range(n):
            value = series[at(VALUE + i, lane)]
            high = value if value > high else high
        series[at(_SLOPE, lane)] = full / high if high > _ZERO else _ZERO
        series[at(UNIT, lane)] = high / full
    for i in range(n):
        for lane in range(LANES):
            level = _wrapped(nearest(series[at(_SLOPE, lane)] * series[at(VALUE + i, lane)]))
            series[at(LEVEL + i, lane)] = limit if level > limit else level


@kernel
def search(series: Floats, n: int, top: np.int32, limit: np.float32) -> None:
    """Levels of the least weighted squared error that make_qp_quants finds; none above limit."""
    _describe(series, n)
    for step in range(_STEPS):
        # The range itself comes first, then tenths of a level less and more.
        tenths = 0 if step == 0 else step - 5 if step < 5 else step - 4
        _try_slope(series, _NUDGE * np.float32(tenths) + np.float32(top))
        for start in range(0, n, UNROLLED):
            _measure(series, start, top, step == 0)
        _choose(series, step == 0)
    _settle(series, n, top)
    for _ in range(_ROUNDS):
        for i in range(n):
            _move(series, i, top)
    _close(series, n, limit)


@kernel
def _wrapped(level: np.int32) -> np.float32:
    """What a uint8 keeps of an int32, as a float."""
    return np.float32(np.int32(level & np.int32(255)))


@kernel
def _describe(series: Floats, n: int) -> None:
    """The largest values."""
    for lane in range(LANES):
        series[at(_HIGH, lane)] = _ZERO
    for i in range(n):
        for lane in range(LANES):
            value, high = series[at(VALUE + i, lane)], series[at(_HIGH, lane)]
            series[at(_HIGH, lane)] = high if high > value else value


@kernel
def _try_slope(series: Floats, span: np.float32) -> None:
    """The slope that puts the largest value at span, and its unit."""
    for lane in range(LANES):
        slope = span / series[at(_HIGH, lane)]
        series[at(_TRIED, lane)] = slope
        series[at(UNIT, lane)] = _ONE / slope
        series[at(_ERROR, lane)] = _ZERO


@kernel
def _measure(series: Floats, start: int, top: np.int32, first: bool) -> None:
    """Adds the error of 8 levels, of which ggml keeps the first slope's as uint8."""
    for lane in range(LANES):
        slope, unit = series[at(_TRIED, lane)], series[at(UNIT, lane)]
        error = series[at(_ERROR, lane)]
        for i in range(UNROLLED):
            value = series[at(VALUE + start + i, lane)]
            level = nearest(slope * value)
            limited = np.float32(top if level > top else level)
            off = value - unit * (_wrapped(level) if first else limited)
            error += series[at(COUNT + start + i, lane)] * off * off
        series[at(_ERROR, lane)] = error


@kernel
def _choose(series: Floats, first: bool) -> None:
    """The slope takes over where its error is smaller."""
    for lane in range(LANES):
        error, best = series[at(_ERROR, lane)], series[at(_BEST, lane)]
        wins = first | (error < best)
        slope, tried = series[at(_SLOPE, lane)], series[at(_TRIED, lane)]
        series[at(_SLOPE, lane)] = tried if wins else slope
        series[at(_BEST, lane)] = error if wins else best


@kernel
def _settle(series: Floats, n: int, top: np.int32) -> None:
    """The winner's levels and the sums of their normal equation."""
    for lane in range(LANES):
        series[at(_XL, lane)] = _ZERO
        series[at(_LL, lane)] = _ZERO
    for start in range(0, n, UNROLLED):
        for lane in range(LANES):
            slope = series[at(_SLOPE, lane)]
            xl, ll = series[at(_XL, lane)], series[at(_LL, lane)]
            for i in range(UNROLLED):
                value, count = (
                    series[at(VALUE + start + i, lane)],
                    series[at(COUNT + start + i, lane)],
                )
                level = nearest(slope * value)
                level = top if level > top else level
                series[at(LEVEL + start + i, lane)] = _wrapped(level)
                code = np.float32(level)
                xl += count * value * code
                ll += count * code * code
            series[at(_XL, lane)] = xl
            series[at(_LL, lane)] = ll


@kernel
def _move(series: Floats, i: int, top: np.int32) -> None:
    """Level i moves to its best place, given the others, where the fit gains by it."""
    for lane in range(LANES):
        value, count = series[at(VALUE + i, lane)], series[at(COUNT + i, lane)]
        old, xl, ll = series[at(LEVEL + i, lane)], series[at(_XL, lane)], series[at(_LL, lane)]
        rest_xl = xl - count * value * old
        rest_ll = ll - count * old * old
        level = nearest(value * rest_ll / rest_xl)
        level = top if level > top else level
        code = np.float32(level)
        new_xl = rest_xl + count * value * code
        new_ll = rest_ll + count * code * code
        gains = new_xl * new_xl * ll > xl * xl * new_ll
        moves = (rest_xl > _ZERO) & (rest_ll > _ZERO) & (code != old) & gains
        series[at(LEVEL + i, lane)] = _wrapped(level) if moves else old
        series[at(_XL, lane)] = new_xl if moves else xl
        series[at(_LL, lane)] = new_ll if moves else ll


@kernel
def _close(series: Floats, n: int, limit: np.float32) -> None:
    """The unit that fits the levels; all are 0 where no value counts."""
    for lane in range(LANES):
        xl, ll = series[at(_XL, lane)], series[at(_LL, lane)]
        nothing = series[at(_HIGH, lane)] < _NOTHING
        series[at(UNIT, lane)] = _ZERO if nothing or not ll > _ZERO else xl / ll
    for i in range(n):
        for lane in range(LANES):
            nothing = series[at(_HIGH, lane)] < _NOTHING
            level = series[at(LEVEL + i, lane)]
            level = limit if level > limit else level
            series[at(LEVEL + i, lane)] = _ZERO if nothing else level
