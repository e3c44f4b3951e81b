"""ComfyUI's layout: comfy-kitchen's bytes, markers that equal the header, files of others."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dqconvert.formats.form import PackedForm
from dqconvert.formats.targets import target
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import ALL, QuantSpec, TensorInfo
from dqconvert.quantizers.tensors import QuantizedTensor

INT8 = QuantSpec("int8", (1, ALL))
FP8 = QuantSpec("e4m3", (ALL, ALL))

samples = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("samples.py"))))
result_of, context_of, infos_of = samples.result_of, samples.context_of, samples.infos_of
same = samples.same


@pytest.fixture(scope="module")
def weight() -> Tensor:
    weight = torch.randn(48, 80, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[3] *= 50
    weight[7] = 0
    return weight


def test_int8_rows_are_kitchens_bytes(weight: Tensor) -> None:
    kitchen = pytest.importorskip("comfy_kitchen.tensor")
    layout = "TensorWiseINT8Layout"
    theirs = kitchen.QuantizedTensor.from_float(weight, layout, per_channel=True)
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    codes = (weight / scale).round().clamp(-128, 127).to(torch.int8)
    form = PackedForm(INT8, (48, 80), bias=False)
    assert_kitchens(form, QuantizedTensor(INT8, codes, scale), theirs, weight)


def test_fp8_is_kitchens_bytes(weight: Tensor) -> None:
    kitchen = pytest.importorskip("comfy_kitchen.tensor")
    theirs = kitchen.QuantizedTensor.from_float(weight, "TensorCoreFP8Layout")
    scale = weight.abs().amax() / 448
    codes = (weight * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
    form = PackedForm(FP8, (48, 80), bias=False, input_scale=True)
    q = QuantizedTensor(FP8, codes, scale.view(1, 1), input_scale=torch.tensor(0.25))
    assert_kitchens(form, q, theirs, weight)


def assert_kitchens(form: PackedForm, q: QuantizedTensor, theirs: Any, weight: Tensor) -> None:
    """Ours and theirs under the same names, and they stand for the same weight."""
    packed = target("comfyui").pack(form, q)
    for suffix, tensor in theirs.state_dict("layer.weight").items():
        assert same(packed[suffix.removeprefix("layer.")], tensor), suffix
    back = target("comfyui").unpack(form, packed)
    values = back.codes.float() * back.scale.view(-1, 1)
    torch.testing.assert_close(values, theirs.dequantize())


def test_markers_equal_the_header() -> None:
    runtime = target("comfyui")
    for name in ("int8", "fp8-tensor"):
        context, _ = context_of(runtime, schemes()[name])
        header = json.loads(runtime.metadata(context)["_quantization_metadata"])
        assert header["format_version"] == "1.0"
        assert header["layers"].keys() == context.layers.keys()
        for layer, form in context.layers.items():
            marker = runtime.pack(form, result_of(form, False))["comfy_quant"]
            said = json.loads(bytes(marker.tolist()))
            assert said == header["layers"][layer]
            exact = name == "fp8-tensor" and form.splits > 0
            assert said.get("full_precision_matrix_mult", False) is exact
        assert runtime.filename(context) == f"toy-{name}.safetensors"


def test_comfyui_reads_foreign_files() -> None:
    """Header or markers alone, one scale for an int8 tensor, a scale of shape [1]."""
    runtime = target("comfyui")
    infos = {
        "a.weight": TensorInfo("I8", (8, 4)),
        "a.weight_scale": TensorInfo("F32", ()),
        "b.weight": TensorInfo("F8_E4M3", (8, 4)),
        "b.weight_scale": TensorInfo("F32", (1,)),
        "b.bias": TensorInfo("F16", (8,)),
    }
    layers = {"a": {"format": "int8_tensorwise"}, "b": {"format": "float8_e4m3fn"}}
    file = runtime.recognize(infos, {"_quantization_metadata": json.dumps({"layers": layers})}, {})
    assert file is not None
    assert file.problems == ()
    assert file.scheme is None
    assert file.forms["a"].spec.tile == (ALL, ALL)
    assert file.forms["b"].spec == schemes()["fp8-tensor"].weight
    assert file.forms["b"].bias_dtype == "F16"
    del infos["a.weight"]
    plain = infos | {"b.comfy_quant": TensorInfo("U8", (len('{"format": "float8_e4m3fn"}'),))}
    file = runtime.recognize(plain, {}, {})
    assert file is not None
    assert (list(file.forms), file.problems, file.scheme) == (["b"], (), "fp8-tensor")


def test_comfyui_does_not_mistake_a_rotated_weight() -> None:
    runtime = target("comfyui")
    form = PackedForm(INT8, (8, 256), bias=False)
    packed = runtime.pack(form, result_of(form, False))
    said = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}
    marker = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    with pytest.raises(SourceError, match="rotated"):
        runtime.unpack(form, packed | {"comfy_quant": marker})
    infos = {f"a.{k}": i for k, i in infos_of(packed | {"comfy_quant": marker}).items()}
    header = {"_quantization_metadata": json.dumps({"layers": {"a": said}})}
    for metadata in ({}, header):
        file = runtime.recognize(infos, metadata, {})
        assert file is not None
        assert len(file.problems) == 1
