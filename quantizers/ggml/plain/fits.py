"""Searches for the scale of a sub-block, in the steps of ggml-quants.c.

affine      make_qkx2_quants, make_qkx3_quants   x ≈ scale · code - shift
symmetric   make_qx_quants                       x ≈ scale · (code - levels)
settled     make_q3_quants                       the same, by descent from the first codes
unsigned    make_qp_quants                       x ≈ scale · code, for scales themselves

Numbers and their weights are [positions, lanes] fp32; codes come back as fp32 in the same shape,
scales as [lanes].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dqconvert.quantizers.ggml.plain.lanes import TINY, divide, factors, nearest, peak, total


@dataclass(frozen=True, slots=True)
class Sweep:
    """Steps of the affine search.

    Codes are 0 .. levels; the inverse scales tried are (first + step · i + levels) / (highest -
    lowest) for i in 0 .. count; absolute: errors count by their size, else by their square.
    """

    levels: int
    first: float
    step: float
    count: int
    absolute: bool = False


class _Fit:
    """The affine search's numbers, and room for the products of one step.

    Lanes without a usable span hold zeros: their codes are all 0, and no step improves on that.
    """

    def __init__(self, x: Tensor, weights: Tensor, sweep: Sweep) -> None:
        self.low = x.amin(0).clamp(max=0)
        self.high = x.amax(0)
        span = self.high - self.low
        self.inverse = divide(sweep.levels, span)
        self.flat = ~(self.inverse.isfinite() & span.isfinite())
        self.x = torch.where(self.flat, 0, x)
        self.weights, self.sweep = weights, sweep
        self.sum_w, self.sum_x = total(weights), total(weights * self.x)
        self.code, self.room, self.more = (torch.empty_like(x) for _ in range(3))

    def encode(self, inverse: Tensor, low: Tensor) -> Tensor:
        """Codes for an inverse scale and a minimum [lanes]."""
        torch.sub(self.x, low, out=self.code)
        return self.code.mul_(inverse).round_().clamp_(0, self.sweep.levels)

    def error(self, scale: Tensor, low: Tensor) -> Tensor:
        """Weighted error [lanes] of the codes."""
        room = torch.mul(self.code, scale, out=self.room).add_(low).sub_(self.x)
        room = room.abs_() if self.sweep.absolute else torch.mul(room, room, out=self.more)
        return total(room.mul_(self.weights))

    def solve(self) -> tuple[Tensor, Tensor, Tensor]:
        """Least squares for the codes: scale and minimum, and where there is such a thing."""
        product = torch.mul(self.weights, self.code, out=self.room)
        sum_l = total(product)
        sum_xl = total(torch.mul(product, self.x, out=self.more))
        sum_l2 = total(product.mul_(self.code))
        sum_w, sum_x = self.sum_w, self.sum_x
        determinant = sum_w * sum_l2 - sum_l * sum_l
        scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = low > 0
        scale = torch.where(above, sum_xl / sum_l2, scale)
        return scale, torch.where(above, 0, low), determinant > 0


def affine(x: Tensor, weights: Tensor, sweep: Sweep) -> tuple[Tensor, Tensor, Tensor]:
    """Scales, shifts (not negative) and codes."""
    fit = _Fit(x, weights, sweep)
    low = torch.where(fit.flat, 0, fit.low)
    scale = divide(1, fit.inverse)
    inverse, base = torch.where(fit.flat, 0, fit.inverse), low
    fit.encode(inverse, base)
    error = fit.error(scale, low)
    steps = range(sweep.count + 1)
    for factor in factors(sweep.levels, sweep.first, sweep.step, steps, x):
        trial = divide(factor, fit.high - low)
        trial = torch.where(trial.isfinite(), trial, 0)
        fit.encode(trial, low)
        trial_scale, trial_low, solved = fit.solve()
        trial_error = fit.error(trial_scale, trial_low)
        better = solved & (trial_error < error)
        inverse, base = torch.where(better, trial, inverse), torch.where(better, low, base)
        scale, low = torch.where(better, trial_scale, scale), torch.where(better, trial_low, low)
        error = torch.where(better, trial_error, error)
    return scale, -torch.where(fit.flat, fit.low, low), fit.encode(inverse, base)


def symmetric(x: Tensor, weights: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scales, of either sign, and codes 0 .. 2 levels - 1; codes 0 where all numbers are tiny."""
    extreme = peak(x)
    tiny = extreme.abs() < TINY
    finite = torch.where(x.isfinite(), x, 0)
    weighted = weights * x
    code, room = torch.empty_like(x), torch.empty_like(x)

    def encode(inverse: Tensor) -> Tensor:
        torch.mul(finite, inverse, out=code)
        return code.round_().clamp_(-levels, levels - 1)

    def sums() -> tuple[Tensor, Tensor]:
        across = total(torch.mul(weighted, code, out=room))
        return across, total(torch.mul(weights, code, out=room).mul_(code))

    inverse = torch.where(tiny, 0, divide(-levels, extreme))
    encode(inverse)
    across, square = sums()
    scale = torch.where(square == 0, 0, across / square)
    best = scale * across
    for factor in -factors(levels, 0, 0.1, _around(9), x):
        trial = torch.where(tiny, 0, divide(factor, extreme))
        encode(trial)
        across, square = sums()
        better = (square > 0) & (across * across > best * square)
        scale = torch.where(better, across / square, scale)
        best = torch.where(better, scale * across, best)
        inverse = torch.where(better, trial, inverse)
    codes = torch.where(tiny, 0, encode(inverse) + levels)
    return torch.where(tiny, 0, scale), codes


def settled(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The same with squares for weights, one code after the other moved while that helps."""
    extreme = peak(x)
    tiny = extreme.abs() < TINY
    weights = x * x
    codes = nearest(divide(-levels, extreme) * x).clamp_(-levels, levels - 1)
    sums = total(weights * x * codes), total(weights * codes * codes)
    scale, codes = _descend(x, weights, codes, sums, (-levels, levels - 1))
    return torch.where(tiny, 0, scale), torch.where(tiny, 0, codes + levels)


def unsigned(x: Tensor, weights: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scales and codes 0 .. levels; what would be negative has wrapped around a byte."""
    highest = torch.zeros_like(x[0])
    for row in x:
        highest = torch.where(highest > row, highest, row)
    tiny = highest < TINY

    def error(inverse: Tensor, codes: Tensor) -> Tensor:
        missed = x - divide(1, inverse) * codes
        return total(weights * missed * missed)

    inverse = divide(levels, highest)
    best = error(inverse, nearest(inverse * x).remainder_(256))
    for factor in factors(levels, 0, 0.1, _around(4), x):
        trial = divide(factor, highest)
        trial_error = error(trial, nearest(trial * x).clamp_(max=levels))
        better = trial_error < best
        best, inverse = torch.where(better, trial_error, best), torch.where(better, trial, inverse)
    codes = nearest(inverse * x).clamp_(max=levels)
    sums = total(weights * x * codes), total(weights * codes * codes)
    scale, codes = _descend(x, weights, codes.remainder_(256), sums, (None, levels))
    return torch.where(tiny, 0, scale), torch.where(tiny, 0, codes)


def _around(reach: int) -> list[int]:
    """The steps -reach .. reach without 0, which is the one begun with."""
    return [step for step in range(-reach, reach + 1) if step]


def _descend(
    x: Tensor,
    weights: Tensor,
    codes: Tensor,
    sums: tuple[Tensor, Tensor],
    bounds: tuple[int | None, int],
) -> tuple[Tensor, Tensor]:
    """Scales and codes after up to five rounds over the positions.

    A code moves to what suits the scale that the others make, if the fit gains. sums: of
    w x code and w code²; bounds: of the codes, without a lower one they wrap around a byte.
    """
    across, square = sums
    for _ in range(5):
        moved = torch.zeros_like(across, dtype=torch.bool)
        for i, (number, weight) in enumerate(zip(x, weights, strict=True)):
            code, weighted = codes[i], weight * number
            rest, rest_square = across - weighted * code, square - weight * code * code
            trial = nearest(number * rest_square / rest).clamp_(*bounds)
            with_it, with_it_square = rest + weighted * trial, rest_square + weight * trial * trial
            usable = with_it_square if bounds[0] is not None else rest_square
            better = (rest > 0) & (usable > 0) & (trial != code)
            better &= with_it * with_it * square > across * across * with_it_square
            stored = trial if bounds[0] is not None else trial.remainder(256)
            codes[i] = torch.where(better, stored, code)
            across = torch.where(better, with_it, across)
            square = torch.where(better, with_it_square, square)
            moved |= better
        if x.device.type == "cpu" and not moved.any():  # a GPU would wait for the answer
            break
    return torch.where(square > 0, across / square, 0), codes
