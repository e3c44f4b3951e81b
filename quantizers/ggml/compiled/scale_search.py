"""The levels of sub-blocks' scales: 6 or 4 bits each, and one fp16 scale for all of a block.

Lanes. A flat float32 array [ROWS, LANES] of affine_search.at holds the scales of up to LANES
series at once, such as a block's scales and a block's minima:

    row VALUE + i   value i of each series, i < n <= 16
    row COUNT + i   how much its squared error counts; for search only
    row LEVEL + i   filled in: its level, of the uint8 that ggml keeps
    row UNIT        filled in: the value of a level of 1, before fp16
    other rows      scratch
"""

from __future__ import annotations

import numpy as np

from dqconvert.quantizers.ggml.compiled.affine_search import LANES, Floats, at
from dqconvert.quantizers.ggml.compiled.floats import nearest
from dqconvert.quantizers.ggml.jit import kernel

VALUE, COUNT, LEVEL, UNIT, ROWS = 0, 16, 32, 48, 54
_HIGH, _SLOPE, _BEST, _XL, _LL = 49, 50, 51, 52, 53

_NOTHING = np.float32(1e-15)  # GROUP_MAX_EPS
_NUDGE = np.float32(0.1)
_ZERO, _ONE = np.float32(0), np.float32(1)
_ROUNDS = 5


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
    _open(series, n, np.float32(top))
    for step in range(-4, 5):
        if step != 0:
            _nudge(series, n, top, step)
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
def _open(series: Floats, n: int, top: np.float32) -> None:
    """The largest values, the slopes that put them at top, and the error of their levels."""
    for lane in range(LANES):
        high = _ZERO
        for i in range(n):
            value = series[at(VALUE + i, lane)]
            high = high if high > value else value
        series[at(_HIGH, lane)] = high
    for lane in range(LANES):
        slope = top / series[at(_HIGH, lane)]
        unit, error = _ONE / slope, _ZERO
        for i in range(n):
            value = series[at(VALUE + i, lane)]
            off = value - unit * _wrapped(nearest(slope * value))
            error += series[at(COUNT + i, lane)] * off * off
        series[at(_SLOPE, lane)] = slope
        series[at(_BEST, lane)] = error


@kernel
def _nudge(series: Floats, n: int, top: np.int32, step: int) -> None:
    """A slope with step tenths of a level more takes over where its error is smaller."""
    span = _NUDGE * np.float32(step) + np.float32(top)
    for lane in range(LANES):
        slope = span / series[at(_HIGH, lane)]
        unit, error = _ONE / slope, _ZERO
        for i in range(n):
            value = series[at(VALUE + i, lane)]
            level = nearest(slope * value)
            off = value - unit * np.float32(top if level > top else level)
            error += series[at(COUNT + i, lane)] * off * off
        best = series[at(_BEST, lane)]
        series[at(_SLOPE, lane)] = slope if error < best else series[at(_SLOPE, lane)]
        series[at(_BEST, lane)] = error if error < best else best


@kernel
def _settle(series: Floats, n: int, top: np.int32) -> None:
    """The winner's levels and the sums of their normal equation."""
    for lane in range(LANES):
        slope, xl, ll = series[at(_SLOPE, lane)], _ZERO, _ZERO
        for i in range(n):
            value, count = series[at(VALUE + i, lane)], series[at(COUNT + i, lane)]
            level = nearest(slope * value)
            level = top if level > top else level
            series[at(LEVEL + i, lane)] = _wrapped(level)
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
