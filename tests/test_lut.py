"""Codebook weights: comfy-kitchen's bytes and decoder, brute force in float64, and laws."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from comfy_kitchen.backends.eager import w4a8_int8 as kitchen
from comfy_kitchen.tensor import w4a8_packed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dqconvert.quantizers import hadamard, lut
from dqconvert.quantizers import spec as spec_module
from dqconvert.quantizers.errors import DataError
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import QuantSpec
from dqconvert.quantizers.tensors import QuantizedTensor

torch.set_num_threads(1)

SPEC = schemes()["convrot-w4a8"].weight
Mode = Callable[[Tensor, QuantSpec], QuantizedTensor]
lawful = settings(derandomize=True, deadline=None, max_examples=60)


def draw(rows: int, cols: int, kind: str = "gauss", seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=rng) * 0.02
    if kind == "laplace":
        uniform = torch.rand(rows, cols, generator=rng) - 0.5
        weight = -0.02 * uniform.sign() * torch.log1p(-2 * uniform.abs())
    elif kind == "spikes":
        weight[torch.rand(rows, cols, generator=rng) < 0.002] *= 60
    elif kind == "uniform":
        weight = torch.rand(rows, cols, generator=rng) - 0.5
    elif kind == "zero rows":
        weight[::9] = 0
    elif kind == "zero groups":
        weight[:, : cols // 16] = 0
    elif kind == "zero":
        weight.zero_()
    elif kind.startswith("1e"):
        weight *= float(kind) * 50
    return weight


def plain_of_kitchen(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, group scales, row scales and codebook of a weight that is not rotated yet."""
    packed, scale, channel, _, table = kitchen.quantize_w4a8_int8_weight(weight, 16, group)
    assert table is not None
    return w4a8_packed._unpack_codes(packed, weight.shape[1], 4).byte(), scale, channel, table


def check_kitchens_bytes(weight: Tensor, group: int) -> QuantizedTensor:
    q = lut.quantize(hadamard.rotate(weight, group), SPEC)
    codes, scale, channel, table = plain_of_kitchen(weight, group)
    assert q.codebook is not None and q.tensor_scale is not None
    assert torch.equal(q.codebook, table)
    assert torch.equal(q.tensor_scale, channel)
    assert torch.equal(q.scale.view(torch.uint8), scale.view(torch.uint8))
    assert torch.equal(q.codes, codes)
    return q


def error(weight: Tensor, q: QuantizedTensor, importance: Tensor | None = None) -> float:
    gain = torch.ones(weight.shape[1]) if importance is None else importance
    return float(((lut.dequantize(q).double() - weight.double()) ** 2 * gain.double()).sum())


@pytest.mark.parametrize(
    "kind", ["gauss", "spikes", "uniform", "zero rows", "zero", "1e-9", "1e-8", "1e-7", "1e-4"]
)
@pytest.mark.parametrize(("rows", "cols", "group"), [(20, 256, 256), (33, 768, 256), (50, 192, 64)])
def test_kitchens_bytes(kind: str, rows: int, cols: int, group: int) -> None:
    check_kitchens_bytes(draw(rows, cols, kind), group)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_kitchens_bytes_where_tails_are_heavy(scale: float) -> None:
    """Rotating twice undoes itself, so that the groups of the inner weight stay Laplacian."""
    inner = draw(170, 2048, "laplace") * scale
    q = check_kitchens_bytes(hadamard.rotate(inner, 256), 256)
    assert not torch.equal(lut.codebook_of(q), lut.gaussian_codebook())


def test_kitchens_bytes_of_a_layer_that_is_sampled() -> None:
    check_kitchens_bytes(draw(1101, 4096, "spikes"), 256)


@pytest.mark.parametrize("kind", ["gauss", "laplace", "zero rows", "1e-8"])
def test_dequantizes_like_kitchen(kind: str) -> None:
    q = lut.quantize(draw(40, 512, kind), SPEC)
    check_kitchens_values(q)


def test_dequantizes_any_bytes_like_kitchen() -> None:
    rng = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (64, 512), generator=rng).byte()
    scale = torch.randint(0, 127, (64, 32), generator=rng).byte().view(torch.float8_e4m3fn)
    channel = torch.rand(64, generator=rng)
    for table in (None, torch.randn(16, generator=rng).sort().values):
        check_kitchens_values(QuantizedTensor(SPEC, codes, scale, channel, codebook=table))


def check_kitchens_values(q: QuantizedTensor) -> None:
    assert q.tensor_scale is not None
    packed = w4a8_packed._pack_codes(q.codes.int(), 4)
    table = w4a8_packed.default_w4a8_codebook() if q.codebook is None else q.codebook
    theirs = kitchen.dequantize_w4a8_int8_weight(
        packed, q.scale, q.tensor_scale, table, output_dtype=torch.float32
    )
    assert torch.equal(hadamard.rotate(lut.dequantize(q), 256), theirs)


def test_levels_in_float64() -> None:
    scale = torch.arange(127).byte().view(torch.float8_e4m3fn)
    table = lut.gaussian_codebook()
    wide = np.multiply.outer(scale.double().numpy(), table.double().numpy())
    expected = np.clip(np.rint(wide), -127, 127)
    assert np.array_equal(lut.levels(table, scale).double().numpy(), expected)
    assert torch.equal(table, w4a8_packed.default_w4a8_codebook())


@lawful
@given(st.integers(0, 2**31), st.booleans(), st.sampled_from((1, 16)))
def test_assign_finds_the_nearest(seed: int, whole: bool, width: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    levels = (torch.randn(7, 16, generator=rng) * 5).sort(-1).values
    values = torch.randn(7, width, generator=rng) * 8
    if whole:
        levels, values = levels.round_(), values.mul_(2).round_().div_(2)  # ties and equal levels
    chosen = lut.assign(values, levels)
    assert chosen.dtype == torch.uint8 and chosen.shape == values.shape
    off = (values[..., None] - levels[:, None]).abs()
    mine = torch.gather(off, -1, chosen.long()[..., None])[..., 0]
    assert torch.equal(mine, off.amin(-1))
    lower = torch.gather(levels, -1, off.argmin(-1))
    assert torch.equal(torch.gather(levels, -1, chosen.long()), lower)
    alone = torch.stack([lut.assign(v, table) for v, table in zip(values, levels, strict=True)])
    assert torch.equal(alone, chosen)


@lawful
@given(
    rows=st.integers(0, 5),
    groups=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    magnitude=st.floats(-12, 6),
    kind=st.sampled_from(("gauss", "spikes", "zero rows", "zero groups", "zero")),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_laws(
    rows: int, groups: int, seed: int, magnitude: float, kind: str, dtype: torch.dtype
) -> None:
    weight = (draw(rows, 16 * groups, kind, seed) * 10**magnitude).to(dtype)
    before = weight.clone()
    importance = torch.rand(16 * groups, generator=torch.Generator().manual_seed(seed))
    plain, found = lut.quantize(weight, SPEC), lut.search(weight, SPEC, importance)
    assert torch.equal(weight, before), "the input was changed in place"
    for q in (plain, found):
        assert q.codes.shape == weight.shape and q.codes.dtype == torch.uint8
        assert q.scale.shape == (rows, groups) and q.scale.dtype == torch.float8_e4m3fn
        assert q.tensor_scale is not None and q.tensor_scale.shape == (rows,)
        table = lut.codebook_of(q)
        assert table.shape == (16,) and torch.equal(table, table.sort().values)
        assert not rows or int(q.codes.amax()) < 16
        back = lut.dequantize(q)
        assert back.dtype == torch.float32 and bool(back.isfinite().all())
        assert bool((back[(weight == 0).all(1)] == 0).all())
        target = (weight.float() / q.tensor_scale[:, None]).view(rows, groups, 16)
        assert torch.equal(lut.assign(target, lut.levels(table, q.scale)), q.codes.view_as(target))
    ours, theirs = error(weight, found, importance), error(weight, plain, importance)
    assert ours <= theirs * (1 + 1e-5)


@pytest.mark.parametrize("mode", [lut.quantize, lut.search])
def test_blocks_of_rows_change_nothing(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = draw(21, 512, "spikes")
    whole = mode(weight, SPEC)
    monkeypatch.setattr(spec_module, "BLOCK", 2048)
    parts = mode(weight, SPEC)
    assert torch.equal(whole.codes, parts.codes)
    assert whole.tensor_scale is not None and parts.tensor_scale is not None
    assert torch.equal(whole.tensor_scale, parts.tensor_scale)
    assert torch.equal(whole.scale.view(torch.uint8), parts.scale.view(torch.uint8))
    assert torch.equal(lut.dequantize(whole), lut.dequantize(parts))


@pytest.mark.parametrize(
    ("kind", "gain"), [("gauss", 0.05), ("laplace", 0.05), ("spikes", 0.08), ("1e-7", 0.08)]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_search_gains(kind: str, gain: float, weighted: bool) -> None:
    """Squared error, on weights rotated from outliers and on ones that are heavy-tailed as is."""
    weight = draw(96, 512, kind)
    if kind == "spikes":
        weight = hadamard.rotate(weight, 256)
    spread = torch.randn(512, generator=torch.Generator().manual_seed(1)).exp()
    importance = spread if weighted else None
    found, plain = lut.search(weight, SPEC, importance), lut.quantize(weight, SPEC)
    limit = (1 - gain - 0.1 * weighted) * error(weight, plain, importance)
    assert error(weight, found, importance) < limit


def test_many_zeros_keep_the_levels_in_order() -> None:
    """Where comfy-kitchen's do not, and its error triples."""
    source = draw(300, 768)
    source[::2] = 0
    weight = hadamard.rotate(source, 256)
    q = lut.quantize(weight, SPEC)
    theirs = plain_of_kitchen(source, 256)[3]
    assert bool((theirs.diff() < 0).any())
    assert torch.equal(lut.codebook_of(q), theirs.sort().values)
    assert error(weight, q) < 0.09**2 * float(weight.double().square().sum())
    found = lut.search(weight, SPEC)
    assert torch.equal(lut.codebook_of(found), lut.gaussian_codebook())
    assert error(weight, found) < 0.073**2 * float(weight.double().square().sum())


def test_takes_a_given_codebook() -> None:
    weight = draw(20, 256)
    table = torch.linspace(-1, 1, 16)
    q = lut.quantize(weight, SPEC, table)
    packed, scale, channel, _, _ = kitchen._quantize_rotated_w4a8_int8_weight(
        weight, codebook_override=table
    )
    assert torch.equal(q.codes, w4a8_packed._unpack_codes(packed, 256, 4).byte())
    assert torch.equal(q.scale.float(), scale.float())
    assert q.tensor_scale is not None and torch.equal(q.tensor_scale, channel)
    assert q.codebook is not None and torch.equal(q.codebook, table)


def test_views_are_quantized_as_copies() -> None:
    weight = draw(64, 48).T
    q, copy = lut.quantize(weight, SPEC), lut.quantize(weight.contiguous(), SPEC)
    assert torch.equal(lut.dequantize(q), lut.dequantize(copy))


@pytest.mark.parametrize("mode", [lut.quantize, lut.search])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_refuses_what_is_not_finite(mode: Mode, bad: float) -> None:
    weight = draw(1100, 4096)
    weight[4, 30] = bad  # in a row that the choice of the codebook does not see
    with pytest.raises(DataError, match="NaN or infinity"):
        mode(weight, SPEC)


def test_refuses_what_groups_do_not_divide() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        lut.quantize(draw(4, 40), SPEC)
