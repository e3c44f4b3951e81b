"""Block-scaled layouts: comfy-kitchen's, torchao's and modelopt's bytes, and the formulas."""

from __future__ import annotations

import itertools
import math
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dqconvert.formats.form import PackedForm
from dqconvert.formats.layouts.blocked import BlockScaled, from_blocked, to_blocked
from dqconvert.formats.layouts.nibbles import (
    pack_nibbles,
    pack_sixes,
    unpack_nibbles,
    unpack_sixes,
)
from dqconvert.quantizers.schemes.blocks import MXFP4, MXFP6, MXFP8, NVFP4
from dqconvert.quantizers.spec import QuantSpec
from dqconvert.quantizers.tensors import QuantizedTensor

samples = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("samples.py"))))
result_of, infos_of, same, raw = samples.result_of, samples.infos_of, samples.same, samples.raw

KITCHEN = BlockScaled(
    tensor_scale="weight_scale_2",
    input_scale="input_scale",
    smooth="pre_quant_scale",
    high_first=True,
    swizzled=True,
    pad=(16, 16),
)
MODELOPT = BlockScaled(tensor_scale="weight_scale_2", input_scale="input_scale")
COMPRESSED = BlockScaled(
    weight="weight_packed",
    tensor_scale="weight_global_scale",
    input_scale="input_global_scale",
    divisors=True,
    one=(1,),
)
LIGHTX2V = BlockScaled(
    input_scale="input_global_scale", alpha="alpha", swizzled=True, divisors=True
)
MX = BlockScaled(scales="F8_E8M0", swizzled=True)
MX_BYTES = BlockScaled(scale="weight_scale_inv", scales="U8")
MX_KITCHEN = BlockScaled(codes="F8_E4M3", scales="F8_E8M0", swizzled=True, pad=(32, 32))

PAIRS = [
    *((layout, NVFP4) for layout in (KITCHEN, MODELOPT, COMPRESSED, LIGHTX2V)),
    *((layout, spec) for layout in (MX, MX_BYTES) for spec in (MXFP4, MXFP6, MXFP8)),
    (MX_KITCHEN, MXFP8),
]

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def weight_of(n: int, k: int, seed: int = 0) -> Tensor:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02
    weight[n // 2] *= 50
    weight[n // 3] = 0
    return weight


def values(q: QuantizedTensor) -> Tensor:
    """What the logical result stands for."""
    codes = q.codes
    if q.spec.code == "e2m1":
        table = torch.cat((E2M1, -E2M1))
        numbers = table[codes.int()]
    else:
        numbers = codes.float()
    second = 1.0 if q.tensor_scale is None else q.tensor_scale.float()
    step = q.scale.float().repeat_interleave(q.spec.tile[1], 1)[:, : codes.shape[1]]
    return numbers * (step * second)


# the laws of every layout


@pytest.mark.parametrize(("layout", "spec"), PAIRS)
@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 150), blocks=st.integers(1, 9), odd=st.integers(0, 3), extra=st.booleans())
def test_a_promise_is_what_is_packed_and_nothing_is_lost(
    layout: BlockScaled, spec: QuantSpec, n: int, blocks: int, odd: int, extra: bool
) -> None:
    k = spec.tile[1] * blocks
    if layout.pad[1] > 1:
        spec, k = replace(spec, ragged=True), max(k - odd, 1)
    needs = bool(layout.alpha)
    form = PackedForm(
        spec,
        (n, k),
        bias=extra,
        input_scale=needs or (extra and bool(layout.input_scale)),
        smooth=extra and bool(layout.smooth),
    )
    assert layout.problem(form) is None
    q = result_of(form, False)
    packed = layout.pack(form, q)
    assert infos_of(packed) == layout.promise(form)
    assert all(tensor.is_contiguous() for tensor in packed.values())
    back = layout.unpack(form, packed)
    assert back.spec == spec
    for field in ("codes", "scale", "bias"):
        assert same(getattr(back, field), getattr(q, field)), field
    inverted = 0.0 if not layout.divisors else 1e-6
    for field, loss in (("tensor_scale", inverted), ("input_scale", inverted), ("smooth", 2**-8)):
        one, two = getattr(back, field), getattr(q, field)
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two.float(), rtol=loss, atol=0)


def test_an_empty_weight_has_a_layout() -> None:
    for layout, spec in PAIRS:
        form = PackedForm(spec, (0, 64), bias=False, input_scale=bool(layout.alpha))
        q = QuantizedTensor(
            spec,
            torch.zeros(0, 64, dtype=torch.uint8),
            torch.zeros(0, 64 // spec.tile[1], dtype=torch.uint8),
            torch.ones(1) if spec.tensor_scale else None,
            input_scale=torch.tensor(0.5) if layout.alpha else None,
        )
        assert infos_of(layout.pack(form, q)) == layout.promise(form)


# foreign bytes


@pytest.mark.parametrize("shape", [(128, 128), (48, 80), (33, 50), (300, 272)])
@pytest.mark.parametrize(
    ("name", "layout", "spec"),
    [
        ("TensorCoreNVFP4Layout", KITCHEN, NVFP4),
        ("TensorCoreMXFP8Layout", MX_KITCHEN, MXFP8),
    ],
)
def test_kitchens_bytes(
    name: str, layout: BlockScaled, spec: QuantSpec, shape: tuple[int, int]
) -> None:
    kitchen = pytest.importorskip("comfy_kitchen.tensor")
    theirs = kitchen.QuantizedTensor.from_float(weight_of(*shape), name)
    tensors = {
        key.removeprefix("layer."): tensor
        for key, tensor in theirs.state_dict("layer.weight").items()
    }
    form = PackedForm(replace(spec, ragged=True), shape, bias=False)
    q = layout.unpack(form, tensors)
    torch.testing.assert_close(values(q), theirs.dequantize()[: shape[0], : shape[1]])
    packed = layout.pack(form, q)
    assert packed.keys() == tensors.keys()
    for suffix, tensor in tensors.items():
        # kitchen types its powers of two as bytes or as e8m0, by version
        assert torch.equal(raw(packed[suffix]), raw(tensor)), suffix
        assert packed[suffix].shape == tensor.shape


def test_modelopts_bytes() -> None:
    pytest.importorskip("modelopt")
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    weight = weight_of(48, 96)
    qtensor, scale, second = NVFP4QTensor.quantize(weight, 16)
    tensors = {
        "weight": qtensor._quantized_data,
        "weight_scale": scale,
        "weight_scale_2": second,
    }
    form = PackedForm(NVFP4, (48, 96), bias=False)
    assert infos_of(tensors) == MODELOPT.promise(form)
    q = MODELOPT.unpack(form, tensors)
    packed = MODELOPT.pack(form, q)
    assert all(same(packed[suffix], tensor) for suffix, tensor in tensors.items())
    meant = qtensor.dequantize(
        torch.float32, scale=scale, double_scale=second, block_sizes={-1: 16}
    )
    torch.testing.assert_close(values(q), meant)


def test_compressed_tensors_read_our_bytes() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    form = PackedForm(NVFP4, (32, 64), bias=False)
    q = result_of(form, False)
    packed = COMPRESSED.pack(form, q)
    numbers = unpack_fp4_from_uint8(packed["weight_packed"], 32, 64, dtype=torch.float32)
    step = packed["weight_scale"].float().repeat_interleave(16, 1) / packed["weight_global_scale"]
    torch.testing.assert_close(numbers * step, values(q))


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 300), cols=st.integers(1, 21))
def test_the_swizzle_is_everybodys(rows: int, cols: int) -> None:
    kitchen = pytest.importorskip("comfy_kitchen.float_utils")
    scale = torch.randint(0, 256, (rows, cols), dtype=torch.uint8)
    blocked = to_blocked(scale)
    assert torch.equal(blocked, kitchen.to_blocked(scale, flatten=False))
    assert torch.equal(from_blocked(blocked, rows, cols), scale)
    assert torch.equal(from_blocked(blocked.flatten(), rows, cols), scale)
    torchao = pytest.importorskip("torchao.prototype.mx_formats.utils")
    assert torch.equal(blocked.flatten(), torchao.to_blocked(scale).flatten())


def test_the_swizzle_is_its_formula() -> None:
    scale = torch.randint(1, 256, (256, 12), dtype=torch.uint8)
    flat = to_blocked(scale).flatten()
    for r, c in itertools.product(range(256), range(12)):
        place = ((r // 128) * 3 + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
        assert flat[place] == scale[r, c]


# the traps: each loads without an error, and is noise


def test_nibble_orders_and_swizzle_are_not_interchangeable() -> None:
    """A file of one order read in the other is far from its weight; the shapes are the same."""
    form = PackedForm(NVFP4, (128, 64), bias=False)
    q = result_of(form, False)
    packed, meant = KITCHEN.pack(form, q), values(q)
    for wrong in (replace(KITCHEN, high_first=False), replace(KITCHEN, swizzled=False)):
        assert wrong.promise(form) == KITCHEN.promise(form)
        read = values(wrong.unpack(form, packed))
        assert float((read - meant).norm() / meant.norm()) > 0.3


def test_the_even_column_is_where_the_layout_says() -> None:
    codes = torch.tensor([[1, 2, 15, 8]], dtype=torch.uint8)
    assert pack_nibbles(codes).tolist() == [[0x21, 0x8F]]
    assert pack_nibbles(codes, high_first=True).tolist() == [[0x12, 0xF8]]
    signed = torch.tensor([[-8, 7, -1, 0]], dtype=torch.int8)
    assert pack_nibbles(signed).tolist() == [[0x78, 0x0F]]
    assert torch.equal(unpack_nibbles(pack_nibbles(signed), torch.int8), signed)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), fours=st.integers(1, 9), high=st.booleans())
def test_small_codes_are_bits_in_a_row(rows: int, fours: int, high: bool) -> None:
    """Read as one little-endian number, the codes follow one another, the first one lowest."""
    codes = torch.randint(0, 64, (rows, 4 * fours), dtype=torch.uint8)
    packed = pack_sixes(codes)
    for line, found in zip(codes.tolist(), packed.tolist(), strict=True):
        assert int.from_bytes(bytes(found), "little") == sum(c << 6 * i for i, c in enumerate(line))
    assert torch.equal(unpack_sixes(packed), codes)
    for dtype, low, top in ((torch.int8, -8, 8), (torch.uint8, 0, 16)):
        some = torch.randint(low, top, (rows, 4 * fours), dtype=dtype)
        assert torch.equal(unpack_nibbles(pack_nibbles(some, high), dtype, high), some)
    fourth = codes & 15
    for line, found in zip(fourth.tolist(), pack_nibbles(fourth).tolist(), strict=True):
        assert int.from_bytes(bytes(found), "little") == sum(c << 4 * i for i, c in enumerate(line))


def test_lightx2vs_alpha_is_the_product_of_both_scales() -> None:
    form = PackedForm(NVFP4, (32, 64), bias=False, input_scale=True)
    q = result_of(form, False)
    packed = LIGHTX2V.pack(form, q)
    assert q.tensor_scale is not None and q.input_scale is not None
    # its runtime: x · input_global_scale is quantized, codes · scales · alpha comes out
    gain = float(packed["input_global_scale"]) * float(packed["alpha"])
    assert math.isclose(gain, float(q.tensor_scale), rel_tol=1e-6)
    assert math.isclose(1 / float(packed["input_global_scale"]), float(q.input_scale), rel_tol=1e-6)


# what a layout cannot hold


REFUSED: list[tuple[BlockScaled, PackedForm, str]] = [
    (MX, PackedForm(MXFP8, (64, 48)), "48 input channels do not divide into blocks of 32"),
    (MODELOPT, PackedForm(replace(NVFP4, ragged=True), (64, 24)), "blocks of 16"),
    (MODELOPT, PackedForm(MXFP4, (64, 64)), "F8_E8M0"),
    (MX, PackedForm(NVFP4, (64, 64)), "F32"),
    (MX, PackedForm(QuantSpec("int4", (1, 64)), (64, 64)), "no block format"),
    (MX, PackedForm(MXFP8, (64, 64), input_scale=True), "static activation scale"),
    (MODELOPT, PackedForm(NVFP4, (64, 64), smooth=True), "smooth vector"),
    (KITCHEN, PackedForm(NVFP4, (64, 64), rotation=16), "rotated"),
    (KITCHEN, PackedForm(NVFP4, (64, 64), rank=16), "low-rank"),
    (KITCHEN, PackedForm(NVFP4, (64, 64), bias_dtype="I8"), "bias in I8"),
    (LIGHTX2V, PackedForm(NVFP4, (64, 64)), "range of the input"),
]


@pytest.mark.parametrize(("layout", "form", "reason"), REFUSED)
def test_what_has_no_place_is_refused(layout: BlockScaled, form: PackedForm, reason: str) -> None:
    assert reason in str(layout.problem(form))


def test_rows_with_scales_of_their_own_are_refused() -> None:
    form = PackedForm(NVFP4, (32, 32), bias=False)
    q = result_of(form, False)
    apart: Any = torch.tensor([1.0, 2.0]).repeat_interleave(16)
    with pytest.raises(ValueError, match="one for each row"):
        MODELOPT.pack(form, replace(q, tensor_scale=apart))
    equal = torch.full((32,), 0.5)
    assert MODELOPT.pack(form, replace(q, tensor_scale=equal))["weight_scale_2"] == 0.5
