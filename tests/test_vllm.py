"""vLLM-Omni's folders: compressed-tensors reads its config and gives our weights back, the same for
modelopt's config; the rules by which vLLM reads names.
"""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.layouts import compressed
from dqconvert.formats.targets import target
from dqconvert.quantizers import rtn
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import ALL, Scheme, TensorInfo
from dqconvert.quantizers.tensors import QuantizedTensor

HERE = Path(__file__)
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE.with_name("checkpoints.py"))))
damage = SimpleNamespace(**runpy.run_path(str(HERE.with_name("damage.py"))))
samples = damage.samples

torch.set_num_threads(1)

RUNTIME = target("vllm")
SCHEMES = [name for name in schemes() if RUNTIME.accepts(schemes()[name]) is None]
PAIRS = [(name, layout) for name in SCHEMES for layout in RUNTIME.layouts(schemes()[name])]
COMPRESSED = [name for name, layout in PAIRS if layout == "compressed-tensors"]
N, K = 256, 384
LINEARS = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out")
KEPT = ("x_embedder", "proj_out", "single_transformer_blocks.0.attn.to_out.0")


def form_of(
    name: str, layout: str, static: bool = False, scheme: Scheme | None = None
) -> PackedForm:
    scheme = RUNTIME.adapt(scheme or schemes()[name], layout)
    static = static or RUNTIME.static(scheme, layout) == "required"
    return PackedForm(scheme.weight, (N, K), bias=False, layout=layout, input_scale=static)


def result_of(form: PackedForm) -> QuantizedTensor:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(form.shape, generator=rng) * torch.rand(N, 1, generator=rng)
    static = torch.tensor(2.0**-9) if form.input_scale else None
    return replace(rtn.quantize(weight, form.spec), input_scale=static)


def context_of(name: str, layout: str, static: bool = False) -> FileContext:
    form = form_of(name, layout, static)
    return FileContext(
        model="toy",
        scheme=RUNTIME.adapt(schemes()[name], layout),
        rank=0,
        config={"_class_name": "FluxTransformer2DModel"},
        layers=dict.fromkeys(LINEARS, form),
        kept=KEPT,
        layout=layout,
    )


def said_of(context: FileContext) -> dict[str, Any]:
    config = RUNTIME.config(context)
    assert config is not None and config["_class_name"] == "FluxTransformer2DModel"
    said: dict[str, Any] = config["quantization_config"]
    assert json.loads(json.dumps(said)) == said
    return said


# compressed-tensors


def parsed(said: dict[str, Any]) -> tuple[Any, Any]:
    """Its config, and the scheme of its only group."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(said)
    (scheme,) = config.config_groups.values()
    return config, scheme


def compressor(said: dict[str, Any]) -> Any:
    from compressed_tensors.compressors.base import BaseCompressor

    return BaseCompressor.get_value_from_registry(said["format"])


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_reads_the_weight_back(name: str) -> None:
    context = context_of(name, "compressed-tensors")
    said = said_of(context)
    config, scheme = parsed(said)
    assert config.ignore == [*KEPT, "single_transformer_blocks.0.attn.to_out"]
    assert str(config.quantization_status.value) == "compressed"
    form = context.layers[LINEARS[0]]
    q = result_of(form)
    tensors = RUNTIME.pack(form, q)
    assert set(compressor(said).compression_param_names(scheme)) <= tensors.keys()
    wide = {k: t.float() if t.dtype == torch.bfloat16 else t for k, t in tensors.items()}
    found = compressor(said).decompress(wide, scheme)["weight"]
    meant = rtn.dequantize(q)
    torch.testing.assert_close(found.float(), meant, rtol=2**-7, atol=0)
    off = (found.float() - meant).norm() / meant.norm()
    assert off < (2**-8 if found.dtype == torch.bfloat16 else 1e-6)


def unsigned_zeros(codes: Tensor, name: str) -> Tensor:
    """Bytes without the sign of zeros, which a product has lost."""
    found = codes.contiguous().view(torch.uint8)
    if name == "nvfp4":
        nibbles = torch.stack((found & 15, found >> 4))
        return torch.where(nibbles == 8, 0, nibbles)
    return torch.where(found == 128, 0, found) if codes.dtype.is_floating_point else found


@pytest.mark.parametrize("name", [n for n in COMPRESSED if not n.startswith("mx")])
def test_compressed_tensors_would_write_the_same_bytes(name: str) -> None:
    """From the weight that ours stand for, under the scales that ours have."""
    context = context_of(name, "compressed-tensors")
    said = said_of(context)
    scheme = parsed(said)[1]
    form = context.layers[LINEARS[0]]
    q = result_of(form)
    ours = RUNTIME.pack(form, q)
    plain = {"weight": rtn.dequantize(q), "weight_scale": q.scale.float()}
    if "weight_global_scale" in ours:
        plain["weight_global_scale"] = ours["weight_global_scale"]
    theirs = compressor(said).compress(plain, scheme)
    for suffix in ("weight", "weight_packed"):
        if suffix in ours:
            one, two = (unsigned_zeros(t[suffix], name) for t in (ours, theirs))
            assert torch.equal(one, two)
    if "weight_shape" in ours:
        assert ours["weight_shape"].tolist() == list(theirs["weight_shape"])


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_takes_the_arguments_for_its_own_preset(name: str) -> None:
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    presets = {
        "int8": "W8A8",
        "fp8": "FP8_DYNAMIC",
        "fp8-block128": "FP8_BLOCK",
        "gptq-w4a16": "W4A16",
        "awq-w4a16": "W4A16",
    }
    scheme = parsed(said_of(context_of(name, "compressed-tensors")))[1]
    preset = preset_name_to_scheme(presets.get(name, name.upper()), ["Linear"])
    for part in ("weights", "input_activations"):
        ours, theirs = getattr(scheme, part), getattr(preset, part)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            drop = {"observer", "observer_kwargs"}
            assert ours.model_dump(exclude=drop) == theirs.model_dump(exclude=drop)


def test_groups_and_zero_points_go_into_the_config() -> None:
    scheme = schemes()["gptq-w4a16"]
    weight = replace(scheme.weight, code="uint4", tile=(1, 32), zero_point=True, full_range=False)
    scheme = RUNTIME.adapt(replace(scheme, weight=weight), "compressed-tensors")
    form = form_of("", "compressed-tensors", scheme=scheme)
    context = replace(
        context_of("gptq-w4a16", "compressed-tensors"), scheme=scheme, layers={LINEARS[0]: form}
    )
    said = said_of(context)
    arguments = parsed(said)[1].weights
    assert (arguments.group_size, arguments.symmetric) == (32, False)
    q = result_of(form)
    tensors = RUNTIME.pack(form, q)
    wide = {k: t.float() if t.dtype == torch.bfloat16 else t for k, t in tensors.items()}
    found = compressor(said).decompress(wide, parsed(said)[1])["weight"]
    torch.testing.assert_close(found.float(), rtn.dequantize(q), rtol=1e-6, atol=1e-7)
    infos = {f"{LINEARS[0]}.{suffix}": info for suffix, info in RUNTIME.promise(form).items()}
    file = RUNTIME.recognize(infos, RUNTIME.metadata(context), RUNTIME.config(context) or {})
    assert file is not None
    assert (file.problems, file.forms) == ((), {LINEARS[0]: form})


# vLLM's own methods


def test_layers_have_the_tensors_that_the_methods_create() -> None:
    scalar, e4m3 = TensorInfo("F32", ()), TensorInfo("F8_E4M3", (N, K))
    needed: dict[tuple[str, str], dict[str, TensorInfo]] = {
        ("int8", "int8"): {
            "weight": TensorInfo("I8", (N, K)),
            "weight_scale": TensorInfo("F32", (N, 1)),
        },
        ("fp8", "modelopt"): {"weight": e4m3, "weight_scale": TensorInfo("F32", (N,))},
        ("fp8-tensor", "fp8"): {"weight": e4m3, "weight_scale": scalar},
        ("fp8-block128", "fp8"): {"weight": e4m3, "weight_scale_inv": TensorInfo("F32", (2, 3))},
        ("nvfp4", "modelopt"): {
            "weight": TensorInfo("U8", (N, K // 2)),
            "weight_scale": TensorInfo("F8_E4M3", (N, K // 16)),
            "weight_scale_2": scalar,
            "input_scale": scalar,
        },
        ("gptq-w4a16", "auto-round"): {
            "qweight": TensorInfo("I32", (K // 8, N)),
            "qzeros": TensorInfo("I32", (K // 128, N // 8)),
            "scales": TensorInfo("F16", (K // 128, N)),
        },
    }
    for (name, layout), infos in needed.items():
        assert RUNTIME.promise(form_of(name, layout)) == infos, (name, layout)


@pytest.mark.parametrize("name", ["int8", "fp8", "fp8-tensor", "fp8-block128"])
def test_codes_times_scales_are_the_weight(name: str) -> None:
    form = form_of(name, RUNTIME.layouts(schemes()[name])[0])
    q = result_of(form)
    tensors = RUNTIME.pack(form, q)
    scale = tensors.get("weight_scale", tensors.get("weight_scale_inv"))
    assert scale is not None
    full: Tensor = scale.double()
    if name == "fp8":
        full = full[:, None]
    if name == "fp8-block128":
        full = full.repeat_interleave(128, 0).repeat_interleave(128, 1)
    product = (tensors["weight"].double() * full).float()
    torch.testing.assert_close(product, rtn.dequantize(q), rtol=1e-6, atol=0)


def test_methods_are_told_what_they_read() -> None:
    """The flag that the checkpoint is quantized stands by itself: some loaders want no method."""
    kept = [*KEPT, "single_transformer_blocks.0.attn.to_out"]
    common = {"activation_scheme": "dynamic", "ignored_layers": kept}
    assert said_of(context_of("int8", "int8")) == {
        "quant_method": "int8",
        "is_checkpoint_int8_serialized": True,
        **common,
    }
    fp8 = {"quant_method": "fp8", "is_checkpoint_fp8_serialized": True, **common}
    assert said_of(context_of("fp8-tensor", "fp8")) == fp8
    block = said_of(context_of("fp8-block128", "fp8"))
    assert block == fp8 | {"weight_block_size": [128, 128]}


PATTERNS = ["x_embedder", "[p]roj_out", *KEPT[2:], "single_transformer_blocks.0.attn.to_out"]


@pytest.mark.parametrize(
    ("name", "static", "algorithm"),
    [
        ("fp8", False, "FP8_PER_CHANNEL_PER_TOKEN"),
        ("fp8-tensor", True, "FP8"),
        ("nvfp4", True, "NVFP4"),
    ],
)
def test_the_config_of_modelopt_is_its_own(name: str, static: bool, algorithm: str) -> None:
    found = find_spec("modelopt")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs modelopt")
    export = Path(found.submodule_search_locations[0]) / "torch" / "export"
    converted = runpy.run_path(str(export / "convert_hf_config.py"))
    layout = RUNTIME.layouts(schemes()[name])[0]
    said = said_of(context_of(name, layout, static))
    theirs = {"quantization": {"quant_algo": algorithm, "exclude_modules": PATTERNS}}
    assert said == converted["convert_hf_quant_config_format"](theirs)


def test_no_name_takes_a_packed_layer_with_it() -> None:
    """Under modelopt a name keeps every module that contains it; a pattern keeps its own alone."""

    def excluded(prefix: str) -> bool:
        return (
            prefix in PATTERNS
            or any(entry != prefix and entry in prefix for entry in PATTERNS)
            or any(fnmatch(prefix, entry) for entry in PATTERNS)
        )

    assert said_of(context_of("fp8", "modelopt"))["ignore"] == PATTERNS
    assert not [layer for layer in LINEARS if excluded(layer)]
    assert all(excluded(name) for name in KEPT)


def test_auto_round_is_told_the_blocks_and_what_stays() -> None:
    said = said_of(context_of("gptq-w4a16", "auto-round"))
    bits = {"bits": 16, "data_type": "float"}
    assert said == {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "data_type": "int",
        "block_name_to_quantize": "transformer_blocks,single_transformer_blocks",
        "extra_config": dict.fromkeys((KEPT[2], f"{KEPT[2][:-2]}"), bits),
    }


# files


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_every_missing_or_wrong_tensor_is_named(name: str, layout: str) -> None:
    optional = frozenset({"input_scale"} if name == "fp8-tensor" else ())
    assert damage.unnamed(RUNTIME, schemes()[name], layout, optional) == []


def test_a_config_that_takes_packed_layers_with_it_is_named() -> None:
    context, infos = samples.context_of(RUNTIME, schemes()["fp8"], "modelopt")
    config = RUNTIME.config(context)
    assert config is not None
    config["quantization_config"]["ignore"] = ["blocks.0.lin"]
    file = RUNTIME.recognize(infos, RUNTIME.metadata(context), config)
    assert file is not None
    assert file.problems == (
        "transformer_blocks.0.linear: packed, but the config keeps 'blocks.0.lin' unquantized",
    )


@pytest.mark.parametrize(
    "said",
    [
        {"quant_method": "gptq"},
        {"quant_method": "auto-round", "bits": 8, "sym": True},
        {"quant_method": "compressed-tensors", "config_groups": {}},
        {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {"a": {}}},
        {"quant_method": "fp8", "ignored_layers": [], "weight_block_size": [1, 32]},
    ],
)
def test_configs_of_others_are_not_recognized(said: dict[str, Any]) -> None:
    infos = samples.context_of(RUNTIME, schemes()["int8"])[1]
    assert RUNTIME.recognize(infos, {}, {"quantization_config": said}) is None
    assert compressed.kind_said(said) is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mxfp6", "not mxfp6"),
        ("bnb-int8", "quantizes the inputs"),
        ("convrot-w4a4", "rotated weights"),
        ("svdquant-w4a4", "a low-rank branch"),
    ],
)
def test_what_it_does_not_load_is_refused(name: str, reason: str) -> None:
    assert reason in (RUNTIME.accepts(schemes()[name]) or "")


def test_linears_of_one_input_share_tensor_scales_and_find_input_scales_at_run_time() -> None:
    shared = [name for name in SCHEMES if RUNTIME.adapt(schemes()[name], "").shared]
    assert shared == ["fp8-tensor", "nvfp4"]
    scheme = schemes()["fp8-tensor"]
    found = RUNTIME.activation(form_of("fp8-tensor", "fp8"), scheme)
    assert found is not None and found.tile == (1, ALL)
    assert RUNTIME.activation(form_of("fp8-tensor", "fp8", True), scheme) == scheme.activation


def test_a_model_as_vllm_builds_it(tmp_path: Path) -> None:
    """Its FLUX.1 has no quantized linears in double blocks."""
    out = tmp_path / "out"
    words = ("--scheme", "int8", "--target", "vllm", "--layout", "compressed-tensors", "-o", out)
    checkpoints.done("flux-digits", *words, "-q")
    with safe_open(out / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as file:
        packed = [name for name in set(file.keys()) if name.endswith(".weight_scale")]
    assert packed
    assert all(name.startswith("single_transformer_blocks.") for name in packed)
    checkpoints.done("verify", out, "--against", "flux-digits")
