"""Preconditioning: x -> (x - center) / smooth at a linear's input, exactly, in the weights alone.

    consumers     W' = W diag(s)          b' = b + W mu
    shift rows    M' = M / s              m' = (m - mu) / s      x = (1 + scale) norm(h) + shift
    scale rows    M' = M / s              m' = (1 + m) / s - 1
    values        V' = V / s              v' = (v - mu) / s      rows of softmax sum to one

Nothing of it needs the runtime, whatever the number format. The order does not matter: consumers
change a linear on the side of its input, the others on that of its output.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dqconvert.quantizers.tensors import LayerStats

LIMIT = 256.0
"""How far the smooth factors of one input may be apart, so that fp16 holds what they divide."""


@dataclass(frozen=True, slots=True, eq=False)
class Transform:
    """x -> (x - center) / smooth. smooth: [K], positive; center: [K], None for zeros."""

    smooth: Tensor
    center: Tensor | None = None

    @property
    def inverse(self) -> Transform:
        """What takes it back."""
        center = None if self.center is None else -self.center / self.smooth
        return Transform(1 / self.smooth, center)


def consumer_weight(weight: Tensor, transform: Transform, start: int = 0) -> Tensor:
    """W diag(s) of a weight [N, K], where the transform fills the columns from start on."""
    weight = _wide(weight).clone()
    weight[:, start : start + len(transform.smooth)] *= transform.smooth
    return weight


def consumer_bias(bias: Tensor, weight: Tensor, transform: Transform, start: int = 0) -> Tensor:
    """b + W mu for a bias [N] and the weight [N, K] as it was before."""
    if transform.center is None:
        return _wide(bias)
    part = _wide(weight[:, start : start + len(transform.smooth)])
    center = transform.center.to(torch.promote_types(part.dtype, transform.center.dtype))
    return _wide(bias) + part.to(center.dtype) @ center


def producer_weight(rows: Tensor, transform: Transform) -> Tensor:
    """M / s of rows [K, C] whose outputs are x, or a factor of it."""
    return _wide(rows) / transform.smooth[:, None]


def shift_bias(bias: Tensor, transform: Transform) -> Tensor:
    """(m - mu) / s of the bias [K] of rows that are added to x: adaLN shifts, attention values."""
    moved = _wide(bias) if transform.center is None else _wide(bias) - transform.center
    return moved / transform.smooth


def scale_bias(bias: Tensor, transform: Transform) -> Tensor:
    """(1 + m) / s - 1 of the bias [K] of rows whose outputs the model adds 1 to."""
    return (1 + _wide(bias)) / transform.smooth - 1


def statistics(stats: LayerStats, transform: Transform, start: int = 0) -> LayerStats:
    """What calibration would have learned of the new input.

    Everything is exact but absmax: what is known of an offset input's range is the hard bound
    absmax + |mu|, and the held rows, beyond which the rest is taken to reach on either side as
    far as it does in magnitude.
    """
    cut = slice(start, start + len(transform.smooth))
    smooth, center = transform.smooth.float(), transform.center
    mu = torch.zeros_like(smooth) if center is None else center.float()
    rows = stats.rows.float().clone()
    rows[:, cut] = (rows[:, cut] - mu) / smooth
    mean, square, top = stats.mean.clone(), stats.mean_square.clone(), stats.absmax.clone()
    square[cut] = (square[cut] - 2 * mu * mean[cut] + mu.square()).clamp_(min=0) / smooth.square()
    mean[cut] = (mean[cut] - mu) / smooth
    top[cut] = _range(stats, cut, mu) / smooth if center is not None else top[cut] / smooth
    moment = stats.second_moment
    if moment is not None:
        moment = _moment(stats, cut, mu, smooth)
    return replace(
        stats, absmax=top, mean=mean, mean_square=square, second_moment=moment, rows=rows
    )


def ratio(rms_x: Tensor, rms_w: Tensor) -> Tensor:
    """(rms_x / rms_w)^0.5 [K]: equal shares of the range for input and weight."""
    return ((rms_x + 1e-6) / (rms_w + 1e-8)).sqrt()


def level(smooth: Tensor) -> float:
    """The geometric mean of factors, of those that are positive and finite."""
    usable = smooth[torch.isfinite(smooth) & (smooth > 0)]
    return float(usable.log().mean().exp()) if len(usable) else 1.0


def bounded(smooth: Tensor, unit: float | None = None) -> Tensor:
    """Factors that 16 bits can hold: their range is at most LIMIT, odd ones (0, NaN) become 1.

    A common factor means nothing to formats with scales, where all of a layer's columns have it:
    then the largest is 1. So 1 + scale never becomes a small difference of large numbers, which
    a runtime's 16 bits would not hold. unit: what becomes 1 instead, where some columns have none.
    """
    usable = torch.isfinite(smooth) & (smooth > 0)
    if not bool(usable.any()):
        return torch.ones_like(smooth)
    top = float(smooth[usable].amax())
    found = (smooth / top).clamp(min=1 / LIMIT) * (top / (unit or top))
    return torch.where(usable, found, torch.ones_like(smooth))


def snapped(transform: Transform, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Transform:
    """The nearest transform whose modulation biases [K] are exact in the dtype that holds them.

    Rounding (1 + m) / s - 1 and (m - mu) / s would change the function; choosing s and mu by what
    the rounding gives does not. Where no bias is near, the factor stays.
    """
    one = 1 + scale.float()
    held = 1 + scale_bias(scale, transform).to(dtype).float()
    smooth = one / held
    near = (smooth / transform.smooth - 1).abs() < 1 / 16
    smooth = torch.where(near, smooth, transform.smooth.float())
    if transform.center is None:
        return Transform(smooth)
    held = shift_bias(shift, Transform(smooth, transform.center)).to(dtype).float()
    return Transform(smooth, shift.float() - held * smooth)


def _range(stats: LayerStats, cut: slice, mu: Tensor) -> Tensor:
    top, rows = stats.absmax[cut], stats.rows.float()[:, cut]
    bound = top + mu.abs()
    if not len(rows):
        return bound
    beyond = (top - rows.abs().amax(0)).clamp(min=0)
    return torch.minimum(bound, (rows - mu).abs().amax(0) + beyond)


def _moment(stats: LayerStats, cut: slice, mu: Tensor, smooth: Tensor) -> Tensor:
    """(H - mean muᵀ - mu meanᵀ + mu muᵀ) / s sᵀ, in double: a difference of large terms.

    mean is that of the rows that H is of, which are all but the held ones.
    """
    assert stats.second_moment is not None
    seen = stats.count - len(stats.rows)
    total = stats.mean.double() * stats.count - stats.rows.double().sum(0)
    mean = total / seen if seen > 0 else stats.mean.double()
    at = torch.zeros_like(mean)
    at[cut] = mu.double()
    factor = torch.ones_like(mean)
    factor[cut] = smooth.double()
    cross = torch.outer(mean, at)
    moved = stats.second_moment.double() - cross - cross.T + torch.outer(at, at)
    return (moved / torch.outer(factor, factor)).float()


def _wide(tensor: Tensor) -> Tensor:
    """fp32, or fp64 where it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
