"""The ways to round a weight, from what is known of its inputs: candidates for the recipe to judge.

    rtn     scales from absolute maxima, nearest codes
    mse     scales by squared error, weighted by the mean squares of the inputs where known
    gptq    both, and GPTQ under scales of the better kind; it needs the inputs' second moment

Rounding to nearest is always the first candidate, so that the best one is never worse. Where
nothing rounds the inputs, GPTQ also goes through them from the loudest on, under scales that stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dqconvert.quantizers import gptq, mse, rtn
from dqconvert.quantizers.ggml import blocks
from dqconvert.quantizers.ggml import gptq as blockwise
from dqconvert.quantizers.ggml.blocks import is_block
from dqconvert.quantizers.hadamard import rotate
from dqconvert.quantizers.spec import ALL, NEEDS_IMPORTANCE, QuantSpec
from dqconvert.quantizers.tensors import LayerStats, LinearProblem, QuantizedTensor


class Inputs:
    """What the main path of a linear sees: inputs divided by smooth, then rotated.

    Made once for the linears that read one input, so that its factors are computed once.
    """

    def __init__(self, stats: LayerStats, smooth: Tensor | None, rotation: int) -> None:
        self._stats, self._smooth, self._rotation = stats, smooth, rotation

    @cached_property
    def moment(self) -> Tensor | None:
        """The second moment [K, K] fp32, None where none was kept."""
        moment = self._stats.second_moment
        if moment is None:
            return None
        moment = moment.float()
        if self._smooth is not None:
            moment = moment / self._smooth[:, None] / self._smooth[None, :]
        if self._rotation:
            moment = rotate(rotate(moment, self._rotation).T.contiguous(), self._rotation)
        return moment

    @cached_property
    def mean_square(self) -> Tensor:
        """The mean square of each channel [K] fp32.

        Where rotated channels are known by neither moment nor rows, the mean over their group.
        """
        stats = self._stats
        if self.moment is not None:
            return self.moment.diagonal().clamp(min=0)
        if self._rotation and len(stats.rows):
            rows = stats.rows.float() if self._smooth is None else stats.rows / self._smooth
            return rotate(rows, self._rotation).square().mean(0)
        square = stats.mean_square.float()
        square = square if self._smooth is None else square / self._smooth.square()
        if not self._rotation:
            return square
        groups = square.view(-1, self._rotation)
        return groups.mean(1, keepdim=True).expand_as(groups).reshape(-1)

    @cached_property
    def factor(self) -> Tensor:
        """GPTQ's factor of the moment, [K, K] fp32."""
        assert self.moment is not None
        return gptq.inverse_factor(self.moment)

    @cached_property
    def loudest(self) -> tuple[Tensor, Tensor]:
        """Channels [K] by falling mean square, and GPTQ's factor in that order."""
        assert self.moment is not None
        order = self.moment.diagonal().argsort(descending=True)
        return order, gptq.inverse_factor(self.moment[order][:, order])

    def blocks(self, width: int) -> Tensor | None:
        """The second moment within each group of channels, [K/width, width, width]."""
        if self.moment is None:
            return None
        groups = self.moment.shape[0] // width
        tiles = self.moment.view(groups, width, groups, width)
        return torch.stack([tiles[group, :, group] for group in range(groups)])


@dataclass(frozen=True, slots=True)
class Aim:
    """What a weight is to become. clip: search scales by the output of each group; weight_only:
    nothing rounds the inputs."""

    spec: QuantSpec
    rounding: str
    clip: bool = False
    weight_only: bool = False


def offer(
    weight: Tensor,
    problem: LinearProblem,
    aim: Aim,
    inputs: Inputs | None,
    consider: Callable[[QuantizedTensor], bool],
) -> None:
    """Offer ways to round a weight [N, K] that is already smoothed and rotated, to nearest first.

    problem: whose parts and ceiling count. consider says whether a candidate is the best so far;
    GPTQ takes over the scales that did better.
    """
    spec, parts, ceiling = aim.spec, problem.parts, problem.ceiling
    if is_block(spec.code):
        _offer_blocks(weight, aim, inputs, consider)
        return
    plain = rtn.quantize(weight, spec, parts, ceiling)
    consider(plain)
    if spec.bits >= 16:
        return
    known = inputs if inputs is not None and inputs.moment is not None else None
    clips, learns = aim.clip and known is not None, aim.rounding == "gptq" and known is not None
    if not (clips or learns or aim.rounding == "mse"):
        return
    metric = None if inputs is None else inputs.mean_square
    if clips and known is not None and spec.tile[0] == 1 and spec.tile[1] != ALL:
        metric = known.blocks(spec.tile[1])
    fitted = mse.quantize(weight, spec, parts, ceiling, metric)
    searched = consider(fitted)
    if not learns or known is None:
        return
    if not searched:
        consider(gptq.quantize(weight, known.factor, plain, gptq.absmax_refit(plain)))
        return
    consider(gptq.quantize(weight, known.factor, fitted, _mse_refit(fitted, known.mean_square)))
    if aim.weight_only:
        order, upper = known.loudest
        consider(gptq.quantize(weight, upper, fitted, order=order))


def _offer_blocks(
    weight: Tensor, aim: Aim, inputs: Inputs | None, consider: Callable[[QuantizedTensor], bool]
) -> None:
    """The same for ggml's types, whose scales are found by least squares of one or another kind.

    rtn: as without an importance matrix; mse: with ones, and where the mean squares of the inputs
    are known, the best of without, ones and these; gptq: then from the loudest input on and over
    all again, for types whose codes stand for one weight each.
    """
    metric = None if inputs is None else inputs.mean_square
    if aim.rounding == "rtn":
        needed = metric if aim.spec.code in NEEDS_IMPORTANCE else None
        consider(blocks.result(weight, aim.spec, needed))
        return
    consider(blocks.result(weight, aim.spec, torch.ones(weight.shape[1])))
    if inputs is None or metric is None:
        return
    if aim.spec.code not in blocks.ONE_WAY:
        if aim.spec.code not in NEEDS_IMPORTANCE:
            consider(blocks.result(weight, aim.spec))
        consider(blocks.result(weight, aim.spec, metric))
    if aim.rounding != "gptq" or inputs.moment is None or not blockwise.covers(aim.spec.code):
        return
    order, upper = inputs.loudest
    start = blocks.result(weight, aim.spec, blockwise.importance(metric, upper, order))
    learned = blockwise.quantize(weight, upper, start, order)
    consider(learned)
    for _ in range(blockwise.SWEEPS):
        learned = blockwise.sweep(weight, inputs.moment, learned)
        consider(learned)


def _mse_refit(start: QuantizedTensor, mean_square: Tensor) -> gptq.Refit | None:
    """Scales of a group that err least now, by the mean squares [K] of its inputs."""
    if start.spec.code == "lut4" or start.spec.unit:
        return None

    def refit(block: Tensor, column: int) -> tuple[Tensor, Tensor | None]:
        metric = mean_square[column : column + block.shape[1]]
        found = mse.search(block, start.spec, start.tensor_scale, metric)
        return found.scale, found.zero

    return refit
