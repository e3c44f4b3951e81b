"""How blocks of 256 weights, whose sub-blocks have a scale and a minimum, lie in bytes.

    q2_k    84 bytes   16 bytes of levels, 64 bytes of codes, half d, half dmin
    q4_k   144 bytes   half d, half dmin, 12 bytes of levels, 128 bytes of codes
    q5_k   176 bytes   half d, half dmin, 12 bytes of levels, 32 bytes of fifth bits, 128 of codes

    weight = (d * scale level) * code - (dmin * minimum level)

Levels. A q2_k block has 16 sub-blocks of 16 weights: byte j holds sub-block j's scale level in its
low nibble and the minimum level in the high one. The others have 8 of 32 and levels of six bits:
byte j < 4 holds the scale level of sub-block j, byte 4 + j its minimum level, byte 8 + j the low
nibbles of sub-block 4 + j's two levels, whose high bits are the top ones of bytes j and 4 + j.

Codes. Nibbles of 32 bytes are the codes of sub-blocks 2 k and 2 k + 1; bit i of fifth byte j is
that of weight 32 i + j. Of two bits, those at 2 k of byte 32 h + j are weight 128 h + 32 k + j.

Structures and get_scale_min_k4: ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dqconvert.quantizers.ggml.jit import kernel

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS = 256
_LOW, _SIX = 0x0F, 0x3F


@kernel
def halves_at(bits: int) -> int:
    """Where d lies in a block of codes of so many bits; dmin comes after it."""
    return 80 if bits == 2 else 0


@kernel
def put_levels(block: Bytes, bits: int, j: int, scale: np.int64, minimum: np.int64) -> None:
    """Writes the levels of sub-block j; lower j are there. More than fits spills as in ggml."""
    if bits == 2:
        block[j] = scale | (minimum << 4)
    elif j < 4:
        block[4 + j] = scale
        block[8 + j] = minimum
    else:
        block[8 + j] = (scale & _LOW) | ((minimum & _LOW) << 4)
        block[j] |= (scale >> 4) << 6
        block[4 + j] |= (minimum >> 4) << 6


@kernel
def levels(block: Bytes, bits: int, j: int) -> tuple[np.float32, np.float32]:
    """The levels of sub-block j: the scale's, the minimum's."""
    if bits == 2:
        scale, minimum = block[j] & _LOW, block[j] >> 4
    elif j < 4:
        scale, minimum = block[4 + j] & _SIX, block[8 + j] & _SIX
    else:
        scale = (block[8 + j] & _LOW) | ((block[j] >> 6) << 4)
        minimum = (block[8 + j] >> 4) | ((block[4 + j] >> 6) << 4)
    return np.float32(scale), np.float32(minimum)


@kernel
def put_codes(block: Bytes, bits: int, codes: Bytes) -> None:
    """Writes 256 codes."""
    if bits == 2:
        _put_pairs(block[16:80], codes)
    elif bits == 4:
        _put_nibbles(block[16:144], codes)
    else:
        _put_fifths(block[16:48], codes)
        _put_nibbles(block[48:176], codes)


@kernel
def get_codes(block: Bytes, bits: int, codes: Bytes) -> None:
    """Reads 256 codes."""
    if bits == 2:
        _get_pairs(block[16:80], codes)
    elif bits == 4:
        _get_nibbles(block[16:144], codes)
    else:
        _get_nibbles(block[48:176], codes)
        _get_fifths(block[16:48], codes)


@kernel
def _put_pairs(packed: Bytes, codes: Bytes) -> None:
    for half in range(2):
        for j in range(32):
            c = 128 * half + j
            low = codes[c] | (codes[c + 32] << 2)
            packed[32 * half + j] = low | (codes[c + 64] << 4) | (codes[c + 96] << 6)


@kernel
def _get_pairs(packed: Bytes, codes: Bytes) -> None:
    for half in range(2):
        for k in range(4):
            for j in range(32):
                codes[128 * half + 32 * k + j] = (packed[32 * half + j] >> (2 * k)) & 3


@kernel
def _put_nibbles(packed: Bytes, codes: Bytes) -> None:
    for pair in range(4):
        for j in range(32):
            c = 64 * pair + j
            packed[32 * pair + j] = (codes[c] & _LOW) | (codes[c + 32] << 4)


@kernel
def _get_nibbles(packed: Bytes, codes: Bytes) -> None:
    for pair in range(4):
        for j in range(32):
            codes[64 * pair + j] = packed[32 * pair + j] & _LOW
            codes[64 * pair + 32 + j] = packed[32 * pair + j] >> 4


@kernel
def _put_fifths(packed: Bytes, codes: Bytes) -> None:
    for j in range(32):
        fifths = codes[j] >> 4
        for i in range(1, 8):
            fifths |= (codes[32 * i + j] >> 4) << i
        packed[j] = fifths


@kernel
def _get_fifths(packed: Bytes, codes: Bytes) -> None:
    for i in range(8):
        for j in range(32):
            codes[32 * i + j] |= ((packed[j] >> i) & 1) << 4
