"""How the types of compiled/legacy.py lay a block out: halves, codes, and the way back.

    bytes      0    2    4    8       the last 16 bytes, or 32 of q8_0
    q4_0       scale                  codes          scale * (code - 8)
    q4_1       scale minimum          codes          scale * code + minimum
    q5_0       scale fifth bits       codes          scale * (code - 16)
    q5_1       scale minimum fifth    codes          scale * code + minimum
    q8_0       scale                  signed codes   scale * code

Scale and minimum are halves. Byte j of the codes has weight j in its low nibble and weight j + 16
in its high one; bit j of the fifth bits, from the lowest on, is weight j's. Kernels take a block as
arrays and its row, and the first byte as a constant: so the compiler sees neither reference counts
nor negative indices, and turns the loops into vectors.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dqconvert.quantizers.ggml.compiled.floats import to_half
from dqconvert.quantizers.ggml.jit import kernel

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Bytes = NDArray[np.uint8]
Line = tuple[np.float32, np.float32, np.float32, np.float32]
"""origin, slope, offset, top: codes are (x - origin) * slope + offset without the fraction."""

WEIGHTS = 32
FOUR, FIVE = np.float32(15), np.float32(31)
"""The greatest codes."""

_NIBBLE, _FOUR, _FIFTH, _TWELVE = np.int32(15), np.int32(4), np.int32(16), np.int32(12)


@kernel
def write_half(out: Bytes, b: int, at: int, x: np.float32) -> None:
    """Two bytes of a block, the low one first."""
    bits = to_half(x)
    out[b, at] = bits & 0xFF
    out[b, at + 1] = bits >> 8


@kernel
def write_four(x: Floats, b: int, line: Line, out: Bytes, at: int) -> None:
    """The codes of row b, of four bits each, to a block from byte at on."""
    half = x.shape[1] // 2
    for j in range(half):
        low, high = _code(x[b, j], line), _code(x[b, j + half], line)
        out[b, at + j] = np.int32(low | np.int32(high << _FOUR))


@kernel
def write_five(x: Floats, b: int, line: Line, out: Bytes, at: int) -> None:
    """The same of five bits each."""
    half = x.shape[1] // 2
    fifth = np.int32(0)
    for j in range(half):
        low, high = _code(x[b, j], line), _code(x[b, j + half], line)
        ends = np.int32(np.int32(low >> _FOUR) | np.int32(np.int32(high & _FIFTH) << _TWELVE))
        fifth = np.int32(fifth | np.int32(ends << np.int32(j)))
        out[b, at + 4 + j] = np.int32(np.int32(low & _NIBBLE) | np.int32(high << _FOUR))
    for j in range(4):
        out[b, at + j] = np.int32(fifth >> np.int32(8 * j))


@kernel
def _code(x: np.float32, line: Line) -> np.int32:
    origin, slope, offset, top = line
    code = (x - origin) * slope + offset
    return np.int32(code if code < top else top)


@kernel
def read_half(blocks: Bytes, b: int, at: int, table: Floats) -> np.float32:
    """The half that is two bytes of a block; table: floats.halves()."""
    bits = np.uint64(blocks[b, at]) | (np.uint64(blocks[b, at + 1]) << np.uint64(8))
    found: np.float32 = table[bits]
    return found


@kernel
def read_four(blocks: Bytes, b: int, at: int, line: tuple[np.float32, ...], out: Floats) -> None:
    """Row b = scale * (code - zero) + shift; line: scale, shift, zero."""
    scale, shift, zero = line
    half = out.shape[1] // 2
    for j in range(half):
        byte = np.int32(blocks[b, at + j])
        out[b, j] = (np.float32(byte & _NIBBLE) - zero) * scale + shift
        out[b, j + half] = (np.float32(byte >> _FOUR) - zero) * scale + shift


@kernel
def read_five(blocks: Bytes, b: int, at: int, line: tuple[np.float32, ...], out: Floats) -> None:
    """The same of five bits each."""
    scale, shift, zero = line
    half = out.shape[1] // 2
    fifth = np.int32(0)
    for j in range(4):
        fifth = np.int32(fifth | np.int32(np.int32(blocks[b, at + j]) << np.int32(8 * j)))
    for j in range(half):
        byte = np.int32(blocks[b, at + 4 + j])
        ends = np.int32(fifth >> np.int32(j))
        low = np.int32(np.int32(byte & _NIBBLE) | np.int32(np.int32(ends << _FOUR) & _FIFTH))
        high = np.int32(np.int32(byte >> _FOUR) | np.int32(np.int32(ends >> _TWELVE) & _FIFTH))
        out[b, j] = (np.float32(low) - zero) * scale + shift
        out[b, j + half] = (np.float32(high) - zero) * scale + shift
