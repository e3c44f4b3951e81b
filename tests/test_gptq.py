"""GPTQ against the textbook: one column at a time, no blocks, float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dqconvert.quantizers import codes as element
from dqconvert.quantizers import gptq, rtn
from dqconvert.quantizers.errors import DataError
from dqconvert.quantizers.schemes.svdquant import INT4_GROUP64, NVFP4_BF16
from dqconvert.quantizers.spec import ALL, QuantSpec
from dqconvert.quantizers.tensors import QuantizedTensor

torch.set_num_threads(1)

INT8_ROWS = QuantSpec("int8", (1, ALL))
E4M3_ROWS = QuantSpec("e4m3", (1, ALL))
E4M3_TENSOR = QuantSpec("e4m3", (ALL, ALL))
WIDE = QuantSpec("int4", (1, 200))
CROSSING = QuantSpec("int4", (1, 48))
SPECS = (INT4_GROUP64, NVFP4_BF16, INT8_ROWS, E4M3_ROWS, E4M3_TENSOR, WIDE, CROSSING)
every_spec = pytest.mark.parametrize(
    "spec", SPECS, ids=[f"{s.code}-{s.tile[0]}x{s.tile[1]}" for s in SPECS]
)


def learned(
    weight: Tensor, upper: Tensor, spec: QuantSpec, parts: tuple[int, ...] = ()
) -> QuantizedTensor:
    """GPTQ with scales from absolute maxima, set as groups are entered."""
    start = rtn.quantize(weight, spec, parts)
    return gptq.quantize(weight, upper, start, gptq.absmax_refit(start))


def moment(columns: int, seed: int, rows: int = 0) -> Tensor:
    """XᵀX of strongly correlated inputs, some channels far larger than others."""
    rng = torch.Generator().manual_seed(seed)
    rows = rows or 2 * columns + 5
    few = torch.randn(rows, max(columns // 4, 1), generator=rng).double()
    mix = torch.randn(few.shape[1], columns, generator=rng).double()
    x = few @ mix + 0.3 * torch.randn(rows, columns, generator=rng).double()
    x = (
        x
        * torch.logspace(-1, 1, columns, dtype=torch.float64)[
            torch.randperm(columns, generator=rng)
        ]
    )
    return x.T @ x / rows


def weight_of(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def upper_of(h: Tensor, damp: float = 0.01) -> Tensor:
    """The upper Cholesky factor of the damped inverse, by an explicit inverse."""
    mean = h.diagonal().mean()
    inverse = torch.linalg.inv(h + damp * mean * torch.eye(len(h), dtype=h.dtype))
    return torch.linalg.cholesky((inverse + inverse.T) / 2).T


def nearest(values: Tensor, code: str) -> Tensor:
    """What the nearest codes stand for: a search through all values, or rounding."""
    if code == "e2m1":
        table = torch.tensor((0, 0.5, 1, 1.5, 2, 3, 4, 6), dtype=torch.float64)
    elif code == "e4m3":
        bits = torch.arange(127, dtype=torch.uint8)
        table = bits.view(torch.float8_e4m3fn).double()
    else:
        top = {"int4": 7, "int8": 127}[code]
        return values.round().clamp(-top, top)
    places = (values.abs()[:, None] - table).abs().argmin(1)
    return table[places] * torch.where(values < 0, -1.0, 1.0)


def textbook(weight: Tensor, upper: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """(codes as values, dequantized) by the loop of the paper in float64."""
    w, u = weight.double().clone(), upper.double()
    start = rtn.quantize(weight, spec)
    second = torch.ones(1) if start.tensor_scale is None else start.tensor_scale
    columns = w.shape[1]
    width = columns if spec.tile[1] == ALL else spec.tile[1]
    codes, back = torch.empty_like(w), torch.empty_like(w)
    step = torch.ones(len(w), dtype=torch.float64)
    for j in range(columns):
        if spec.tile[1] == ALL:
            step = start.scale[:, 0].double()
        elif j % width == 0:
            amax = w[:, j : j + width].abs().amax(1, keepdim=True).float()
            first = rtn.first_scales(amax, spec, start.tensor_scale)
            step = (first.float() * second.float()[:, None]).double()[:, 0]
        codes[:, j] = nearest(w[:, j] / step, spec.code)
        back[:, j] = codes[:, j] * step
        error = (w[:, j] - back[:, j]) / u[j, j]
        w[:, j + 1 :] -= error[:, None] * u[j, j + 1 :]
    return codes, back


def loss(back: Tensor, weight: Tensor, h: Tensor) -> float:
    """tr(E H Eᵀ): the squared output error."""
    off = back.double() - weight.double()
    return float(((off @ h) * off).sum())


WIDTHS = (1, 48, 64, 127, 128, 129, 192, 200, 240, 320, 400)


@pytest.mark.parametrize(
    ("spec", "columns"),
    [(s, k) for s in SPECS for k in WIDTHS if s.tile[1] == ALL or k % s.tile[1] == 0],
)
def test_equal_to_the_textbook(spec: QuantSpec, columns: int) -> None:
    """A weight that sits on the edge between two codes may fall either way, and what follows
    it in its row then differs too; so nearly all rows must be equal, and all losses close."""
    h = moment(columns, columns)
    weight = weight_of(24, columns, 5)
    upper = upper_of(h)
    q = learned(weight, upper.float(), spec)
    codes, back = textbook(weight, upper, spec)
    equal = (element.decode(q.codes, spec.code) == codes).all(1)
    assert float(equal.double().mean()) >= 0.9
    theirs = loss(back, weight, h)
    assert loss(rtn.dequantize(q), weight, h) == pytest.approx(theirs, rel=0.02, abs=1e-12)


@pytest.mark.parametrize("columns", [1, 5, 64, 200])
def test_the_factor_is_the_inverse(columns: int) -> None:
    h = moment(columns, 7)
    upper = gptq.inverse_factor(h.float()).double()
    assert torch.equal(upper, upper.triu())
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(columns)
    product = upper.T @ upper @ damped
    assert torch.allclose(product, torch.eye(columns, dtype=torch.float64), atol=2e-2)
    assert torch.allclose(upper, upper_of(h), rtol=1e-2, atol=1e-3 * float(upper.max()))


@every_spec
def test_uncorrelated_inputs_make_it_round_to_nearest(spec: QuantSpec) -> None:
    columns = 400 if spec is WIDE else 384
    weight = weight_of(9, columns, 1)
    weight[3] = 0
    for diagonal in (torch.ones(columns), torch.linspace(0.1, 9, columns)):
        q = learned(weight, gptq.inverse_factor(torch.diag(diagonal)), spec)
        want = rtn.quantize(weight, spec)
        assert torch.equal(rtn.dequantize(q), rtn.dequantize(want))
        assert torch.equal(q.scale.float(), want.scale.float())
        assert q.codes.dtype == want.codes.dtype


@every_spec
@pytest.mark.parametrize("seed", range(4))
def test_never_a_larger_loss_than_rounding_to_nearest(spec: QuantSpec, seed: int) -> None:
    columns = 400 if spec is WIDE else 192
    h, weight = moment(columns, seed), weight_of(40, columns, seed)
    before = weight.clone(), h.clone()
    q = learned(weight, gptq.inverse_factor(h.float()), spec)
    plain = rtn.quantize(weight, spec)
    assert loss(rtn.dequantize(q), weight, h) < 0.8 * loss(rtn.dequantize(plain), weight, h)
    assert torch.equal(weight, before[0]) and torch.equal(h, before[1]), "changed in place"


def test_bf16_weights_and_moments_are_not_changed() -> None:
    weight, h = weight_of(4, 64, 1).bfloat16(), moment(64, 1).float()
    before = weight.clone(), h.clone()
    learned(weight, gptq.inverse_factor(h), INT4_GROUP64)
    assert torch.equal(weight, before[0]) and torch.equal(h, before[1])


@pytest.mark.parametrize("spec", [INT4_GROUP64, INT8_ROWS])
def test_dead_channels_are_left_alone(spec: QuantSpec) -> None:
    """A channel that is always zero gets no correction and gives none."""
    h, weight = moment(128, 3), weight_of(16, 128, 3)
    dead = torch.tensor([0, 1, 63, 64, 100, 127])
    h[dead] = 0
    h[:, dead] = 0
    upper = gptq.inverse_factor(h.float())
    assert bool(torch.isfinite(upper).all())
    off = upper - torch.diag(upper.diagonal())
    assert not bool(off[dead].any()) and not bool(off[:, dead].any())
    q = learned(weight, upper, spec)
    step = q.scale.float().repeat_interleave(128 // q.scale.shape[1], 1)
    away = (rtn.dequantize(q) - weight).abs()
    assert bool((away <= step / 2 * 1.001)[:, dead].all())
    plain = rtn.dequantize(rtn.quantize(weight, spec))
    assert loss(rtn.dequantize(q), weight, h) < loss(plain, weight, h)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_fewer_samples_than_channels(rows: int) -> None:
    h, weight = moment(128, 4, rows), weight_of(16, 128, 4)
    upper = gptq.inverse_factor(h.float())
    assert bool(torch.isfinite(upper).all())
    q = learned(weight, upper, INT4_GROUP64)
    plain = rtn.dequantize(rtn.quantize(weight, INT4_GROUP64))
    assert loss(rtn.dequantize(q), weight, h) < loss(plain, weight, h)


def test_nothing_known_of_the_input_makes_it_round_to_nearest() -> None:
    weight = weight_of(4, 64, 1)
    upper = gptq.inverse_factor(torch.zeros(64, 64))
    q = learned(weight, upper, INT4_GROUP64)
    assert torch.equal(q.codes, rtn.quantize(weight, INT4_GROUP64).codes)


def test_an_indefinite_moment_is_damped_until_it_is_not() -> None:
    h = torch.diag(torch.tensor([4.0, 1.0, -0.5, 2.0]))
    assert bool(torch.isfinite(gptq.inverse_factor(h)).all())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_moment_that_is_no_number_is_refused(value: float) -> None:
    h = torch.eye(8)
    h[3, 3] = value
    with pytest.raises(DataError, match="NaN or infinity"):
        gptq.inverse_factor(h)


def test_a_weight_that_is_no_number_is_refused() -> None:
    weight = weight_of(4, 64, 1)
    weight[1, 1] = math.nan
    with pytest.raises(DataError, match="NaN or infinity"):
        learned(weight, torch.eye(64), INT4_GROUP64)


def test_parts_keep_their_own_tensor_scales() -> None:
    h, sizes = moment(64, 2), (3, 5)
    upper = gptq.inverse_factor(h.float())
    parts = [weight_of(n, 64, n) * gain for n, gain in zip(sizes, (1.0, 90.0), strict=True)]
    whole = learned(torch.cat(parts), upper, NVFP4_BF16, sizes)
    assert whole.tensor_scale is not None and whole.tensor_scale.shape == (8,)
    for part, cut in zip(parts, (slice(0, 3), slice(3, 8)), strict=True):
        alone: QuantizedTensor = learned(part, upper, NVFP4_BF16)
        assert torch.equal(whole.codes[cut], alone.codes)
        assert torch.equal(whole.scale[cut].float(), alone.scale.float())
