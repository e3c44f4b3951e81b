"""The recipe: each choice is never worse than the plain one. Judges: torch.linalg.svd, formulas
in float64, and the output error written out again."""

from __future__ import annotations

import math
import runpy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dqconvert.quantizers import forward, lowrank, recipe, rtn, smoothing
from dqconvert.quantizers.errors import DataError
from dqconvert.quantizers.recipe import RecipeOptions
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.schemes.svdquant import INT4_GROUP64
from dqconvert.quantizers.spec import CODES, Scheme

torch.set_num_threads(1)
problems = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("problems.py"))))
problem_of, options_of, error_of = problems.problem_of, problems.options_of, problems.error_of
problem_for = problems.problem_for
SHIFT, W4A4, NVFP4, INT8, FP8 = (
    problems.SHIFT,
    problems.W4A4,
    problems.NVFP4,
    problems.INT8,
    problems.FP8,
)
NARROW = [s for s in schemes().values() if CODES[s.weight.code].block <= 32]
"""Schemes that the widths here have room for; larger blocks: test_ggml_laws.py."""

every_scheme = pytest.mark.parametrize("scheme", NARROW, ids=[scheme.name for scheme in NARROW])
svdquant = pytest.mark.parametrize("scheme", [W4A4, NVFP4], ids=["int4", "nvfp4"])


# ---------------------------------------------------------------------------- the low rank


def decaying(rows: int, columns: int, power: float, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, rows, generator=rng)).Q
    v = torch.linalg.qr(torch.randn(columns, columns, generator=rng)).Q
    short = min(rows, columns)
    values = torch.arange(1, short + 1).float() ** -power
    return u[:, :short] * values @ v[:, :short].T


@pytest.mark.parametrize("shape", [(96, 96), (33, 200), (201, 77), (64, 1), (1, 64), (5, 3)])
@pytest.mark.parametrize("power", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("rank", [1, 8, 16])
def test_truncation_is_as_good_as_the_exact_one(
    shape: tuple[int, int], power: float, rank: int
) -> None:
    weight = decaying(*shape, power, rank)
    before = weight.clone()
    up, down = lowrank.truncate(weight, rank)
    assert torch.equal(weight, before)
    assert up.shape == (shape[0], rank) and down.shape == (rank, shape[1])
    values = torch.linalg.svdvals(weight.double())
    best = float(values[rank:].square().sum().sqrt())
    found = float((weight.double() - up.double() @ down.double()).norm())
    assert found <= 1.01 * best + 1e-5 * float(values.norm())


def test_truncation_beyond_the_full_rank_is_padded_with_zeros() -> None:
    weight = decaying(12, 40, 0.5, 0)
    up, down = lowrank.truncate(weight, 32)
    assert up.shape == (12, 32) and down.shape == (32, 40)
    assert not bool(up[:, 12:].any()) and not bool(down[12:].any())
    assert torch.allclose(up @ down, weight, atol=1e-6)


def test_truncation_of_zeros_and_to_rank_zero() -> None:
    up, down = lowrank.truncate(torch.zeros(20, 30), 4)
    assert torch.equal(up @ down, torch.zeros(20, 30))
    up, down = lowrank.truncate(torch.ones(20, 30), 0)
    assert up.shape == (20, 0) and down.shape == (0, 30)


def test_truncation_is_reproducible_in_any_thread() -> None:
    """Also while other threads draw random numbers; and it draws none of the caller's."""
    weights = [torch.randn(200, 160, generator=torch.Generator().manual_seed(i)) for i in range(24)]
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    first = [lowrank.truncate(weight, 16) for weight in weights]
    assert torch.equal(torch.randn(3), expected)
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in range(3):
            again = list(pool.map(lambda weight: lowrank.truncate(weight, 16), weights))
            for (up, down), (up2, down2) in zip(first, again, strict=True):
                assert torch.equal(up, up2) and torch.equal(down, down2)


def test_the_branch_reads_the_raw_input() -> None:
    problem = problem_of()
    smooth = torch.rand(128, generator=torch.Generator().manual_seed(1)) + 0.5
    up, down = lowrank.truncate(problem.weight * smooth, 8)
    branch = lowrank.branch(problem.weight * smooth, 8, smooth)
    assert branch.up.dtype == branch.down.dtype == torch.bfloat16
    want = (up.double() @ down.double()) / smooth.double()
    assert float((lowrank.product(branch) - want).norm() / want.norm()) < 0.01


# ------------------------------------------------------------------------------- smoothing


@svdquant
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shift", [0.0, SHIFT])
def test_smoothing_is_never_worse_than_none(scheme: Scheme, seed: int, shift: float) -> None:
    problem = problem_of(seed=seed, shift=shift if scheme is W4A4 else 0.0)
    options = options_of(scheme, refinements=0)
    (searched,) = recipe.quantize_group([problem], scheme, options)
    (plain,) = recipe.quantize_group([problem], scheme, replace(options, smooth="off"))
    assert plain.smooth is not None and bool((plain.smooth == 1).all())
    assert error_of(searched, problem, scheme) <= error_of(plain, problem, scheme) * (1 + 1e-6)
    if not shift:
        assert error_of(searched, problem, scheme) < 0.8 * error_of(plain, problem, scheme)


@svdquant
def test_a_group_shares_one_smooth_vector(scheme: Scheme) -> None:
    one = problem_of(seed=1)
    group = [one, replace(problem_of(24, seed=2), stats=one.stats)]
    for mode in ("auto", "0.5", "off"):
        found = recipe.quantize_group(group, scheme, options_of(scheme, smooth=mode))
        first, other = (q.smooth for q in found)
        assert first is not None and other is not None
        assert torch.equal(first, other)
        assert torch.equal(first, first.bfloat16().float()), "not what the file will hold"
        assert bool((first > 0).all() & first.isfinite().all())


def test_smooth_by_an_exponent_is_the_formula() -> None:
    problem = problem_of(seed=3)
    assert problem.stats is not None
    found = smoothing.search([problem], "0.75", lambda p, s: 0.0).double()
    want = problem.stats.absmax.double() ** 0.75 / problem.weight.abs().amax(0).double() ** 0.25
    want /= want.log().mean().exp()
    assert torch.allclose(found, want, rtol=2**-8)


@pytest.mark.parametrize("mode", ["auto", "0.5"])
def test_silent_and_unused_channels_leave_a_usable_vector(mode: str) -> None:
    problem = problem_of(seed=3)
    assert problem.stats is not None
    rows = problem.stats.rows.clone()
    rows[:, 5] = 0
    absmax, square = problem.stats.absmax.clone(), problem.stats.mean_square.clone()
    absmax[5] = square[5] = 0
    weight = problem.weight.clone()
    weight[:, 9] = 0
    weight[:, 5] = 0
    stats = replace(problem.stats, absmax=absmax, mean_square=square, rows=rows)
    problem = replace(problem, weight=weight, stats=stats)
    for vector in smoothing.candidates([problem], mode):
        assert bool((vector > 0).all() & vector.isfinite().all())
    (q,) = recipe.quantize_group([problem], W4A4, options_of(W4A4, smooth=mode))
    assert error_of(q, problem, W4A4) < 0.2


def test_no_smoothing_is_the_first_candidate_and_wins_ties() -> None:
    problem = problem_of()
    assert bool((smoothing.candidates([problem], "auto")[0] == 1).all())
    assert bool((smoothing.search([problem], "auto", lambda p, s: 1.0) == 1).all())


# ----------------------------------------------------------------- refinement and rounding


@svdquant
@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_refinement_is_never_worse(scheme: Scheme, calibrated: bool, seed: int) -> None:
    problem = problem_of(seed=seed, calibrated=calibrated)
    errors = []
    for rounds in (0, 1, 4):
        (q,) = recipe.quantize_group([problem], scheme, options_of(scheme, refinements=rounds))
        off = forward.effective_weight(q).double() - problem.weight.double()
        errors.append(error_of(q, problem, scheme) if calibrated else float(off.norm()))
        smooth_is_one = q.smooth is not None and bool((q.smooth == 1).all())
        assert calibrated or smooth_is_one, "without activations there is nothing to smooth by"
    if not calibrated:
        assert errors[2] <= errors[1] <= errors[0]
        return
    smooth = torch.ones(128)  # one vector for all, or the search may land elsewhere
    errors = [
        error_of(
            recipe.quantize_linear(problem, scheme, options_of(scheme, refinements=r), smooth),
            problem,
            scheme,
        )
        for r in (0, 1, 4)
    ]
    assert errors[2] <= errors[1] * (1 + 1e-6) and errors[1] <= errors[0] * (1 + 1e-6)


@every_scheme
@pytest.mark.parametrize("seed", range(3))
def test_mse_and_gptq_are_never_worse_than_nearest_on_held_rows(scheme: Scheme, seed: int) -> None:
    problem = problem_for(scheme, seed)
    smooth = torch.ones(128) if "smooth" in scheme.steps else None
    nearest, searched, learned = (
        error_of(
            recipe.quantize_linear(problem, scheme, options_of(scheme, rounding=r), smooth),
            problem,
            scheme,
        )
        for r in ("rtn", "mse", "gptq")
    )
    assert searched <= nearest * (1 + 1e-6) and learned <= searched * (1 + 1e-6)
    if scheme is W4A4 and seed < 2:
        assert learned < nearest


@every_scheme
def test_gptq_misled_by_its_moment_is_not_taken(scheme: Scheme) -> None:
    """XᵀX of some other input: rounding to nearest is better, so it is chosen."""
    problem = problem_for(scheme, 1)
    other = problem_of(seed=77).stats
    assert problem.stats is not None and other is not None
    problem = replace(problem, stats=replace(problem.stats, second_moment=other.second_moment))
    smooth = torch.ones(128) if "smooth" in scheme.steps else None
    plain, misled = (
        recipe.quantize_linear(problem, scheme, options_of(scheme, rounding=r), smooth)
        for r in ("rtn", "gptq")
    )
    assert error_of(misled, problem, scheme) <= error_of(plain, problem, scheme) * (1 + 1e-6)


@svdquant
def test_gptq_sees_the_input_that_the_main_path_sees(scheme: Scheme) -> None:
    """W under s and x is W s under 1 and x / s: in powers of two, to the last bit."""
    problem = problem_of(seed=1)
    assert problem.stats is not None
    smooth = 2.0 ** torch.randint(-3, 4, (128,), generator=torch.Generator().manual_seed(2))
    stats = replace(
        problem.stats,
        absmax=problem.stats.absmax / smooth,
        mean_square=problem.stats.mean_square / smooth**2,
        second_moment=problem.stats.second_moment / smooth[:, None] / smooth,
        rows=problem.stats.rows / smooth,
    )
    folded = replace(problem, weight=problem.weight * smooth, stats=stats)
    options = options_of(scheme, rank=0, rounding="gptq", refinements=0)
    one = recipe.quantize_linear(problem, scheme, options, smooth)
    two = recipe.quantize_linear(folded, scheme, options, torch.ones(128))
    assert torch.equal(one.codes, two.codes) and torch.equal(one.scale.float(), two.scale.float())
    plain = recipe.quantize_linear(problem, scheme, replace(options, rounding="rtn"), smooth)
    assert not torch.equal(one.codes, plain.codes), "GPTQ was not taken"


def test_modulations_take_the_better_rounding() -> None:
    for seed in range(3):
        problem = problem_of(96, seed=seed)
        assert problem.stats is not None
        x = problem.stats.rows.double()
        errors = []
        for rounding in ("rtn", "gptq"):
            q = recipe.quantize_modulation(problem, INT4_GROUP64, RecipeOptions(rounding=rounding))
            assert q.smooth is None and q.lowrank is None and q.input_scale is None
            assert q.bias is problem.bias
            off = rtn.dequantize(q).double() - problem.weight.double()
            errors.append(float((x @ off.T).norm()))
        assert errors[1] < errors[0]


# -------------------------------------------------------------------------- the whole layer


@every_scheme
@pytest.mark.parametrize("lack", ["nothing", "moment", "rows", "stats"])
@pytest.mark.parametrize("rounding", ["rtn", "mse", "gptq"])
def test_any_knowledge_of_the_input_will_do(scheme: Scheme, lack: str, rounding: str) -> None:
    problem = problem_for(scheme)
    stats = problem.stats
    assert stats is not None
    known = {
        "nothing": stats,
        "moment": replace(stats, second_moment=None),
        "rows": replace(stats, rows=stats.rows[:0]),
        "stats": None,
    }[lack]
    asked = replace(problem, stats=known)
    before = problem.weight.clone()
    (q,) = recipe.quantize_group([asked], scheme, options_of(scheme, rounding=rounding))
    assert torch.equal(problem.weight, before), "the weight was changed in place"
    if scheme is FP8 and lack == "stats":
        assert q.input_scale is None
    limit = {4: 0.21, 5: 0.1, 6: 0.08, 8: 0.06, 16: 0.003}[scheme.weight.bits]
    if rounding == "rtn":  # the others give up some of the weight for the output
        assert recipe.weight_error(q, problem.weight) < limit
    coarse = scheme.activation is not None and scheme.activation.bits == 4
    assert error_of(q, problem, scheme) < (0.45 if coarse else 1.5 * limit)
    if known is not None:
        assert math.isfinite(recipe.output_error(q, asked, scheme.activation))


@every_scheme
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_give_the_fp32_result(scheme: Scheme, dtype: torch.dtype) -> None:
    problem = problem_for(scheme)
    weight = problem.weight.bfloat16().half().to(dtype)
    for stats in (problem.stats, None):
        short = replace(problem, weight=weight, stats=stats)
        full = replace(short, weight=weight.float())
        kept = weight.clone()
        one, two = (
            recipe.quantize_group([p], scheme, options_of(scheme, rounding="gptq"))[0]
            for p in (short, full)
        )
        assert torch.equal(weight, kept)
        assert torch.equal(one.codes.float(), two.codes.float())
        assert torch.equal(one.scale.float(), two.scale.float())


@every_scheme
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("calibrated", [True, False])
def test_no_number_is_refused(scheme: Scheme, value: float, calibrated: bool) -> None:
    problem = problem_of(calibrated=calibrated)
    problem.weight[7, 11] = value
    with pytest.raises(DataError, match="NaN or infinity"):
        recipe.quantize_group([problem_of(calibrated=calibrated), problem], scheme, RecipeOptions())
    with pytest.raises(DataError, match="NaN or infinity"):
        recipe.quantize_modulation(problem, INT4_GROUP64, RecipeOptions(rounding="gptq"))


def test_zero_weights() -> None:
    for scheme in NARROW:
        for calibrated in (True, False):
            problem = replace(
                problem_for(scheme, calibrated=calibrated), weight=torch.zeros(48, 128)
            )
            (q,) = recipe.quantize_group([problem], scheme, options_of(scheme, rounding="gptq"))
            assert not bool(forward.effective_weight(q).any())
            assert recipe.weight_error(q, problem.weight) == 0


def test_stacked_linears_keep_their_own_tensor_scales() -> None:
    problem = problem_of(48)
    weight = problem.weight.clone()
    weight[:16] *= 200
    problem = replace(problem, weight=weight, parts=(16, 16, 16))
    for rounding in ("rtn", "gptq"):
        (q,) = recipe.quantize_group([problem], NVFP4, options_of(NVFP4, rounding=rounding))
        assert q.tensor_scale is not None and q.tensor_scale.shape == (48,)
        off = (forward.effective_weight(q) - weight).norm(dim=1) / weight.norm(dim=1)
        assert float(off.max()) < 0.2, "a small part under a large one's scale loses everything"


def test_fp8_gets_a_static_scale_only_from_activations() -> None:
    problem = problem_of()
    assert problem.stats is not None
    (q,) = recipe.quantize_group([problem], FP8, RecipeOptions())
    assert q.input_scale is not None and q.input_scale.shape == ()
    assert float(q.input_scale) == pytest.approx(float(problem.stats.absmax.max()) / 448)
    (q,) = recipe.quantize_group([replace(problem, stats=None)], FP8, RecipeOptions())
    assert q.input_scale is None
    still = replace(problem.stats, absmax=torch.zeros(128))
    (q,) = recipe.quantize_group([replace(problem, stats=still)], FP8, RecipeOptions())
    assert q.input_scale is not None and float(q.input_scale) == 1
    (q,) = recipe.quantize_group([problem], INT8, RecipeOptions())
    assert q.input_scale is None
