"""ComfyUI's formats are comfy-kitchen's bytes, announced in markers and header alike."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dqconvert.formats import comfy
from dqconvert.formats.form import PackedForm
from dqconvert.formats.targets import target
from dqconvert.quantizers import hadamard, lut, rtn
from dqconvert.quantizers.forward import effective_weight
from dqconvert.quantizers.schemes import scheme, schemes
from dqconvert.quantizers.spec import ALL, Scheme
from dqconvert.quantizers.tensors import QuantizedTensor

samples = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("samples.py"))))
result_of, context_of, infos_of = samples.result_of, samples.context_of, samples.infos_of
raw, same = samples.raw, samples.same

COMFYUI = target("comfyui")
OURS = [s for s in schemes().values() if "comfyui" in s.targets]

KITCHENS: list[tuple[str, str, dict[str, Any]]] = [
    ("int8", "TensorWiseINT8Layout", {"per_channel": True}),
    ("fp8-tensor", "TensorCoreFP8Layout", {}),
    ("fp8-e5m2", "TensorCoreFP8Layout", {"dtype": torch.float8_e5m2}),
    ("mxfp8", "TensorCoreMXFP8Layout", {}),
    ("nvfp4", "TensorCoreNVFP4Layout", {}),
    ("convrot-int8", "TensorWiseINT8Layout", {"per_channel": True, "convrot": True}),
    ("convrot-w4a4", "TensorCoreConvRotW4A4Layout", {}),
    ("convrot-w4a8", "AsymW4A8Int8Layout", {}),
]
"""Schemes that comfy-kitchen quantizes itself, and what to tell it."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def weight_of(n: int, k: int) -> Tensor:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[3] *= 50
    weight[:, 5] *= 8
    weight[7] = 0
    return weight


def rounded(name: str, weight: Tensor, rotation: int) -> tuple[PackedForm, QuantizedTensor]:
    """A weight rounded to nearest by a scheme, and its form."""
    spec = COMFYUI.adapt(scheme(name), "comfy-quant").weight
    turned = hadamard.rotate(weight, rotation)
    q = lut.quantize(turned, spec) if spec.code == "lut4" else rtn.quantize(turned, spec)
    form = PackedForm(spec, (weight.shape[0], weight.shape[1]), bias=False, rotation=rotation)
    return form, replace(q, rotation=rotation)


def loaded(packed: dict[str, Tensor], shape: tuple[int, int]) -> Any:
    """A layer as ComfyUI builds it: from its tensors and the words of its marker alone."""
    kitchen = pytest.importorskip("comfy_kitchen.tensor")
    said = json.loads(bytes(packed["comfy_quant"].tolist()))
    name, scale = said["format"], packed.get("weight_scale")
    rotation = said.get("convrot_groupsize", 256)
    layout, fields = {
        "int8_tensorwise": (
            "TensorWiseINT8Layout",
            {"convrot": said.get("convrot", False), "convrot_groupsize": rotation},
        ),
        "float8_e4m3fn": ("TensorCoreFP8Layout", {}),
        "float8_e5m2": ("TensorCoreFP8Layout", {}),
        "mxfp8": ("TensorCoreMXFP8Layout", {}),
        "nvfp4": (
            "TensorCoreNVFP4Layout",
            {"block_scale": scale, "scale": packed.get("weight_scale_2")},
        ),
        "convrot_w4a4": ("TensorCoreConvRotW4A4Layout", {"convrot_groupsize": rotation}),
        "asym_w4a8_int8": (
            "AsymW4A8Int8Layout",
            {
                "scale": packed.get("weight_s_rel"),
                "s_channel": packed.get("weight_s_channel"),
                "codebook": packed.get("weight_codebook"),
                "group_size": said.get("group_size", 16),
                "convrot_groupsize": rotation,
            },
        ),
        "awq_w4a16": (
            "TensorCoreAWQW4A16Layout",
            {"zeros": packed.get("weight_zeros"), "group_size": said.get("group_size", 64)},
        ),
    }[name]
    params = {"scale": scale, "orig_dtype": torch.float32, "orig_shape": shape, **fields}
    kind = kitchen.get_layout_class(layout)
    return kitchen.QuantizedTensor(packed["weight"], layout, kind.Params(**params))


# bytes


@pytest.mark.parametrize(("name", "layout", "words"), KITCHENS)
@pytest.mark.parametrize("shape", [(48, 256), (33, 320), (130, 512)])
def test_our_bytes_are_kitchens(
    name: str, layout: str, words: dict[str, Any], shape: tuple[int, int]
) -> None:
    kitchen = pytest.importorskip("comfy_kitchen.tensor")
    weight, ours = weight_of(*shape), scheme(name)
    rotation = samples.rotation_of(ours, shape[1])
    if rotation:
        words = {**words, "convrot_groupsize": rotation}
    theirs = kitchen.QuantizedTensor.from_float(weight, layout, **words)
    form, q = rounded(name, weight, rotation)
    assert COMFYUI.problem(form) is None
    packed = COMFYUI.pack(form, q)
    for key, tensor in theirs.state_dict("weight").items():
        assert packed[key].shape == tensor.shape, key
        assert torch.equal(raw(packed[key]), raw(tensor)), key
    back = COMFYUI.unpack(form, packed)
    torch.testing.assert_close(
        effective_weight(back), theirs.dequantize()[: shape[0], : shape[1]], rtol=1e-5, atol=1e-6
    )


def forms_of(one: Scheme) -> list[PackedForm]:
    found = samples.forms_in(COMFYUI, COMFYUI.adapt(one, "comfy-quant"), "comfy-quant")
    some = [form for form in found if COMFYUI.problem(form) is None and not form.smooth]
    return [form for form in some if form.shape in ((128, 128), (96, 192))][:6]


@pytest.mark.parametrize("one", OURS, ids=lambda one: one.name)
@pytest.mark.parametrize("zero_points", [False, True])
def test_kitchen_decodes_what_we_mean(one: Scheme, zero_points: bool) -> None:
    """Random codes and scales of every format, also those that it cannot quantize itself."""
    for form in forms_of(one):
        if zero_points:
            if form.spec.scale != "BF16":
                continue
            spec = replace(form.spec, code="uint4", zero_point=True, full_range=False)
            form = replace(form, spec=spec)
        q = result_of(form, False)
        packed = COMFYUI.pack(form, q)
        theirs = loaded(packed, form.shape)
        meant = effective_weight(COMFYUI.unpack(form, packed))
        n, k = form.shape
        torch.testing.assert_close(theirs.dequantize()[:n, :k], meant, rtol=2e-3, atol=2e-3)
        if one.activation is None:
            x = torch.randn(3, k, generator=torch.Generator().manual_seed(1)).bfloat16()
            y = torch.nn.functional.linear(x, loaded(packed, form.shape)).float()
            assert float((y - x.float() @ meant.T).norm() / y.norm()) < 0.01


def test_the_even_column_is_high_in_nvfp4_and_low_in_the_rest() -> None:
    codes = {"nvfp4": 0x12, "convrot-w4a4": 0x21, "convrot-w4a8": 0x21, "gptq-w4a16": 0xA9}
    for name, first in codes.items():
        form = next(form for form in forms_of(scheme(name)) if form.shape == (128, 128))
        q = result_of(form, False)
        q.codes[0, :2] = torch.tensor([1, 2], dtype=q.codes.dtype)
        assert int(COMFYUI.pack(form, q)["weight"].view(torch.uint8)[0, 0]) == first, name


def test_scales_are_fp32_whatever_they_were() -> None:
    """ComfyUI once refused scales in bf16."""
    for name in ("int8", "fp8-tensor", "convrot-w4a4"):
        for form in forms_of(scheme(name)):
            q = result_of(form, False)
            packed = COMFYUI.pack(form, replace(q, scale=q.scale.bfloat16()))
            assert packed["weight_scale"].dtype == torch.float32


def test_a_smooth_vector_is_what_the_input_is_multiplied_by() -> None:
    spec = COMFYUI.adapt(scheme("nvfp4"), "comfy-quant").weight
    form = PackedForm(spec, (32, 64), bias=False, smooth=True, input_scale=True)
    q = result_of(form, True)
    packed = COMFYUI.pack(form, q)
    assert packed["pre_quant_scale"].shape == (64,)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    theirs = loaded(packed, form.shape).dequantize()
    y = (x * packed["pre_quant_scale"].float()) @ theirs.T
    for meant, loss in ((COMFYUI.unpack(form, packed), 1e-5), (q, 2**-8)):
        assert float((y - x @ effective_weight(meant).T).norm() / y.norm()) < loss


# what is said of a layer


@pytest.mark.parametrize("one", OURS, ids=lambda one: one.name)
def test_markers_equal_the_header(one: Scheme) -> None:
    context, _ = context_of(COMFYUI, one)
    metadata = COMFYUI.metadata(context)
    header = json.loads(metadata["_quantization_metadata"])
    assert header["format_version"] == "1.0"
    assert header["layers"].keys() == context.layers.keys()
    later = one.name in ("convrot-w4a8", "gptq-w4a16", "awq-w4a16")
    assert metadata["comfyui_min_version"] == ("0.38.1" if later else "0.29.0")
    for layer, form in context.layers.items():
        said = json.loads(bytes(comfy.marker(form)))
        assert said == header["layers"][layer]
        assert said.get("full_precision_matrix_mult", False) is form.full_precision
        understood = comfy.understood(said)
        assert understood.fault is None
        assert (understood.rotation, understood.format) == (form.rotation, comfy.known(form).name)
    assert COMFYUI.filename(context) == f"toy-{one.name}.safetensors"


MARKERS = {
    "int8": {"format": "int8_tensorwise"},
    "fp8-tensor": {"format": "float8_e4m3fn"},
    "fp8-e5m2": {"format": "float8_e5m2"},
    "mxfp8": {"format": "mxfp8"},
    "nvfp4": {"format": "nvfp4"},
    "convrot-int8": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64},
    "convrot-w4a4": {"format": "convrot_w4a4", "convrot_groupsize": 64},
    "convrot-w4a8": {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 64},
    "gptq-w4a16": {"format": "awq_w4a16", "group_size": 128, "symmetric": True},
}


@pytest.mark.parametrize("name", MARKERS)
def test_a_marker_is_what_comfyui_reads(name: str) -> None:
    spec = COMFYUI.adapt(scheme(name), "comfy-quant").weight
    form = PackedForm(spec, (64, 128), rotation=64 if scheme(name).rotation else 0)
    tensors = COMFYUI.pack(form, result_of(form, False))
    assert json.loads(bytes(tensors["comfy_quant"].tolist())) == MARKERS[name]
    exact = COMFYUI.pack(replace(form, full_precision=True), result_of(form, False))
    said = json.loads(bytes(exact["comfy_quant"].tolist()))
    assert said == MARKERS[name] | {"full_precision_matrix_mult": True}


def test_layouts_leave_out_the_header_or_the_markers() -> None:
    for layout, markers, header in (("markers", True, False), ("header", False, True)):
        context, infos = context_of(COMFYUI, scheme("convrot-int8"), layout)
        assert any(name.endswith("comfy_quant") for name in infos) is markers
        assert ("_quantization_metadata" in COMFYUI.metadata(context)) is header


def test_older_files_have_one_marker_for_all() -> None:
    context, infos = context_of(COMFYUI, scheme("fp8-tensor"), "scaled-fp8")
    assert infos["scaled_fp8"] == COMFYUI.extras(context)["scaled_fp8"]
    assert COMFYUI.metadata(context) == {}  # a header would hide scaled_fp8
    for exact, size in ((True, 2), (False, 0)):
        layers = {k: replace(f, full_precision=exact) for k, f in context.layers.items()}
        older = replace(context, layers=layers)
        extras = COMFYUI.extra_tensors(older)
        assert infos_of(extras) == COMFYUI.extras(older)
        assert extras["scaled_fp8"].shape == (size,)
        assert extras["scaled_fp8"].dtype == torch.float8_e4m3fn
        file = COMFYUI.recognize(infos | COMFYUI.extras(older), {}, {})
        assert file is not None
        assert (file.problems, file.scheme, file.extras) == ((), "fp8-tensor", ("scaled_fp8",))
        assert all(form.full_precision is exact for form in file.forms.values())
    layers = {k: replace(f, full_precision=f.splits > 0) for k, f in context.layers.items()}
    assert COMFYUI.extras(replace(context, layers=layers))["scaled_fp8"].shape == (0,)
    form = PackedForm(scheme("fp8-tensor").weight, (48, 80), layout="scaled-fp8", input_scale=True)
    q = result_of(form, False)
    packed = COMFYUI.pack(form, q)
    assert set(packed) == {"weight", "scale_weight", "scale_input", "bias"}
    assert packed["scale_weight"].shape == packed["scale_input"].shape == ()
    assert torch.equal(packed["weight"].float() * packed["scale_weight"], rtn.dequantize(q))


# what is refused, before anything is written


REFUSED = {
    "fp8": "one scale for an fp8 tensor, and no format for rows",
    "fp8-block128": "no format for blocks of 128x128",
    "fp8-cast": "no format for weights without scales",
    "mxfp6": "no format for e3m2",
    "mxfp4": "no format for e2m1 in tiles of (1, 32)",
    "bnb-nf4": "no format for nf4",
    "bnb-int8": "makes int8 of inputs",
    "svdquant-w4a4": "no room for: smooth, lowrank",
    "svdquant-nvfp4": "no room for: lowrank",
}


def test_a_scheme_that_comfyui_cannot_load_is_refused_with_the_reason() -> None:
    for one in schemes().values():
        reason = COMFYUI.accepts(one)
        assert (reason is None) == (one in OURS), one.name
        assert REFUSED.get(one.name, "") in str(reason), reason


def shaped(name: str, k: int, **changes: Any) -> PackedForm:
    spec = COMFYUI.adapt(scheme(name), "comfy-quant").weight
    return PackedForm(spec, (64, k), **changes)


LAYERS = [
    (shaped("convrot-int8", 320, rotation=256), "rotated groups of 256"),
    (shaped("convrot-w4a4", 128), "the runtime rotates the input"),
    (shaped("convrot-w4a4", 96, rotation=16), "no multiple of 64"),
    (shaped("convrot-w4a4", 256, rotation=128), "rotated groups of 128"),
    (shaped("convrot-w4a8", 24, rotation=4), "no multiple of 16"),
    (shaped("gptq-w4a16", 192), "no multiple of 128"),
    (shaped("gptq-w4a16", 128, smooth=True), "no room for a smooth vector"),
    (shaped("fp8-tensor", 64, rotation=16), "room for codes and scales alone"),
    (shaped("int8", 64, input_scale=True), "no static activation scale"),
    (shaped("mxfp8", 64, input_scale=True), "no static activation scale"),
    (shaped("nvfp4", 64, rank=16), "no room for a low-rank branch"),
    (shaped("int8", 64, bias_dtype="I8"), "a bias in I8"),
    (PackedForm(scheme("fp8").weight, (64, 64)), "no format for rows"),
]


@pytest.mark.parametrize(("form", "reason"), LAYERS)
def test_a_layer_that_has_no_place_is_refused(form: PackedForm, reason: str) -> None:
    assert reason in str(COMFYUI.problem(form))


def test_static_scales_and_inputs() -> None:
    wants = {one.name: COMFYUI.static(one, "") for one in OURS}
    optional = {"fp8-tensor", "fp8-e5m2", "nvfp4"}
    assert {name for name, want in wants.items() if want == "optional"} == optional
    assert set(wants.values()) == {"optional", "never"}
    for one in OURS:
        form = PackedForm(one.weight, (64, 64))
        assert COMFYUI.activation(form, one) == one.activation
        assert COMFYUI.activation(replace(form, full_precision=True), one) is None
        assert (one.activation is None) == (one.weight.tile[1] == 128)
    assert scheme("fp8-tensor").weight.tile == (ALL, ALL)
