"""Packers: bytes of the reference exporter, closed forms by a slow loop, inverses.

tests/data/nunchaku.safetensors holds inputs in natural layout beside the tensors that
deepcompressor's exporter made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from dqconvert.formats import bits

GOLDEN = Path(__file__).parent / "data" / "nunchaku.safetensors"

tiles = st.integers(1, 3)
seeds = st.integers(0, 2**31)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


def raw(tensor: Tensor) -> Tensor:
    """The bytes, so that NaN patterns and negative zeros count."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def same(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(raw(one), raw(two))


def integers(low: int, high: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def halves(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Any 16-bit patterns, NaN among them."""
    return integers(-(2**15), 2**15, shape, seed).to(torch.int16).view(torch.bfloat16)


# golden bytes


def test_codes_are_the_exporters_bytes(golden: dict[str, Tensor]) -> None:
    assert same(bits.pack_codes(golden["int4.codes"]), golden["int4.qweight"])
    for name in ("linear_int4", "linear_int4_shifted"):
        packed = bits.pack_codes(golden[f"{name}.in.codes"])
        assert same(packed, golden[f"{name}.out.qweight"])


def test_nvfp4_codes_are_the_exporters_bytes(golden: dict[str, Tensor]) -> None:
    values = golden["linear_nvfp4.in.values"]
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = torch.searchsorted(magnitudes, values.abs()) | ((values < 0).long() << 3)
    packed = bits.pack_codes(codes.to(torch.uint8))
    assert same(packed, golden["linear_nvfp4.out.qweight"])


@pytest.mark.parametrize(
    ("pack", "natural", "packed"),
    [
        (bits.pack_group_scales, "int4.scales", "int4.wscales"),
        (bits.pack_group_scales, "linear_int4.in.scales", "linear_int4.out.wscales"),
        (bits.pack_micro_scales, "nvfp4.scales", "nvfp4.wscales"),
        (bits.pack_micro_scales, "linear_nvfp4.in.scales", "linear_nvfp4.out.wscales"),
        (bits.pack_vector, "vector.natural", "vector.packed"),
        (bits.pack_vector, "linear.in.smooth", "linear_int4.out.smooth"),
        (bits.pack_vector, "linear_int4.in.bias", "linear_int4.out.bias"),
        *[(bits.pack_down, f"lowrank{r}.down", f"lowrank{r}.down_packed") for r in (16, 32, 128)],
        *[(bits.pack_up, f"lowrank{r}.up", f"lowrank{r}.up_packed") for r in (16, 32, 128)],
        (bits.pack_up, "linear.in.up", "linear_nvfp4.out.lora_up"),
    ],
)
def test_scales_and_branches_are_the_exporters_bytes(
    golden: dict[str, Tensor], pack: Callable[[Tensor], Tensor], natural: str, packed: str
) -> None:
    assert same(pack(golden[natural]), golden[packed])


@pytest.mark.parametrize("splits", [3, 6])
def test_modulation_is_the_exporters_bytes(golden: dict[str, Tensor], splits: int) -> None:
    name = f"awq{splits}"
    codes = bits.interleave_chunks(golden[f"{name}.codes"], splits)
    assert same(bits.pack_awq_codes(codes), golden[f"{name}.qweight"])
    scales = bits.interleave_chunks(golden[f"{name}.scales"], splits).t()
    assert same(scales, golden[f"{name}.wscales"])
    assert same(bits.awq_zeros(scales), golden[f"{name}.wzeros"])
    bias = bits.add_ones(golden[f"{name}.bias_natural"], splits)
    assert same(bits.interleave_chunks(bias, splits), golden[f"{name}.bias"])


# the closed forms of the module's docstring, element by element


def test_codes_formula() -> None:
    n, k = 256, 128
    codes = integers(0, 16, (n, k)).to(torch.uint8)
    words = [0] * (n * k // 8)
    for row, column in product(range(n), range(k)):
        nt, np, npk, nl = row // 128, row % 128 // 16, row % 16 // 8, row % 8
        kt, kpk, kl, r = column // 64, column % 64 // 32, column % 32 // 8, column % 8
        word = ((((nt * (k // 64) + kt) * 8 + np) * 8 + nl) * 4 + kl) * 4 + npk * 2 + kpk
        words[word] |= int(codes[row, column]) << 4 * r
    expected = b"".join(word.to_bytes(4, "little") for word in words)
    assert bytes(raw(bits.pack_codes(codes)).tolist()) == expected


def test_group_scales_formula() -> None:
    n, groups = 256, 3
    natural = halves((n, groups)).view(torch.int16)
    expected = torch.empty(n * groups, dtype=torch.int16)
    for row, g in product(range(n), range(groups)):
        nt, a, b, c, d = row // 128, row % 128 // 16, row % 16 // 8, row % 8 // 2, row % 2
        expected[(nt * groups + g) * 128 + a * 16 + c * 4 + b * 2 + d] = natural[row, g]
    assert same(bits.pack_group_scales(natural), expected.view(groups, n))
    assert same(bits.pack_vector(natural[:, 0]), bits.pack_group_scales(natural[:, :1]).flatten())


def test_micro_scales_formula() -> None:
    n, groups = 256, 8
    natural = integers(0, 256, (n, groups)).to(torch.uint8)
    expected = torch.empty(n * groups, dtype=torch.uint8)
    for row, g in product(range(n), range(groups)):
        nt, p, q, lane = row // 128, row % 128 // 32, row % 32 // 8, row % 8
        kt, j = g // 4, g % 4
        flat = (((nt * (groups // 4) + kt) * 8 + lane) * 4 + q) * 16 + p * 4 + j
        expected[flat] = natural[row, g]
    micro = natural.view(torch.float8_e4m3fn)
    assert same(bits.pack_micro_scales(micro).view(torch.uint8), expected.view(groups, n))


def test_lowrank_formula() -> None:
    rank, channels = 32, 128
    down, up = halves((rank, channels), 1), halves((channels, rank), 2)
    flat_down = torch.empty(rank * channels, dtype=torch.int16)
    flat_up = torch.empty_like(flat_down)
    for cp, rp, h, s, u, t, e in product(
        range(channels // 16), range(rank // 16), range(2), range(8), range(2), range(4), range(2)
    ):
        flat = ((cp * (rank // 16) + rp) * 32 + s * 4 + t) * 8 + h * 4 + u * 2 + e
        outer, inner = 8 * h + s, 8 * u + 2 * t + e
        flat_down[flat] = down.view(torch.int16)[16 * rp + outer, 16 * cp + inner]
        flat_up[flat] = up.view(torch.int16)[16 * cp + outer, 16 * rp + inner]
    assert same(bits.pack_down(down).view(torch.int16), flat_down.view(channels, rank))
    assert same(bits.pack_up(up).view(torch.int16), flat_up.view(channels, rank))


def test_awq_codes_formula() -> None:
    n, k = 136, 128
    codes = integers(-7, 8, (n, k)).to(torch.int8)
    words = [0] * (n * k // 4)
    for row, column in product(range(n), range(k)):
        half, i, j = column % 64 // 32, column % 32 // 8, column % 8
        tile = row // 4 * (k // 64) + column // 64
        words[(tile * 4 + row % 4) * 16 + half * 8 + j] |= (int(codes[row, column]) + 7) << 4 * i
    expected = b"".join(word.to_bytes(2, "little") for word in words)
    packed = bits.pack_awq_codes(codes)
    assert packed.dtype == torch.int32
    assert packed.shape == (n // 4, k // 2)
    assert bytes(raw(packed).tolist()) == expected


# inverses, both ways: every packed pattern is reached


@settings(deadline=None, max_examples=25)
@given(tiles, tiles, seeds)
def test_codes_round_trip(nt: int, kt: int, seed: int) -> None:
    n, k = 128 * nt, 128 * kt
    packed = integers(-128, 128, (n, k // 2), seed).to(torch.int8)
    for dtype in (torch.int8, torch.uint8):
        codes = bits.unpack_codes(packed, dtype)
        assert same(bits.pack_codes(codes), packed)
    assert int(codes.max()) <= 15
    signed = integers(-8, 8, (n, k), seed).to(torch.int8)
    assert same(bits.unpack_codes(bits.pack_codes(signed), torch.int8), signed)


@settings(deadline=None, max_examples=25)
@given(tiles, tiles, tiles, seeds)
def test_scales_and_branches_round_trip(nt: int, kt: int, rt: int, seed: int) -> None:
    n, k, rank = 128 * nt, 128 * kt, 16 * rt
    scale = halves((n, k // 64), seed)
    micro = integers(0, 256, (n, k // 16), seed).to(torch.uint8).view(torch.float8_e4m3fn)
    down, up = halves((rank, k), seed), halves((n, rank), seed)
    assert same(bits.unpack_group_scales(bits.pack_group_scales(scale)), scale)
    assert same(bits.unpack_micro_scales(bits.pack_micro_scales(micro)), micro)
    assert same(bits.unpack_vector(bits.pack_vector(scale[:, 0])), scale[:, 0])
    assert same(bits.unpack_down(bits.pack_down(down)), down)
    assert same(bits.unpack_up(bits.pack_up(up)), up)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 80), tiles, seeds)
def test_awq_codes_round_trip(nt: int, kt: int, seed: int) -> None:
    packed = integers(-(2**31), 2**31, (nt, 32 * kt), seed).to(torch.int32)
    codes = bits.unpack_awq_codes(packed)
    assert codes.shape == (4 * nt, 64 * kt)
    assert same(bits.pack_awq_codes(codes), packed)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([2, 3, 6]), st.integers(1, 40), seeds)
def test_chunks_round_trip(splits: int, rows: int, seed: int) -> None:
    natural = halves((splits * rows, 2), seed)
    woven = bits.interleave_chunks(natural, splits)
    assert same(woven[splits - 1], natural[(splits - 1) * rows])
    assert same(bits.separate_chunks(woven, splits), natural)


def test_ones_go_to_the_scale_chunks() -> None:
    bias = torch.zeros(12, dtype=torch.bfloat16)
    assert bits.add_ones(bias, 6).tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0]
    assert bits.add_ones(bias, 3).tolist() == [0] * 4 + [1] * 4 + [0] * 4
    assert torch.equal(bits.remove_ones(bits.add_ones(bias, 6), 6), bias)


def test_awq_refuses_a_code_that_would_wrap() -> None:
    codes = torch.zeros(8, 64, dtype=torch.int8)
    codes[3, 5] = -8
    with pytest.raises(ValueError, match="-8"):
        bits.pack_awq_codes(codes)


def test_views_pack_like_copies() -> None:
    codes = integers(-7, 8, (256, 256)).to(torch.int8)
    odd = torch.empty(128 * 128 + 1, dtype=torch.int8)[1:].view(128, 128).copy_(codes[:128, :128])
    for view in (codes[:128, 128:], codes.t()[:128, :128], odd):
        assert same(bits.pack_codes(view), bits.pack_codes(view.clone().contiguous()))
        assert same(bits.pack_awq_codes(view), bits.pack_awq_codes(view.clone().contiguous()))
    unaligned = torch.empty(128 * 64 + 1, dtype=torch.int8)[1:].view(128, 64)
    unaligned.copy_(bits.pack_codes(odd))
    assert same(bits.unpack_codes(unaligned, torch.int8), odd)
