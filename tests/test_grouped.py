"""Packed int4 groups against their readers: compressed-tensors' compressor, auto-round's linear."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dqconvert.formats.form import PackedForm
from dqconvert.formats.layouts import Layout
from dqconvert.formats.layouts.grouped import Gptq, PackQuantized, pack_nibbles, unpack_nibbles
from dqconvert.quantizers.spec import QuantSpec
from dqconvert.quantizers.tensors import DTYPE_NAMES, QuantizedTensor

torch.set_num_threads(1)


def spec_of(group: int, zero_point: bool, scale: str = "F16") -> QuantSpec:
    if zero_point:
        return QuantSpec("uint4", (1, group), scale=scale, zero_point=True)
    return QuantSpec("int4", (1, group), scale=scale, full_range=True)


def result_of(form: PackedForm, seed: int = 0, lowest: int = 0) -> QuantizedTensor:
    """Every code, scales of both signs, and every zero point from lowest on."""
    rng = torch.Generator().manual_seed(seed)
    n, groups = form.spec.grid(form.shape)
    low, zero = -8, None
    if form.spec.zero_point:
        low = 0
        zero = torch.randint(lowest, 16, (n, groups), generator=rng).float()
    return QuantizedTensor(
        spec=form.spec,
        codes=torch.randint(low, low + 16, form.shape, generator=rng).to(torch.int8),
        scale=torch.randn((n, groups), generator=rng).half(),
        bias=torch.randn(n, generator=rng).bfloat16() if form.bias else None,
        zero=zero,
    )


def weight_of(q: QuantizedTensor) -> Tensor:
    """(code - zero) · scale in float64, the slow way."""
    group = q.spec.tile[1]
    scale = q.scale.double().repeat_interleave(group, 1)
    zero = 0 if q.zero is None else q.zero.double().repeat_interleave(group, 1)
    return (q.codes.double() - zero) * scale


@pytest.mark.parametrize("layout", [Gptq(), Gptq(offset=0), PackQuantized()], ids=repr)
@settings(deadline=None)
@given(
    shape=st.tuples(st.sampled_from((32, 64, 160)), st.sampled_from((128, 256, 384))),
    group=st.sampled_from((32, 64, 128)),
    zero_point=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_packing_loses_nothing_and_keeps_its_promise(
    layout: Layout, shape: tuple[int, int], group: int, zero_point: bool, bias: bool, seed: int
) -> None:
    form = PackedForm(spec_of(group, zero_point), shape, bias=bias)
    assert layout.problem(form) is None
    q = result_of(form, seed, lowest=getattr(layout, "offset", 0))
    tensors = layout.pack(form, q)
    found = {k: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for k, t in tensors.items()}
    assert found == {k: (info.dtype, info.shape) for k, info in layout.promise(form).items()}
    assert all(t.is_contiguous() for t in tensors.values())
    back = layout.unpack(form, tensors)
    assert (back.codes.dtype, back.scale.dtype) == (torch.int8, torch.float16)
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.scale, q.scale)
    assert (back.zero is None) == (q.zero is None)
    assert q.zero is None or (back.zero is not None and torch.equal(back.zero, q.zero))
    assert (back.bias is None) == (not bias)


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (13, 64), (8, 32)])
def test_compressed_tensors_reads_the_weight(zero_point: bool, shape: tuple[int, int]) -> None:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=4, group_size=32, strategy="group", symmetric=not zero_point)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    q = result_of(form := PackedForm(spec_of(32, zero_point, "F32"), shape, bias=False))
    q = replace(q, scale=q.scale.float())
    ours = PackQuantized().pack(form, q)
    read = PackedQuantizationCompressor.decompress(dict(ours), scheme)["weight"]
    assert torch.equal(read.double(), weight_of(q))
    state = {"weight": read, "weight_scale": q.scale}
    if q.zero is not None:
        state["weight_zero_point"] = (q.zero - 8).to(torch.int8)
    theirs = PackedQuantizationCompressor.compress(state, scheme)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.parametrize(("offset", "zero_point"), [(1, False), (0, False), (0, True), (1, True)])
def test_auto_rounds_linear_reads_the_weight(offset: int, zero_point: bool) -> None:
    """Its two torch linears add 1 to stored zero points, or nothing."""
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    form = PackedForm(spec_of(64, zero_point), (96, 192))
    q = result_of(form, lowest=offset)
    module = (qlinear_torch_zp if offset else qlinear_torch).QuantLinear(
        4, 64, form.shape[1], form.shape[0], bias=True
    )
    module.load_state_dict(Gptq(offset=offset).pack(form, q))
    assert q.bias is not None
    read = module(torch.eye(form.shape[1])) - q.bias.float()
    wanted = weight_of(q).half().float().T + q.bias.float() - q.bias.float()
    assert torch.allclose(read, wanted, atol=1e-3, rtol=2e-3)
    without = replace(form, bias=False)
    module.bias = None
    module.load_state_dict(Gptq(offset=offset).pack(without, replace(q, bias=None)))
    assert torch.equal(module(torch.eye(form.shape[1])), weight_of(q).half().float().T)


@given(rows=st.integers(0, 5), columns=st.integers(0, 40), seed=st.integers(0, 9))
def test_a_nibbles_place_in_its_word(rows: int, columns: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    nibbles = torch.randint(0, 16, (rows, columns), generator=rng).to(torch.uint8)
    packed = pack_nibbles(nibbles)
    assert packed.shape == (rows, -(-columns // 8))
    for row, words in zip(nibbles.tolist(), packed.tolist(), strict=True):
        for i, nibble in enumerate(row):
            assert (words[i // 8] >> 4 * (i % 8)) & 15 == nibble
    assert torch.equal(unpack_nibbles(packed, columns), nibbles)


def test_symmetric_zero_points_are_the_bytes_that_loaders_know() -> None:
    form = PackedForm(spec_of(32, False), (32, 64))
    stored = Gptq().pack(form, result_of(form))["qzeros"]
    assert set(stored.flatten().tolist()) == {0x77777777}


@pytest.mark.parametrize("zeros", [0.5, -1.0, 16.0, 0.0])
def test_a_zero_point_that_is_no_nibble_is_refused(zeros: float) -> None:
    form = PackedForm(spec_of(32, True), (32, 64))
    q = replace(result_of(form), zero=torch.full((32, 2), zeros))
    with pytest.raises(ValueError, match="zero points"):
        Gptq().pack(form, q)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"spec": QuantSpec("int8", (1, 64), scale="F16")}, "int4"),
        ({"spec": QuantSpec("uint4", (1, 64), scale="F16")}, "zero points"),
        ({"spec": QuantSpec("int4", (1, -1), scale="F16")}, "groups"),
        ({"spec": QuantSpec("int4", (1, 96), scale="F16")}, "do not make groups of 96"),
        ({"rank": 16}, "low-rank"),
        ({"rotation": 64}, "rotated"),
        ({"smooth": True}, "smooth"),
        ({"input_scale": True}, "static activation scale"),
        ({"bias_dtype": "I8"}, "bias"),
        ({"spec": spec_of(64, False, "F8_E4M3")}, "scales are"),
    ],
)
def test_what_cannot_be_packed_has_a_reason(change: dict[str, object], reason: str) -> None:
    form = replace(PackedForm(spec_of(64, False), (64, 128)), **change)  # type: ignore[arg-type]
    for layout in (Gptq(), PackQuantized()):
        assert reason in str(layout.problem(form))
    assert "F16, not BF16" in str(Gptq().problem(PackedForm(spec_of(64, False, "BF16"), (64, 128))))
    assert "multiples of 32" in str(Gptq().problem(PackedForm(spec_of(64, False), (24, 128))))
