"""The steps of a scheme, in order: smooth, split off the low-rank branch, round the rest.

A group is the linears that share a smooth vector. Everything that is chosen (smooth vector,
iterate of the low-rank branch, rounding) is chosen by the layer's output error on held rows when
calibration ran, by the weight's error otherwise, and the plain choice is always among the
candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dqconvert.quantizers import gptq, lowrank, rtn, smoothing
from dqconvert.quantizers.forward import apply, effective_weight, row_blocks, shift_surplus
from dqconvert.quantizers.spec import ALL, QuantSpec, Scheme
from dqconvert.quantizers.tensors import LinearProblem, LowRank, QuantizedTensor


@dataclass(frozen=True, slots=True)
class RecipeOptions:
    """What a user may change of a scheme.

    rank: of the low-rank branch; rounding: "rtn" or "gptq" (needs second moments, else rtn);
    smooth: "auto", "off" or an exponent; refinements: rounds of residual-aware refinement of
    the low-rank branch.
    """

    rank: int = 0
    rounding: str = "rtn"
    smooth: str = "auto"
    refinements: int = 3


def quantize_group(
    problems: Sequence[LinearProblem], scheme: Scheme, options: RecipeOptions
) -> list[QuantizedTensor]:
    """Quantize linears [N, K] that share one smooth vector by a scheme's steps.

    Raises DataError on NaN or infinity.
    """
    smooth = None
    if "smooth" in scheme.steps:
        smooth = _smooth(problems, scheme, options)
    return [quantize_linear(problem, scheme, options, smooth) for problem in problems]


def quantize_linear(
    problem: LinearProblem, scheme: Scheme, options: RecipeOptions, smooth: Tensor | None = None
) -> QuantizedTensor:
    """Quantize one linear under a given smooth vector [K] (None: the format has none)."""
    activation = scheme.activation
    if "lowrank" not in scheme.steps:
        return _rounded(problem, scheme.weight, options, smooth, activation)
    assert smooth is not None
    rtn.absmax(problem.weight, scheme.weight)  # refuses NaN, which a decomposition would not name
    problem = replace(problem, weight=problem.weight.float())
    best = _refine(problem, scheme, options, smooth)
    if not _moments(problem, options):
        return best[1]
    branch = best[1].lowrank
    assert branch is not None
    q = _learned(problem, _residual(problem.weight, branch, smooth), scheme.weight, smooth)
    return _better(best, _finish(problem, q, smooth, branch, activation), problem, activation)[1]


def quantize_modulation(
    problem: LinearProblem, spec: QuantSpec, options: RecipeOptions
) -> QuantizedTensor:
    """Quantize an adaLN modulation linear, whose input stays in 16 bit."""
    return _rounded(problem, spec, options, None, None)


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


def output_error(q: QuantizedTensor, problem: LinearProblem, activation: QuantSpec | None) -> float:
    """||Y' - Y|| / ||Y|| on the held rows, activations quantized as the runtime does.

    Biases count in the difference, not in the norm, so that a large constant cannot hide an
    error. Where no row could be held, the error that XᵀX predicts for the weight alone.
    """
    stats = problem.stats
    assert stats is not None
    weight = problem.weight.float()
    if not len(stats.rows):
        off = effective_weight(q) - weight
        moment = torch.diag(stats.mean_square)
        moment = moment if stats.second_moment is None else stats.second_moment.float()
        return _ratio(
            ((off @ moment) * off).sum().sqrt(), ((weight @ moment) * weight).sum().sqrt()
        )
    x = stats.rows.float()
    reference = x @ weight.T
    exact = reference if problem.bias is None else reference + problem.bias.float()
    return _ratio((apply(q, x, activation) - exact).norm(), reference.norm())


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
    problem: LinearProblem, scheme: Scheme, options: RecipeOptions, smooth: Tensor
) -> tuple[float, QuantizedTensor]:
    """L_0 = SVD(W), L_(k+1) = SVD(W - Q(W - L_k)) of the smoothed weight; the best, with RTN."""
    best: tuple[float, QuantizedTensor] | None = None
    rest = problem.weight * smooth
    for _ in range(options.refinements + 1):
        branch = lowrank.branch(rest, options.rank, smooth)
        rest = _residual(problem.weight, branch, smooth)
        q = rtn.quantize(rest, scheme.weight, problem.parts)
        candidate = _finish(problem, q, smooth, branch, scheme.activation)
        best = _better(best, candidate, problem, scheme.activation)
        rest = rtn.dequantize(q).neg_().addcmul_(problem.weight, smooth)
    assert best is not None
    return best


def _residual(weight: Tensor, branch: LowRank, smooth: Tensor) -> Tensor:
    """(W - up down) diag(s), [N, K] fp32: what is left to be rounded."""
    return (weight * smooth).addmm_(branch.up.float(), branch.down.float() * smooth, alpha=-1)


def _rounded(
    problem: LinearProblem,
    spec: QuantSpec,
    options: RecipeOptions,
    smooth: Tensor | None,
    activation: QuantSpec | None,
) -> QuantizedTensor:
    """A weight without a low-rank branch, to nearest or by GPTQ, whichever errs less."""
    weight = problem.weight if smooth is None else problem.weight.float() * smooth
    q = rtn.quantize(weight, spec, problem.parts)
    plain = _finish(problem, q, smooth, None, activation)
    if not _moments(problem, options):
        return plain
    learned = _finish(problem, _learned(problem, weight, spec, smooth), smooth, None, activation)
    return _better(_better(None, plain, problem, activation), learned, problem, activation)[1]


def _learned(
    problem: LinearProblem, weight: Tensor, spec: QuantSpec, smooth: Tensor | None
) -> QuantizedTensor:
    """GPTQ of a weight that is already in the smoothed basis, of a problem with second moments."""
    assert problem.stats is not None and problem.stats.second_moment is not None
    moment = problem.stats.second_moment
    if smooth is not None:
        moment = moment / smooth[:, None] / smooth[None, :]
    return gptq.quantize(weight, gptq.inverse_factor(moment), spec, problem.parts)


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
    bias = problem.bias
    surplus = shift_surplus(replace(q, smooth=smooth, shift=problem.shift))
    if surplus is not None:
        bias = (0.0 if bias is None else bias.float()) - surplus
    scale = None
    if activation is not None and activation.tile == (ALL, ALL) and problem.stats is not None:
        top = problem.stats.absmax.amax()
        scale = torch.where(top > 0, top / activation.maximum, torch.ones_like(top))
    return replace(
        q, bias=bias, smooth=smooth, lowrank=branch, shift=problem.shift, input_scale=scale
    )


def _better(
    best: tuple[float, QuantizedTensor] | None,
    q: QuantizedTensor,
    problem: LinearProblem,
    activation: QuantSpec | None,
) -> tuple[float, QuantizedTensor]:
    """The candidate with the smaller error; the earlier one wins a tie."""
    if problem.stats is None:
        error = weight_error(q, problem.weight)
    else:
        error = output_error(q, problem, activation)
    return (error, q) if best is None or error < best[0] else best


def _moments(problem: LinearProblem, options: RecipeOptions) -> bool:
    return (
        options.rounding == "gptq"
        and problem.stats is not None
        and problem.stats.second_moment is not None
    )


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if bool(whole > 0) else float(part)
