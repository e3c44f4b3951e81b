"""The codebooks of the IQ types: points on a grid, and which of them stand near every other point.

A point is 8 levels of {0, 1, 2} (IQ2, IQ1) or 4 of {0 .. 7} (IQ3). A quantizer rounds weights to
levels on their own; the code Σ levelᵢ baseⁱ of what it finds either is on the grid or names a
list of neighbours to choose from: the points at the smallest few distances, nearest first and by
index where distances are equal, as in iq2xs_init_impl and iq3xs_init_impl of ggml-quants.c. (ggml
packs the same levels into bit fields; the order of the lists is what its bytes depend on.)

The points come from the gguf package, which has them for its dequantizers. Signs are a byte of 8
bits, or 7 of them where an even number of minus signs makes the eighth (ksigns_iq2xs).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

_DISTANCES = {"iq2_xxs": 2, "iq2_xs": 2, "iq2_s": 1, "iq3_xxs": 2, "iq3_s": 3, "iq1_s": 3}
"""How many different distances a list of neighbours spans."""

_ROWS = 512


@dataclass(frozen=True, eq=False)
class Grid:
    """A codebook of points with their neighbours, codes = base ** dims.

    levels      [points, dims] int8    what the quantizer rounds to: 0 .. base - 1
    values      [points, dims] float32 what the dequantizer multiplies with
    index       [codes] int32          the point that a code is, or -1
    starts      [codes + 1] int32      a code's neighbours are neighbours[starts[c] : starts[c+1]],
    neighbours  [..] int16             none where the code is a point
    """

    levels: NDArray[np.int8]
    values: NDArray[np.float32]
    index: NDArray[np.int32]
    starts: NDArray[np.int32]
    neighbours: NDArray[np.int16]
    base: int

    @property
    def dims(self) -> int:
        """Weights that a point stands for."""
        return int(self.levels.shape[1])


@cache
def grid(code: str) -> Grid:
    """The codebook of a type: iq2_xxs, iq2_xs, iq2_s, iq3_xxs, iq3_s, iq1_s or iq1_m."""
    if code == "iq1_m":
        return grid("iq1_s")
    values = _values(code)
    alphabet = np.unique(values)
    levels = np.searchsorted(alphabet, values).astype(np.int8)
    base, dims = len(alphabet), levels.shape[1]
    powers = base ** np.arange(dims)
    index = np.full(base**dims, -1, np.int32)
    index[levels @ powers] = np.arange(len(levels))
    starts, neighbours = _neighbours(levels, index, powers, _DISTANCES[code])
    return Grid(levels, values, index, starts, neighbours, base)


@cache
def signs() -> NDArray[np.uint8]:
    """The sign byte [128] of 7 bits: bit i is set where weight i is negative."""
    seven = np.arange(128, dtype=np.uint8)
    return (seven | (np.bitwise_count(seven) % 2) << 7).astype(np.uint8)


def _values(code: str) -> NDArray[np.float32]:
    from gguf import quants

    table = getattr(quants, code.upper())
    table.init_grid()
    values: NDArray[np.float32] = table.grid.reshape(table.grid_shape)
    return values


def _neighbours(
    levels: NDArray[np.int8], index: NDArray[np.int32], powers: NDArray[np.int64], distances: int
) -> tuple[NDArray[np.int32], NDArray[np.int16]]:
    """The lists of all codes that are no point, one behind the other, and where each starts."""
    codes = np.flatnonzero(index < 0)
    counts = np.zeros(len(index) + 1, np.int32)
    lists = []
    for first in range(0, len(codes), _ROWS):
        some = codes[first : first + _ROWS]
        rows, points = _nearest(some[:, None] // powers % powers[1], levels, distances)
        counts[some + 1] = np.bincount(rows, minlength=len(some))
        lists.append(points)
    return np.cumsum(counts, dtype=np.int32), np.concatenate(lists).astype(np.int16)


def _nearest(
    codes: NDArray[np.int64], levels: NDArray[np.int8], distances: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of codes [n, dims] and the points near them, by row, distance and point."""
    points = levels.astype(np.float32)
    squared = (codes**2).sum(1, dtype=np.float32)[:, None] + (points**2).sum(1)
    squared -= 2 * (codes.astype(np.float32) @ points.T)
    limit = squared.min(1)
    for _ in range(distances - 1):
        limit = np.where(squared > limit[:, None], squared, np.inf).min(1)
    row, point = np.nonzero(squared <= limit[:, None])
    order = np.lexsort((squared[row, point], row))
    return row, point[order]
