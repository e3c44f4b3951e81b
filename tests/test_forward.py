"""What a runtime computes: exact where nothing is rounded, and as comfy-kitchen's eager kernels
compute it. Closed forms in float64."""

from __future__ import annotations

import math
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dqconvert.quantizers import codes as element
from dqconvert.quantizers import forward, recipe, rtn
from dqconvert.quantizers import spec as spec_module
from dqconvert.quantizers.recipe import RecipeOptions
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import ALL, CODES, QuantSpec, Scheme
from dqconvert.quantizers.tensors import LinearProblem, LowRank, QuantizedTensor

torch.set_num_threads(1)
problems = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("problems.py"))))
stats_of, inputs, problem_of, options_of, error_of = (
    problems.stats_of,
    problems.inputs,
    problems.problem_of,
    problems.options_of,
    problems.error_of,
)
SHIFT, W4A4, NVFP4, INT8, FP8 = (
    problems.SHIFT,
    problems.W4A4,
    problems.NVFP4,
    problems.INT8,
    problems.FP8,
)
TILED = [scheme for scheme in schemes().values() if not CODES[scheme.weight.code].block]
every_scheme = pytest.mark.parametrize("scheme", TILED, ids=[scheme.name for scheme in TILED])
svdquant = pytest.mark.parametrize("scheme", [W4A4, NVFP4], ids=["int4", "nvfp4"])


# ------------------------------------------------------------------------------- the shift


def test_the_surplus_is_what_a_layer_gives_for_nothing() -> None:
    """Of inputs of 0 the main path sees the shift alone."""
    exact = LinearProblem(problem_of().weight, None, shift=SHIFT)
    for smooth in (None, torch.linspace(0.5, 2, 128)):
        q = rtn.quantize(exact.weight, W4A4.weight)
        assert forward.shift_surplus(q) is None
        q = replace(q, smooth=smooth, shift=SHIFT)
        surplus = forward.shift_surplus(q)
        assert surplus is not None
        assert torch.allclose(surplus, forward.apply(q, torch.zeros(1, 128), None)[0], atol=1e-6)


def representable() -> tuple[Tensor, Tensor, Tensor]:
    """A weight W, a smooth vector s and inputs x such that W diag(s) sits on int4's grid and
    (x + shift) / s on uint4's, all in powers of two: nothing is rounded anywhere."""
    rng = torch.Generator().manual_seed(4)
    smooth = 2.0 ** torch.randint(-2, 3, (128,), generator=rng)
    codes = torch.randint(-7, 8, (24, 128), generator=rng).float()
    codes[:, ::64] = 7  # every group reaches its largest code, so the scale is what it was
    steps = 2.0 ** torch.randint(-3, 2, (24, 2), generator=rng)
    weight = codes * steps.repeat_interleave(64, 1) / smooth
    seen = torch.randint(0, 16, (10, 128), generator=rng).float()
    seen[:, ::64] = 15
    x = seen * 0.25 * smooth - SHIFT
    return weight, smooth, x


def test_the_shift_is_exact_where_nothing_is_rounded() -> None:
    weight, smooth, x = representable()
    bias = torch.linspace(-2, 2, 24)
    problem = LinearProblem(weight, bias, shift=SHIFT)
    q = recipe.quantize_linear(problem, W4A4, RecipeOptions(rank=0, refinements=0), smooth)
    assert q.shift == SHIFT
    assert torch.equal(rtn.dequantize(q), weight * smooth)
    want = x.double() @ weight.double().T + bias.double()
    got = forward.apply(q, x, W4A4.activation).double()
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [0, 8])
def test_the_shift_is_taken_out_of_the_bias(bias: bool, rank: int) -> None:
    """bias' = b - shift Σ_k R(1/s): of the rounded residual; the low-rank branch sees no shift."""
    problem = problem_of(seed=6, shift=SHIFT)
    if not bias:
        problem = replace(problem, bias=None)
    options = RecipeOptions(rank=rank, refinements=1, rounding="gptq")
    (q,) = recipe.quantize_group([problem], W4A4, options)
    assert q.bias is not None and q.smooth is not None and q.lowrank is not None
    residual = rtn.dequantize(q).double()
    surplus = SHIFT * (residual / q.smooth.double()).sum(1)
    want = (problem.bias.double() if problem.bias is not None else 0) - surplus
    assert torch.allclose(q.bias.double(), want, rtol=1e-5, atol=1e-5)
    assert error_of(q, problem, W4A4) < 0.15
    assert problem.stats is not None  # with exact activations only the weight's error is left
    x = problem.stats.rows
    exact = forward.apply(q, x, None).double()
    base = 0 if problem.bias is None else problem.bias.double()
    unshifted = x.double() @ forward.effective_weight(q).double().T + base
    assert torch.allclose(exact, unshifted, rtol=1e-4, atol=1e-3)


# ----------------------------------------------------------------------------- the forward


@svdquant
def test_the_effective_weight_is_the_formula(scheme: Scheme) -> None:
    problem = problem_of()
    (q,) = recipe.quantize_group([problem], scheme, options_of(scheme))
    assert q.smooth is not None and q.lowrank is not None
    codes = element.decode(q.codes, q.spec.code).double()
    step = q.scale.double().repeat_interleave(q.spec.tile[1], 1)
    second = 1.0 if q.tensor_scale is None else q.tensor_scale.double()[:, None]
    branch = q.lowrank.up.double() @ q.lowrank.down.double()
    want = codes * step * second / q.smooth.double() + branch
    assert torch.allclose(forward.effective_weight(q).double(), want, rtol=1e-5, atol=1e-7)
    off = float((want - problem.weight.double()).norm() / problem.weight.double().norm())
    assert recipe.weight_error(q, problem.weight) == pytest.approx(off, rel=1e-4)


@every_scheme
def test_without_activation_rounding_the_forward_is_the_effective_weight(scheme: Scheme) -> None:
    problem = problems.problem_for(scheme)
    (q,) = recipe.quantize_group([problem], scheme, options_of(scheme))
    assert problem.stats is not None and q.bias is not None
    x = problem.stats.rows
    want = x.double() @ forward.effective_weight(q).double().T + q.bias.double()
    assert torch.allclose(forward.apply(q, x, None).double(), want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shift", [0.0, SHIFT])
def test_int4_is_kitchens_forward(shift: float) -> None:
    """comfy-kitchen's eager kernels take the same natural codes; its activation scales stay in
    fp32 here, ours are rounded to bf16 as nunchaku rounds them."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.svdquant")
    problem = problem_of(seed=2, shift=shift)
    (q,) = recipe.quantize_group([problem], W4A4, options_of(W4A4, rounding="gptq"))
    assert problem.stats is not None and q.smooth is not None
    assert q.lowrank is not None and q.bias is not None
    x = problem.stats.rows
    act, scales, side = kitchen.quantize_svdquant_w4a4(
        x + shift,
        q.smooth,
        q.lowrank.down.float().T,
        pad_size=1,
        act_unsigned=bool(shift),
        lora_x=x,
    )
    theirs = kitchen.scaled_mm_svdquant_w4a4(
        act,
        kitchen._pack_int4_row_major(q.codes),
        scales,
        q.scale.float().T.contiguous(),
        side,
        q.lowrank.up.float(),
        q.bias,
        act_unsigned=bool(shift),
    )
    spec = QuantSpec("int4", (1, 64))  # scales in fp32
    ours = forward.apply(q, x, spec)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3 * float(theirs.abs().max()))
    rounded = forward.apply(q, x, W4A4.activation)
    assert float((rounded - theirs).norm() / theirs.norm()) < 0.02


def test_int8_is_kitchens_forward() -> None:
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    problem = problem_of(seed=2)
    (q,) = recipe.quantize_group([problem], INT8, RecipeOptions())
    assert problem.stats is not None and q.bias is not None
    x = problem.stats.rows
    codes, scales = kitchen.quantize_int8_rowwise(x)
    sums = kitchen.mm_int8(codes, q.codes.T.contiguous()).double()
    want = sums * scales.double() * q.scale.double().T + q.bias.double()
    assert torch.allclose(forward.apply(q, x, INT8.activation).double(), want, rtol=1e-5, atol=1e-4)


def test_fp8_is_kitchens_forward() -> None:
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    problem = problem_of(seed=2)
    (q,) = recipe.quantize_group([problem], FP8, RecipeOptions())
    assert problem.stats is not None and q.bias is not None and q.input_scale is not None
    x = 2 * problem.stats.rows  # the loudest are clipped
    for scale in (q.input_scale, torch.tensor(1.0)):
        codes = kitchen.quantize_per_tensor_fp8(x, scale).double() * scale.double()
        want = codes @ (q.codes.double() * q.scale.double()).T + q.bias.double()
        given = replace(q, input_scale=scale)
        got = forward.apply(given, x, FP8.activation).double()
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-3)
    without = forward.apply(replace(q, input_scale=None), x, FP8.activation)
    assert torch.equal(without, forward.apply(given, x, FP8.activation)), "the runtime takes 1"


def test_one_code_by_hand() -> None:
    """Two outputs of 64 inputs, of which three count: y = 7 * 0.5 * (...) computed on paper."""
    codes = torch.zeros(2, 64, dtype=torch.int8)
    codes[0, :3] = torch.tensor([7, -3, 1])
    codes[1, 2] = 4
    q = QuantizedTensor(
        spec=QuantSpec("int4", (1, 64), scale="BF16"),
        codes=codes,
        scale=torch.tensor([[0.5], [2.0]]).bfloat16(),
        bias=torch.tensor([10.0, -1.0]),
        smooth=torch.full((64,), 2.0),
        lowrank=LowRank(torch.ones(1, 64).bfloat16(), torch.tensor([[1.0], [3.0]]).bfloat16()),
    )
    x = torch.zeros(1, 64)
    x[0, :3] = torch.tensor([14.0, 4.0, -2.0])
    # x / 2 = 7, 2, -1: scale 1, nothing is lost. Sum of raw x = 16.
    want = [0.5 * (7 * 7 - 3 * 2 - 1) + 16 + 10, 2.0 * 4 * -1 + 3 * 16 - 1]
    assert forward.apply(q, x, W4A4.activation)[0].tolist() == want
    assert forward.effective_weight(q)[:, :4].tolist() == [
        [1 + 7 * 0.25, 1 - 3 * 0.25, 1.25, 1.0],
        [3.0, 3.0, 7.0, 3.0],
    ]


def test_output_error_without_held_rows_is_the_moments() -> None:
    """tr(E H Eᵀ) / tr(W H Wᵀ), with diag(mean square) where no moment was kept."""
    problem = problem_of()
    assert problem.stats is not None
    (q,) = recipe.quantize_group([problem], INT8, RecipeOptions())
    off = forward.effective_weight(q).double() - problem.weight.double()
    for kept in (problem.stats.second_moment, None):
        stats = replace(problem.stats, rows=torch.zeros(0, 128), second_moment=kept)
        h = torch.diag(stats.mean_square) if kept is None else kept
        w, h = problem.weight.double(), h.double()
        want = math.sqrt(float(((off @ h) * off).sum() / ((w @ h) * w).sum()))
        found = recipe.output_error(q, replace(problem, stats=stats), INT8.activation)
        assert found == pytest.approx(want, rel=1e-3)


def test_a_column_cut_of_statistics_is_that_of_the_input() -> None:
    x = inputs(96, 1)
    cut, want = stats_of(x).columns(32, 64), stats_of(x[:, 32:64])
    for name in ("absmax", "mean", "mean_square", "second_moment", "rows"):
        assert torch.allclose(getattr(cut, name), getattr(want, name), rtol=1e-4, atol=1e-4), name


def test_tiles_over_all_rows_have_one_static_scale() -> None:
    spec = QuantSpec("e4m3", (ALL, ALL))
    x = torch.linspace(-500, 500, 32).view(2, 16)
    seen = forward.quantize_activation(x, spec)
    assert float(seen.max()) == 448
    assert torch.equal(forward.quantize_activation(x, None), x)


# --------------------------------------------------------------- what runtimes make of inputs


def test_nvfp4_inputs_are_kitchens() -> None:
    """Under the scale of all tokens together, or a static one, which clips what is louder."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    spec, x = schemes()["nvfp4"].weight, inputs(128, 3)[:128]
    for static in (None, x.abs().amax() / 2688 / 4):
        second = x.abs().amax() / 2688 if static is None else static
        packed, scales = kitchen.quantize_nvfp4(x, second)
        want = kitchen.dequantize_nvfp4(packed, second, scales, torch.float32)
        seen = forward.quantize_activation(x, spec, static=static)
        assert torch.allclose(seen, want, rtol=1e-6)
    assert float(seen.abs().max()) <= float(second) * 2688 < float(x.abs().max())


def test_mxfp8_inputs_are_kitchens() -> None:
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    x = inputs(128, 3)[:128]
    want = kitchen.dequantize_mxfp8(*kitchen.quantize_mxfp8(x), torch.float32)
    assert torch.equal(forward.quantize_activation(x, schemes()["mxfp8"].activation), want)


@pytest.mark.parametrize("columns", [40, 128, 200])
def test_groups_of_inputs_may_end_early(columns: int) -> None:
    """The last of the 1x128 groups is what is left of the channels."""
    x = torch.randn(7, columns, generator=torch.Generator().manual_seed(1))
    seen = forward.quantize_activation(x, schemes()["fp8-block128"].activation)
    for start in range(0, columns, 128):
        group = x[:, start : start + 128]
        scale = group.abs().amax(1, keepdim=True) / 448
        want = (group / scale).to(torch.float8_e4m3fn).float() * scale
        assert torch.equal(seen[:, start : start + 128], want)


def test_convrot_int8_is_kitchens_forward() -> None:
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    scheme = schemes()["convrot-int8"]
    problem = problems.problem_for(scheme)
    (q,) = recipe.quantize_group([problem], scheme, RecipeOptions(rounding="gptq"))
    assert problem.stats is not None
    x = problem.stats.rows
    want = kitchen.int8_linear(
        x, q.codes, q.scale, q.bias, torch.float32, convrot=True, convrot_groupsize=64
    )
    assert torch.allclose(forward.apply(q, x, scheme.activation), want, rtol=1e-4, atol=1e-3)


def test_convrot_w4a8_is_kitchens_forward() -> None:
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.w4a8_int8")
    scheme = schemes()["convrot-w4a8"]
    problem = problems.problem_for(scheme)
    (q,) = recipe.quantize_group([problem], scheme, RecipeOptions(rounding="gptq"))
    assert problem.stats is not None
    x = problem.stats.rows
    want = kitchen.w4a8_int8_linear(
        x,
        kitchen._pack_codes(q.codes.int(), 4),
        q.scale,
        q.tensor_scale,
        q.codebook,
        bias=q.bias,
        convrot_groupsize=64,
        out_dtype=torch.float32,
    )
    assert torch.allclose(forward.apply(q, x, scheme.activation), want, rtol=1e-4, atol=1e-3)


ODD = (QuantSpec("uint4", (1, 64), zero_point=True), QuantSpec("int4", (ALL, 64)))


@pytest.mark.parametrize("spec", sorted({s.weight for s in TILED} | set(ODD), key=repr), ids=str)
def test_rows_of_a_layer_are_layers(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the last tile of rows is short; smooth and rotation stay with every row."""
    weight = torch.randn(300, 128, generator=torch.Generator().manual_seed(1))
    smooth = torch.linspace(0.5, 2, 128)
    whole = replace(rtn.quantize(weight, spec), smooth=smooth, rotation=64)
    want = forward.effective_weight(whole)
    monkeypatch.setattr(spec_module, "BLOCK", 40 * 128)
    parts = list(forward.row_blocks(whole))
    assert len(parts) > 1
    for start, part in parts:
        rows = want[start : start + len(part.codes)]
        assert torch.allclose(forward.effective_weight(part), rows, rtol=1e-6, atol=1e-7)
    assert sum(len(part.codes) for _, part in parts) == 300
