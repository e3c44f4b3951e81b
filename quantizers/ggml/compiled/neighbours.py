"""A grid's lists of neighbours, laid out for the lanes of vectors, and what ranks them.

A distance is never negative, so its bits order as integers do: with the place in the list and the
point below them, the least 64-bit number is the nearest neighbour, and the first of equals.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dqconvert.quantizers.ggml import grids
from dqconvert.quantizers.ggml.jit import kernel

Floats = NDArray[np.float32]

SIDE = 16
FARTHEST = np.int64(0x7FFFFFFFFFFFFFFF)
POINT = np.int64(0xFFFF)


class Lattice(NamedTuple):
    """A grid as the search reads it; a point's list is the point itself.

    found   [codes] int32               the point that a code is, or -1
    starts  [codes + 1] int32           a code's list is near[starts[c] : starts[c+1]],
                                        its last neighbour repeated where there are no more
    near    [chunks, 16] int32          neighbours: 2^16 place in the list + point
    odds    [chunks, dims, 16] int8     their 2 level + 1
    points  [points, dims] float32      2 level + 1 of every point
    """

    found: NDArray[np.int32]
    starts: NDArray[np.int32]
    near: NDArray[np.int32]
    odds: NDArray[np.int8]
    points: NDArray[np.float32]


@cache
def lattice(code: str) -> Lattice:
    """The tables of a type's grid."""
    grid = grids.grid(code)
    counts = np.diff(grid.starts)
    chunks = np.maximum(-(-counts // SIDE), 1)
    starts = np.concatenate([[0], np.cumsum(chunks)]).astype(np.int32)
    codes = np.repeat(np.arange(len(counts)), chunks)
    places = (np.arange(len(codes)) - starts[codes])[:, None] * SIDE + np.arange(SIDE)
    listed = grid.starts[codes, None] + np.minimum(places, counts[codes, None] - 1)
    own = grid.index[codes, None]
    points = np.where(own < 0, grid.neighbours[listed], own)
    near = (places << 16 | points).astype(np.int32)
    odds = 2 * grid.levels + 1
    around = np.ascontiguousarray(odds[points].transpose(0, 2, 1))
    return Lattice(grid.index, starts, near, around, odds.astype(np.float32))


@kernel
def term(scale: np.float32, odd: np.int8, x: np.float32, root: np.float32) -> np.float32:
    """What one weight adds to a distance."""
    off = scale * np.float32(odd) - x
    return root * off * off


@kernel
def ranked(distance: np.float32, near: np.int32) -> np.int64:
    """A number that orders as distance does, then as place; the point is its lowest bits."""
    return (np.int64(np.float32(distance).view(np.int32)) << 32) | np.int64(near)
