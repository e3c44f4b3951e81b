"""The best levels -1, 0, 1 for weights in ascending order: all cuts into three parts (IQ1).

Σ w q x and Σ w q² of every cut say how much error its best scale leaves; the first of the best
counts. Numbers are [count, lanes] fp32, and sums add up as in quantize_row_iq1_*_impl.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_PLUS = (-0.875, 0.125, 1.125)
_MINUS = (-1.125, -0.125, 0.875)
"""What levels stand for with a shift of ⅛ up or down."""


@dataclass(frozen=True, eq=False)
class Cut:
    """Levels [count, lanes] fp32, shifts [groups of 8, lanes] ±1, scale and found [lanes].

    found: false where all weights are small or count for nothing.
    """

    levels: Tensor
    shifts: Tensor
    scale: Tensor
    found: Tensor


class _Best:
    """The cut with the least error so far, of each lane."""

    def __init__(self, x: Tensor) -> None:
        self.largest = self.scale = x.abs().amax(0)
        self.score = torch.full_like(self.scale, torch.finfo(x.dtype).min)
        self.choice = torch.full_like(self.scale, -1, dtype=torch.int32)

    def offer(self, xq: Tensor, qq: Tensor, first: int) -> None:
        """Sums [cuts, kinds, lanes] of the cuts at first and first, first + 1, ..., the end."""
        ratio = xq / qq
        score, square = ratio * xq, torch.where(qq > 0, xq * xq, -torch.inf)
        rows = zip(*(of.flatten(0, 1) for of in (ratio, score, square, qq)), strict=True)
        start = first * (first + len(xq)) + first
        for number, (scale, mark, fit, size) in enumerate(rows, start * xq.shape[1]):
            better = fit > self.score * size
            self.scale = torch.where(better, scale, self.scale)
            self.score = torch.where(better, mark, self.score)
            self.choice = torch.where(better, number, self.choice)

    def taken(
        self, x: Tensor, order: Tensor, floor: float, kinds: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Kinds [lanes], levels [count, lanes] fp32, and whether there are any [lanes]."""
        cut = self.choice // kinds
        ranks = torch.arange(len(x), device=x.device)[:, None]
        levels = (ranks >= cut // (len(x) + 1)).float() + (ranks >= cut % (len(x) + 1)).float() - 1
        levels = torch.empty_like(x).scatter_(0, order, levels)
        return self.choice % kinds, levels, (self.largest >= floor) & (self.choice >= 0)


def cut_together(x: Tensor, weight: Tensor, floor: float) -> Cut:
    """One shift for all of a lane: up or down."""
    count, order = len(x), _order(x)
    xs, ws = (_sums(of.gather(0, order)) for of in (weight * x, weight))
    best = _Best(x)
    for first in range(count + 1):
        xq = x.new_empty((count + 1 - first, 2, x.shape[1]))
        qq = torch.empty_like(xq)
        for kind, values in enumerate((_PLUS, _MINUS)):
            a, b, c = (of * value for of, value in zip(_parts(xs, first), values, strict=True))
            xq[:, kind] = a + b + c
            a, b, c = (
                of * value * value for of, value in zip(_parts(ws, first), values, strict=True)
            )
            qq[:, kind] = a + b + c
        best.offer(xq, qq, first)
    kinds, levels, found = best.taken(x, order, floor, 2)
    return Cut(levels, (1 - 2 * kinds).expand(count // 8, -1), best.scale, found)


def cut_by_eights(x: Tensor, weight: Tensor, floor: float) -> Cut:
    """A shift for each half of a lane: both up, the second down, the first down, both down."""
    count, order = len(x), _order(x)
    low, middle, high = _products(x, weight, order)
    best = _Best(x)
    head = torch.zeros_like(low[0])
    for first in range(count + 1):
        sums = head.new_empty((count + 1 - first, *head.shape))
        sums[0] = head
        for i in range(first, count):
            torch.add(sums[i - first], middle[i], out=sums[i - first + 1])
            sums[: i - first + 1] += high[i]
        best.offer(sums[:, 0], sums[:, 1], first)
        if first < count:
            head = head + low[first]
    kinds, levels, found = best.taken(x, order, floor, 4)
    shifts = torch.stack((1 - kinds // 2 * 2, 1 - kinds % 2 * 2))
    return Cut(levels, shifts, best.scale, found)


def _products(x: Tensor, weight: Tensor, order: Tensor) -> list[Tensor]:
    """For each level w q x and w q² in order, for all four pairs of shifts [count, 2, 4, lanes]."""
    second = order >= len(x) // 2
    pairs = [torch.zeros_like(second), second, ~second, torch.ones_like(second)]
    minus = torch.stack(pairs, 1)
    x, weight = x.gather(0, order), weight.gather(0, order)
    found = []
    for plus_level, minus_level in zip(_PLUS, _MINUS, strict=True):
        ups, downs = (
            torch.stack((weight * level * x, weight * level * level), 1)[:, :, None]
            for level in (plus_level, minus_level)
        )
        found.append(torch.where(minus[:, None], downs, ups))
    return found


def _parts(sums: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the three parts of all cuts whose first is at a place."""
    return sums[first] - sums[0], sums[first:] - sums[first], sums[-1] - sums[first:]


def _order(x: Tensor) -> Tensor:
    """Of weights in ascending order [count, lanes]; equal ones, as 0 and -0, stay as they are."""
    return torch.sort(x + 0.0, dim=0, stable=True).indices


def _sums(values: Tensor) -> Tensor:
    """The sum of the first i of values [count, lanes], in row i."""
    found = torch.zeros((len(values) + 1, values.shape[1]), device=values.device)
    for i, value in enumerate(values):
        torch.add(found[i], value, out=found[i + 1])
    return found
