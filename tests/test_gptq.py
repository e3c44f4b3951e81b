"""GPTQ against the textbook: one column at a time, no blocks, float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dqconvert.quantizers import gptq, mse, rtn
from dqconvert.quantizers.errors import DataError
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.schemes.svdquant import INT4_GROUP64, NVFP4_BF16
from dqconvert.quantizers.spec import ALL, CODES, QuantSpec
from dqconvert.quantizers.tensors import QuantizedTensor

torch.set_num_threads(1)

INT8_ROWS = QuantSpec("int8", (1, ALL))
E4M3_ROWS = QuantSpec("e4m3", (1, ALL))
E4M3_TENSOR = QuantSpec("e4m3", (ALL, ALL))
WIDE = QuantSpec("int4", (1, 200))
CROSSING = QuantSpec("int4", (1, 48))
AFFINE = QuantSpec("uint4", (1, 64), zero_point=True)
OF_SCHEMES = {s.weight for s in schemes().values() if CODES[s.weight.code].bits < 16}
OF_SCHEMES = {s for s in OF_SCHEMES if not CODES[s.code].block} | {INT4_GROUP64}
SPECS = sorted(OF_SCHEMES | {E4M3_TENSOR, WIDE, CROSSING, AFFINE}, key=repr)
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


def values_of(start: QuantizedTensor) -> Tensor:
    """All values of a code, before any scale: [L] fp64; of lut4's grid, none."""
    code = CODES[start.spec.code]
    if code.levels:
        return torch.tensor(code.levels, dtype=torch.float64)
    if not code.is_float:
        low = 0 if not code.signed else -code.maximum - start.spec.full_range
        return torch.arange(low, code.maximum + 1, dtype=torch.float64)
    steps = torch.arange(2 ** (code.bits - 1) - code.specials)
    exponent, mantissa = steps // 2**code.mantissa, steps % 2**code.mantissa
    digits = mantissa.double() + (exponent > 0) * 2**code.mantissa
    bias = 2 ** (code.exponent - 1) - 1 + code.mantissa
    some = digits * 2.0 ** (exponent.clamp(min=1) - bias).double()
    return torch.cat([some, -some])


def decoded(start: QuantizedTensor, group: int, scale: Tensor, zero: Tensor | None) -> Tensor:
    """All weights [N, L] that the rows of a group can be, fp64. scale, zero: those of the group."""
    rows = len(start.codes)
    second = torch.ones(1) if start.tensor_scale is None else start.tensor_scale
    if start.spec.code == "lut4":
        assert start.codebook is not None
        grid = (start.codebook * scale.float()[:, None]).round().clamp(-127, 127)
        return grid.double() * second.double()[:, None]
    tall = start.spec.tile_of((rows, 1))[0]
    steps = (scale.float().repeat_interleave(tall)[:rows] * second.float()).double()
    shift = 0 if zero is None else zero.double().repeat_interleave(tall)[:rows, None]
    return (values_of(start) - shift) * steps[:, None]


def textbook(
    weight: Tensor, upper: Tensor, start: QuantizedTensor, refit: bool, order: list[int]
) -> Tensor:
    """Dequantized, by the loop of the paper in float64: the nearest of all that a weight can be."""
    w, u, spec = weight.double().clone(), upper.double(), start.spec
    scale, zero = start.scale.float(), start.zero
    back = torch.empty_like(w)
    width = spec.tile_of((1, w.shape[1]))[1]
    for place, j in enumerate(order):
        group, first = divmod(j, width)
        if refit and first == 0:
            q = rtn.quantize(w[:, j : j + width].float(), replace(spec, tensor_scale=None))
            if spec.tensor_scale is None:
                scale[:, group : group + 1] = q.scale.float()
            else:
                amax = w[:, j : j + width].abs().amax(1, keepdim=True).float()
                scale[:, group : group + 1] = rtn.first_scales(amax, spec, start.tensor_scale)
            if zero is not None and q.zero is not None:
                zero[:, group : group + 1] = q.zero
        table = decoded(start, group, scale[:, group], None if zero is None else zero[:, group])
        places = (w[:, j, None] - table).abs().argmin(1, keepdim=True)
        back[:, j] = table.gather(1, places)[:, 0]
        later = order[place + 1 :]
        error = (w[:, j] - back[:, j]) / u[place, place]
        w[:, later] -= error[:, None] * u[place, place + 1 :]
    return back


def loss(back: Tensor, weight: Tensor, h: Tensor) -> float:
    """tr(E H Eᵀ): the squared output error."""
    off = back.double() - weight.double()
    return float(((off @ h) * off).sum())


WIDTHS = (1, 48, 64, 127, 128, 129, 192, 200, 256)


def agrees(q: QuantizedTensor, back: Tensor, weight: Tensor, h: Tensor) -> None:
    """A weight that sits on the edge between two codes may fall either way, and what follows
    it in its row then differs too; so nearly all rows must be equal, and all losses close."""
    found = rtn.dequantize(q)
    equal = torch.isclose(found.double(), back, rtol=1e-5, atol=1e-12).all(1)
    assert float(equal.double().mean()) >= 0.85
    assert loss(found, weight, h) == pytest.approx(loss(back, weight, h), rel=0.02, abs=1e-12)


def fits(spec: QuantSpec, columns: int) -> bool:
    return spec.ragged or spec.tile[1] == ALL or columns % spec.tile[1] == 0


@pytest.mark.parametrize(
    ("spec", "columns", "refit"),
    [
        (spec, columns, refit)
        for spec in SPECS
        for columns in WIDTHS
        for refit in (False, True)
        if fits(spec, columns) and not (refit and (spec.tile[1] == ALL or spec.code == "lut4"))
    ],
)
def test_equal_to_the_textbook(spec: QuantSpec, columns: int, refit: bool) -> None:
    h, weight = moment(columns, columns), weight_of(24, columns, 5)
    if spec.tile[0] > 1:
        weight = weight.repeat(6, 1)[: spec.tile[0] + 10]
    upper, start = upper_of(h), rtn.quantize(weight, spec)
    q = gptq.quantize(weight, upper.float(), start, gptq.absmax_refit(start) if refit else None)
    agrees(q, textbook(weight, upper, start, refit, list(range(columns))), weight, h)


@pytest.mark.parametrize(
    ("spec", "columns"), [(s, k) for s in SPECS for k in (200, 256) if fits(s, k)]
)
def test_equal_to_the_textbook_in_any_order(spec: QuantSpec, columns: int) -> None:
    h, weight = moment(columns, columns), weight_of(24, columns, 5)
    order = h.diagonal().argsort(descending=True)
    upper, start = upper_of(h[order][:, order]), mse.quantize(weight, spec)
    q = gptq.quantize(weight, upper.float(), start, order=order)
    assert torch.equal(q.scale.float(), start.scale.float())
    agrees(q, textbook(weight, upper, start, False, order.tolist()), weight, h)


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
@pytest.mark.parametrize("seed", range(2))
def test_never_a_larger_loss_than_rounding_to_nearest(spec: QuantSpec, seed: int) -> None:
    columns = {48: 192, 128: 256, 200: 400}.get(spec.tile[1], 192)
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
