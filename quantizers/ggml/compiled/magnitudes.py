"""A block of 256 weights around the search of lattice.py.

Before: weights of errors, magnitudes and sign bytes, and the largest magnitude of a sub-block.
After: the sub-blocks' scales in 4 bits, odd multiples of half a step. From the
quantize_row_iq2_*_impl and quantize_row_iq3_*_impl of ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dqconvert.quantizers.ggml.compiled.floats import put_half
from dqconvert.quantizers.ggml.compiled.lattice import BLOCK, Rule, Tools, Work, fit, level
from dqconvert.quantizers.ggml.jit import kernel

Floats = NDArray[np.float32]


def by_blocks(rows: Floats, importance: Floats) -> tuple[Floats, Floats]:
    """Rows [N, K] and importance [K] by blocks of 256; none is [1, 0], as kernels take it."""
    blocks = rows.reshape(-1, BLOCK)
    return blocks, importance.reshape(-1, BLOCK) if importance.size else importance.reshape(1, 0)


@kernel
def solve(tools: Tools, block: Floats, importance: Floats) -> None:
    """Fills work with scales, signs and points of a block."""
    lattice, rule, work = tools
    describe(rule, work, block, importance)
    fit(lattice, rule, work)


@kernel
def describe(rule: Rule, work: Work, block: Floats, importance: Floats) -> None:
    """Fills weight, root, x, signs, peaks and the first scales of work; no importance is empty."""
    mean = mean_square(block, rule.spread)
    if len(importance):
        weigh(work.weight, block, importance, mean)
    elif rule.dims == 4:
        for i in range(BLOCK):
            work.weight[i] = block[i] * block[i]
    else:
        for i in range(BLOCK):
            work.weight[i] = np.float32(0.25) * mean + block[i] * block[i]
    for i in range(BLOCK):
        work.root[i] = np.sqrt(work.weight[i])
    for i in range(BLOCK):
        work.x[i] = abs(block[i])
    _sign(work.signs, block)
    if rule.sign == 127:
        _make_even(work.signs, work.x, work.weight, block)
    _find_peaks(rule, work)


@kernel
def mean_square(block: Floats, spread: np.float32) -> np.float32:
    """The mean square of 256 weights, spread times."""
    total = np.float32(0)
    for i in range(BLOCK):
        total += block[i] * block[i]
    return spread * total / np.float32(BLOCK)


@kernel
def weigh(
    weight: Floats,
    block: Floats,
    importance: Floats,
    mean: np.float32,
) -> None:
    """Importance times the root of what a weight and its neighbourhood are, squared."""
    for i in range(BLOCK):
        weight[i] = importance[i] * np.sqrt(mean + block[i] * block[i])


@kernel
def _sign(signs: NDArray[np.uint8], block: Floats) -> None:
    """Sign bytes of a block's weights."""
    for byte in range(BLOCK // 8):
        bits = 0
        for i in range(8):
            bits |= int(block[8 * byte + i] < np.float32(0)) << i
        signs[byte] = bits


@kernel
def _make_even(
    signs: NDArray[np.uint8],
    x: Floats,
    weight: Floats,
    block: Floats,
) -> None:
    """Leaves seven bits of a sign byte: if their number is odd, the cheapest sign changes."""
    for byte in range(BLOCK // 8):
        bits = np.int64(signs[byte])
        odd = bits ^ bits >> 4
        odd ^= odd >> 2
        if (odd ^ odd >> 1) & 1:
            least = 8 * byte
            lowest = weight[least] * block[least] * block[least]
            for i in range(8 * byte + 1, 8 * byte + 8):
                cost = weight[i] * block[i] * block[i]
                least = i if cost < lowest else least
                lowest = cost if cost < lowest else lowest
            x[least] = -x[least]
            bits ^= 1 << least - 8 * byte
        signs[byte] = bits & 127


@kernel
def _find_peaks(rule: Rule, work: Work) -> None:
    for part in range(BLOCK // rule.sub):
        peak = work.x[part * rule.sub]
        for i in range(part * rule.sub + 1, (part + 1) * rule.sub):
            peak = max(peak, work.x[i])
        work.peaks[part] = np.float32(0) if peak < rule.least else peak
        work.scales[part] = peak / np.float32(2 * rule.base - 1)


@kernel
def put_scale(block: NDArray[np.uint8], work: Work, fudge: np.float32) -> np.float32:
    """Writes the block's half; the inverse of the scales' step, 0 where all of them are 0."""
    largest = np.float32(0)
    for scale in work.scales:
        largest = max(largest, scale)
    if not largest > np.float32(0):
        put_half(block, 0, np.float32(0))
        return np.float32(0)
    step = largest / np.float32(31)
    put_half(block, 0, step * fudge)
    return np.float32(1) / step


@kernel
def nibble(work: Work, inverse: np.float32, part: int) -> np.int32:
    """A sub-block's scale in 4 bits."""
    return level(inverse, work.scales[part], np.int32(15))
