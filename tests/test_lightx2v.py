"""LightX2V's files, read as its loader reads them: float tensors cast to bf16, scales as well,
blocks of scales out of the tiles of its kernels, by formulas in float64.
"""

from __future__ import annotations

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

from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.targets import lightx2v, target
from dqconvert.quantizers import recipe, rtn
from dqconvert.quantizers.errors import PlanError
from dqconvert.quantizers.recipe import RecipeOptions
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import Scheme, TensorInfo
from dqconvert.quantizers.tensors import LayerStats, LinearProblem

damage = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("damage.py"))))
samples = damage.samples

torch.set_num_threads(1)

RUNTIME = target("lightx2v")
SCHEMES = [name for name in schemes() if RUNTIME.accepts(schemes()[name]) is None]
N, K = 256, 384


def adapted(name: str) -> Scheme:
    return RUNTIME.adapt(schemes()[name], "")


def form_of(name: str, n: int = N, k: int = K) -> PackedForm:
    scheme = adapted(name)
    static = RUNTIME.static(scheme, "") == "required"
    return PackedForm(scheme.weight, (n, k), bias=False, input_scale=static)


def quantized(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The tensors of a layer, with statistics of some inputs."""
    x = torch.randn(32, weight.shape[1])
    stats = LayerStats(32, x.abs().amax(0), x.mean(0), (x * x).mean(0), None, x)
    problem = LinearProblem(weight, stats=stats)
    (q,) = recipe.quantize_group([problem], adapted(name), RecipeOptions())
    form = form_of(name, *weight.shape)
    q = q if form.input_scale else replace(q, input_scale=None)
    return RUNTIME.pack(form, q)


def loaded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What _load_quant_ckpt makes of them."""
    floats = (torch.float16, torch.bfloat16, torch.float32)
    return {k: t.to(torch.bfloat16) if t.dtype in floats else t for k, t in tensors.items()}


def unswizzled(scale: Tensor, rows: int, cols: int) -> Tensor:
    """Scales out of cutlass' 128 x 4 tiles, one by one."""
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    tiles = -(-cols // 4)
    place = ((r // 128) * tiles + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
    return scale.reshape(-1).view(torch.uint8)[place]


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)


def numbers(kind: str, weight: Tensor) -> Tensor:
    """What the bytes of block formats stand for, float64 [N, K]."""
    if kind == "mxfp8":
        return weight.view(torch.float8_e4m3fn).double()
    b = weight.long()
    if kind == "mxfp6":
        x, y, z = b.view(b.shape[0], -1, 3).unbind(-1)
        fours = (x & 63, x >> 6 | (y & 15) << 2, y >> 4 | (z & 3) << 4, z >> 2)
        codes = torch.stack(fours, -1).view(b.shape[0], -1)
        e, m = (codes >> 2) & 7, codes & 3
        size = torch.where(e > 0, 2.0 ** (e - 3).double() * (1 + m / 4), m / 4 * 2.0**-2)
        return torch.where(codes >> 5 > 0, -size, size)
    codes = torch.stack((b & 15, b >> 4), -1).view(b.shape[0], -1)
    return torch.where(codes >> 3 > 0, -E2M1[codes & 7], E2M1[codes & 7])


def weight_of(kind: str, tensors: dict[str, Tensor], k: int) -> Tensor:
    """The weight that LightX2V multiplies with, float64 [N, K]."""
    weight, scale = tensors["weight"], tensors["weight_scale"]
    if kind in ("int8", "fp8", "fp8-tensor"):
        return weight.double() * scale.double()
    n = weight.shape[0]
    if kind == "fp8-block128":
        full = scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
        return weight.double() * full[:n, :k]
    block = 16 if kind == "nvfp4" else 32
    found = unswizzled(scale, n, k // block)
    if kind == "nvfp4":
        step = found.view(torch.float8_e4m3fn).double()
        step = step * tensors["alpha"].double() * tensors["input_global_scale"].double()
    else:
        step = 2.0 ** (found.double() - 127)
    return numbers(kind, weight) * step.repeat_interleave(block, 1)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_loader_reads_the_weight_that_was_meant(name: str) -> None:
    """After its cast to bf16, to the last bit."""
    torch.manual_seed(0)
    weight = torch.randn(N, K) * torch.rand(N, 1)
    tensors = quantized(name, weight)
    meant = rtn.dequantize(RUNTIME.unpack(form_of(name), tensors))
    found = weight_of(name, loaded(tensors), K)
    torch.testing.assert_close(found.float(), meant, rtol=1e-6, atol=0)
    for suffix, tensor in tensors.items():
        if tensor.dtype == torch.float32 and suffix != "input_scale":
            assert torch.equal(tensor.bfloat16().float(), tensor), suffix


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from((0.0, 1e-6, 1.0, 1e4)))
def test_codes_are_the_nearest_under_the_scale_that_is_loaded(n: int, k: int, size: float) -> None:
    """A scale cast after rounding would be off by up to 0.4 %; int8 steps show it at 127."""
    weight = torch.randn(n, k) * size
    tensors = loaded(quantized("int8", weight))
    scale = tensors["weight_scale"].double()
    off = (tensors["weight"].double() * scale - weight.double()).abs()
    inside = weight.double().abs() <= 127.5 * scale
    assert bool((off <= scale * 0.5000001)[inside].all())


def test_the_scale_of_nvfp4_inputs_is_a_power_of_two_that_covers_them() -> None:
    torch.manual_seed(1)
    tensors = quantized("nvfp4", torch.randn(32, 64))
    scale = float(tensors["input_global_scale"])
    mantissa, _ = torch.frexp(torch.tensor(scale))
    assert float(mantissa) == 0.5
    torch.manual_seed(1)
    torch.randn(32, 64)
    top = float(torch.randn(32, 64).abs().amax())
    assert 0.5 < scale * top / 2688 <= 1


FORMS: dict[str, dict[str, TensorInfo]] = {
    "int8": {
        "weight": TensorInfo("I8", (N, K)),
        "weight_scale": TensorInfo("F32", (N, 1)),
    },
    "fp8": {
        "weight": TensorInfo("F8_E4M3", (N, K)),
        "weight_scale": TensorInfo("F32", (N, 1)),
    },
    "fp8-tensor": {
        "weight": TensorInfo("F8_E4M3", (N, K)),
        "weight_scale": TensorInfo("F32", ()),
        "input_scale": TensorInfo("F32", ()),
    },
    "fp8-block128": {
        "weight": TensorInfo("F8_E4M3", (N, K)),
        "weight_scale": TensorInfo("F32", (2, 3)),
    },
    "nvfp4": {
        "weight": TensorInfo("U8", (N, K // 2)),
        "weight_scale": TensorInfo("F8_E4M3", (N, K // 16)),
        "input_global_scale": TensorInfo("F32", ()),
        "alpha": TensorInfo("F32", ()),
    },
    "mxfp8": {
        "weight": TensorInfo("U8", (N, K)),
        "weight_scale": TensorInfo("F8_E8M0", (N, K // 32)),
    },
    "mxfp6": {
        "weight": TensorInfo("U8", (N, K * 3 // 4)),
        "weight_scale": TensorInfo("F8_E8M0", (N, K // 32)),
    },
    "mxfp4": {
        "weight": TensorInfo("U8", (N, K // 2)),
        "weight_scale": TensorInfo("F8_E8M0", (N, K // 32)),
    },
}


@pytest.mark.parametrize("name", SCHEMES)
def test_layers_have_the_tensors_of_their_kernel_and_no_others(name: str) -> None:
    assert RUNTIME.promise(form_of(name)) == FORMS[name]
    bias = RUNTIME.promise(replace(form_of(name), bias=True, bias_dtype="F16"))
    assert bias == FORMS[name] | {"bias": TensorInfo("F16", (N,))}


def test_scales_of_blocks_are_filled_up_to_their_tiles() -> None:
    promised = RUNTIME.promise(form_of("nvfp4", 96, 96))
    assert promised["weight_scale"].shape == (128, 8)
    assert RUNTIME.promise(form_of("mxfp8", 128, 96))["weight_scale"].shape == (128, 4)


def test_every_scheme_of_the_target_is_accepted() -> None:
    assert sorted(s.name for s in schemes().values() if "lightx2v" in s.targets) == SCHEMES


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("convrot-int8", "rotated weights"),
        ("svdquant-w4a4", "a low-rank branch"),
        ("gptq-w4a16", "not w4a16"),
        ("bnb-int8", "quantizes the inputs"),
        ("fp8-e5m2", "not e5m2"),
    ],
)
def test_other_schemes_are_refused_with_the_reason(name: str, reason: str) -> None:
    assert reason in (RUNTIME.accepts(schemes()[name]) or "")


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (replace(form_of("fp8-tensor"), input_scale=False), "need a static scale"),
        (replace(form_of("nvfp4"), input_scale=False), "need"),
        (replace(form_of("int8"), input_scale=True), "no static scale"),
        (form_of("nvfp4", 48, 64), "multiples of 32 rows and 32 columns"),
        (form_of("mxfp4", 128, 96), "multiples of 128 rows and 128 columns"),
        (form_of("mxfp8", 96, 96), "multiples of 128 rows"),
        (form_of("fp8-block128", 96, 96), "128 columns"),
        (replace(form_of("nvfp4"), parts=2), "stacks 2"),
    ],
)
def test_layers_that_a_kernel_does_not_take_are_refused(form: PackedForm, reason: str) -> None:
    assert reason in (RUNTIME.problem(form) or "")


# the config


def context_of(name: str, **changes: Any) -> FileContext:
    context: FileContext = samples.context_of(RUNTIME, schemes()[name])[0]
    return replace(context, facts={}, **changes)


@pytest.mark.parametrize(
    ("name", "kernel", "long"),
    [
        ("fp8", None, "W-fp8-channel-sym-A-fp8-channel-sym-dynamic-Sgl"),
        ("fp8", "fp8-vllm", "W-fp8-channel-sym-A-fp8-channel-sym-dynamic-Vllm"),
        ("fp8", "fp8-q8f", "W-fp8-channel-sym-A-fp8-channel-sym-dynamic-Q8F"),
        ("fp8", "fp8-triton", None),
        ("int8", None, "W-int8-channel-sym-A-int8-channel-sym-dynamic-Vllm"),
        ("int8", "int8-torchao", "W-int8-channel-sym-A-int8-channel-sym-dynamic-Torchao"),
        (
            "fp8-block128",
            None,
            "W-fp8-block128-sym-A-fp8-channel-group128-sym-dynamic-Deepgemm",
        ),
        ("mxfp6", None, None),
    ],
)
def test_the_config_says_the_kernel_and_nothing_foreign(
    name: str, kernel: str | None, long: str | None
) -> None:
    settings = {} if kernel is None else {"kernel": kernel}
    said = RUNTIME.config(context_of(name, settings=settings))
    assert said is not None
    expected: dict[str, Any] = {
        "dit_quantized": True,
        "dit_quant_scheme": kernel or lightx2v.KERNELS[name][0],
    }
    assert said == expected | ({"mm_config": {"mm_type": long}} if long else {})


def test_kernels_are_those_that_the_loader_accepts() -> None:
    """The list in _check_dit_quantized, without formats of other files."""
    known = {
        *(f"fp8-{name}" for name in ("pertensor", "triton", "vllm", "q8f", "sgl", "torchao")),
        *(f"int8-{name}" for name in ("triton", "vllm", "q8f", "sgl", "torchao", "npu")),
        *("fp8-b128-deepgemm", "fp8-intel-xpu", "nvfp4", "mxfp4", "mxfp6-mxfp8", "mxfp8"),
    }
    assert set(lightx2v.SETTINGS["kernel"]) == known


def test_a_kernel_of_another_format_is_refused() -> None:
    with pytest.raises(PlanError, match="fp8-sgl: computes no int8; for that there is int8-vllm"):
        RUNTIME.config(context_of("int8", settings={"kernel": "fp8-sgl"}))


@pytest.mark.parametrize("component", ["t5", "clip"])
def test_encoders_have_keys_of_their_own(component: str) -> None:
    facts = {"component": component}
    context = replace(context_of("int8"), facts=facts)
    said = {f"{component}_quantized": True, f"{component}_quant_scheme": "int8-vllm"}
    assert RUNTIME.config(context) == said
    with pytest.raises(PlanError, match=f"reads no {component} in nvfp4"):
        RUNTIME.config(replace(context_of("nvfp4"), facts=facts))


# files


def test_blocks_go_to_the_files_that_the_loader_opens() -> None:
    """block_{name.split('.')[1]} for what is in blocks; the rest is read beforehand."""
    names = (
        "patch_embedding.weight",
        "text_embedding.0.weight",
        "blocks.0.self_attn.q.weight",
        "blocks.0.self_attn.q.weight_scale",
        "blocks.11.ffn.2.bias",
        "double_blocks.11.img_attn_q.weight",
        "blocks.0.modulation",
        "head.head.weight",
    )
    context = context_of("fp8", settings={"save-by-block": "yes"})
    assert lightx2v.files(context, names) == {
        "non_block.safetensors": (names[0], names[1], names[7]),
        "block_0.safetensors": (names[2], names[3], names[6]),
        "block_11.safetensors": (names[4], names[5]),
    }
    assert lightx2v.files(context_of("fp8"), names) == {"toy-fp8.safetensors": names}


@pytest.mark.parametrize("name", SCHEMES)
def test_a_file_without_its_config_is_known_by_its_tensors(name: str) -> None:
    context, infos = samples.context_of(RUNTIME, schemes()[name])
    file = RUNTIME.recognize(infos, {"format": "pt"}, {})
    assert file is not None
    assert file.problems == ()
    assert (file.scheme, file.forms.keys()) == (name, context.layers.keys())
    for metadata in ({"quantization_config": "{}"}, {"_quantization_metadata": "{}"}):
        assert RUNTIME.recognize(infos, metadata, {}) is None
    assert RUNTIME.recognize(infos, {}, {"quantization_config": {"quant_method": "fp8"}}) is None


@pytest.mark.parametrize("name", ["int8", "fp8-tensor", "fp8-block128", "nvfp4", "mxfp6"])
def test_every_missing_or_wrong_tensor_is_named(name: str) -> None:
    assert damage.unnamed(RUNTIME, schemes()[name], "") == []


def test_scales_that_another_converter_left_in_bf16_are_no_damage() -> None:
    context, infos = samples.context_of(RUNTIME, schemes()["fp8"])
    loose = {
        name: replace(info, dtype="BF16") if name.endswith("weight_scale") else info
        for name, info in infos.items()
    }
    file = RUNTIME.recognize(loose, {}, RUNTIME.config(context) or {})
    assert file is not None
    assert file.problems == ()
