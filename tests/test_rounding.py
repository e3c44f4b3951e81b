"""What a layer's main path sees of its input, and which roundings the recipe is offered: rotated,
clipped, shared and static, each against the same thing written out."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dqconvert.quantizers import forward, gptq, hadamard, mse, recipe, rounding, rtn
from dqconvert.quantizers.recipe import RecipeOptions
from dqconvert.quantizers.rounding import Aim, Inputs
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import ALL, CODES, QuantSpec, Scheme
from dqconvert.quantizers.tensors import LinearProblem, QuantizedTensor

torch.set_num_threads(1)
problems = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("problems.py"))))
problem_of, problem_for, error_of = (
    problems.problem_of,
    problems.problem_for,
    problems.error_of,
)
W4A4, W4A8, NVFP4 = (schemes()[name] for name in ("convrot-w4a4", "convrot-w4a8", "nvfp4"))
AWQ, W4A16, FP8 = (schemes()[name] for name in ("awq-w4a16", "gptq-w4a16", "fp8-tensor"))


def seen(problem: LinearProblem, smooth: Tensor | None) -> Tensor:
    """The rows behind second_moment (problems.inputs without those held), as codes meet them."""
    x = problems.inputs(128, 0)[:-64]
    return hadamard.rotate(x if smooth is None else x / smooth, problem.rotation).double()


@pytest.mark.parametrize("rotation", [0, 64])
@pytest.mark.parametrize("smoothed", [False, True])
def test_inputs_are_those_of_smoothed_and_rotated_rows(rotation: int, smoothed: bool) -> None:
    problem = replace(problem_of(seed=0), rotation=rotation)
    smooth = torch.linspace(0.5, 3, 128) if smoothed else None
    assert problem.stats is not None
    inputs = Inputs(problem.stats, smooth, rotation)
    x = seen(problem, smooth)
    want = x.T @ x / len(x)
    assert inputs.moment is not None
    top = float(want.abs().max())
    assert torch.allclose(inputs.moment.double(), want, atol=1e-5 * top)
    assert torch.allclose(inputs.mean_square.double(), want.diagonal(), atol=1e-5 * top)
    blocks = inputs.blocks(32)
    assert blocks is not None
    for group, block in enumerate(blocks):
        cut = slice(32 * group, 32 * group + 32)
        assert torch.allclose(block.double(), want[cut, cut], atol=1e-5 * top)
    order, upper = inputs.loudest
    assert torch.equal(order.sort().values, torch.arange(128))
    assert bool((inputs.moment.diagonal()[order].diff() <= 0).all())
    assert torch.equal(upper, gptq.inverse_factor(inputs.moment[order][:, order]))


@pytest.mark.parametrize("rotation", [0, 64])
def test_inputs_without_a_moment_are_known_by_rows_or_channels(rotation: int) -> None:
    problem = replace(problem_of(seed=0), rotation=rotation)
    assert problem.stats is not None
    smooth = torch.linspace(0.5, 3, 128)
    stats = replace(problem.stats, second_moment=None)
    inputs = Inputs(stats, smooth, rotation)
    assert inputs.moment is None and inputs.blocks(32) is None
    held = hadamard.rotate(stats.rows / smooth, rotation).double().square().mean(0)
    whole = (stats.mean_square / smooth**2).double()
    assert torch.allclose(inputs.mean_square.double(), held if rotation else whole, rtol=1e-4)
    blind = Inputs(replace(stats, rows=stats.rows[:0]), smooth, rotation).mean_square.double()
    if rotation:  # the energy of a group, evenly
        whole = whole.view(2, 64).mean(1).repeat_interleave(64)
    assert torch.allclose(blind, whole, rtol=1e-4)


def offered(problem: LinearProblem, aim: Aim, pleased: bool = True) -> list[QuantizedTensor]:
    """All that a judge hears who thinks that of everything."""
    heard: list[QuantizedTensor] = []

    def consider(q: QuantizedTensor) -> bool:
        heard.append(q)
        return pleased

    assert problem.stats is not None
    inputs = Inputs(problem.stats, None, 0)
    rounding.offer(problem.weight, problem, aim, inputs, consider)
    return heard


def test_gptq_takes_the_scales_that_did_better() -> None:
    problem, spec = problem_of(), QuantSpec("int8", (1, ALL))
    for pleased in (True, False):
        plain, fitted, learned = offered(problem, Aim(spec, "gptq"), pleased)
        assert torch.equal(plain.scale, rtn.quantize(problem.weight, spec).scale)
        assert not torch.equal(plain.scale, fitted.scale)
        assert torch.equal(learned.scale, fitted.scale if pleased else plain.scale)
        assert not torch.equal(learned.codes, plain.codes)


def test_each_word_offers_what_it_says() -> None:
    problem, spec = problem_of(), W4A16.weight
    assert len(offered(problem, Aim(spec, "rtn"))) == 1
    assert len(offered(problem, Aim(spec, "mse"))) == 2
    assert len(offered(problem, Aim(spec, "gptq"))) == 3
    assert len(offered(problem, Aim(spec, "gptq", weight_only=True))) == 4
    assert problem.stats is not None
    blind = replace(problem, stats=replace(problem.stats, second_moment=None))
    assert len(offered(blind, Aim(spec, "gptq"))) == 1
    assert len(offered(blind, Aim(spec, "mse"))) == 2
    assert len(offered(blind, Aim(spec, "rtn", clip=True))) == 1


def test_clipping_needs_no_other_rounding() -> None:
    problem = problem_of(seed=3)
    assert problem.stats is not None
    (q,) = recipe.quantize_group([problem], AWQ, RecipeOptions())
    plain = rtn.quantize(problem.weight, AWQ.weight)
    blocks = Inputs(problem.stats, None, 0).blocks(128)
    want = mse.quantize(problem.weight, AWQ.weight, metric=blocks)
    assert torch.equal(q.scale, want.scale) and torch.equal(q.codes, want.codes)
    assert error_of(q, problem, AWQ) < 0.9 * error_of(plain, problem, AWQ)
    (blind,) = recipe.quantize_group([replace(problem, stats=None)], AWQ, RecipeOptions())
    assert torch.equal(blind.codes, plain.codes)


@pytest.mark.parametrize("seed", range(2))
def test_groups_with_zero_points_are_learned_too(seed: int) -> None:
    affine = QuantSpec("uint4", (1, 64), zero_point=True)
    scheme, problem = replace(W4A16, weight=affine), problem_of(seed=seed)
    problem = replace(problem, weight=problem.weight + 0.1)  # which is what zero points are for
    plain, searched, learned = (
        recipe.quantize_group([problem], scheme, RecipeOptions(rounding=r))[0]
        for r in ("rtn", "mse", "gptq")
    )
    assert plain.zero is not None and bool((plain.zero != 8).any())
    assert learned.zero is not None and bool((learned.zero == learned.zero.round()).all())
    assert float(learned.zero.min()) >= 0 and float(learned.zero.max()) <= 15
    errors = [error_of(q, problem, scheme) for q in (plain, searched, learned)]
    assert errors[0] > errors[1] > errors[2]


TILED = [scheme for scheme in schemes().values() if not CODES[scheme.weight.code].block]


@pytest.mark.parametrize("scheme", TILED, ids=[scheme.name for scheme in TILED])
def test_without_data_gptq_is_nearest_and_mse_errs_less(scheme: Scheme) -> None:
    problem = problem_for(scheme, calibrated=False)
    plain, searched, learned = (
        recipe.quantize_group([problem], scheme, problems.options_of(scheme, rounding=r))[0]
        for r in ("rtn", "mse", "gptq")
    )
    assert torch.equal(plain.codes.float(), learned.codes.float())
    assert torch.equal(plain.scale.float(), learned.scale.float())
    errors = [recipe.weight_error(q, problem.weight) for q in (plain, searched)]
    assert errors[1] <= errors[0]
    if scheme.weight.bits == 4:
        assert errors[1] < errors[0]


@pytest.mark.parametrize("words", ["rtn", "mse", "gptq"])
@pytest.mark.parametrize("scheme", [W4A4, W4A8], ids=["w4a4", "w4a8"])
def test_rotated_codes_are_those_of_the_rotated_layer(scheme: Scheme, words: str) -> None:
    """Rotated by hand beforehand, weight and statistics, the same codes come out."""
    problem = problem_for(scheme, seed=2)
    assert problem.stats is not None and problem.rotation == 64
    options = RecipeOptions(rounding=words)
    (q,) = recipe.quantize_group([problem], scheme, options)
    assert q.rotation == 64 and q.bias is problem.bias
    rows = hadamard.rotate(problem.stats.rows, 64)
    moment = Inputs(problem.stats, None, 64).moment
    stats = replace(problem.stats, rows=rows, second_moment=moment)
    by_hand = replace(problem, weight=hadamard.rotate(problem.weight, 64), rotation=0, stats=stats)
    (want,) = recipe.quantize_group([by_hand], scheme, options)
    assert torch.equal(q.codes, want.codes) and torch.equal(q.scale.float(), want.scale.float())
    assert error_of(q, problem, scheme) == pytest.approx(error_of(want, by_hand, scheme), rel=1e-4)
    back = hadamard.rotate(rtn.dequantize(q), 64)
    assert torch.allclose(forward.effective_weight(q), back, atol=1e-7)
    off = float((back - problem.weight).norm() / problem.weight.norm())
    assert recipe.weight_error(q, problem.weight) == pytest.approx(off, rel=1e-4)


def test_rotation_tames_outliers() -> None:
    """Which is what ConvRot is for: int8 rows and tokens with channels thirty times larger."""
    scheme, problem = schemes()["convrot-int8"], problem_of(seed=1)
    errors = []
    for rotation in (0, 64):
        turned = replace(problem, rotation=rotation)
        (q,) = recipe.quantize_group([turned], scheme, RecipeOptions())
        errors.append(error_of(q, turned, scheme))
    assert errors[1] < 0.7 * errors[0]


def test_a_shift_passes_the_rotation() -> None:
    problem = replace(problem_of(seed=6, shift=problems.SHIFT), rotation=64)
    (q,) = recipe.quantize_group([problem], W4A8, RecipeOptions())
    assert problem.stats is not None and q.bias is not None and problem.bias is not None
    x = problem.stats.rows
    want = x.double() @ forward.effective_weight(q).double().T + problem.bias.double()
    assert torch.allclose(forward.apply(q, x, None).double(), want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("words", ["rtn", "mse", "gptq"])
@pytest.mark.parametrize("scheme", [FP8, NVFP4], ids=["fp8", "nvfp4"])
def test_linears_of_a_group_share_their_widest_scale(scheme: Scheme, words: str) -> None:
    shared = replace(scheme, shared=True)
    first, second = problem_of(seed=1), problem_of(24, seed=2)
    second = replace(second, weight=3 * second.weight, stats=first.stats)
    name = "scale" if scheme is FP8 else "tensor_scale"
    options = RecipeOptions(rounding=words)
    scales = [getattr(q, name) for q in recipe.quantize_group([first, second], shared, options)]
    assert torch.equal(scales[0], scales[1])
    top = float(second.weight.abs().max())
    assert float(scales[0]) == pytest.approx(top / (448 if scheme is FP8 else 448 * 6))
    given = replace(first, ceiling=torch.tensor(2 * top))
    for q in recipe.quantize_group([given, second], shared, options):
        assert float(getattr(q, name)) == pytest.approx(2 * float(scales[0]))
    own = [getattr(q, name) for q in recipe.quantize_group([first, second], scheme, options)]
    assert not torch.equal(own[0], own[1])


def test_static_input_scales_cover_what_was_seen() -> None:
    problem = problem_of()
    assert problem.stats is not None
    top = float(problem.stats.absmax.max())
    (q,) = recipe.quantize_group([problem], NVFP4, RecipeOptions())
    assert q.input_scale is not None and q.input_scale.shape == ()
    assert float(q.input_scale) == pytest.approx(top / (6 * 448))
    (blind,) = recipe.quantize_group([replace(problem, stats=None)], NVFP4, RecipeOptions())
    assert blind.input_scale is None
    turned = replace(problem, rotation=64)
    (q,) = recipe.quantize_group([turned], FP8, RecipeOptions())
    seen_top = float(hadamard.rotate(problem.stats.rows, 64).abs().max())
    assert q.input_scale is not None and float(q.input_scale) == pytest.approx(seen_top / 448)
    unheld = replace(turned, stats=replace(problem.stats, rows=problem.stats.rows[:0]))
    (q,) = recipe.quantize_group([unheld], FP8, RecipeOptions())
    assert q.input_scale is not None and float(q.input_scale) * 448 >= seen_top


def test_one_input_is_factored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cholesky factors of large inputs take longer than rounding: linears share them."""
    calls: list[int] = []
    plain = gptq.inverse_factor

    def counted(moment: Tensor) -> Tensor:
        calls.append(1)
        return plain(moment)

    monkeypatch.setattr(gptq, "inverse_factor", counted)
    first = problem_of(seed=1)
    group = [first] + [replace(problem_of(24, seed=s), stats=first.stats) for s in (2, 3)]
    for scheme in (NVFP4, problems.W4A4):
        calls.clear()
        options = RecipeOptions(rank=4, rounding="gptq", refinements=0)
        recipe.quantize_group(group, scheme, options)
        assert len(calls) == 1
    calls.clear()
    recipe.quantize_group([first, problem_of(seed=2)], NVFP4, RecipeOptions(rounding="gptq"))
    assert len(calls) == 2
