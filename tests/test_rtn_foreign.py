"""Rounding to nearest gives the bytes of comfy-kitchen, torchao, ModelOpt and bitsandbytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dqconvert.quantizers import codes as element
from dqconvert.quantizers import rtn
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.schemes.blocks import MXFP4, MXFP8, NVFP4
from dqconvert.quantizers.schemes.plain8 import E5M2_TENSOR
from dqconvert.quantizers.schemes.svdquant import NVFP4_BF16
from dqconvert.quantizers.spec import QuantSpec

torch.set_num_threads(1)
INT8, FP8 = schemes()["int8"].weight, schemes()["fp8-tensor"].weight
NF4 = schemes()["bnb-nf4"].weight


def draw(shape: tuple[int, int], seed: int, gain: float, spikes: bool) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=rng) * gain
    if spikes:
        weight.view(-1)[torch.randint(weight.numel(), (2,), generator=rng)] *= 100
    return weight


@pytest.fixture(scope="module")
def weights() -> list[Tensor]:
    zeros, row = torch.zeros(4, 32), draw((4, 32), 8, 1.0, False)
    row[2] = 0
    shapes = ((1, 1), (7, 33), (48, 80), (3, 1000))
    many = [draw(s, i, 10.0**m, True) for i, s in enumerate(shapes) for m in (-6, -2, 0, 6)]
    return [zeros, row, *many, (row * 2).round() / 2, torch.full((2, 8), 1e-35)]


def test_int8_rows_are_kitchens(weights: list[Tensor]) -> None:
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    for weight in weights:
        codes, scale = kitchen.quantize_int8_rowwise(weight)
        ours = rtn.quantize(weight, INT8)
        assert torch.equal(ours.codes, codes)
        assert torch.equal(ours.scale, scale)


def test_fp8_tensors_are_kitchens(weights: list[Tensor]) -> None:
    """Except for zeros, which become NaN there: its scale is 0. Ours has scale 1."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    for weight in weights:
        ours = rtn.quantize(weight, FP8)
        scale = weight.abs().amax() / 448
        if float(scale) == 0:
            assert float(ours.scale) == 1 and not bool(ours.codes.float().any())
            continue
        assert float(ours.scale) == float(scale)
        theirs = kitchen.quantize_per_tensor_fp8(weight, scale)
        assert torch.equal(ours.codes.view(torch.uint8), theirs.view(torch.uint8))


def test_e2m1_is_kitchens() -> None:
    """All ties, their neighbours, both zeros, and what saturates."""
    kitchen = pytest.importorskip("comfy_kitchen.float_utils")
    halves = torch.arange(-32, 33).float() / 4
    values = [halves, torch.nextafter(halves, halves + 1), torch.nextafter(halves, halves - 1)]
    values += [torch.linspace(-9, 9, 30001), torch.tensor([1e-45, -1e-45, 1e30, -1e30, -0.0])]
    x = torch.cat(values)
    assert torch.equal(
        element.round_to(x.clone(), "e2m1"), kitchen._f32_to_floatx_unpacked(x, 2, 1)
    )
    codes = torch.arange(16, dtype=torch.uint8)
    theirs = kitchen._floatx_unpacked_to_f32(codes, 2, 1)
    assert torch.equal(element.decode(codes, "e2m1"), theirs)


def test_nvfp4_is_kitchens(weights: list[Tensor]) -> None:
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    spec = replace(NVFP4_BF16, tensor_scale="F32")
    zero_rows = draw((128, 64), 1, 1.0, False)
    zero_rows[5] = 0
    zero_rows[6] *= 1e-9
    for weight in (zero_rows, draw((128, 64), 2, 1e-5, True), draw((256, 128), 3, 1e5, False)):
        ours = rtn.quantize(weight, spec)
        assert ours.tensor_scale is not None
        packed, blocked = kitchen.quantize_nvfp4(weight, ours.tensor_scale[0])
        codes = torch.stack([packed >> 4, packed & 15], -1).view(weight.shape)
        assert torch.equal(ours.codes, codes)
        scales = kitchen.from_blocked(blocked, weight.shape[0], weight.shape[1] // 16)
        assert torch.equal(ours.scale.float(), scales.float())


def test_fp8_e5m2_tensors_are_kitchens(weights: list[Tensor]) -> None:
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    for weight in weights:
        ours = rtn.quantize(weight, E5M2_TENSOR)
        scale = weight.abs().amax() / 57344
        if float(scale) < 1e-37:  # theirs becomes infinite, and NaN
            continue
        assert float(ours.scale) == float(scale)
        theirs = kitchen.quantize_per_tensor_fp8(weight, scale, torch.float8_e5m2)
        assert torch.equal(ours.codes.view(torch.uint8), theirs.view(torch.uint8))


def test_e3m2_is_kitchens() -> None:
    """All ties, their neighbours, both zeros, and what saturates."""
    kitchen = pytest.importorskip("comfy_kitchen.float_utils")
    ties = torch.arange(-1024, 1025).float() / 32
    values = [ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)]
    values += [torch.linspace(-40, 40, 30001), torch.tensor([1e-45, -1e-45, 1e30, -1e30, -0.0])]
    x = torch.cat(values)
    assert torch.equal(
        element.round_to(x.clone(), "e3m2"), kitchen._f32_to_floatx_unpacked(x, 3, 2)
    )
    codes = torch.arange(64, dtype=torch.uint8)
    assert torch.equal(element.decode(codes, "e3m2"), kitchen._floatx_unpacked_to_f32(codes, 3, 2))


def blocks_of_all_sizes() -> list[Tensor]:
    rows = draw((128, 128), 1, 1.0, True)
    rows[5] = 0
    rows *= torch.logspace(-33, 30, 128)[:, None]
    return [rows, draw((128, 128), 2, 1e-5, True), draw((256, 128), 3, 1e5, False)]


def test_mxfp8_is_kitchens() -> None:
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    for weight in blocks_of_all_sizes():
        ours = rtn.quantize(weight, MXFP8)
        codes, blocked = kitchen.quantize_mxfp8(weight)
        assert torch.equal(ours.codes.view(torch.uint8), codes.view(torch.uint8))
        scales = kitchen.from_blocked(blocked.view(torch.uint8), weight.shape[0], 4)
        assert torch.equal(ours.scale.view(torch.uint8), scales)


@pytest.mark.parametrize(("spec", "dtype"), [(MXFP8, "float8_e4m3fn"), (MXFP4, "float4_e2m1fn_x2")])
def test_powers_of_two_are_torchaos(spec: QuantSpec, dtype: str) -> None:
    """Rounded up. Only a hair above a power of two theirs may stay below, by its log2 in fp32."""
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    rceil = mx.ScaleCalculationMode.RCEIL
    edges = spec.maximum * 2.0 ** torch.arange(-96, 96).float()
    weight = torch.cat([edges, edges * 1.01, edges * 0.99])[:, None] * torch.linspace(-1, 0.5, 32)
    for case in (weight, draw((64, 64), 9, 0.02, True)):
        scale, codes = mx.to_mx(case, getattr(torch, dtype), 32, rceil)
        ours = rtn.quantize(case, spec)
        assert torch.equal(ours.scale.view(torch.uint8), scale.view(torch.uint8))
        theirs = codes.view(torch.uint8)
        if spec is MXFP4:  # two codes a byte, the first one low
            theirs = torch.stack([theirs & 15, theirs >> 4], -1).view(case.shape)
        assert torch.equal(ours.codes.view(torch.uint8), theirs)


def test_nvfp4_is_modelopts() -> None:
    modelopt = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor")
    for gain in (1e-5, 0.02, 1e5):
        weight = draw((48, 128), 6, gain, True)
        theirs, scale, second = modelopt.NVFP4QTensor.quantize(weight, 16)
        ours = rtn.quantize(weight, NVFP4)
        assert ours.tensor_scale is not None and float(ours.tensor_scale) == float(second)
        assert torch.equal(ours.scale.float(), scale.float())
        packed = theirs._quantized_data
        codes = torch.stack([packed & 15, packed >> 4], -1).view(weight.shape)
        assert torch.equal(element.decode(ours.codes, "e2m1"), element.decode(codes, "e2m1"))


def test_nf4_is_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for gain in (1e-5, 0.02, 1e5):
        weight = draw((48, 128), 6, gain, True)
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        ours = rtn.quantize(weight, NF4)
        codes = torch.stack([packed >> 4, packed & 15], -1).view(weight.shape)
        assert torch.equal(ours.codes, codes)
        assert torch.equal(ours.scale.view(-1), state.absmax)
        theirs = functional.dequantize_4bit(packed, state)
        assert torch.equal(rtn.dequantize(ours), theirs)


@pytest.mark.parametrize("spec", [MXFP8, MXFP4])
def test_powers_of_two_are_the_next_ones_above(spec: QuantSpec) -> None:
    """As cvt.rp.satfinite.ue8m0x2.f32 has them: exact up to the last bit, so nothing saturates."""
    edges = spec.maximum * 2.0 ** torch.arange(-90, 90).float()
    for gain, more in ((1.0, 0), (1 + 2.0**-23, 1), (1 + 2.0**-22, 1), (1 - 2.0**-24, 0), (2.0, 1)):
        weight = (edges * gain)[:, None].expand(-1, 32)
        want = torch.arange(-90, 90) + 127 + more
        assert torch.equal(rtn.quantize(weight, spec).scale.view(torch.uint8)[:, 0].long(), want)
