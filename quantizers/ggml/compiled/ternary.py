"""Ternary types and MXFP4 as ggml-quants.c has them (quantize_row_tq1_0_ref and so on).

    tq1_0    256 weights    48 + 4 bytes of codes, half scale     scale * (code - 1)
    tq2_0    256 weights    64 bytes of codes, half scale         scale * (code - 1)
    mxfp4    32 weights     exponent, 16 bytes of codes           2^(exponent - 128) * value[code]

TQ1_0 has five codes 0 .. 2 in a byte, as digits of a number to base 3 that is scaled from 243 to
256: weight m + 32 n is digit n of byte m, m < 32; likewise with 16 for 32 in the next 16 bytes;
the last four bytes hold four codes and a 0. TQ2_0 has four codes in a byte: weight m + 32 n of a
half is bits 2 n of byte m. MXFP4's code is a sign and a value 0, 1, 2, 3, 4, 6, 8 or 12; weight j
is in the low nibble of byte j, weight j + 16 in the high one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dqconvert.quantizers.ggml.compiled.floats import halves
from dqconvert.quantizers.ggml.compiled.legacy import inverse, magnitude
from dqconvert.quantizers.ggml.compiled.legacy_blocks import (
    Bytes,
    Floats,
    Ints,
    read_half,
    write_half,
)
from dqconvert.quantizers.ggml.jit import kernel
from dqconvert.quantizers.spec import BLOCKS

_ZERO, _HALF, _EIGHT = np.float32(0), np.float32(0.5), np.float32(8)
_THREE = np.int32(3)
_SPANS = ((0, 0, 32, 5), (160, 32, 16, 5), (240, 48, 4, 4))
"""Where TQ1_0's weights begin, their bytes, how many these are and their digits."""

_SCALED = np.array([-(-number * 256 // 243) for number in range(243)], np.uint8)
"""Numbers of five digits as bytes."""

_SIGN, _FOUR = np.int32(8), np.int32(4)
_BETWEEN = (0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0)
_BOUNDS = tuple(np.float32(bound) for bound in _BETWEEN)
"""Between the values of MXFP4; one that is on a bound takes the smaller value."""


@kernel
def _code(x: np.float32, slope: np.float32) -> np.int32:
    """A weight as 0, 1 or 2; halves go away from the middle."""
    scaled = x * slope
    return np.int32(np.int32(scaled >= _HALF) - np.int32(scaled <= -_HALF) + np.int32(1))


@kernel
def _tq1(x: Floats, out: Bytes) -> None:
    numbers = np.empty(32, np.int32)
    bits = x.view(np.int32)
    for b in range(len(x)):
        scale = magnitude(bits, b)
        slope = inverse(scale)
        for start, at, width, digits in _SPANS:
            numbers[:] = 0
            for digit in range(digits):
                _append(x, b, start + digit * width, slope, numbers[:width])
            for m in range(width):
                number = numbers[m] if digits == 5 else numbers[m] * _THREE
                out[b, at + m] = _SCALED[number]
        write_half(out, b, 52, scale)


@kernel
def _append(x: Floats, b: int, start: int, slope: np.float32, numbers: Ints) -> None:
    """One more digit."""
    for m in range(len(numbers)):
        code = _code(x[b, start + m], slope)
        numbers[m] = np.int32(numbers[m] * _THREE + code)


@kernel
def _tq2(x: Floats, out: Bytes) -> None:
    bits = x.view(np.int32)
    for b in range(len(x)):
        scale = magnitude(bits, b)
        _put_pairs(x, b, (inverse(scale), 32), 0, out)
        _put_pairs(x, b, (inverse(scale), 32), 1, out)
        write_half(out, b, 64, scale)


@kernel
def _put_pairs(x: Floats, b: int, how: tuple[np.float32, int], part: int, out: Bytes) -> None:
    slope, width = how
    for m in range(width):
        byte = np.int32(0)
        for n in range(4):
            code = _code(x[b, 128 * part + n * width + m], slope)
            byte = np.int32(byte | np.int32(code << np.int32(2 * n)))
        out[b, part * width + m] = byte


@kernel
def _mxfp4(x: Floats, out: Bytes) -> None:
    bits = x.view(np.int32)
    for b in range(len(x)):
        largest = magnitude(bits, b)
        exponent = np.int32(0)
        if largest > _ZERO:
            exponent = np.int32(np.floor(np.float32(np.log2(np.float64(largest))))) + 125
        exponent = np.int32(exponent & 255)
        out[b, 0] = exponent
        _put_values(x, b, _power(exponent), out)


@kernel
def _power(exponent: np.int32) -> np.float32:
    """2^(exponent - 128)."""
    small, large = np.int32(0x200000) << exponent, np.int32(exponent - 1) << np.int32(23)
    found: np.float32 = np.int32(small if exponent < 2 else large).view(np.float32)
    return found


@kernel
def _put_values(x: Floats, b: int, scale: np.float32, out: Bytes) -> None:
    half = x.shape[1] // 2
    top = np.int32(7 if _EIGHT * scale < np.inf else 5)
    for j in range(half):
        low, high = _value(x[b, j], scale, top), _value(x[b, j + half], scale, top)
        out[b, j + 1] = np.int32(low | np.int32(high << _FOUR))


@kernel
def _value(x: np.float32, scale: np.float32, top: np.int32) -> np.int32:
    """The code of the nearest value that is finite, top at most; 0 has no sign."""
    code, size = np.int32(0), abs(x)
    for bound in _BOUNDS:
        code = np.int32(code + np.int32(size > bound * scale))
    code = code if code < top else top
    return np.int32(code | _SIGN) if (x < _ZERO) & (code > 0) else code


@kernel
def _tq1_weights(blocks: Bytes, out: Floats, table: Floats) -> None:
    for b in range(len(blocks)):
        scale = read_half(blocks, b, 52, table)
        for start, at, width, digits in _SPANS:
            power = np.int32(1)
            for digit in range(digits):
                _take_digit(blocks, b, (at, width, power), scale, out[b, start + digit * width :])
                power = np.int32(power * _THREE)


@kernel
def _take_digit(
    blocks: Bytes, b: int, where: tuple[int, int, np.int32], scale: np.float32, out: Floats
) -> None:
    """Multiplied by a power of 3 without the carry, a byte has the digit in front."""
    at, width, power = where
    for m in range(width):
        rest = np.int32(np.int32(blocks[b, at + m] * power) & np.int32(255))
        out[m] = np.float32(np.int32(np.int32(rest * _THREE) >> np.int32(8)) - 1) * scale


@kernel
def _tq2_weights(blocks: Bytes, out: Floats, table: Floats) -> None:
    for b in range(len(blocks)):
        scale = read_half(blocks, b, 64, table)
        _take_pairs(blocks, b, (scale, 32), 0, out)
        _take_pairs(blocks, b, (scale, 32), 1, out)


@kernel
def _take_pairs(blocks: Bytes, b: int, how: tuple[np.float32, int], part: int, out: Floats) -> None:
    scale, width = how
    for m in range(width):
        byte = np.int32(blocks[b, part * width + m])
        for n in range(4):
            code = np.int32(np.int32(byte >> np.int32(2 * n)) & _THREE)
            out[b, 128 * part + n * width + m] = np.float32(code - np.int32(1)) * scale


@kernel
def _mxfp4_weights(blocks: Bytes, out: Floats) -> None:
    half = out.shape[1] // 2
    for b in range(len(blocks)):
        scale = _power(np.int32(blocks[b, 0]))
        for j in range(half):
            byte = np.int32(blocks[b, j + 1])
            out[b, j] = np.float32(_signed(np.int32(byte & np.int32(15)))) * scale
            out[b, j + half] = np.float32(_signed(np.int32(byte >> _FOUR))) * scale


@kernel
def _signed(code: np.int32) -> np.int32:
    """A code's value: its low bit, from 2 on with a bit before it, shifted by the others."""
    shift, last = np.int32(np.int32(code >> np.int32(1)) & _THREE), np.int32(code & np.int32(1))
    value = np.int32(np.int32(last | np.int32(2)) << shift) >> np.int32(1)
    value = value if shift > 0 else last
    return np.int32(-value if code >= _SIGN else value)


Kernel = Callable[..., None]


def _quantizer(code: str, kernel: Kernel) -> Kernel:
    """A kernel over blocks as one over rows."""
    weights, size = BLOCKS[code.upper()]

    def quantize(rows: Floats, out: Bytes) -> None:
        kernel(rows.reshape(-1, weights), out.reshape(-1, size))

    return quantize


def _dequantizer(code: str, kernel: Kernel, *tables: Any) -> Kernel:
    weights, size = BLOCKS[code.upper()]

    def dequantize(blocks: Bytes, out: Floats) -> None:
        kernel(blocks.reshape(-1, size), out.reshape(-1, weights), *tables)

    return dequantize


QUANTIZERS = {
    "tq1_0": (_quantizer("tq1_0", _tq1), None),
    "tq2_0": (_quantizer("tq2_0", _tq2), None),
    "mxfp4": (_quantizer("mxfp4", _mxfp4), None),
}
DEQUANTIZERS = {
    "tq1_0": _dequantizer("tq1_0", _tq1_weights, halves()),
    "tq2_0": _dequantizer("tq2_0", _tq2_weights, halves()),
    "mxfp4": _dequantizer("mxfp4", _mxfp4_weights),
}
