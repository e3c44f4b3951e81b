"""Scales by squared error: of some scales around the largest weight's, the one that errs least.

    error of a tile = Σ m_k (w_nk - w'_nk)²,  m: 1, or the mean square of input k

or, where the second moment of the inputs is known within each group, e M eᵀ for each row e of a
tile: the error of its output (the clipping of AWQ, arXiv 2306.00978, section 3.2).

All candidates are in the format of the scale itself: fractions of the largest weight; the other
sign where integers reach further down than up; neighbouring codes for e4m3 (ScaleSweep, arXiv
2606.07618), which have block maxima at 6 and at 4 among them (Four Over Six, arXiv 2512.02010);
one power of two more or less for e8m0; narrower ranges with a zero point.

Law (tests/test_mse.py): rounding to nearest is among the candidates, so the error never rises.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dqconvert.quantizers import lut, rtn
from dqconvert.quantizers.spec import ALL, CODES, QuantSpec
from dqconvert.quantizers.tensors import QuantizedTensor

FRACTIONS = tuple(1 - 0.025 * step for step in range(19))
"""Of the largest magnitude of a tile: 1 .. 0.55."""

ENDS = (1.0, 0.95, 0.9, 0.8)
"""Of either end of a range with a zero point."""

NEIGHBOURS = (0, -4, -3, -2, -1, 1, 2, 3, 4, 5)
"""Codes of e4m3 around the one that maps the maximum to 6; 4 to 5 further up it is mapped to 4."""

ROOM = 256.0
"""Largest block scale, instead of 448, that lets the largest block be mapped to 4 too."""


@dataclass(frozen=True, slots=True, eq=False)
class Scales:
    """What a search found. scale, zero: as in QuantizedTensor; error: of each tile, [grid]."""

    scale: Tensor
    zero: Tensor | None
    error: Tensor


def quantize(
    weight: Tensor,
    spec: QuantSpec,
    parts: tuple[int, ...] = (),
    ceiling: Tensor | None = None,
    metric: Tensor | None = None,
) -> QuantizedTensor:
    """Round a weight under the best scales.

    weight, parts, ceiling: as for rtn.quantize. metric: [K] mean squares of the inputs, or
    [K/G, G, G] their second moments within each group of a tile (1, G). Scales that linears share
    are not searched.
    """
    if spec.unit or not weight.numel() or (ceiling is not None and spec.tile == (ALL, ALL)):
        return rtn.quantize(weight, spec, parts, ceiling)
    if spec.code == "lut4":
        return lut.search(weight, spec, metric)
    amax = rtn.absmax(weight, spec)
    seconds = [rtn.tensor_scales(amax, spec, parts, ceiling)]
    if spec.tensor_scale is not None and ceiling is None:
        seconds.append(rtn.tensor_scales(amax, spec, parts, top=ROOM))
    found = [(second, search(weight, spec, second, metric)) for second in seconds]
    second, best = min(found, key=lambda pair: float(pair[1].error.sum()))
    codes = rtn.encode(weight, best.scale, second, spec, best.zero)
    return QuantizedTensor(spec, codes, best.scale, second, zero=best.zero)


def search(
    weight: Tensor, spec: QuantSpec, second: Tensor | None, metric: Tensor | None = None
) -> Scales:
    """The best first-level scales of a weight [N, K] under given second-level ones."""
    blocks = list(spec.row_blocks((weight.shape[0], weight.shape[1])))
    if len(blocks) > 1 and spec.tile[0] != ALL:
        found = [
            search(weight[start:stop], spec, _rows(second, start, stop), metric)
            for start, stop in blocks
        ]
        zeros = [part.zero for part in found if part.zero is not None]
        return Scales(
            torch.cat([part.scale for part in found]),
            torch.cat(zeros) if zeros else None,
            torch.cat([part.error for part in found]),
        )
    steps = list(candidates(weight, spec, second))
    errors = [torch.zeros_like(scale, dtype=torch.float64) for scale, _ in steps]
    for start, stop in blocks:
        block, rows = weight[start:stop].float(), _rows(second, start, stop)
        for error, (scale, zero) in zip(errors, steps, strict=True):
            codes = rtn.encode(block, scale, rows, spec, zero)
            q = QuantizedTensor(spec, codes, scale, rows, zero=zero)
            error += _error(rtn.dequantize(q).sub_(block), spec, metric)
    return _best(steps, errors)


def candidates(
    weight: Tensor, spec: QuantSpec, second: Tensor | None
) -> Iterable[tuple[Tensor, Tensor | None]]:
    """(scale, zero) [grid] to try, those of rounding to nearest first."""
    if spec.zero_point:
        low, high = rtn.extremes(weight, spec)
        for down in ENDS:
            for up in ENDS:
                yield rtn.affine_scales(low * down, high * up, spec)
        return
    amax = rtn.absmax(weight, spec)
    plain = rtn.first_scales(amax, spec, second)
    if spec.scale.startswith("F8"):
        powers = spec.scale == "F8_E8M0"
        top = 254 if powers else 126
        code = plain.view(torch.uint8).short()
        for offset in (0, -1, 1) if powers else NEIGHBOURS:
            moved = (code + offset).clamp_(0, top).to(torch.uint8)
            yield moved.view(plain.dtype), None
        return
    yield plain, None
    sign = torch.ones_like(amax)
    if spec.full_range and not CODES[spec.code].is_float:
        low, high = rtn.extremes(weight, spec)
        sign = torch.where(high > -low, -sign, sign)  # the longer end goes to the further code
    for fraction in FRACTIONS[not spec.full_range :]:
        scale = rtn.first_scales(amax * fraction, spec, second)
        yield scale * sign.to(scale.dtype), None


def _error(off: Tensor, spec: QuantSpec, metric: Tensor | None) -> Tensor:
    """Squared error of each tile of a row block, by its deviation [rows, K]."""
    if metric is not None and metric.dim() == 3:
        groups = off.view(off.shape[0], metric.shape[0], -1).transpose(0, 1)
        return (torch.bmm(groups, metric) * groups).sum(-1).T
    off = off.square_()
    return rtn.tiled(off if metric is None else off.mul_(metric), spec).sum((1, 3))


def _best(steps: list[tuple[Tensor, Tensor | None]], errors: list[Tensor]) -> Scales:
    """For each tile the candidate with the least error, the earlier one of two."""
    (scale, zero), error = steps[0], errors[0]
    for (other, shifted), found in zip(steps[1:], errors[1:], strict=True):
        less = found < error
        error, scale = torch.where(less, found, error), _where(less, other, scale)
        if zero is not None and shifted is not None:
            zero = torch.where(less, shifted, zero)
    return Scales(scale, zero, error)


def _where(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """torch.where, also of the float8 that it does not take."""
    if yes.element_size() > 1:
        return torch.where(condition, yes, no)
    return torch.where(condition, yes.view(torch.uint8), no.view(torch.uint8)).view(no.dtype)


def _rows(second: Tensor | None, start: int, stop: int) -> Tensor | None:
    """Second-level scales of some rows."""
    return second if second is None or second.numel() == 1 else second[start:stop]
