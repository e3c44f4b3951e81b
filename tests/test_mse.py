"""Scales by squared error: never worse than nearest, as good as a search through everything."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dqconvert.quantizers import codes as element
from dqconvert.quantizers import mse, rtn
from dqconvert.quantizers import spec as spec_module
from dqconvert.quantizers.errors import DataError
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.schemes.blocks import MXFP4, NVFP4
from dqconvert.quantizers.schemes.convrot import INT4_ROW, LUT4_GROUP16
from dqconvert.quantizers.schemes.weightonly import INT4_GROUP128
from dqconvert.quantizers.spec import ALL, CODES, QuantSpec
from dqconvert.quantizers.tensors import QuantizedTensor

torch.set_num_threads(1)

AFFINE = QuantSpec("uint4", (1, 32), zero_point=True)
OTHERS = {AFFINE, QuantSpec("int4", (ALL, 8)), QuantSpec("int4", (1, 16), scale="BF16")}
OF_SCHEMES = {s.weight for s in schemes().values() if not CODES[s.weight.code].block}
SPECS = sorted(OF_SCHEMES | OTHERS, key=repr)
NAMES = [f"{s.code}-{s.tile[0]}x{s.tile[1]}-{s.scale}-{s.tensor_scale}" for s in SPECS]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=NAMES)
lawful = settings(derandomize=True, deadline=None, max_examples=12)


def draw(rows: int, cols: int, seed: int, gain: float = 1.0, spikes: bool = False) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=rng) * gain
    if spikes:
        weight.view(-1)[torch.randint(weight.numel(), (3,), generator=rng)] *= 20
    return weight


def loss(q: QuantizedTensor, weight: Tensor, metric: Tensor | None) -> float:
    off = (rtn.dequantize(q).double() - weight.double()).square()
    return float((off if metric is None else off * metric.double()).sum())


@every_spec
@lawful
@given(
    rows=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    magnitude=st.floats(-30, 30),
    spikes=st.booleans(),
    weighted=st.booleans(),
)
def test_never_worse_than_nearest(
    spec: QuantSpec, rows: int, seed: int, magnitude: float, spikes: bool, weighted: bool
) -> None:
    weight = draw(rows, 128, seed, 10**magnitude, spikes)
    rng = torch.Generator().manual_seed(seed)
    metric = torch.rand(128, generator=rng) ** 4 if weighted else None
    before = weight.clone()
    q = mse.quantize(weight, spec, metric=metric)
    plain = rtn.quantize(weight, spec)
    assert torch.equal(weight, before)
    assert q.codes.shape == plain.codes.shape and q.scale.shape == plain.scale.shape
    assert q.codes.dtype == plain.codes.dtype and q.scale.dtype == plain.scale.dtype
    assert loss(q, weight, metric) <= loss(plain, weight, metric) * (1 + 1e-5)


GAINS = {
    "int4-1x-1-F32-None": 1.5,
    "int4-1x128-F32-None": 1.25,
    "nf4-1x64-F32-None": 1.1,
    "e2m1-1x16-F8_E4M3-F32": 1.2,
    "e2m1-1x32-F8_E8M0-None": 1.05,
    "uint4-1x32-F32-None": 1.06,
    "int4--1x8-F32-None": 1.5,
    "int4-1x16-BF16-None": 1.05,
    "lut4-1x16-F8_E4M3-F32": 1.02,
}


@pytest.mark.parametrize("name", GAINS)
def test_of_gaussian_weights_four_bits_lose_less(name: str) -> None:
    spec, weight = SPECS[NAMES.index(name)], draw(256, 512, 1, 0.02)
    gain = loss(rtn.quantize(weight, spec), weight, None) / loss(
        mse.quantize(weight, spec), weight, None
    )
    assert gain > GAINS[name]


def test_a_loud_input_gets_the_better_codes() -> None:
    """Weights that meet large inputs lose less than without knowing, the others more."""
    weight, metric = draw(64, 128, 2), torch.ones(128)
    metric[::8] = 400
    for spec in (NVFP4, INT4_GROUP128, MXFP4, INT4_ROW):
        known, blind = mse.quantize(weight, spec, metric=metric), mse.quantize(weight, spec)
        assert loss(known, weight, metric) < 0.99 * loss(blind, weight, metric)
        assert loss(known, weight, None) >= loss(blind, weight, None)


def test_nvfp4_blocks_are_mapped_to_six_or_to_four() -> None:
    """Four Over Six's own example: 10, 20, 30, 40 has no error when 40 is 4, not when it is 6."""
    weight = torch.tensor([10.0, 20.0, 30.0, 40.0] * 4)[None].repeat(4, 1)
    weight[1] = torch.tensor([15.0, 20.0, 30.0, 60.0] * 4)  # exact with 60 at 6
    q = mse.quantize(weight, NVFP4)
    assert torch.allclose(rtn.dequantize(q), weight, rtol=1e-6)
    assert q.tensor_scale is not None
    assert element.decode(q.codes[:2, 3], "e2m1").tolist() == [4, 6]
    plain = rtn.quantize(weight, NVFP4)
    assert loss(plain, weight, None) > 1


def test_the_largest_block_of_nvfp4_may_be_mapped_to_four() -> None:
    """Which a tensor scale of amax / (6 · 448) does not allow: its scale would be 672."""
    weight = torch.tensor([10.0, 20.0, 30.0, 40.0] * 4)[None]
    q = mse.quantize(weight, NVFP4)
    assert torch.allclose(rtn.dequantize(q), weight, rtol=1e-6)
    assert q.tensor_scale is not None and float(q.tensor_scale) == pytest.approx(40 / (6 * 256))
    shared = mse.quantize(weight, NVFP4, ceiling=torch.tensor(40.0))
    assert shared.tensor_scale is not None
    assert float(shared.tensor_scale) == pytest.approx(40 / (6 * 448)), "it must not be chosen"


def test_the_longer_end_goes_to_minus_eight() -> None:
    for sign in (1, -1):
        weight = sign * torch.linspace(-8, 7, 16)[None] * 0.25
        q = mse.quantize(weight, replace(INT4_GROUP128, tile=(1, 16)))
        assert torch.allclose(rtn.dequantize(q), weight, atol=1e-6)
        assert int(q.codes.min()) == -8 and float(q.scale) == pytest.approx(sign * 0.25)
    short = mse.quantize(weight, QuantSpec("int4", (1, 16)))
    assert int(short.codes.min()) >= -7 and bool((short.scale > 0).all())


def test_as_good_as_a_search_through_all_fractions() -> None:
    """An exhaustive search in float64 over 450 scales finds nothing much better."""
    weight = draw(8, 64, 3)
    spec, top = QuantSpec("int4", (1, ALL)), 7
    found = mse.quantize(weight, spec)
    for row, back in zip(weight.double(), rtn.dequantize(found).double(), strict=True):
        best = math.inf
        for step in range(450):
            scale = float(row.abs().max()) / top * (1 - step / 1000)
            off = (row / scale).round().clamp(-top, top) * scale - row
            best = min(best, float(off.square().sum()))
        assert float((back - row).square().sum()) <= 1.06 * best


def test_blocks_of_the_moment_are_the_output_error_of_groups() -> None:
    """Each group takes the fraction with the least ||x_g E_gᵀ||, written out over real rows."""
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(500, 8, generator=rng) @ torch.randn(8, 64, generator=rng)
    weight = draw(6, 64, 5)
    groups = x.view(500, 4, 16)
    blocks = torch.einsum("tgi,tgj->gij", groups, groups) / 500
    spec = QuantSpec("int4", (1, 16))
    q = mse.quantize(weight, spec, metric=blocks)

    def errors(back: Tensor) -> Tensor:
        off = (back - weight).double().view(6, 4, 16)
        return torch.einsum("tgi,ngi->ngt", groups.double(), off).square().mean(-1)

    best = torch.full((6, 4), math.inf, dtype=torch.float64)
    for fraction in mse.FRACTIONS:
        scale = rtn.absmax(weight, spec) / 7 * fraction
        tried = QuantizedTensor(spec, rtn.encode(weight, scale, None, spec), scale)
        best = torch.minimum(best, errors(rtn.dequantize(tried)))
    assert torch.allclose(errors(rtn.dequantize(q)), best, rtol=1e-3)
    blind = mse.quantize(weight, spec, metric=x.square().mean(0))
    assert float(errors(rtn.dequantize(blind)).sum()) > float(best.sum())


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != LUT4_GROUP16])
def test_row_blocks_do_not_matter(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, metric = draw(300, 128, 7, 1.0, True), torch.linspace(0.1, 4, 128)
    want = mse.quantize(weight, spec, metric=metric)
    monkeypatch.setattr(spec_module, "BLOCK", 40 * 128)
    found = mse.quantize(weight, spec, metric=metric)
    assert torch.equal(found.codes.float(), want.codes.float())
    assert torch.equal(found.scale.float(), want.scale.float())


@every_spec
def test_odd_weights(spec: QuantSpec) -> None:
    spike = torch.zeros(5, 128)
    spike[2, 3] = -37.5
    small = draw(5, 128, 1) * 1e-38
    for odd in (torch.zeros(5, 128), spike, torch.ones(5, 128), -draw(5, 128, 2).abs(), small):
        back = rtn.dequantize(mse.quantize(odd, spec))
        assert bool(torch.isfinite(back).all())
        assert bool((back[odd == 0].abs() <= 1e-6 * odd.abs().max()).all())
    assert mse.quantize(torch.zeros(0, 128), spec).codes.shape == (0, 128)
    with pytest.raises(DataError, match="NaN or infinity"):
        mse.quantize(torch.full((5, 128), math.nan), spec)


def test_stacked_linears_keep_their_own_tensor_scales() -> None:
    parts = [draw(n, 64, n, gain) for n, gain in ((3, 1.0), (5, 90.0))]
    whole = mse.quantize(torch.cat(parts), NVFP4, (3, 5))
    assert whole.tensor_scale is not None and whole.tensor_scale.shape == (8,)
    assert whole.tensor_scale.unique().numel() == 2
    off = (rtn.dequantize(whole) - torch.cat(parts)).norm(dim=1) / torch.cat(parts).norm(dim=1)
    assert float(off.max()) < 0.12


def test_what_linears_share_is_not_searched() -> None:
    for scheme in ("fp8-tensor", "fp8-cast"):
        spec, weight = schemes()[scheme].weight, draw(8, 64, 1)
        q = mse.quantize(weight, spec, ceiling=torch.tensor(9.0))
        want = 1.0 if spec.unit else 9 / 448
        assert float(q.scale) == pytest.approx(want)
