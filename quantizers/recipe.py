"""The steps of a scheme, in order: smooth, split off the low-rank branch, rotate, round the rest.

A group is the linears that read one input. Everything that is chosen (smooth vector,
iterate of the low-rank branch, rounding) is chosen by the layer's output error on held rows when
calibration ran, by the weight's error otherwise, and the plain choice is always among the
candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from dqconvert.quantizers import lowrank, rtn, smoothing
from dqconvert.quantizers.forward import (
    apply,
    effective_weight,
    entering,
    row_blocks,
    shift_surplus,
)
from dqconvert.quantizers.hadamard import rotate
from dqconvert.quantizers.rounding import Aim, Inputs, offer
from dqconvert.quantizers.spec import ALL, QuantSpec, Scheme
from dqconvert.quantizers.tensors import (
    TORCH_DTYPES,
    LayerStats,
    LinearProblem,
    LowRank,
    QuantizedTensor,
)

FLAT = 0.01
"""Share of its norm that a layer's output varies by at least, where errors are relative to that."""


@dataclass(frozen=True, slots=True)
class RecipeOptions:
    """What a user may change of a scheme.

    rank: of the low-rank branch; rounding: "rtn", "mse" or "gptq" (needs second moments, else
    rtn); smooth: "auto", "off" or an exponent; refinements: rounds of residual-aware refinement of
    the low-rank branch; device: torch's, where it is computed.
    """

    rank: int = 0
    rounding: str = "rtn"
    smooth: str = "auto"
    refinements: int = 3
    device: str = "cpu"


def quantize_group(
    problems: Sequence[LinearProblem], scheme: Scheme, options: RecipeOptions
) -> list[QuantizedTensor]:
    """Quantize linears [N, K] that read one input by a scheme's steps.

    They share the smooth vector, and tensor-wide scales where the scheme says so. Raises DataError
    on NaN or infinity.
    """
    smooth = None
    if "smooth" in scheme.steps:
        smooth = _smooth(problems, scheme, options)
    if scheme.shared:
        problems = _under_one_ceiling(problems, scheme, smooth)
    seen: dict[int, Inputs] = {}
    found = []
    for problem in problems:
        inputs = _inputs(problem, smooth)
        if inputs is not None:
            inputs = seen.setdefault(id(problem.stats), inputs)
        found.append(quantize_linear(problem, scheme, options, smooth, inputs))
    return found


def quantize_linear(
    problem: LinearProblem,
    scheme: Scheme,
    options: RecipeOptions,
    smooth: Tensor | None = None,
    inputs: Inputs | None = None,
) -> QuantizedTensor:
    """Quantize one linear under a given smooth vector [K] (None: the format has none).

    inputs: what is known of its input under that vector; shared by the linears that read it.
    """
    inputs = inputs or _inputs(problem, smooth)
    activation = scheme.activation
    aim = Aim(scheme.weight, options.rounding, "clip" in scheme.steps, activation is None)
    judge = _Judge(problem, activation)
    if "lowrank" not in scheme.steps:
        weight = _entered(problem.weight, smooth, problem.rotation)
        offer(weight, problem, aim, inputs, partial(judge.hear, smooth=smooth))
        return judge.best
    assert smooth is not None
    rtn.absmax(problem.weight, scheme.weight)  # refuses NaN, which a decomposition would not name
    problem = replace(problem, weight=problem.weight.float())
    _refine(problem, scheme, options, smooth, judge)
    branch = judge.best.lowrank
    assert branch is not None
    if options.rounding != "rtn":
        rest = _residual(problem, branch, smooth)
        offer(rest, problem, aim, inputs, partial(judge.hear, smooth=smooth, branch=branch))
    return judge.best


def quantize_modulation(
    problem: LinearProblem, spec: QuantSpec, options: RecipeOptions
) -> QuantizedTensor:
    """Quantize an adaLN modulation linear, whose input stays in 16 bit."""
    judge = _Judge(problem, None)
    aim = Aim(spec, options.rounding, weight_only=True)
    weight = _entered(problem.weight, None, problem.rotation)
    offer(weight, problem, aim, _inputs(problem, None), judge.hear)
    return judge.best


def weight_error(q: QuantizedTensor, weight: Tensor) -> float:
    """||W' - W|| / ||W||, Frobenius norms, of the weight that the whole layer stands for."""
    off, whole = squared_error(q, weight)
    return math.sqrt(off / whole if whole else off)


def squared_error(q: QuantizedTensor, weight: Tensor) -> tuple[float, float]:
    """(||W' - W||², ||W||²), so that blocks of rows can be added up."""
    off = whole = 0.0
    for start, part in row_blocks(q):
        reference = weight[start : start + part.codes.shape[0]].float()
        whole += float(torch.dot(reference.view(-1), reference.view(-1)))
        difference = effective_weight(part).sub_(reference).view(-1)
        off += float(torch.dot(difference, difference))
    return off, whole


def output_error(
    q: QuantizedTensor,
    problem: LinearProblem,
    activation: QuantSpec | None,
    reference: Tensor | None = None,
) -> float:
    """||Y' - Y|| / ||Y - mean Y|| on the held rows, activations quantized as the runtime does.

    Constants count in the difference, not in the norm, so that a large one cannot hide an error,
    nor does centering change its measure; where the output hardly varies, FLAT of its own norm is
    the measure. Where no row could be held, the error that XᵀX predicts
    for the weight alone. reference: x Wᵀ of the held rows, where it is known already.
    """
    stats = problem.stats
    assert stats is not None
    if not len(stats.rows):
        weight = problem.weight.float()
        off = effective_weight(q) - weight
        return _ratio(_predicted(off, stats), _predicted(weight, stats))
    x = stats.rows.float()
    if reference is None:
        reference = x @ problem.weight.float().T
    exact = reference if problem.bias is None else reference + problem.bias.float()
    varying = reference - reference.mean(0) if len(reference) > 1 else reference
    measure = torch.maximum(varying.norm(), FLAT * reference.norm())
    return _ratio((apply(q, x, activation) - exact).norm(), measure)


def _predicted(weight: Tensor, stats: LayerStats) -> Tensor:
    """||X Wᵀ|| of a weight [N, K] as XᵀX predicts it, or its diagonal where that alone is known."""
    if stats.second_moment is None:
        return (weight.square() @ stats.mean_square.float()).sum().sqrt()
    return ((weight @ stats.second_moment.float()) * weight).sum().sqrt()


def _smooth(problems: Sequence[LinearProblem], scheme: Scheme, options: RecipeOptions) -> Tensor:
    width = problems[0].weight.shape[1]
    if options.smooth == "off" or any(problem.stats is None for problem in problems):
        return torch.ones(width)
    trial = replace(options, rounding="rtn", refinements=0)

    def error(problem: LinearProblem, smooth: Tensor) -> float:
        alone = replace(problem, parts=())
        return (
            output_error(quantize_linear(alone, scheme, trial, smooth), alone, scheme.activation)
            ** 2
        )

    return smoothing.search(problems, options.smooth, error)


def _refine(
    problem: LinearProblem, scheme: Scheme, options: RecipeOptions, smooth: Tensor, judge: _Judge
) -> None:
    """L_0 = SVD(W), L_(k+1) = SVD(W - Q(W - L_k)) of the smoothed weight, with nearest codes."""
    rest = problem.weight * smooth
    for _ in range(options.refinements + 1):
        branch = lowrank.branch(rest, options.rank, smooth)
        left = _residual(problem, branch, smooth)
        q = rtn.quantize(left, scheme.weight, problem.parts, problem.ceiling)
        judge.hear(q, smooth, branch)
        back = rotate(rtn.dequantize(q), problem.rotation)
        rest = back.neg_().addcmul_(problem.weight, smooth)


def _residual(problem: LinearProblem, branch: LowRank, smooth: Tensor) -> Tensor:
    """(W - up down) diag(s), rotated, [N, K] fp32: what is left to be rounded."""
    rest = problem.weight * smooth
    rest = rest.addmm_(branch.up.float(), branch.down.float() * smooth, alpha=-1)
    return rotate(rest, problem.rotation)


def _entered(weight: Tensor, smooth: Tensor | None, rotation: int) -> Tensor:
    """W diag(s), rotated: [N, K], as it is where neither is asked for."""
    weight = weight if smooth is None else weight.float() * smooth
    return rotate(weight, rotation) if rotation else weight


def _inputs(problem: LinearProblem, smooth: Tensor | None) -> Inputs | None:
    return None if problem.stats is None else Inputs(problem.stats, smooth, problem.rotation)


def _under_one_ceiling(
    problems: Sequence[LinearProblem], scheme: Scheme, smooth: Tensor | None
) -> list[LinearProblem]:
    """The linears with the largest magnitude among all their weights for a ceiling."""
    tops = [
        rtn.absmax(_entered(problem.weight, smooth, problem.rotation), scheme.weight).amax()
        for problem in problems
        if problem.weight.numel()
    ]
    tops += [problem.ceiling for problem in problems if problem.ceiling is not None]
    top = torch.stack([top.float() for top in tops]).amax() if tops else None
    return [replace(problem, ceiling=top) for problem in problems]


def _finish(
    problem: LinearProblem,
    q: QuantizedTensor,
    smooth: Tensor | None,
    branch: LowRank | None,
    activation: QuantSpec | None,
) -> QuantizedTensor:
    """Add what belongs to the layer as a whole, and take the shift out of the bias again.

    The bias loses exactly what the shift adds to the main path.
    """
    q = replace(q, smooth=smooth, shift=problem.shift, rotation=problem.rotation)
    bias = problem.bias
    surplus = shift_surplus(q)
    if surplus is not None:
        bias = (0.0 if bias is None else bias.float()) - surplus
    scale = _input_scale(problem, q, activation)
    return replace(q, bias=bias, lowrank=branch, input_scale=scale)


def _input_scale(
    problem: LinearProblem, q: QuantizedTensor, activation: QuantSpec | None
) -> Tensor | None:
    """The static scale [] of activations that have one for all, if calibration ran."""
    if activation is None or problem.stats is None:
        return None
    limit = activation.maximum
    if activation.tensor_scale is not None:
        limit *= torch.finfo(TORCH_DTYPES[activation.scale]).max
    elif activation.tile != (ALL, ALL):
        return None
    stats = problem.stats
    if problem.rotation and len(stats.rows):
        top = entering(stats.rows.float() + q.shift, q).abs().amax()
    else:
        absmax = stats.absmax.float() + abs(q.shift)
        top = (absmax if q.smooth is None else absmax / q.smooth).amax()
        top = top * math.sqrt(max(problem.rotation, 1))
    return torch.where(top > 0, top / limit, torch.ones_like(top))


class _Judge:
    """Keeps the candidate for a layer with the smaller error; the earlier one wins a tie."""

    def __init__(self, problem: LinearProblem, activation: QuantSpec | None) -> None:
        self._problem, self._activation = problem, activation
        self._best: QuantizedTensor | None = None
        self._least: float | None = None

    @property
    def best(self) -> QuantizedTensor:
        """The best one so far."""
        assert self._best is not None
        return self._best

    def hear(
        self, q: QuantizedTensor, smooth: Tensor | None = None, branch: LowRank | None = None
    ) -> bool:
        """Consider codes under a smooth vector beside a branch: whether they are the best so far.

        What is never compared is never measured.
        """
        q = _finish(self._problem, q, smooth, branch, self._activation)
        if self._best is None:
            self._best = q
            return True
        if self._least is None:
            self._least = self._error(self._best)
        error = self._error(q)
        better = error < self._least
        if better:
            self._best, self._least = q, error
        return better

    def _error(self, q: QuantizedTensor) -> float:
        if self._problem.stats is None:
            return weight_error(q, self._problem.weight)
        return output_error(q, self._problem, self._activation, self._reference)

    @cached_property
    def _reference(self) -> Tensor:
        """The held rows' exact output, without the bias."""
        assert self._problem.stats is not None
        return self._problem.stats.rows.float() @ self._problem.weight.float().T


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if bool(whole > 0) else float(part)
