"""Linears to quantize, with inputs that have outlier channels, for the tests of the recipe."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dqconvert.quantizers import forward
from dqconvert.quantizers.recipe import RecipeOptions
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import Scheme
from dqconvert.quantizers.tensors import LayerStats, LinearProblem, QuantizedTensor

SHIFT = 0.171875
W4A4, NVFP4 = schemes()["svdquant-w4a4"], schemes()["svdquant-nvfp4"]
INT8, FP8 = schemes()["int8"], schemes()["fp8-tensor"]


def stats_of(x: Tensor, held: int = 64) -> LayerStats:
    """What calibration would say of these rows; the last ones are held."""
    seen = x[: len(x) - held]
    return LayerStats(
        count=len(x),
        absmax=x.abs().amax(0),
        mean=x.mean(0),
        mean_square=x.square().mean(0),
        second_moment=seen.T @ seen / len(seen),
        rows=x[len(x) - held :].clone(),
    )


def inputs(columns: int, seed: int, rows: int = 400) -> Tensor:
    """Correlated rows with a few channels that are thirty times larger."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 24, generator=rng) @ torch.randn(24, columns, generator=rng) / 5
    x += 0.3 * torch.randn(rows, columns, generator=rng)
    x[:, torch.randperm(columns, generator=rng)[:3]] *= 30
    return x


def problem_of(
    rows: int = 48, columns: int = 128, seed: int = 0, shift: float = 0.0, calibrated: bool = True
) -> LinearProblem:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=rng) * 0.05
    x = inputs(columns, seed)
    if shift:
        x = torch.nn.functional.gelu(x, approximate="tanh")
    bias = torch.randn(rows, generator=rng)
    return LinearProblem(weight, bias, shift=shift, stats=stats_of(x) if calibrated else None)


def problem_for(scheme: Scheme, seed: int = 0, calibrated: bool = True) -> LinearProblem:
    """A problem of a scheme, rotated in groups of 64 where the scheme rotates."""
    problem = problem_of(seed=seed, calibrated=calibrated)
    return replace(problem, rotation=64 if scheme.rotation else 0)


def options_of(scheme: Scheme, **words: object) -> RecipeOptions:
    rank = 8 if "lowrank" in scheme.steps else 0
    return replace(RecipeOptions(rank=rank, refinements=1), **words)  # type: ignore[arg-type]


def error_of(q: QuantizedTensor, problem: LinearProblem, scheme: Scheme) -> float:
    """The output error on the held rows, written out in float64 around forward.apply."""
    assert problem.stats is not None
    x = problem.stats.rows
    want = x.double() @ problem.weight.double().T
    bias = 0 if problem.bias is None else problem.bias.double()
    got = forward.apply(q, x, scheme.activation).double()
    return float((got - want - bias).norm() / want.norm())
