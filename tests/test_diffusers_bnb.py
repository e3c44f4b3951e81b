"""bitsandbytes' own quantizer, tensors and modules read what we pack, on the CPU.

diffusers refuses bitsandbytes without a GPU; where its loader is tried, that one check is lifted.
"""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dqconvert.formats.form import PackedForm
from dqconvert.formats.layouts.bnb import STATE, Int8Rows, Nf4, dynamic_map
from dqconvert.formats.targets import target
from dqconvert.quantizers import rtn
from dqconvert.quantizers.errors import PlanError, SourceError
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.tensors import QuantizedTensor

torch.set_num_threads(1)
clients = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("flux_clients.py"))))
RUNTIME = target("diffusers")
NF4, INT8 = schemes()["bnb-nf4"].weight, schemes()["bnb-int8"].weight

weights = st.builds(
    lambda n, k, seed, gain: gain * torch.randn((n, 64 * k), generator=rng(seed)),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(0, 99),
    st.sampled_from((1e-4, 1.0, 3e4)),
)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def form_of(weight: Tensor, layout: str = "bitsandbytes") -> PackedForm:
    return PackedForm(NF4, (weight.shape[0], weight.shape[1]), bias=False, layout=layout)


def theirs(weight: Tensor, double: bool) -> dict[str, Tensor]:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        weight, blocksize=64, compress_statistics=double, quant_type="nf4"
    )
    named = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return {"weight": packed} | named


@settings(max_examples=30, deadline=None)
@given(weight=weights, zeros=st.booleans(), double=st.booleans())
def test_bytes_are_those_of_bitsandbytes(weight: Tensor, zeros: bool, double: bool) -> None:
    if zeros:
        weight[weight.shape[0] // 2] = 0
    form = form_of(weight)
    ours, other = Nf4(double).pack(form, rtn.quantize(weight, NF4)), theirs(weight, double)
    assert ours.keys() == other.keys()
    said = json.loads(bytes(ours.pop(STATE).tolist()))
    wanted = json.loads(bytes(other.pop(STATE).tolist()))
    assert said == {**wanted, "dtype": "bfloat16"}
    assert list(said) == list(wanted)
    if double:  # its CPU kernel looks boundaries up in a coarser table than its CUDA kernel does
        codes, near = ours.pop("weight.absmax"), other.pop("weight.absmax")
        live = ours["weight.nested_absmax"].repeat_interleave(256)[: len(codes)] > 0
        off = (codes.int() - near.int()).abs() * live
        assert int(off.max()) <= 1
        assert int(off.sum()) <= 1 + len(codes) // 100
        exact = exact_codes(rtn.quantize(weight, NF4))
        assert torch.equal(codes[live], exact[live])
    for name, tensor in ours.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


def exact_codes(q: QuantizedTensor) -> Tensor:
    """The codes of absmax by distance to every value, which other dtypes take in bitsandbytes."""
    zeros = (q.codes.view(-1, 64) == 7).all(1)
    absmax = q.scale.flatten().masked_fill(zeros, 0.0)
    rest = (absmax - absmax.mean()).double()
    codes, _ = torch.ops.bitsandbytes.quantize_blockwise.default(rest, dynamic_map(), 256)
    found: Tensor = codes
    return found


def test_the_dynamic_code_is_that_of_bitsandbytes() -> None:
    from bitsandbytes.functional import create_dynamic_map

    assert torch.equal(dynamic_map(), create_dynamic_map())


@settings(max_examples=20, deadline=None)
@given(weight=weights, double=st.booleans())
def test_its_parameter_gives_the_weight_back(weight: Tensor, double: bool) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    form = form_of(weight)
    packed = Nf4(double).pack(form, rtn.quantize(weight, NF4))
    stats = {f"layer.{name}": tensor for name, tensor in packed.items() if name != "weight"}
    parameter = Params4bit.from_prequantized(packed["weight"], stats, device="cpu")
    assert (parameter.quant_state.nested, tuple(parameter.quant_state.shape)) == (
        double,
        form.shape,
    )
    parameter.quant_state.dtype = torch.float32
    read = dequantize_4bit(parameter.data, parameter.quant_state)
    ours = rtn.dequantize(Nf4(double).unpack(form, packed))
    torch.testing.assert_close(read, ours, rtol=1e-6, atol=float(weight.abs().max()) * 1e-6)


def test_zeros_do_not_spoil_the_second_quantization() -> None:
    """A block of zeros counts as 0, not as the scale 1 that stands for nothing."""
    weight = torch.randn((64, 256), generator=rng(0)) * 1e-3
    weight[::2] = 0
    form = form_of(weight, "bitsandbytes-double")
    q = rtn.quantize(weight, NF4)
    back = Nf4(double=True).unpack(form, Nf4(double=True).pack(form, q))
    off = (rtn.dequantize(back) - rtn.dequantize(q)).norm() / weight.norm()
    assert off < 0.02
    assert bool((rtn.dequantize(back)[::2] == 0).all())


def test_a_broken_state_is_named() -> None:
    weight = torch.randn((4, 64), generator=rng(0))
    form = form_of(weight, "bitsandbytes-double")
    packed = Nf4(double=True).pack(form, rtn.quantize(weight, NF4))
    packed[STATE] = torch.zeros_like(packed[STATE])
    with pytest.raises(SourceError, match=r"quant_state\.bitsandbytes__nf4"):
        Nf4(double=True).unpack(form, packed)


@settings(max_examples=20, deadline=None)
@given(weight=weights)
def test_int8_rows_are_those_of_bitsandbytes(weight: Tensor) -> None:
    from bitsandbytes.functional import int8_vectorwise_quant

    form = PackedForm(INT8, (weight.shape[0], weight.shape[1]), bias=False)
    q = rtn.quantize(weight, INT8)
    packed = Int8Rows().pack(form, q)
    codes, scales, _ = int8_vectorwise_quant(weight)
    torch.testing.assert_close(packed["SCB"], scales, rtol=2**-23, atol=0)
    off = (packed["weight"].int() - codes.int()).abs()
    assert int(off.max()) <= 1  # 127/amax and amax/127 round ties apart
    assert int(off.sum()) <= 1 + codes.numel() // 1000
    back = Int8Rows().unpack(form, packed)
    assert torch.equal(back.codes, q.codes)
    torch.testing.assert_close(back.scale, q.scale, rtol=2**-23, atol=0)


def test_its_int8_linear_takes_the_tensors() -> None:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    weight, bias = torch.randn((96, 128), generator=rng(0)), torch.randn(96, generator=rng(1))
    form = PackedForm(INT8, (96, 128), bias_dtype="F32")
    q = replace(rtn.quantize(weight, INT8), bias=bias)
    module = Linear8bitLt(128, 96, has_fp16_weights=False)
    packed = Int8Rows().pack(form, q)
    module.bias.data = packed["bias"]
    module.weight = Int8Params(
        packed["weight"],
        requires_grad=False,
        has_fp16_weights=False,
        CB=packed["weight"],
        SCB=packed["SCB"],
    )
    x = torch.randn((32, 128), generator=rng(2)).half()
    wanted = x.float() @ rtn.dequantize(q).T + bias
    assert (module(x).float() - wanted).norm() / wanted.norm() < 0.02


@pytest.mark.parametrize(
    ("name", "layout", "tolerance"),
    [
        ("bnb-nf4", "bitsandbytes", 6e-3),
        ("bnb-nf4", "bitsandbytes-double", 6e-3),
        ("bnb-int8", "bitsandbytes", 8e-3),
    ],
)
def test_diffusers_runs_what_we_packed(
    name: str, layout: str, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import FluxTransformer2DModel
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    for kind in ("BnB4BitDiffusersQuantizer", "BnB8BitDiffusersQuantizer"):
        quantizer = getattr(bnb_quantizer, kind)
        monkeypatch.setattr(quantizer, "validate_environment", lambda *_, **__: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda *_: {"": "cpu"})
    model = clients.build()
    packed = clients.Packed(model, RUNTIME, schemes()[name], layout, also=("proj_out",))
    packed.write(tmp_path)
    found = FluxTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert type(found.proj_out) is not nn.Linear
    assert type(found.x_embedder) is nn.Linear
    wanted = clients.run(packed.reference)
    assert (clients.run(found) - wanted).norm() / wanted.norm() < tolerance


def test_a_module_that_its_loader_cannot_skip_alone_is_refused() -> None:
    """It compares the last parts of names, too: skipping proj_out skips those of the blocks."""
    packed = clients.Packed(clients.build(), RUNTIME, schemes()["bnb-nf4"], "bitsandbytes")
    with pytest.raises(PlanError, match="proj_out: bitsandbytes cannot skip it"):
        RUNTIME.config(packed.context)
