"""Quantized linears cut and joined: parts are parts of the weight, and together they are it."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from dqconvert.quantizers import rtn, slicing
from dqconvert.quantizers.forward import effective_weight
from dqconvert.quantizers.schemes.blocks import MXFP8, NVFP4
from dqconvert.quantizers.schemes.plain8 import FP8_BLOCK, FP8_TENSOR, INT8_ROW
from dqconvert.quantizers.schemes.svdquant import INT4_GROUP64, NVFP4_BF16
from dqconvert.quantizers.schemes.weightonly import INT4_GROUP128
from dqconvert.quantizers.spec import QuantSpec
from dqconvert.quantizers.tensors import LowRank, QuantizedTensor

torch.set_num_threads(1)
lawful = settings(derandomize=True, deadline=None, max_examples=25)
GOLDEN = Path(__file__).parent / "data" / "nunchaku.safetensors"
AFFINE = replace(INT4_GROUP128, code="uint4", zero_point=True, full_range=False)
SVDQ = (INT4_GROUP64, NVFP4_BF16)
SPECS = (INT8_ROW, FP8_BLOCK, FP8_TENSOR, MXFP8, NVFP4, INT4_GROUP128, AFFINE, *SVDQ)


def linear(spec: QuantSpec, n: int, k: int, seed: int = 0, rank: int = 16) -> QuantizedTensor:
    """A random linear with all that the format has room for."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=rng) * (0.1 + torch.rand(n, 1, generator=rng))
    q = replace(rtn.quantize(weight, spec), bias=torch.randn(n, generator=rng))
    if spec not in SVDQ:
        return q
    down, up = (torch.randn(s, generator=rng).bfloat16() for s in ((rank, k), (n, rank)))
    smooth = (0.5 + torch.rand(k, generator=rng)).bfloat16()
    return replace(q, smooth=smooth, lowrank=LowRank(down, up))


def same(one: QuantizedTensor, two: QuantizedTensor) -> bool:
    """Bit by bit, but for tensor scales that are one value or the same in every row."""
    pairs = [(getattr(one, f), getattr(two, f)) for f in ("codes", "scale", "zero", "bias")]
    pairs += [(one.smooth, two.smooth)]
    if one.lowrank is not None and two.lowrank is not None:
        pairs += [(one.lowrank.down, two.lowrank.down), (one.lowrank.up, two.lowrank.up)]
    return all(a is b or torch.equal(raw(a), raw(b)) for a, b in pairs)


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.code}-{spec.tile[1]}-{spec.scale}")
@given(n=st.integers(2, 4), cut=st.integers(1, 3), seed=st.integers(0, 99))
@lawful
def test_rows_are_rows_and_join_again(spec: QuantSpec, n: int, cut: int, seed: int) -> None:
    q = linear(spec, 128 * n, 256, seed)
    at = 128 * min(cut, n - 1)
    parts = slicing.rows(q, 0, at), slicing.rows(q, at, 128 * n)
    whole = effective_weight(q)
    assert torch.equal(effective_weight(parts[0]), whole[:at])
    assert torch.equal(effective_weight(parts[1]), whole[at:])
    again = slicing.join_rows(parts)
    assert same(again, q) and torch.equal(effective_weight(again), whole)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.code}-{spec.tile[1]}-{spec.scale}")
@given(cut=st.integers(1, 2), seed=st.integers(0, 99))
@lawful
def test_columns_are_columns_and_add_up(spec: QuantSpec, cut: int, seed: int) -> None:
    q = linear(spec, 128, 384, seed)
    at = 128 * cut
    parts = [slicing.columns(q, 0, at), replace(slicing.columns(q, at, 384), bias=q.bias)]
    whole = effective_weight(q)
    for part, exact in zip(parts, (whole[:, :at], whole[:, at:]), strict=True):
        assert torch.allclose(effective_weight(part), exact, rtol=0, atol=2e-5)
    again = slicing.join_columns(parts)
    assert same(again, q)


@given(seed=st.integers(0, 99), rank=st.sampled_from((16, 32)))
@lawful
def test_branches_of_their_own_stand_side_by_side(seed: int, rank: int) -> None:
    """Rank adds up, the weight is what each had; the zeros go when they are cut apart again."""
    one, two = linear(INT4_GROUP64, 128, 256, seed), linear(INT4_GROUP64, 256, 256, seed + 1, rank)
    two = replace(two, smooth=one.smooth)
    fused = slicing.join_rows([one, two])
    assert fused.lowrank is not None and len(fused.lowrank.down) == 16 + rank
    exact = torch.cat([effective_weight(one), effective_weight(two)])
    assert torch.allclose(effective_weight(fused), exact, rtol=0, atol=2e-5)
    wide = replace(fused, lowrank=slicing.widened(fused.lowrank, 64))
    for part, was in ((slicing.rows(wide, 0, 128), one), (slicing.rows(wide, 128, 384), two)):
        assert part.lowrank is not None
        assert same(replace(part, lowrank=slicing.trimmed(part.lowrank)), was)
    beside = slicing.join_columns([one, linear(INT4_GROUP64, 128, 384, seed + 2, rank)])
    left = slicing.columns(beside, 0, 256)
    assert same(replace(left, bias=one.bias), one)


def test_different_tensor_scales_go_into_the_smooth_vector() -> None:
    one, two = linear(NVFP4_BF16, 128, 128), linear(NVFP4_BF16, 128, 256, 1)
    assert not torch.equal(one.tensor_scale, two.tensor_scale)
    q = slicing.join_columns([one, two])
    exact = torch.cat([effective_weight(one), effective_weight(two)], 1)
    assert torch.allclose(effective_weight(q), exact, rtol=1e-5, atol=1e-5)
    plain = [replace(part, smooth=None, lowrank=None) for part in (one, two)]
    with pytest.raises(ValueError, match="different tensor scales"):
        slicing.join_columns(plain)


def test_a_tensor_scale_is_taken_up_exactly_or_not_at_all() -> None:
    q = linear(NVFP4, 128, 256)
    halves = [slicing.rows(q, 0, 64), slicing.rows(q, 64, 128)]
    assert halves[0].tensor_scale is not None
    small = replace(halves[1], scale=(halves[1].scale.float() / 4).to(torch.float8_e4m3fn))
    small = replace(small, tensor_scale=halves[0].tensor_scale * 4)
    assert torch.equal(effective_weight(small), effective_weight(halves[1]))
    fused = slicing.one_tensor_scale(slicing.join_rows([halves[0], small]))
    assert fused.tensor_scale is not None and fused.tensor_scale.numel() == 1
    assert torch.equal(effective_weight(fused), effective_weight(q))
    odd = replace(halves[1], tensor_scale=halves[0].tensor_scale * 1.37)
    with pytest.raises(ValueError, match="no scales of blocks"):
        slicing.one_tensor_scale(slicing.join_rows([halves[0], odd]))


def test_a_shift_is_taken_out_of_the_bias_of_the_exporters_layer() -> None:
    """In float64 from the golden codes: bias + 0.171875 times the sums of the rows over smooth."""
    bits = runpy.run_path(str(Path(__file__).with_name("test_svdq.py")))
    _, q = bits["golden_result"](load_file(GOLDEN), "linear_int4_shifted")
    assert q.shift == 0.171875
    weight = q.codes.double().view(256, -1, 64) * q.scale.double()[..., None]
    surplus = 0.171875 * (weight.view(256, -1) / q.smooth.double()).sum(1)
    plain = slicing.shifted(q, 0.0)
    assert plain.shift == 0.0 and torch.equal(plain.codes, q.codes)
    assert torch.allclose(plain.bias.double(), q.bias.double() + surplus, rtol=1e-5, atol=1e-6)
    back = slicing.shifted(plain, 0.171875)
    assert torch.equal(back.bias.bfloat16(), q.bias.bfloat16())


Q = linear(INT8_ROW, 128, 256)
REFUSED: list[tuple[Any, str]] = [
    (lambda: slicing.rows(linear(FP8_BLOCK, 256, 128), 0, 64), "inside of a tile of 128 rows"),
    (lambda: slicing.columns(linear(NVFP4, 128, 256), 0, 8), "inside of a tile of 16 columns"),
    (lambda: slicing.columns(replace(Q, rotation=256), 0, 64), "rotated group of 256 columns"),
    (lambda: slicing.join_columns([Q, linear(INT8_ROW, 128, 256, 1)]), "rows of the whole have"),
    (lambda: slicing.join_rows([Q, linear(MXFP8, 128, 256)]), "different formats"),
    (lambda: slicing.join_rows([Q, replace(Q, rotation=64)]), "rotated or shifted"),
    (lambda: slicing.join_rows([Q, replace(Q, smooth=torch.ones(256))]), "smooth vectors"),
    (lambda: slicing.join_rows([Q, replace(Q, input_scale=torch.ones(()))]), "static scales"),
    (lambda: slicing.join_rows([linear(FP8_TENSOR, 8, 8, s) for s in (0, 1)]), "the whole has one"),
    (lambda: slicing.join_rows([linear(FP8_BLOCK, n, 128) for n in (64, 128)]), "do not fill"),
    (lambda: slicing.widened(linear(INT4_GROUP64, 128, 128).lowrank, 8), "does not fit a rank"),
]


@pytest.mark.parametrize(("act", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_has_no_exact_place_is_refused(act: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        act()
