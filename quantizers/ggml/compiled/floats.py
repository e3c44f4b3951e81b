"""Rounding as ggml does it: to integers (nearest_int of ggml-quants.c) and to halves and back."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from dqconvert.quantizers.ggml.jit import kernel

_SHIFT = np.float32(12582912)  # 3 · 2²²: the sum's last bit stands for one
_MANTISSA = np.int32(0x7FFFFF)
_MIDDLE = np.int32(0x400000)

_HALF_INFINITY = np.int32(0x47800000)  # the fp32 bits of 2¹⁶
_HALF_NORMAL = np.int32(0x38800000)  # and of 2⁻¹⁴, the least normal half


@kernel
def nearest(x: np.float32) -> np.int32:
    """The nearest integer, even at ties; 0 - 2²² at infinity, 0 at NaN, as the bits have it."""
    bits = np.float32(x + _SHIFT).view(np.int32)
    return np.int32((bits & _MANTISSA) - _MIDDLE)


@kernel
def to_half(x: np.float32) -> np.uint16:
    """The bits of the nearest half, even at ties."""
    bits = np.int64(np.float32(x).view(np.int32))
    sign = (bits >> 16) & 0x8000
    size = bits & 0x7FFFFFFF
    if size > 0x7F800000:
        return np.uint16(sign | 0x7E00)
    if size >= _HALF_INFINITY:
        return np.uint16(sign | 0x7C00)
    if size < _HALF_NORMAL:  # halves below are 2⁻²⁴ apart, as floats from one half to one are
        sum_bits = np.int64(np.float32(abs(x) + np.float32(0.5)).view(np.int32))
        return np.uint16(sign | (sum_bits - 0x3F000000))
    return np.uint16(sign | ((size - 0x38000000 + 0xFFF + ((size >> 13) & 1)) >> 13))


@kernel
def put_half(block: NDArray[np.uint8], at: int, x: np.float32) -> None:
    """Writes two bytes, the low one first."""
    bits = to_half(x)
    block[at] = bits & 0xFF
    block[at + 1] = bits >> 8


@cache
def halves() -> NDArray[np.float32]:
    """What the 65536 halves are, by their bits."""
    return np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
