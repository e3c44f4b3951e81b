"""Smoothing (SmoothQuant arXiv 2211.10438, SVDQuant arXiv 2411.05007): s = |X|^a / |W|^b.

The runtime divides the input by s, the weight is multiplied by it. Candidates are judged by the
output error of the layers that share s, on held rows, with the inputs quantized as the runtime
quantizes them and the low-rank branch of each candidate in place. No smoothing is always one of
the candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from dqconvert.quantizers.tensors import LayerStats, LinearProblem

EXPONENTS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.9)
LIMITS = (1e-4, 1e4)
"""Smooth factors are normalised to geometric mean 1 and clamped to these."""

MAX_ROWS = 4096
"""Output channels that judge a candidate: a smooth vector belongs to input channels, so a large
weight is represented by evenly spaced rows."""


def candidates(problems: Sequence[LinearProblem], mode: str) -> list[Tensor]:
    """Smooth vectors [K] to try for linears that share one, the first all ones.

    mode: "auto", or one exponent a as a decimal for s = |X|^a / |W|^(1-a) alone.
    """
    stats = [problem.stats for problem in problems if problem.stats is not None]
    ones = torch.ones(problems[0].weight.shape[1])
    if not stats:
        return [ones]
    absmax_x = _largest(s.absmax for s in stats)
    absmax_w = _largest(_column_absmax(problem.weight) for problem in problems)
    if mode != "auto":
        a = float(mode)
        return [_normalised(absmax_x**a / absmax_w ** (1 - a))]
    rms_x = _mean_square(stats).sqrt()
    rms_w = _largest(problem.weight.float().square().mean(0) for problem in problems).sqrt()
    found = [ones, _normalised(((rms_x + 1e-6) / (rms_w + 1e-8)).sqrt())]
    for a in EXPONENTS:
        found.append(_normalised(absmax_x**a / absmax_w ** (1 - a)))
        found.append(_normalised(absmax_x**a))
    return found


def search(
    problems: Sequence[LinearProblem],
    mode: str,
    error: Callable[[LinearProblem, Tensor], float],
) -> Tensor:
    """The smooth vector [K], bf16 values, with the least summed error.

    error(problem, smooth) is the relative squared output error of one linear under a candidate.
    """
    options = [option.bfloat16().float() for option in candidates(problems, mode)]
    if len(options) == 1:
        return options[0]
    sampled = [_sample(problem) for problem in problems]
    scores = [sum(error(problem, option) for problem in sampled) for option in options]
    return options[min(range(len(options)), key=scores.__getitem__)]


def _sample(problem: LinearProblem) -> LinearProblem:
    """At most MAX_ROWS output channels, evenly spaced."""
    rows = problem.weight.shape[0]
    if rows <= MAX_ROWS:
        return problem
    keep = torch.arange(0, rows, -(-rows // MAX_ROWS))
    return LinearProblem(problem.weight[keep], shift=problem.shift, stats=problem.stats)


def _column_absmax(weight: Tensor) -> Tensor:
    return weight.abs().amax(0).float()


def _largest(vectors: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(vectors)).amax(0)


def _mean_square(stats: Sequence[LayerStats]) -> Tensor:
    count = sum(s.count for s in stats)
    return torch.stack([s.mean_square * (s.count / count) for s in stats]).sum(0)


def _normalised(smooth: Tensor) -> Tensor:
    """Geometric mean 1; channels that are zero or infinite are left alone."""
    usable = torch.isfinite(smooth) & (smooth > 0)
    smooth = torch.where(usable, smooth, torch.ones_like(smooth))
    log = smooth.log()
    mean = log[usable].mean() if bool(usable.any()) else torch.zeros(())
    log = torch.where(usable, log - mean, torch.zeros_like(log))
    return log.exp().clamp_(*LIMITS)
