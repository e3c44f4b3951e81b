"""A codebook on a device, and which of its points stands for weights with the least error.

Weights lie side by side, [dims, lanes]: a lane is what one point stands for. Sums run over dims
one after the other, as C adds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from dqconvert.quantizers.ggml import grids
from dqconvert.quantizers.ggml.plain.lanes import Quantize

_WINDOW = 1 << 14
"""Pairs of a lane and a neighbour that are worth a pass of their own."""

ROOM = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Numbers that a search holds for all of its steps at once."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """A grid of ggml/grids.py on a device.

    values      [points, dims] fp32  what a dequantizer multiplies the scale with
    factors     [dims, points] fp32  what a quantizer does: 2 level + 1, or level - 1 (IQ1)
    index       [codes] int32        the point that a code is, or -1
    starts      [codes] int32        where a code's neighbours begin
    counts      [codes] int32        how many there are, 0 for a point
    neighbours  [..] int32           points, nearest first
    """

    values: Tensor
    factors: Tensor
    index: Tensor
    starts: Tensor
    counts: Tensor
    neighbours: Tensor
    base: int

    @property
    def dims(self) -> int:
        """Weights that a point stands for."""
        return len(self.factors)

    def codes(self, levels: Tensor) -> Tensor:
        """Codes [.., n] int32 of levels [.., dims, n] fp32."""
        found = levels.select(-2, 0)
        for dim in range(1, self.dims):
            found = found + levels.select(-2, dim) * self.base**dim
        return found.int()

    def choose(
        self,
        codes: Tensor,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor | None = None,
    ) -> Tensor:
        """Points [lanes] int32: the code itself, or the neighbour of least Σ w (scale q - x)².

        codes, scale, shift (of factors): [lanes]; x, weight: [dims, n], again and again for each
        n of the lanes.
        """
        found = self.index.index_select(0, codes)
        counts = self.counts.index_select(0, codes)
        order = torch.argsort(counts, descending=True)
        above = torch.bincount(counts).flip(0).cumsum(0).flip(0)[1:].tolist()
        if not above:
            return found
        lanes = order[: above[0]]
        places = lanes % x.shape[1]
        errors = _Errors(
            self.factors,
            x.index_select(1, places),
            weight.index_select(1, places),
            scale.index_select(0, lanes),
            None if shift is None else shift.index_select(0, lanes),
        )
        chosen = self._nearest(codes.index_select(0, lanes), above, errors)
        return found.index_copy(0, lanes, chosen)

    def _nearest(self, codes: Tensor, above: list[int], errors: _Errors) -> Tensor:
        """The points of least error, for codes whose lists grow shorter.

        above[j]: how many lanes have more than j neighbours. Of equal errors the first counts.
        """
        first = self.starts.index_select(0, codes)
        last = first + self.counts.index_select(0, codes) - 1
        best = torch.full_like(errors.scale, torch.inf)
        chosen = self.neighbours.index_select(0, first)
        for place, width, lanes in _windows(above):
            points, error = self._window(first[:lanes], last[:lanes], place, width, errors)
            better = error < best[:lanes]
            torch.where(better, error, best[:lanes], out=best[:lanes])
            torch.where(better, points, chosen[:lanes], out=chosen[:lanes])
        return chosen

    def _window(
        self, first: Tensor, last: Tensor, place: int, width: int, errors: _Errors
    ) -> tuple[Tensor, Tensor]:
        """The best point and its error [lanes] among some neighbours from a place on."""
        if width == 1:
            points = self.neighbours.index_select(0, first + place)
            return points, errors(points, 1, len(first))[0]
        steps = torch.arange(place, place + width, device=first.device, dtype=torch.int32)
        places = torch.minimum(first + steps[:, None], last)
        points = self.neighbours.index_select(0, places.flatten())
        error, row = errors(points, width, len(first)).min(0)
        return points.view(width, -1).gather(0, row[None])[0], error


@dataclass(frozen=True, eq=False)
class _Errors:
    """Σ w (scale q - x)² of points against lanes: x, weight [dims, n], scale, shift [n]."""

    factors: Tensor
    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor | None

    def __call__(self, points: Tensor, width: int, lanes: int) -> Tensor:
        """[width, lanes] for points [width * lanes], each row for the same first lanes."""
        parts = self.factors.index_select(1, points).view(-1, width, lanes)
        if self.shift is not None:
            parts += self.shift[:lanes]
        parts *= self.scale[:lanes]
        parts -= self.x[:, None, :lanes]
        weighted = self.weight[:, None, :lanes] * parts
        parts *= weighted
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total


def _windows(above: list[int]) -> Iterator[tuple[int, int, int]]:
    """Where in the lists a pass begins, how many neighbours it takes, and of how many lanes."""
    place = 0
    while place < len(above):
        width = min(max(1, _WINDOW // above[place]), len(above) - place)
        yield place, width, above[place]
        place += width


@cache
def codebook(code: str, device: torch.device) -> Codebook:
    """The codebook of a type."""
    grid = grids.grid(code)
    levels = grid.levels.T.astype(np.float32)
    factors = levels - 1 if code.startswith("iq1") else 2 * levels + 1
    tables = {
        "values": grid.values,
        "factors": factors,
        "index": grid.index,
        "starts": grid.starts[:-1],
        "counts": np.diff(grid.starts),
        "neighbours": grid.neighbours.astype(np.int32),
    }
    moved = {name: torch.from_numpy(table.copy()).to(device) for name, table in tables.items()}
    return Codebook(base=grid.base, **moved)


def shared(kernel: Quantize, numbers: int) -> Quantize:
    """A kernel over blocks that gets fewer of them at once: it holds that many numbers for one."""

    def quantize(blocks: Tensor, importance: Tensor | None) -> Tensor:
        room = ROOM.get(blocks.device.type, ROOM["cpu"])
        step = max(1, room // numbers)
        parts = blocks.split(step)
        if importance is None:
            return torch.cat([kernel(part, None) for part in parts])
        return torch.cat(
            [kernel(*both) for both in zip(parts, importance.split(step), strict=True)]
        )

    return quantize
