"""GPTQ (arXiv 2210.17323): round one column, let the columns to its right absorb the error.

With H = XᵀX and U the upper Cholesky factor of its damped inverse, column j is rounded,
e = (w_j - q_j) / U_jj, and W[:, k] -= e U_jk for every k > j. Any code and any tile: group scales
are set from the updated weights when a group is entered.

Law (tests/test_gptq.py): equal to the textbook loop in float64; with H = I equal to rounding to
nearest; never a larger tr(E H Eᵀ) than rounding to nearest on correlated inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dqconvert.quantizers import codes as element
from dqconvert.quantizers import rtn
from dqconvert.quantizers.errors import DataError
from dqconvert.quantizers.spec import ALL, QuantSpec
from dqconvert.quantizers.tensors import QuantizedTensor

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
    while True:
        damped = h.clone()
        damped.diagonal().add_(damp * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            inverse = torch.cholesky_inverse(lower)
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(info) == 0:
                return torch.as_tensor(upper)
        damp *= 10


@dataclass(frozen=True, slots=True, eq=False)
class _Grid:
    """Codes and scales as they are fixed, column by column."""

    spec: QuantSpec
    codes: Tensor
    scale: Tensor
    second: Tensor | None

    def enter(self, weight: Tensor, column: int) -> None:
        """Set the scale of the group that begins at a column, from the weights as they are now."""
        width = self.spec.tile_of((1, weight.shape[1]))[1]
        if self.spec.tile[1] == ALL or column % width:
            return
        amax = rtn.absmax(weight[:, column : column + width], self.spec)
        group = column // width
        self.scale[:, group : group + 1] = rtn.first_scales(amax, self.spec, self.second)

    def round(self, values: Tensor, column: int) -> Tensor:
        """Round one column [N] in place of codes; returns what the codes stand for."""
        width = self.codes.shape[1] // self.scale.shape[1]
        scale = self.scale[:, column // width].float()
        rows = values.shape[0] // scale.shape[0]
        step = scale.repeat_interleave(rows) if rows > 1 else scale
        if self.second is not None:
            step = step * self.second.float()
        steps = torch.where(step == 0, torch.zeros_like(values), values / step)
        codes = element.round_to(steps, self.spec.code)
        self.codes[:, column] = codes
        return element.decode(codes, self.spec.code).mul_(step)


def quantize(
    weight: Tensor, upper: Tensor, spec: QuantSpec, parts: tuple[int, ...] = ()
) -> QuantizedTensor:
    """Round a weight [N, K] against its inputs' inverse factor U [K, K].

    parts: rows of each stacked linear, which keep tensor scales of their own.
    """
    start = rtn.quantize(weight, spec, parts)
    w = weight.to(torch.float32, copy=True)
    grid = _Grid(spec, torch.empty_like(start.codes), start.scale.clone(), start.tensor_scale)
    columns = w.shape[1]
    width = spec.tile_of((1, columns))[1] if spec.tile[1] != ALL else 1
    block = -(-BLOCK // width) * width  # whole groups: a group's scale sees all corrections
    for left in range(0, columns, block):
        right = min(left + block, columns)
        errors = torch.empty(w.shape[0], right - left, device=w.device)
        for j in range(left, right):
            grid.enter(w, j)
            rounded = grid.round(w[:, j], j)
            errors[:, j - left] = (w[:, j] - rounded) / upper[j, j]
            w[:, j + 1 : right].addr_(errors[:, j - left], upper[j, j + 1 : right], alpha=-1)
        w[:, right:].addmm_(errors, upper[left:right, right:], alpha=-1)
    return QuantizedTensor(spec, grid.codes, grid.scale, grid.second)
