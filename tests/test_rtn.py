"""Rounding to nearest: laws over all formats, and formulas in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dqconvert.quantizers import lut, rtn
from dqconvert.quantizers import spec as spec_module
from dqconvert.quantizers.errors import DataError
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.schemes.blocks import NVFP4
from dqconvert.quantizers.schemes.convrot import LUT4_GROUP16
from dqconvert.quantizers.schemes.svdquant import INT4_GROUP64, NVFP4_BF16
from dqconvert.quantizers.spec import ALL, CODES, QuantSpec
from dqconvert.quantizers.tensors import TORCH_DTYPES, QuantizedTensor

torch.set_num_threads(1)

OF_SCHEMES = {
    spec
    for scheme in schemes().values()
    for spec in (scheme.weight, scheme.activation, scheme.modulation)
    if spec is not None
}
OTHERS = {
    QuantSpec("int4", (1, ALL)),
    QuantSpec("int8", (ALL, ALL)),
    QuantSpec("int8", (ALL, 16)),
    QuantSpec("int8", (4, 8), scale="BF16"),
    QuantSpec("e4m3", (1, ALL)),
    QuantSpec("e4m3", (4, 8)),
    QuantSpec("e5m2", (1, ALL), reciprocal=True),
    QuantSpec("e2m1", (1, 16)),
    QuantSpec("e3m2", (1, 8)),
    QuantSpec("nf4", (1, 16)),
    QuantSpec("uint4", (1, 64), zero_point=True),
    QuantSpec("uint4", (1, 16), scale="BF16", zero_point=True),
    QuantSpec("uint4", (ALL, 8), zero_point=True),
    QuantSpec("int4", (16, 8), ragged=True),
}
APART = {"lut4", *(name for name in CODES if CODES[name].block)}  # have tests of their own
SPECS = sorted((s for s in OF_SCHEMES | OTHERS if s.code not in APART), key=repr)
NAMES = [f"{s.code}-{s.tile[0]}x{s.tile[1]}-{s.scale}-{s.tensor_scale}" for s in SPECS]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=NAMES)
lawful = settings(derandomize=True, deadline=None, max_examples=60)

FP8 = schemes()["fp8-tensor"].weight


def shape_for(spec: QuantSpec, rows: int, cols: int) -> tuple[int, int]:
    """Rows and columns as they are where a tile covers them, else so many tiles, or odd ones."""
    if spec.ragged:
        return rows * 37, cols * 41
    return (
        rows if spec.tile[0] in (1, ALL) else rows * spec.tile[0],
        cols if spec.tile[1] in (1, ALL) else cols * spec.tile[1],
    )


def draw(shape: tuple[int, int], seed: int, gain: float, spikes: bool) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=rng) * gain
    if spikes and weight.numel():
        weight.view(-1)[torch.randint(weight.numel(), (2,), generator=rng)] *= 100
    return weight


def spread(grid: Tensor, spec: QuantSpec, shape: tuple[int, int]) -> Tensor:
    """Values of the tiles, repeated over their weights."""
    rows, cols = spec.tile_of(shape)
    return grid.repeat_interleave(rows, 0).repeat_interleave(cols, 1)[: shape[0], : shape[1]]


def second(q: QuantizedTensor) -> Tensor:
    return torch.ones(1, 1).double() if q.tensor_scale is None else q.tensor_scale.double()[:, None]


def allowed(q: QuantizedTensor, weight: Tensor) -> Tensor:
    """How far each weight may move: half a step of its code, plus what its scale was rounded.

    An integer's step is the scale, a codebook's its widest gap; a float with m mantissa bits
    moves by 2^-(m+1) of itself, or by half of its smallest step. A scale in e4m3 moves by 2^-10
    below 2^-6, and the largest code with it.
    """
    code, shape = CODES[q.spec.code], (weight.shape[0], weight.shape[1])
    step = spread(q.scale.double() * second(q), q.spec, shape)
    if code.levels:
        bound = step * max(b - a for a, b in pairwise(code.levels)) / 2
    elif not code.is_float:
        bound = step / 2
    else:
        smallest = 2.0 ** (2 - 2 ** (code.exponent - 1) - code.mantissa)
        part = 2.0 ** -(code.mantissa + 1)
        bound = torch.maximum(weight.double().abs() * part, step * smallest / 2)
    if q.spec.scale == "F8_E4M3":
        bound = bound + second(q) * code.maximum * 2.0**-10
    if q.zero is not None and q.spec.scale == "BF16":  # a scale rounded down falls short of an end
        bound = bound + step * code.maximum * 2.0**-9
    return bound * (1 + 1e-5)


def saturates(spec: QuantSpec, weight: Tensor) -> bool:
    """A float8 scale without a second level, or none at all, cannot hold what is larger."""
    limit = spec.maximum * (1 if spec.unit else 448)
    bounded = spec.unit or (spec.scale == "F8_E4M3" and spec.tensor_scale is None)
    return bounded and weight.numel() > 0 and bool(weight.abs().max() > limit)


def check(weight: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """The laws that hold for every weight: shapes, dtypes, finite, nothing touched, the bound."""
    before = weight.clone()
    q = rtn.quantize(weight, spec)
    assert torch.equal(weight, before), "the input was changed in place"
    shape = (weight.shape[0], weight.shape[1])
    assert q.codes.shape == shape
    assert q.scale.shape == spec.grid(shape)
    assert q.scale.dtype == TORCH_DTYPES[spec.scale]
    assert (q.tensor_scale is None) is (spec.tensor_scale is None)
    if q.tensor_scale is not None:
        assert q.tensor_scale.shape == (1,)
        assert q.tensor_scale.dtype == TORCH_DTYPES[spec.tensor_scale or ""]
    codes = q.codes.clone().float(), q.scale.clone().float()
    back = rtn.dequantize(q)
    assert back.dtype == torch.float32 and back.shape == shape
    assert torch.equal(q.codes.float(), codes[0]) and torch.equal(q.scale.float(), codes[1])
    assert bool(torch.isfinite(back).all())
    if not saturates(spec, weight):
        off = (back.double() - weight.double()).abs()
        assert bool((off <= allowed(q, weight)).all())
    return q


def check_idempotent(q: QuantizedTensor) -> None:
    """Codes return exactly; scales exactly where their dtype is short, else to the last bits.

    Powers of two may be halved when the largest weight was rounded down onto one, and a range in
    short scales with a zero point need not come to both of its ends.
    """
    if q.spec.zero_point and q.spec.scale != "F32":
        return
    again = rtn.quantize(rtn.dequantize(q), q.spec)
    if q.spec.scale == "F8_E8M0":
        assert torch.equal(rtn.dequantize(again), rtn.dequantize(q))
        return
    usual = torch.ones_like(q.scale, dtype=torch.bool)
    if q.spec.scale == "F8_E4M3":  # below 2^-6 a scale has too few bits to return
        usual = (q.scale.float() >= 2.0**-6) | (q.scale.float() == 0)
    shape = (q.codes.shape[0], q.codes.shape[1])
    where = spread(usual, q.spec, shape)
    assert torch.equal(again.codes.float()[where], q.codes.float()[where])
    assert torch.allclose(again.scale.float()[usual], q.scale.float()[usual], rtol=3e-7, atol=0)
    if q.spec.scale != "F32":
        assert torch.equal(again.scale.float()[usual], q.scale.float()[usual])


@every_spec
@lawful
@given(
    rows=st.integers(1, 7),
    cols=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    magnitude=st.floats(-30, 30),
    spikes=st.booleans(),
)
def test_laws(
    spec: QuantSpec, rows: int, cols: int, seed: int, magnitude: float, spikes: bool
) -> None:
    weight = draw(shape_for(spec, rows, cols), seed, 10**magnitude, spikes)
    check_idempotent(check(weight, spec))


@every_spec
def test_odd_weights(spec: QuantSpec) -> None:
    shape = shape_for(spec, 5, 3)
    weight = draw(shape, 1, 0.02, False)
    spike = torch.zeros(shape)
    spike[shape[0] // 2, shape[1] // 2] = -37.5
    for odd in (
        spike,
        torch.linspace(-2, 3, shape[0])[:, None].expand(shape),  # constant rows, stride 0
        -weight.abs(),
        weight[:1].repeat(shape[0], 1) * torch.arange(shape[0])[:, None],  # a row of zeros
        draw(shape_for(spec, 1, 1), 2, 1.0, False),
    ):
        check_idempotent(check(odd, spec))


@every_spec
def test_zeros_stay_zeros(spec: QuantSpec) -> None:
    shape = shape_for(spec, 3, 2)
    q = check(torch.zeros(shape), spec)
    silent = 7 if spec.code == "nf4" else 0
    assert bool((q.codes.view(torch.uint8) == silent).all())
    assert int(rtn.dequantize(q).count_nonzero()) == 0
    if spec.scale.startswith("F8"):
        assert int(q.scale.view(torch.uint8).count_nonzero()) == 0
    else:
        assert bool((q.scale == (spec.floor or 1.0)).all())


@every_spec
@pytest.mark.parametrize("top", [1e-45, 1e-41, 1e-38, 1e-36, 1e-30])
def test_subnormal_weights_neither_explode_nor_become_nan(spec: QuantSpec, top: float) -> None:
    weight = draw(shape_for(spec, 3, 4), 3, 1.0, False)
    weight *= top / weight.abs().max()
    weight[0] = 0
    q = rtn.quantize(weight, spec)
    back = rtn.dequantize(q)
    assert bool(torch.isfinite(back).all())
    assert bool(torch.isfinite(q.codes.float()).all())
    assert bool((back[0] == 0).all())
    assert bool((back.abs() <= 2 * top).all())


@every_spec
def test_weights_too_small_for_their_scale_are_zero(spec: QuantSpec) -> None:
    """Beside a huge neighbour or under a floor a scale may become zero; so do the codes."""
    weight = draw(shape_for(spec, 4, 4), 3, 1e-12, False)
    weight[0, 0] = 1e6
    q = rtn.quantize(weight, spec)
    step = spread(q.scale.float() * second(q).float(), spec, (weight.shape[0], weight.shape[1]))
    assert not bool(q.codes[step == 0].float().any())


@every_spec
@pytest.mark.parametrize("cols", [1, 3])
def test_no_rows(spec: QuantSpec, cols: int) -> None:
    shape = shape_for(spec, 0, cols)
    q = rtn.quantize(torch.empty(shape), spec)
    assert q.codes.shape == shape == rtn.dequantize(q).shape
    assert q.scale.shape == spec.grid(shape)


@every_spec
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_number_is_refused(spec: QuantSpec, value: float, dtype: torch.dtype) -> None:
    weight = draw(shape_for(spec, 5, 3), 4, 1.0, False).to(dtype)
    weight[-1, -1] = value
    with pytest.raises(DataError, match="NaN or infinity"):
        rtn.quantize(weight, spec)


def same(one: QuantizedTensor, two: QuantizedTensor) -> bool:
    pairs = [(one.codes, two.codes), (one.scale, two.scale), (one.tensor_scale, two.tensor_scale)]
    pairs.append((one.zero, two.zero))
    return all(a is b or torch.equal(a.float(), b.float()) for a, b in pairs)  # type: ignore


@every_spec
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_is_computed_in_fp32(spec: QuantSpec, dtype: torch.dtype) -> None:
    weight = draw(shape_for(spec, 5, 3), 5, 0.3, True).bfloat16().half().to(dtype)
    before = weight.clone()
    assert same(rtn.quantize(weight, spec), rtn.quantize(weight.float(), spec))
    assert torch.equal(weight, before)


@every_spec
def test_strides_do_not_matter(spec: QuantSpec) -> None:
    rows, cols = shape_for(spec, 5, 3)
    want = rtn.quantize(draw((rows, cols), 6, 1.0, False), spec)
    plain = draw((rows, cols), 6, 1.0, False)
    transposed = plain.T.contiguous().T
    wide = torch.full((2 * rows, 3 * cols), math.nan)
    wide[::2, ::3] = plain
    for view in (transposed, wide[::2, ::3]):
        assert cols == 1 or not view.is_contiguous()
        kept = view.clone()
        assert same(rtn.quantize(view, spec), want)
        assert torch.equal(view, kept)


@every_spec
def test_row_blocks_do_not_matter(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = draw(shape_for(spec, 11, 3), 7, 1.0, True)
    want = rtn.quantize(weight, spec)
    monkeypatch.setattr(spec_module, "BLOCK", 2 * weight.shape[1] + 1)
    assert same(rtn.quantize(weight, spec), want)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_parts_keep_their_own_tensor_scales(dtype: str) -> None:
    spec = replace(NVFP4_BF16, tensor_scale=dtype)
    gains, sizes = (1.0, 300.0, 0.004, 0.0), (3, 1, 5, 2)
    parts = [draw((n, 64), n, g, False) for n, g in zip(sizes, gains, strict=True)]
    whole = rtn.quantize(torch.cat(parts), spec, sizes)
    assert whole.tensor_scale is not None and whole.tensor_scale.shape == (sum(sizes),)
    start = 0
    for part in parts:
        cut = slice(start, start := start + len(part))
        alone = rtn.quantize(part, spec)
        assert alone.tensor_scale is not None
        assert bool((whole.tensor_scale[cut] == alone.tensor_scale).all())
        cut_of_whole = QuantizedTensor(spec, whole.codes[cut], whole.scale[cut], alone.tensor_scale)
        assert same(cut_of_whole, alone)
        assert torch.equal(rtn.dequantize(whole)[cut], rtn.dequantize(alone))


# ------------------------------------------------- the documented formula, in float64, by hand


def bf16(x: float) -> float:
    """Eight significant bits, halves to even."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa * 256) / 256, exponent)


def nearest(x: float, table: list[float]) -> int:
    """Index of the nearest entry; of two, the even one."""
    return min(range(len(table)), key=lambda i: (abs(table[i] - x), i % 2))


E4M3 = [
    m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
    for e in range(16)
    for m in range(8)
    if (e, m) != (15, 7)
]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@pytest.mark.parametrize("gain", [1e-6, 0.02, 1.0, 1e6])
def test_int4_groups_by_the_formula(gain: float) -> None:
    weight = draw((5, 192), 11, gain, True)
    weight[2, 64:128] = 0
    q = rtn.quantize(weight, INT4_GROUP64)
    for n, row in enumerate(weight.tolist()):
        for g in range(3):
            group = row[g * 64 : g * 64 + 64]
            scale = bf16(max(map(abs, group)) / 7) or 1.0
            assert float(q.scale[n, g]) == scale
            codes = [max(-7, min(7, round(w / scale))) for w in group]
            assert q.codes[n, g * 64 : g * 64 + 64].tolist() == codes


@pytest.mark.parametrize("gain", [1e-6, 0.02, 1.0, 1e6])
def test_nvfp4_by_the_formula(gain: float) -> None:
    weight = draw((6, 64), 12, gain, True)
    weight[2, 16:32] = 0
    weight[3] *= 1e-7
    q = rtn.quantize(weight, NVFP4_BF16)
    tensor = bf16(float(weight.abs().max()) / 6 / 448)
    assert q.tensor_scale is not None and q.tensor_scale.tolist() == [tensor]
    for n, row in enumerate(weight.tolist()):
        for g in range(4):
            group = row[g * 16 : g * 16 + 16]
            scale = E4M3[nearest(min(max(map(abs, group)) / 6 / tensor, 448.0), E4M3)]
            assert float(q.scale[n, g]) == scale
            step = scale * tensor
            codes = [nearest(abs(w) / step, E2M1) | (w < 0) << 3 if step else 0 for w in group]
            assert q.codes[n, g * 16 : g * 16 + 16].tolist() == codes


def test_zero_points_by_the_formula() -> None:
    """(high - low) / 15 over a range that holds 0, and the whole code that is nearest to 0."""
    weight = draw((6, 64), 12, 0.02, True)
    weight[1], weight[2], weight[3] = weight[1].abs() + 1, -weight[2].abs() - 1, 0
    q = rtn.quantize(weight, QuantSpec("uint4", (1, 32), zero_point=True))
    assert q.zero is not None
    for n, row in enumerate(weight.tolist()):
        for g in range(2):
            group = row[g * 32 : g * 32 + 32]
            low, high = min(*group, 0.0), max(*group, 0.0)
            scale = (high - low) / 15 or 1.0
            zero = round(-low / scale)
            assert float(q.scale[n, g]) == pytest.approx(scale, rel=1e-6)
            assert float(q.zero[n, g]) == zero
            exact = [w / scale + zero for w in group]
            codes = q.codes[n, g * 32 : g * 32 + 32].tolist()
            for code, want in zip(codes, exact, strict=True):
                assert 0 <= code <= 15 and abs(code - want) <= 0.5 + 1e-5


@pytest.mark.parametrize("spec", [FP8, NVFP4], ids=["tensor", "two levels"])
def test_a_ceiling_makes_linears_share_what_covers_the_tensor(spec: QuantSpec) -> None:
    small, large = draw((4, 32), 1, 0.1, False), draw((4, 32), 2, 3.0, False)
    one = rtn.quantize(small, spec, ceiling=large.abs().amax())
    two = rtn.quantize(large, spec, ceiling=small.abs().amax())
    assert same(two, rtn.quantize(large, spec))
    shared = "scale" if spec is FP8 else "tensor_scale"
    assert torch.equal(getattr(one, shared), getattr(two, shared))
    check_close = (rtn.dequantize(one) - small).norm() / small.norm()
    assert float(check_close) < 0.15
    rows = QuantSpec("int8", (1, ALL))
    assert same(rtn.quantize(small, rows, ceiling=torch.tensor(9.0)), rtn.quantize(small, rows))


def test_lut4_is_luts() -> None:
    weight = draw((8, 64), 6, 0.02, True)
    ours, want = rtn.quantize(weight, LUT4_GROUP16), lut.quantize(weight, LUT4_GROUP16)
    assert same(ours, want) and torch.equal(rtn.dequantize(ours), lut.dequantize(want))
