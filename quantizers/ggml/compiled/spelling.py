"""What the bytes of IQ2 and IQ3 blocks share: halves, signs of 8 weights, words of 4 such signs.

A word is four 7-bit signs and, in its highest four bits, the scale of 32 weights (the types _xxs
of ggml-common.h).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dqconvert.quantizers.ggml.compiled.lattice import Work
from dqconvert.quantizers.ggml.compiled.magnitudes import nibble
from dqconvert.quantizers.ggml.jit import kernel

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@kernel
def half(block: Bytes, halves: Floats) -> np.float32:
    """The half that the first two bytes are."""
    return np.float32(halves[np.int64(block[0]) | np.int64(block[1]) << 8])


@kernel
def put_word(block: Bytes, at: int, work: Work, part: int, inverse: np.float32) -> None:
    """Writes the signs and the scale of 32 weights."""
    word = np.int64(nibble(work, inverse, part)) << 28
    for i in range(4):
        word |= np.int64(work.signs[4 * part + i]) << 7 * i
    for i in range(4):
        block[at + i] = (word >> 8 * i) & 255


@kernel
def word(block: Bytes, at: int) -> np.int64:
    """Four bytes, the lowest first."""
    found = np.int64(0)
    for i in range(4):
        found |= np.int64(block[at + i]) << 8 * i
    return found


@kernel
def spell_quad(out: Floats, values: Floats, step: np.float32, signs: int) -> None:
    """Four values times a step; negative where bit i of signs is set."""
    for i in range(4):
        x = step * values[i]
        out[i] = -x if signs >> i & 1 else x


@kernel
def spell_octet(out: Floats, values: Floats, step: np.float32, signs: int) -> None:
    """The same for eight."""
    for i in range(8):
        x = step * values[i]
        out[i] = -x if signs >> i & 1 else x
