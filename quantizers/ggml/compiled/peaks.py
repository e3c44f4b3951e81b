"""The scale that IQ2_XXS begins with: five even levels for magnitudes, as make_qp_quants finds it.

The inverse scale with the least weighted squared error, of nine around 4 / peak, gives levels;
then every level in turn moves where the fit gains by it, until none does. ggml keeps levels in
uint8: one below 0, which a magnitude with its sign changed may have, comes back 256 larger.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dqconvert.quantizers.ggml.compiled.floats import nearest
from dqconvert.quantizers.ggml.compiled.lattice import BLOCK, Rule, Work
from dqconvert.quantizers.ggml.jit import kernel

Floats = NDArray[np.float32]

_TOP = np.int32(4)
_SUB = 32
_ROUNDS = 5


@kernel
def fit_peaks(rule: Rule, work: Work) -> None:
    """Puts three times the scale in the place of each peak, and the scale in scales."""
    levels = np.empty(_SUB, np.uint8)
    for part in range(BLOCK // _SUB):
        peak = work.peaks[part]
        if not peak > np.float32(0):
            continue
        x = work.x[part * _SUB : (part + 1) * _SUB]
        weight = work.weight[part * _SUB : (part + 1) * _SUB]
        scale = _settle(x, weight, levels, _best_inverse(x, weight, peak))
        work.scales[part] = scale
        work.peaks[part] = scale * np.float32(rule.base)


@kernel
def _best_inverse(x: Floats, weight: Floats, peak: np.float32) -> np.float32:
    best = np.float32(_TOP) / peak
    least = _first_error(x, weight, best)
    for step in range(-4, 5):
        if step != 0:
            inverse = (np.float32(0.1) * np.float32(step) + np.float32(_TOP)) / peak
            error = _error(x, weight, inverse)
            if error < least:
                least = error
                best = inverse
    return best


@kernel
def _first_error(x: Floats, weight: Floats, inverse: np.float32) -> np.float32:
    scale = np.float32(1) / inverse
    error = np.float32(0)
    for i in range(_SUB):
        off = x[i] - scale * np.float32(nearest(inverse * x[i]) & np.int32(255))
        error += weight[i] * off * off
    return error


@kernel
def _error(x: Floats, weight: Floats, inverse: np.float32) -> np.float32:
    scale = np.float32(1) / inverse
    error = np.float32(0)
    for i in range(_SUB):
        off = x[i] - scale * np.float32(_level(inverse * x[i]))
        error += weight[i] * off * off
    return error


@kernel
def _level(x: np.float32) -> np.int32:
    found = nearest(x)
    return found if found < _TOP else _TOP


@kernel
def _settle(
    x: Floats, weight: Floats, levels: NDArray[np.uint8], inverse: np.float32
) -> np.float32:
    """The scale that suits the levels once none of them wants to move."""
    product, square = np.float32(0), np.float32(0)
    for i in range(_SUB):
        found = _level(inverse * x[i])
        levels[i] = found & np.int32(255)
        product += weight[i] * x[i] * np.float32(found)
        square += weight[i] * np.float32(found) * np.float32(found)
    for _ in range(_ROUNDS):
        moved = False
        for i in range(_SUB):
            old = np.float32(levels[i])
            new, next_product, next_square = _moved(x[i], weight[i], old, product, square)
            if new != old:
                levels[i] = np.int32(new) & np.int32(255)
                product, square = next_product, next_square
                moved = True
        if not moved:
            break
    return product / square if square > np.float32(0) else np.float32(0)


@kernel
def _moved(
    x: np.float32, weight: np.float32, old: np.float32, product: np.float32, square: np.float32
) -> tuple[np.float32, np.float32, np.float32]:
    """A level and the sums with it: the best one for the others, or the old one."""
    rest = product - weight * x * old
    rest_square = square - weight * old * old
    if not (rest > np.float32(0) and rest_square > np.float32(0)):
        return old, product, square
    new = np.float32(_level(x * rest_square / rest))
    next_product = rest + weight * x * new
    next_square = rest_square + weight * new * new
    if next_product * next_product * square > product * product * next_square:
        return new, next_product, next_square
    return old, product, square
