"""GPTQ (arXiv 2210.17323): round one column, let the columns to its right absorb the error.

With H = XᵀX and U the upper Cholesky factor of its damped inverse, column j is rounded,
e = (w_j - q_j) / U_jj, and W[:, k] -= e U_jk for every k > j. Any code and any tile. Scales stay
as they were set on the original weight, or those of a group are set anew from the updated weights
when it is entered. Columns may go in any order while scales stay (act-order: the loudest inputs
first), so that the codes need no record of it.

Law (tests/test_gptq.py): equal to the textbook loop in float64; with H = I equal to rounding to
nearest; never a larger tr(E H Eᵀ) than rounding to nearest on correlated inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dqconvert.quantizers import lut, rtn
from dqconvert.quantizers.codes import decode, round_to
from dqconvert.quantizers.errors import DataError
from dqconvert.quantizers.spec import ALL
from dqconvert.quantizers.tensors import QuantizedTensor

Refit = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]
"""(scale, zero) of a group, from its weights as they are now [N, G] and its first column."""

BLOCK = 128
"""Columns between two updates of everything to their right."""


def inverse_factor(second_moment: Tensor, damp: float = 0.01) -> Tensor:
    """Upper Cholesky factor U [K, K] fp32 of (H + damp mean(diag H) I)⁻¹.

    Channels that were never active count as mean ones. The damping grows tenfold until the
    factorization succeeds. Raises DataError on NaN or infinity.
    """
    h = second_moment.float().clone()
    diagonal = h.diagonal()
    mean = diagonal.mean()
    if not bool(mean.isfinite()):
        raise DataError("the second moment of its input holds NaN or infinity")
    if not bool(mean > 0):
        return torch.eye(h.shape[0], device=h.device)
    diagonal[diagonal == 0] = mean
    while (upper := _upper_of_inverse(h, damp * mean)) is None:
        damp *= 10
    return upper


def _upper_of_inverse(h: Tensor, damping: Tensor) -> Tensor | None:
    """Upper Cholesky factor of (H + damping I)⁻¹, None where there is none in fp32.

    Lets go of each step's matrix at once: for the widest inputs one takes 600 MB.
    """
    damped = h.clone()
    damped.diagonal().add_(damping)
    lower, info = torch.linalg.cholesky_ex(damped)
    del damped
    if int(info):
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if int(info) else torch.as_tensor(upper)


def quantize(
    weight: Tensor,
    upper: Tensor,
    start: QuantizedTensor,
    refit: Refit | None = None,
    order: Tensor | None = None,
) -> QuantizedTensor:
    """Round a weight [N, K] against its inputs' inverse factor U [K, K].

    start: the weight in the same format, whose scales are kept but for what refit sets anew.
    order: [K] columns in the order in which they are rounded, which is also the order of U; not
    together with refit.
    """
    assert refit is None or order is None
    w = weight.to(torch.float32, copy=True) if order is None else weight[:, order].float()
    places = list(range(w.shape[1])) if order is None else order.tolist()
    grid = _Grid(start, None if start.spec.tile[1] == ALL else refit)
    columns, width = w.shape[1], grid.width
    block = max(BLOCK // width, 1) * width if grid.refit else BLOCK  # groups see all corrections
    for left in range(0, columns, block):
        right = min(left + block, columns)
        errors = torch.empty(w.shape[0], right - left, device=w.device)
        for j in range(left, right):
            grid.enter(w[:, j : j + width], places[j])
            rounded = grid.round(w[:, j], places[j])
            errors[:, j - left] = (w[:, j] - rounded) / upper[j, j]
            w[:, j + 1 : right].addr_(errors[:, j - left], upper[j, j + 1 : right], alpha=-1)
        w[:, right:].addmm_(errors, upper[left:right, right:], alpha=-1)
    return grid.result()


class _Grid:
    """Codes and scales as they are fixed, column by column."""

    def __init__(self, start: QuantizedTensor, refit: Refit | None) -> None:
        self.start, self.refit = start, refit
        self.codes = torch.empty_like(start.codes)
        self.scale = start.scale.clone()
        self.zero = None if start.zero is None else start.zero.clone()
        self.width = start.spec.tile_of((1, start.codes.shape[1]))[1]
        self.group = -1
        self.step = self.offset = self.borders = self.levels = torch.empty(0)

    def enter(self, weight: Tensor, column: int) -> None:
        """Make the group of a column the current one; at its first column, set its scale anew."""
        group, first = divmod(column, self.width)
        if self.refit is not None and first == 0:
            scale, zero = self.refit(weight, column)
            self.scale[:, group : group + 1] = scale
            if self.zero is not None and zero is not None:
                self.zero[:, group : group + 1] = zero
        elif group == self.group:
            return
        self.group = group
        second = self.start.tensor_scale
        scale = self._rows(self.scale[:, group].float())
        if self.start.spec.code == "lut4":
            assert second is not None
            self.step = second.float()
            self.levels = lut.levels(lut.codebook_of(self.start), scale)
            self.borders = (self.levels[:, 1:] + self.levels[:, :-1]) / 2
            return
        self.step = scale if second is None else scale * second.float()
        if self.zero is not None:
            self.offset = self._rows(self.zero[:, group])

    def round(self, values: Tensor, column: int) -> Tensor:
        """Round one column [N]; returns what its codes stand for."""
        spec, step = self.start.spec, self.step
        steps = torch.where(step == 0, torch.zeros_like(values), values / step)
        if spec.code == "lut4":
            nearest = torch.searchsorted(self.borders, steps[:, None])
            self.codes[:, column] = nearest[:, 0].to(torch.uint8)
            return self.levels.gather(1, nearest)[:, 0] * step
        if self.zero is not None:
            steps = steps.add_(self.offset)
        codes = round_to(steps, spec.code, spec.full_range)
        self.codes[:, column] = codes
        back = decode(codes, spec.code)
        return (back if self.zero is None else back.sub_(self.offset)).mul_(step)

    def result(self) -> QuantizedTensor:
        """The weight in its new codes and scales."""
        return replace(self.start, codes=self.codes, scale=self.scale, zero=self.zero)

    def _rows(self, values: Tensor) -> Tensor:
        """Values of tiles, one for each row of the weight."""
        rows = self.start.spec.tile_of((self.codes.shape[0], 1))[0]
        return values.repeat_interleave(rows)[: self.codes.shape[0]] if rows > 1 else values


def absmax_refit(start: QuantizedTensor) -> Refit | None:
    """The scales of rounding to nearest, under the second-level scales of a quantized weight.

    None where those of a codebook come from more than that.
    """
    spec = start.spec
    if spec.code == "lut4":
        return None

    def refit(block: Tensor, column: int) -> tuple[Tensor, Tensor | None]:
        if spec.zero_point:
            return rtn.affine_scales(*rtn.extremes(block, spec), spec)
        return rtn.first_scales(rtn.absmax(block, spec), spec, start.tensor_scale), None

    return refit
