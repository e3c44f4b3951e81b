"""Q6_K and Q3_K back to weights (ggml-quants.c, dequantize_row_*).

symmetric_q6 and symmetric_q3 have the layouts.
"""

from __future__ import annotations

import numpy as np

from dqconvert.quantizers.ggml.compiled.floats import halves
from dqconvert.quantizers.ggml.compiled.symmetric_search import Bytes, Floats
from dqconvert.quantizers.ggml.jit import kernel


def q6_k(blocks: Bytes, out: Floats) -> None:
    """Blocks [N, row bytes] to weights [N, K]."""
    _decode6(blocks.reshape(-1, 210), halves(), out.reshape(-1, 256))


def q3_k(blocks: Bytes, out: Floats) -> None:
    """Blocks [N, row bytes] to weights [N, K]."""
    _decode3(blocks.reshape(-1, 110), halves(), out.reshape(-1, 256))


@kernel
def _decode6(blocks: Bytes, halves: Floats, out: Floats) -> None:
    for n in range(blocks.shape[0]):
        block = blocks[n]
        d = halves[np.int64(block[208]) | np.int64(block[209]) << 8]
        for s in range(16):
            step = d * np.float32(np.int8(block[192 + s]))
            half, group, part = s // 8, s % 8 // 2, s % 2 * 16
            low = block[64 * half + 32 * (group % 2) + part :]
            high = block[128 + 32 * half + part :]
            _spread6((low, group // 2 * 4), (high, group * 2), step, out[n, 16 * s : 16 * s + 16])


@kernel
def _spread6(
    low: tuple[Bytes, int], high: tuple[Bytes, int], step: np.float32, out: Floats
) -> None:
    """16 weights of one scale: 4 bits above low's shift, 2 bits above high's."""
    nibbles, pairs = low[0], high[0]
    right, left = np.uint8(low[1]), np.uint8(high[1])
    for i in range(16):
        level = np.int32((nibbles[i] >> right) & 15) | np.int32((pairs[i] >> left) & 3) << 4
        out[i] = step * np.float32(np.int32(level - 32))


@kernel
def _decode3(blocks: Bytes, halves: Floats, out: Floats) -> None:
    for n in range(blocks.shape[0]):
        block = blocks[n]
        d = halves[np.int64(block[108]) | np.int64(block[109]) << 8]
        for s in range(16):
            low, high = block[96 + s % 8] >> s // 8 * 4, block[104 + s % 4] >> s // 4 * 2
            step = d * np.float32(((low & 15) | (high & 3) << 4) - 32)
            half, group, part = s // 8, s % 8 // 2, s % 2 * 16
            pairs, bits = block[32 + 32 * half + part :], block[part:]
            _spread3((pairs, group * 2), (bits, s // 2), step, out[n, 16 * s : 16 * s + 16])


@kernel
def _spread3(
    low: tuple[Bytes, int], high: tuple[Bytes, int], step: np.float32, out: Floats
) -> None:
    """16 weights of one scale: 2 bits above low's shift, 1 bit above high's."""
    pairs, bits = low[0], high[0]
    right, left = np.uint8(low[1]), np.uint8(high[1])
    for i in range(16):
        level = np.int32((pairs[i] >> right) & 3) | np.int32((bits[i] >> left) & 1) << 2
        out[i] = step * np.float32(np.int32(level - 4))


DEQUANTIZERS = {"q3_k": q3_k, "q6_k": q6_k}
