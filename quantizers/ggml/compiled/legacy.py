"""ggml's types with a scale for 32 weights, q4_0 to q8_0; legacy_blocks.py has their layout.

Without importance the scale comes from a block's extremes, and codes are nearest ones
(quantize_row_*_ref of ggml-quants.c). legacy_search.py is the way with importance.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dqconvert.quantizers.ggml.compiled import legacy_search
from dqconvert.quantizers.ggml.compiled.floats import halves
from dqconvert.quantizers.ggml.compiled.legacy_blocks import (
    FIVE,
    FOUR,
    WEIGHTS,
    Bytes,
    Floats,
    Ints,
    read_five,
    read_four,
    read_half,
    write_five,
    write_four,
    write_half,
)
from dqconvert.quantizers.ggml.jit import kernel
from dqconvert.quantizers.spec import BLOCKS

_SIGN, _MAGNITUDE, _LAST = np.int32(-0x80000000), np.int32(0x7FFFFFFF), np.int32(31)
_ZERO, _HALF, _ONE, _TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
_UNDER_HALF = np.float32(0.49999997)
_NOTHING = np.float32(-0.0)  # added, it leaves zeros of both signs as they are


@kernel
def _symmetric(x: Floats, out: Bytes, top: np.float32) -> None:
    bits = x.view(np.int32)
    reach = (top + _ONE) / _TWO
    for b in range(len(x)):
        scale = np.float32(_peak(x, bits, b) / -reach)
        slope = inverse(scale)
        offset = _HALF if slope == _ZERO and scale != _ZERO else reach + _HALF
        write_half(out, b, 0, scale)
        if top == FOUR:
            write_four(x, b, (_ZERO, slope, offset, top), out, 2)
        else:
            write_five(x, b, (_ZERO, slope, offset, top), out, 2)


@kernel
def _affine(x: Floats, out: Bytes, top: np.float32) -> None:
    bits = x.view(np.int32)
    for b in range(len(x)):
        least, most = _range(x, bits, b)
        scale = np.float32((most - least) / top)
        slope = inverse(scale)
        origin = least if slope != _ZERO else _ZERO
        write_half(out, b, 0, scale)
        write_half(out, b, 2, least)
        if top == FOUR:
            write_four(x, b, (origin, slope, _HALF, top), out, 4)
        else:
            write_five(x, b, (origin, slope, _HALF, top), out, 4)


@kernel
def _eight(x: Floats, out: Bytes) -> None:
    bits = x.view(np.int32)
    for b in range(len(x)):
        scale = np.float32(magnitude(bits, b) / np.float32(127))
        write_half(out, b, 0, scale)
        _round_away(x, b, inverse(scale), out)


@kernel
def _round_away(x: Floats, b: int, slope: np.float32, out: Bytes) -> None:
    """Signed codes next to x * slope, halves away from zero."""
    for j in range(x.shape[1]):
        scaled = x[b, j] * slope
        out[b, j + 2] = np.int32(scaled + (_UNDER_HALF if scaled > _ZERO else -_UNDER_HALF))


@kernel
def inverse(scale: np.float32) -> np.float32:
    """1 / scale; 0 where that is infinite, as ggml's codes are 0 there."""
    found: np.float32 = _ONE / scale
    return found if abs(found) < np.inf else _ZERO


@kernel
def magnitude(bits: Ints, b: int) -> np.float32:
    """The largest magnitude in a row of floats, which are given by their bits."""
    found = np.int32(0)
    for j in range(bits.shape[1]):
        size = np.int32(bits[b, j] & _MAGNITUDE)
        found = size if size > found else found
    return _float(found)


@kernel
def _peak(x: Floats, bits: Ints, b: int) -> np.float32:
    """The first number of largest magnitude; 0 is positive.

    The bits of positive floats, and of negative ones without their sign, order as floats do.
    """
    above, below = np.int32(0), np.int32(0)
    for j in range(bits.shape[1]):
        bit = np.int32(bits[b, j])
        flipped = np.int32(bit ^ _SIGN)
        above = bit if bit > above else above
        below = flipped if flipped > below else below
    if above == below:
        return _first(x, b, _float(above)) + _ZERO
    size = above if above > below else below
    sign = np.int32(np.int32(above - below) & _SIGN)
    return np.int32(size | sign).view(np.float32)


@kernel
def _range(x: Floats, bits: Ints, b: int) -> tuple[np.float32, np.float32]:
    """Least and greatest number; where zeros of both signs are least, the first."""
    low, high = _MAGNITUDE, _SIGN
    for j in range(bits.shape[1]):
        bit = np.int32(bits[b, j])
        key = np.int32(bit ^ np.int32(np.int32(bit >> _LAST) & _MAGNITUDE))
        low = key if key < low else low
        high = key if key > high else high
    least = _float(low)
    return (_first(x, b, _ZERO) if least == _ZERO else least), _float(high)


@kernel
def _float(key: np.int32) -> np.float32:
    """The float of a key that orders as floats do: its bits, those of negative ones turned."""
    found: np.float32 = np.int32(key ^ np.int32(np.int32(key >> _LAST) & _MAGNITUDE)).view(
        np.float32
    )
    return found


@kernel
def _first(x: Floats, b: int, size: np.float32) -> np.float32:
    """The first number of a magnitude in a row."""
    for j in range(x.shape[1]):
        if abs(x[b, j]) == size:
            found: np.float32 = x[b, j]
            return found
    return size


@kernel
def _symmetric_weights(blocks: Bytes, out: Floats, top: np.float32, table: Floats) -> None:
    zero = (top + _ONE) / _TWO
    for b in range(len(blocks)):
        line = (read_half(blocks, b, 0, table), _NOTHING, zero)
        if top == FOUR:
            read_four(blocks, b, 2, line, out)
        else:
            read_five(blocks, b, 2, line, out)


@kernel
def _affine_weights(blocks: Bytes, out: Floats, top: np.float32, table: Floats) -> None:
    for b in range(len(blocks)):
        scale, minimum = read_half(blocks, b, 0, table), read_half(blocks, b, 2, table)
        if top == FOUR:
            read_four(blocks, b, 4, (scale, minimum, _ZERO), out)
        else:
            read_five(blocks, b, 4, (scale, minimum, _ZERO), out)


@kernel
def _eight_weights(blocks: Bytes, out: Floats, table: Floats) -> None:
    signed = blocks.view(np.int8)
    for b in range(len(blocks)):
        scale = read_half(blocks, b, 0, table)
        for j in range(out.shape[1]):
            out[b, j] = np.float32(signed[b, j + 2]) * scale


Kernel = Callable[..., None]


def _plain(code: str, kernel: Kernel, *settings: np.float32) -> Kernel:
    """A kernel over blocks [B, 32] as one over rows."""
    size = BLOCKS[code.upper()][1]

    def quantize(rows: Floats, out: Bytes) -> None:
        kernel(rows.reshape(-1, WEIGHTS), out.reshape(-1, size), *settings)

    return quantize


def _weighted(code: str, search: Kernel, bound: int) -> Kernel:
    size = BLOCKS[code.upper()][1]

    def quantize(rows: Floats, importance: Floats, out: Bytes) -> None:
        search(rows, importance, out.reshape(-1, size), bound)

    return quantize


def _dequantizer(code: str, kernel: Kernel, *settings: np.float32) -> Kernel:
    size = BLOCKS[code.upper()][1]

    def dequantize(blocks: Bytes, out: Floats) -> None:
        kernel(blocks.reshape(-1, size), out.reshape(-1, WEIGHTS), *settings, halves())

    return dequantize


_SYMMETRIC, _AFFINE = legacy_search.symmetric, legacy_search.affine

QUANTIZERS = {
    "q4_0": (_plain("q4_0", _symmetric, FOUR), _weighted("q4_0", _SYMMETRIC, 8)),
    "q4_1": (_plain("q4_1", _affine, FOUR), _weighted("q4_1", _AFFINE, 15)),
    "q5_0": (_plain("q5_0", _symmetric, FIVE), _weighted("q5_0", _SYMMETRIC, 16)),
    "q5_1": (_plain("q5_1", _affine, FIVE), _weighted("q5_1", _AFFINE, 31)),
    "q8_0": (_plain("q8_0", _eight), None),
}
DEQUANTIZERS = {
    "q4_0": _dequantizer("q4_0", _symmetric_weights, FOUR),
    "q4_1": _dequantizer("q4_1", _affine_weights, FOUR),
    "q5_0": _dequantizer("q5_0", _symmetric_weights, FIVE),
    "q5_1": _dequantizer("q5_1", _affine_weights, FIVE),
    "q8_0": _dequantizer("q8_0", _eight_weights),
}
