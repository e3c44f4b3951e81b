"""GPTQ onto ggml's types: the same bytes, with codes that make up for each other's errors.

    importance   what ggml's search for scales is told of the channels
    quantize     under scales that stay, from the loudest channel on: each rounds to the nearest
                 level, those after it absorb the error (gptq.quantize, for levels of blocks)
    sweep        goes through all channels once more: each to the level that is best now that all
                 others are known, by the moment as it was measured, without damping

Scales found anew from what the weights have become gain less than that order does, which they
rule out but within blocks. What earlier channels leave behind is taken off a stretch of channels at
a time, so that most of the work is matrix products. Rows know nothing of each other.

Laws (tests/test_ggml_gptq.py): with U = I, the nearest levels; never a larger tr(E H Eᵀ) than
ggml's own rounding on correlated inputs; a sweep never makes it larger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dqconvert.quantizers.ggml import fields
from dqconvert.quantizers.tensors import QuantizedTensor

SWEEPS = 2
"""So many are worth their time; a third gains less than a tenth of a dB."""

STRETCH = 32
"""Channels between two products."""

LOWEST = {"q8_0": -127.0}
"""Where ggml never writes the lowest level there is."""

ROWS = 4096
"""Rows at a time: a stretch of them stays in the processor's cache."""


def covers(code: str) -> bool:
    """Whether each code of a type stands for one weight."""
    return code in fields.LAYOUTS


def importance(mean_square: Tensor, upper: Tensor, order: Tensor) -> Tensor:
    """How much errors of channels [K] count when scales are searched.

    Their mean squares say it where nothing makes up for an error, 1 / U² where the channels after
    do so as far as they can, which rounding keeps them from: the geometric mean.
    """
    left = torch.empty_like(mean_square)
    left[order] = upper.diagonal().reciprocal()
    return left * mean_square.sqrt()


def quantize(
    weight: Tensor, upper: Tensor, start: QuantizedTensor, order: Tensor
) -> QuantizedTensor:
    """Round a weight [N, K] against its inputs' inverse factor U [K, K], under start's scales.

    order: [K] channels in the order in which they are rounded, which is also the order of U.
    """
    places = order.tolist()

    def rows(part: Tensor, ladder: _Ladder) -> None:
        errors = torch.empty(part.shape[1], len(part), device=part.device)
        for left in range(0, len(places), STRETCH):
            cut = slice(left, left + STRETCH)
            now = part[:, order[cut]].T.float().addmm(upper[:left, cut].T, errors[:left], alpha=-1)
            corner = upper[cut, cut]
            for j, column in enumerate(now):
                error = torch.sub(column, ladder.round(column, places[left + j]))
                error = torch.div(error, corner[j, j], out=errors[left + j])
                now[j + 1 :].addr_(corner[j, j + 1 :], error, alpha=-1)

    return _in_parts(weight, start, rows)


def sweep(weight: Tensor, moment: Tensor, start: QuantizedTensor) -> QuantizedTensor:
    """Round each channel of a weight [N, K] again, given all others, by a second moment [K, K].

    The error of the output is a parabola in each weight, so the best level is the nearest one to
    where it is least. Channels that are never active stay.
    """
    active = moment.diagonal().clamp(min=torch.finfo(torch.float32).tiny)

    def rows(part: Tensor, ladder: _Ladder) -> None:
        values = ladder.values()
        errors = part.T.float() - values
        for left in range(0, len(values), STRETCH):
            cut = slice(left, left + STRETCH)
            slopes = moment[cut] @ errors
            corner = moment[cut, cut]
            for j, slope in enumerate(slopes, left):
                best = torch.addcdiv(values[j], slope, active[j])
                change = ladder.round(best, j).sub_(values[j])
                errors[j].sub_(change)
                slopes[j - left + 1 :].addr_(corner[j - left, j - left + 1 :], change, alpha=-1)

    return _in_parts(weight, start, rows)


def _in_parts(
    weight: Tensor, start: QuantizedTensor, rows: Callable[[Tensor, _Ladder], None]
) -> QuantizedTensor:
    """Some rows after the other."""
    if not weight.numel():
        return start
    found = []
    for part, packed in zip(weight.split(ROWS), start.codes.split(ROWS), strict=True):
        ladder = _Ladder(packed, start.spec.code)
        rows(part, ladder)
        found.append(ladder.blocks())
    return replace(start, codes=torch.cat(found))


class _Ladder:
    """The levels of rows of blocks [n, row bytes], and which each weight has: [K, n]."""

    def __init__(self, packed: Tensor, code: str) -> None:
        found = fields.split(packed, code)
        self._packed, self._code = packed, code
        self._codes = found.codes.T.contiguous()
        self._levels = fields.levels(code, packed.device)
        self._step = found.step.T.contiguous()
        self._divisor = self._step.masked_fill(self._step == 0, torch.inf)
        self._offset = None if found.offset is None else found.offset.T.contiguous()
        self._width = len(self._codes) // len(self._step)
        self._first, top = float(self._levels[0]), float(self._levels[-1])
        whole = len(self._levels) == top - self._first + 1
        self._ends = (LOWEST.get(code, self._first), top) if whole else None
        self._borders = (self._levels[1:] + self._levels[:-1]) / 2

    def round(self, column: Tensor, place: int) -> Tensor:
        """Give a channel the levels nearest to values [n]; returns what they stand for, [n]."""
        sub = place // self._width
        offset = None if self._offset is None else self._offset[sub]
        steps = (column if offset is None else column - offset) / self._divisor[sub]
        if self._ends is not None:
            level = steps.round_().clamp_(*self._ends)
            self._codes[place] = level - self._first if self._first else level
        else:
            nearest = torch.searchsorted(self._borders, steps)
            level = self._levels[nearest]
            self._codes[place] = nearest
        level = level.mul_(self._step[sub])
        return level if offset is None else level.add_(offset)

    def values(self) -> Tensor:
        """The weights as they are now, [K, n] fp32."""
        step = self._step.repeat_interleave(self._width, 0)
        found = self._levels[self._codes.int()].mul_(step)
        if self._offset is None:
            return found
        return found.add_(self._offset.repeat_interleave(self._width, 0))

    def blocks(self) -> Tensor:
        """Rows of blocks with the codes as they are now."""
        return fields.join(self._packed, self._code, self._codes.T)
