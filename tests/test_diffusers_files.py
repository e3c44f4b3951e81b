"""What stands around the bytes of a diffusers file: headers, configs, refusals, recognition."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.layouts.torchao import TorchAo
from dqconvert.formats.targets import recognize, target
from dqconvert.quantizers.errors import PlanError
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.schemes.blocks import NVFP4
from dqconvert.quantizers.schemes.plain8 import FP8_BLOCK, FP8_ROW, INT8_ROW
from dqconvert.quantizers.spec import QuantSpec, Scheme, TensorInfo

torch.set_num_threads(1)
samples = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("samples.py"))))
clients = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("flux_clients.py"))))
RUNTIME = target("diffusers")
ALL_SCHEMES = list(schemes().values())


def context_of(name: str, layout: str, *layers: str, **more: Any) -> FileContext:
    """A file of 128x128 layers without biases."""
    scheme = RUNTIME.adapt(schemes()[name], layout)
    form = PackedForm(
        scheme.weight,
        (128, 128),
        bias=False,
        layout=layout,
        input_scale=RUNTIME.static(scheme, layout) == "required",
    )
    forms = dict.fromkeys(layers or ("blocks.0.linear",), form)
    names = tuple(f"{layer}.{suffix}" for layer in forms for suffix in RUNTIME.promise(form))
    kept = more.get("kept", ())
    return FileContext(
        model="toy",
        scheme=scheme,
        rank=0,
        config={"_class_name": "FluxTransformer2DModel"},
        layers=forms,
        layout=layout,
        names=(*names, *(f"{name}.weight" for name in kept)),
        kept=kept,
    )


def infos_of(context: FileContext) -> dict[str, TensorInfo]:
    packed = {
        f"{layer}.{suffix}": info
        for layer, form in context.layers.items()
        for suffix, info in RUNTIME.promise(form).items()
    }
    return packed | {f"{name}.weight": TensorInfo("BF16", (8, 8)) for name in context.kept}


def section_of(context: FileContext) -> dict[str, Any]:
    config = RUNTIME.config(context)
    assert config is not None
    found: dict[str, Any] = config["quantization_config"]
    return found


# torchao


def subclass(spec: QuantSpec, dynamic: bool, q: Any) -> Any:
    """torchao's own tensor around our numbers."""
    from torchao.float8.inference import Float8MMConfig
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    from torchao.quantization import Float8Tensor, Int8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import (
        QuantizeTensorToFloat8Kwargs,
        QuantizeTensorToInt8Kwargs,
    )

    qdata, scale = q["_weight_qdata"], q["_weight_scale"]
    if spec == INT8_ROW:
        kwargs = QuantizeTensorToInt8Kwargs(granularity=PerRow()) if dynamic else None
        zero, tile = q["_weight_zero_point"], [1, qdata.shape[1]]
        return Int8Tensor(qdata, scale, tile, torch.bfloat16, zero, act_quant_kwargs=kwargs)
    if spec == NVFP4:
        second = q["_weight_per_tensor_scale"]
        return NVFP4Tensor(qdata, scale, 16, torch.bfloat16, second)
    return Float8Tensor(
        qdata,
        scale,
        block_size=list(spec.tile_of((qdata.shape[0], qdata.shape[1]))),
        mm_config=Float8MMConfig(use_fast_accum=True) if dynamic else None,
        act_quant_kwargs=QuantizeTensorToFloat8Kwargs() if dynamic else None,
        dtype=torch.bfloat16,
    )


@pytest.mark.parametrize(
    ("spec", "dynamic"),
    [
        (INT8_ROW, True),
        (INT8_ROW, False),
        (FP8_ROW, True),
        (FP8_ROW, False),
        (FP8_BLOCK, False),
        (NVFP4, False),
    ],
)
def test_torchaos_serializer_writes_the_same_file(spec: QuantSpec, dynamic: bool) -> None:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    layout = "torchao" if dynamic else "torchao-weight-only"
    name = next(s.name for s in ALL_SCHEMES if s.weight == spec and layout in RUNTIME.layouts(s))
    context = context_of(name, layout, kept=("norm",))
    (form,) = context.layers.values()
    packed = RUNTIME.pack(form, samples.result_of(form, False))
    plain = torch.zeros(8, 8)
    state = {"blocks.0.linear.weight": subclass(spec, dynamic, packed), "norm.weight": plain}
    tensors, metadata = flatten_tensor_state_dict(state)
    ours = {f"blocks.0.linear.{suffix}": tensor for suffix, tensor in packed.items()}
    assert tensors.keys() == ours.keys() | {"norm.weight"}
    assert all(samples.same(tensors[key], tensor) for key, tensor in ours.items())
    said = RUNTIME.metadata(context)
    assert said.keys() == metadata.keys() | {"format", "runtime"}
    for key, text in metadata.items():
        theirs, mine = json.loads(text), json.loads(said[key])
        if isinstance(theirs, dict) and "_tensor_data_names" in theirs:
            for side in (theirs, mine):
                side["_tensor_data_names"].sort()
        assert mine == theirs, key


@pytest.mark.parametrize(
    ("name", "layout", "kind"),
    [
        ("int8", "torchao", "Int8DynamicActivationInt8WeightConfig"),
        ("int8", "torchao-weight-only", "Int8WeightOnlyConfig"),
        ("fp8", "torchao", "Float8DynamicActivationFloat8WeightConfig"),
        ("fp8", "torchao-weight-only", "Float8WeightOnlyConfig"),
        ("fp8-block128", "torchao-weight-only", "Float8WeightOnlyConfig"),
        ("nvfp4", "torchao-weight-only", "NVFP4WeightOnlyConfig"),
    ],
)
def test_torchao_parses_the_config(name: str, layout: str, kind: str) -> None:
    import torchao.prototype.mx_formats  # noqa: F401 - registers its configurations
    from torchao.core.config import config_from_dict

    (said,) = section_of(context_of(name, layout))["quant_type"].values()
    found = config_from_dict(said)
    assert type(found).__name__ == kind


def test_a_kept_module_does_not_cover_packed_ones_of_its_name() -> None:
    """diffusers looks for "proj_out." anywhere in a tensor's name."""
    context = context_of("int8", "torchao", "blocks.0.proj_out", kept=("proj_out", "x_embedder"))
    assert section_of(context)["modules_to_not_convert"] == ["proj_out.weight", "x_embedder"]


@pytest.mark.parametrize(
    ("spec", "shape", "reason"),
    [
        (FP8_BLOCK, (192, 128), "multiples of 128"),
        (FP8_ROW, (24, 40), "multiples of 16"),
        (replace(INT8_ROW, scale="BF16"), (32, 32), "other scales"),
        (QuantSpec("e5m2", (1, -1)), (32, 32), "no tensor for e5m2"),
        (NVFP4, (32, 32), "for weights alone"),
    ],
)
def test_what_torchao_would_misread_is_refused(
    spec: QuantSpec, shape: tuple[int, int], reason: str
) -> None:
    assert reason in str(TorchAo(dynamic=True).problem(PackedForm(spec, shape)))


Metadata = dict[str, str]


def _spoil_block(said: Metadata) -> None:
    entry = json.loads(said["blocks.0.linear.weight"])
    entry["_data"]["block_size"] = [1, 64]
    said["blocks.0.linear.weight"] = json.dumps(entry)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (_spoil_block, "blocks.0.linear.weight: header._data.block_size: is [1, 64]"),
        (lambda said: said.pop("blocks.0.linear.weight"), "does not say how to join"),
        (lambda said: said.update(tensor_names="[]"), "norm.weight: not in tensor_names"),
        (lambda said: said.update(tensor_names="{"), "blocks.0.linear.weight: not in tensor_names"),
        (
            lambda said: said.update(
                tensor_names='["gone.weight", "blocks.0.linear.weight", "norm.weight"]'
            ),
            "gone.weight: in tensor_names, but",
        ),
        (lambda said: said.pop("norm.weight"), "norm.weight: in tensor_names, but"),
    ],
)
def test_a_header_that_hides_a_tensor_is_named(spoil: Callable[[Metadata], Any], line: str) -> None:
    """diffusers would start the model from random weights, or fail with a KeyError."""
    context = context_of("int8", "torchao", kept=("norm",))
    said = RUNTIME.metadata(context)
    spoil(said)
    file = RUNTIME.recognize(infos_of(context), said, RUNTIME.config(context) or {})
    assert file is not None
    assert any(line in problem for problem in file.problems), file.problems


# auto-round


def test_auto_round_is_told_what_stays_and_what_differs() -> None:
    layers = ("blocks.0.a", "singles.0.b")
    context = context_of("gptq-w4a16", "auto-round", *layers, kept=("blocks.0.kept", "proj_out"))
    form = context.layers["singles.0.b"]
    other = replace(form, spec=replace(form.spec, tile=(1, 32)))
    context = replace(context, layers={**context.layers, "singles.0.b": other})
    said = section_of(context)
    assert said["packing_format"] == "auto_round:auto_gptq"
    assert said["block_name_to_quantize"] == "blocks,singles"
    assert said["extra_config"] == {
        "blocks.0.kept": {"bits": 16, "data_type": "float"},
        "singles.0.b": {"bits": 4, "group_size": 32},
    }
    file = RUNTIME.recognize(
        infos_of(context), RUNTIME.metadata(context), RUNTIME.config(context) or {}
    )
    assert file is not None
    assert file.problems == ()
    assert (file.scheme, file.forms["singles.0.b"].spec.tile) == ("gptq-w4a16", (1, 32))


def test_zero_points_change_the_word_for_the_packing() -> None:
    scheme = clients.grouped(schemes()["awq-w4a16"], 64, True)
    context = context_of("awq-w4a16", "auto-round")
    spec = RUNTIME.adapt(scheme, "auto-round").weight
    mixed = {"b.0.l": PackedForm(spec, (128, 128), layout="auto-round"), **context.layers}
    whole = replace(
        context, scheme=replace(context.scheme, weight=spec), layers={"b.0.l": mixed["b.0.l"]}
    )
    said = section_of(whole)
    assert (said["packing_format"], said["sym"], said["group_size"]) == ("auto_round", False, 64)
    file = RUNTIME.recognize(infos_of(whole), RUNTIME.metadata(whole), RUNTIME.config(whole) or {})
    assert file is not None
    assert file.problems == ()
    assert file.scheme == "awq-w4a16"
    with pytest.raises(PlanError, match="zero points for all or none"):
        RUNTIME.config(replace(context, layers=mixed))


# all


def test_one_model_has_one_quantizer() -> None:
    context = context_of("int8", "torchao")
    other = context_of("bnb-nf4", "bitsandbytes", "blocks.1.linear")
    mixed = replace(context, layers={**context.layers, **other.layers})
    for ask in (RUNTIME.config, RUNTIME.metadata):
        with pytest.raises(PlanError, match=r"blocks\.1\.linear: diffusers has one quantizer"):
            ask(mixed)


def test_torchao_mixes_formats() -> None:
    """Each weight has its own entry in the header."""
    context = context_of("int8", "torchao")
    other = context_of("nvfp4", "torchao-weight-only", "blocks.1.linear")
    names = (*context.names, *other.names)
    mixed = replace(context, layers={**context.layers, **other.layers}, names=names)
    file = RUNTIME.recognize(infos_of(mixed), RUNTIME.metadata(mixed), RUNTIME.config(mixed) or {})
    assert file is not None
    assert file.problems == ()
    assert file.forms == mixed.layers


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=lambda scheme: scheme.name)
def test_a_scheme_has_layouts_or_a_reason(scheme: Scheme) -> None:
    reason = RUNTIME.accepts(scheme)
    assert (reason is None) == bool(RUNTIME.layouts(scheme)) == ("diffusers" in scheme.targets)
    assert reason is None or len(reason) > 20
    for layout in RUNTIME.layouts(scheme):
        adapted = RUNTIME.adapt(scheme, layout)
        assert RUNTIME.problem(PackedForm(adapted.weight, (128, 128), parts=2, layout=layout))
        assert RUNTIME.static(adapted, layout) == (
            "required" if (scheme.name, layout) == ("nvfp4", "bfl") else "never"
        )


@pytest.mark.parametrize(
    ("said", "config"),
    [
        ({"format": "pt", "runtime": "vllm"}, {}),
        ({"format": "pt"}, {"quant_method": "fp8"}),
        ({"format": "pt"}, {"quant_method": "compressed-tensors"}),
        ({"format": "pt"}, {"quant_method": "modelopt"}),
    ],
)
@pytest.mark.parametrize(
    ("name", "layout"), [("fp8", "bfl"), ("nvfp4", "bfl"), ("fp8-cast", "layerwise")]
)
def test_files_that_name_another_reader_are_not_ours(
    name: str, layout: str, said: Metadata, config: dict[str, Any]
) -> None:
    context = context_of(name, layout)
    plain = RUNTIME.config(context) or {}
    whole = {**plain, **({"quantization_config": config} if config else {})}
    found = recognize(infos_of(context), said, whole)
    assert found is None or found[0] is not RUNTIME
    found = recognize(infos_of(context), RUNTIME.metadata(context), plain)
    assert found is not None
    assert found[0] is RUNTIME


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("fp8", "torchao"),
        ("fp8-block128", "torchao-weight-only"),
        ("bnb-nf4", "bitsandbytes-double"),
        ("fp8", "bfl"),
        ("nvfp4", "bfl"),
    ],
)
def test_damage_is_named_in_every_layout(name: str, layout: str) -> None:
    context = context_of(name, layout, "blocks.0.a", "blocks.0.b")
    said, config, infos = (
        RUNTIME.metadata(context),
        RUNTIME.config(context) or {},
        infos_of(context),
    )
    for tensor, info in infos.items():
        without = {key: value for key, value in infos.items() if key != tensor}
        for spoiled in (
            without,
            infos | {tensor: replace(info, dtype="F64")},
            infos | {tensor: replace(info, shape=(*info.shape, 7))},
        ):
            file = RUNTIME.recognize(spoiled, said, config)
            assert file is not None
            layer = ".".join(tensor.split(".")[:3])
            assert any(line.startswith(f"{layer}.") for line in file.problems), tensor
