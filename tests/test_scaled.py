"""The layout of 8-bit weights with plain scales: w = weight · weight_scale, in every shape that
runtimes give the scale.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqconvert.formats.form import PackedForm
from dqconvert.formats.layouts.scaled import Scaled
from dqconvert.quantizers import rtn
from dqconvert.quantizers.schemes.blocks import NVFP4
from dqconvert.quantizers.schemes.plain8 import (
    E5M2_TENSOR,
    FP8_BLOCK,
    FP8_ROW,
    FP8_TENSOR,
    INT8_ROW,
)
from dqconvert.quantizers.spec import ALL, QuantSpec, TensorInfo
from dqconvert.quantizers.tensors import DTYPE_NAMES

torch.set_num_threads(1)

UNIT = QuantSpec("e4m3", (ALL, ALL), unit=True)
SPECS = (INT8_ROW, FP8_ROW, FP8_TENSOR, E5M2_TENSOR)


@given(
    st.sampled_from(SPECS),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(((), (1,))),
    st.booleans(),
)
def test_codes_times_scale_is_the_weight(
    spec: QuantSpec, rows: int, cols: int, one: tuple[int, ...], column: bool
) -> None:
    layout = Scaled(one=one, column=column)
    weight = torch.randn(rows, cols)
    q = rtn.quantize(weight, spec)
    form = PackedForm(spec, (rows, cols), bias=False)
    tensors = layout.pack(form, q)
    found = {k: TensorInfo(DTYPE_NAMES[t.dtype], tuple(t.shape)) for k, t in tensors.items()}
    assert found == layout.promise(form)
    scale = tensors["weight_scale"].double()
    scale = scale[:, None] if scale.shape == (rows,) and spec.tile[0] == 1 else scale
    product = tensors["weight"].double() * scale
    assert torch.equal(product.float(), rtn.dequantize(q))
    back = layout.unpack(form, tensors)
    assert torch.equal(back.codes.view(torch.int8), q.codes.view(torch.int8))
    assert torch.equal(back.scale, q.scale)


@pytest.mark.parametrize(
    ("layout", "spec", "shape"),
    [
        (Scaled(), INT8_ROW, (6, 1)),
        (Scaled(column=False), INT8_ROW, (6,)),
        (Scaled(), FP8_TENSOR, ()),
        (Scaled(one=(1,)), FP8_TENSOR, (1,)),
    ],
)
def test_scales_have_the_shape_that_the_runtime_reads(
    layout: Scaled, spec: QuantSpec, shape: tuple[int, ...]
) -> None:
    promised = layout.promise(PackedForm(spec, (6, 10), bias=False))
    assert promised["weight_scale"] == TensorInfo("F32", shape)


@pytest.mark.parametrize("shape", [(128, 128), (130, 257), (1, 1), (300, 64)])
def test_blocks_may_end_early(shape: tuple[int, int]) -> None:
    """Each block of 128 x 128 times its own scale, in float64."""
    layout = Scaled("weight_scale_inv")
    torch.manual_seed(0)
    scale = torch.rand(FP8_BLOCK.grid(shape)) + 0.1
    codes = torch.randn(shape).to(torch.float8_e4m3fn)
    form = PackedForm(FP8_BLOCK, shape, bias=False)
    tensors = layout.pack(form, rtn.QuantizedTensor(FP8_BLOCK, codes, scale))
    stored = tensors["weight_scale_inv"]
    assert stored.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    full = stored.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    q = layout.unpack(form, tensors)
    again = q.scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    assert torch.equal(codes.double() * full.double(), q.codes.double() * again.double())


def test_narrow_scales_come_back_exactly() -> None:
    spec = QuantSpec("int8", (1, ALL), scale="BF16")
    q = rtn.quantize(torch.randn(9, 33), spec)
    assert q.scale.dtype == torch.bfloat16
    form = PackedForm(spec, (9, 33), bias=False)
    tensors = Scaled().pack(form, q)
    assert tensors["weight_scale"].dtype == torch.float32
    back = Scaled().unpack(form, tensors)
    assert back.scale.dtype == torch.bfloat16
    assert torch.equal(back.scale, q.scale)


def test_a_weight_without_scales_is_its_codes() -> None:
    form = PackedForm(UNIT, (4, 5), bias=False)
    codes = torch.randn(4, 5).to(torch.float8_e4m3fn)
    q = rtn.QuantizedTensor(UNIT, codes, torch.ones(1, 1))
    tensors = Scaled().pack(form, q)
    assert list(tensors) == ["weight"]
    assert torch.equal(Scaled().unpack(form, tensors).scale, torch.ones(1, 1))


def test_static_scales_and_biases_must_be_as_promised() -> None:
    form = PackedForm(FP8_TENSOR, (4, 4), input_scale=True, bias_dtype="F16")
    q = rtn.quantize(torch.randn(4, 4), FP8_TENSOR)
    with pytest.raises(ValueError, match="static"):
        Scaled().pack(form, q)
    static = rtn.QuantizedTensor(q.spec, q.codes, q.scale, input_scale=torch.tensor(0.5))
    with pytest.raises(ValueError, match="bias"):
        Scaled().pack(form, static)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (PackedForm(NVFP4, (32, 32)), "one level of scales"),
        (PackedForm(FP8_ROW, (32, 32), rank=16), "room for codes and scales alone"),
        (PackedForm(FP8_ROW, (32, 32), rotation=16), "room for codes and scales alone"),
        (PackedForm(FP8_ROW, (32, 32), bias_dtype="I8"), "a bias in I8"),
        (PackedForm(QuantSpec("e4m3", (128, 128)), (32, 32)), "does not divide"),
        (PackedForm(QuantSpec("e4m3", (1, 32), scale="F8_E8M0"), (32, 32)), "F8_E8M0"),
    ],
)
def test_what_has_no_room_is_refused(form: PackedForm, reason: str) -> None:
    assert reason in (Scaled().problem(form) or "")
    assert Scaled().problem(PackedForm(FP8_ROW, (32, 32))) is None
