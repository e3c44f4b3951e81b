"""SGLang's folders against Model Optimizer's own numbers and config, transformers' parser, and the
rules by which SGLang reads names.
"""

from __future__ import annotations

import json
import runpy
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.layouts import diffusers_folder as folder
from dqconvert.formats.targets import target
from dqconvert.quantizers import rtn
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import ALL, TensorInfo

HERE = Path(__file__)
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE.with_name("checkpoints.py"))))
damage = SimpleNamespace(**runpy.run_path(str(HERE.with_name("damage.py"))))
samples = damage.samples

torch.set_num_threads(1)

RUNTIME = target("sglang")
SCHEMES = [name for name in schemes() if RUNTIME.accepts(schemes()[name]) is None]
N, K = 256, 384


def form_of(name: str, n: int = N, k: int = K, static: bool = False) -> PackedForm:
    scheme = RUNTIME.adapt(schemes()[name], "")
    static = static or RUNTIME.static(scheme, "") == "required"
    return PackedForm(scheme.weight, (n, k), bias=False, input_scale=static)


def packed(name: str, weight: Tensor, static: float | None = None) -> dict[str, Tensor]:
    form = form_of(name, *weight.shape, static=static is not None)
    q = rtn.quantize(weight, form.spec)
    scale = None if static is None else torch.tensor(static)
    return RUNTIME.pack(form, replace(q, input_scale=scale))


def weight_of(rows: int = N, cols: int = K) -> Tensor:
    rng = torch.Generator().manual_seed(rows + cols)
    return torch.randn(rows, cols, generator=rng) * torch.rand(rows, 1, generator=rng)


def modelopt() -> Any:
    pytest.importorskip("modelopt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch.quantization import qtensor
    return qtensor


def test_nvfp4_is_modelopts_to_the_byte() -> None:
    weight = weight_of()
    theirs, scale, second = modelopt().NVFP4QTensor.quantize(weight, 16)
    ours = packed("nvfp4", weight, static=0.5)
    assert torch.equal(ours["weight"], theirs._quantized_data)
    assert torch.equal(ours["weight_scale"].view(torch.uint8), scale.view(torch.uint8))
    assert torch.equal(ours["weight_scale_2"], second.reshape(()))
    assert ours["input_scale"] == 0.5


def test_fp8_per_tensor_is_modelopts() -> None:
    """But for ties: modelopt divides by the scale."""
    weight = weight_of()
    theirs, scale = modelopt().FP8QTensor.quantize(weight)
    ours = packed("fp8-tensor", weight)
    torch.testing.assert_close(ours["weight_scale"], scale.reshape(()), rtol=1e-6, atol=0)
    equal = ours["weight"].view(torch.uint8) == theirs._quantized_data.view(torch.uint8)
    assert equal.double().mean() > 0.999


def test_mxfp8_is_modelopts_to_the_byte() -> None:
    weight = weight_of()
    theirs, scale = modelopt().MXFP8QTensor.quantize(weight)
    ours = packed("mxfp8", weight)
    assert torch.equal(ours["weight"].view(torch.uint8), theirs._quantized_data.view(torch.uint8))
    assert torch.equal(ours["weight_scale_inv"], scale.view(torch.uint8).reshape(N, K // 32))


def test_weight_scale_inv_is_a_factor() -> None:
    """amax / 448 of each block of 128 x 128, in float64; the last ones may be smaller."""
    weight = weight_of(200, 300)
    tensors = packed("fp8-block128", weight)
    scale = tensors["weight_scale_inv"]
    assert scale.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            block = weight[128 * i : 128 * i + 128, 128 * j : 128 * j + 128].double()
            assert float(scale[i, j]) == pytest.approx(float(block.abs().amax()) / 448, rel=1e-6)
            codes = tensors["weight"][128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
            off = (codes.double() * scale[i, j].double() - block).abs()
            assert bool((off <= block.abs() / 16 + 448 / 2**18 * scale[i, j].double()).all())


def test_layers_have_the_tensors_that_the_methods_create() -> None:
    scalar = TensorInfo("F32", ())
    fp8 = {"weight": TensorInfo("F8_E4M3", (N, K)), "weight_scale": scalar}
    assert RUNTIME.promise(form_of("fp8-tensor")) == fp8
    static = RUNTIME.promise(form_of("fp8-tensor", static=True))
    assert static == fp8 | {"input_scale": scalar}
    assert RUNTIME.promise(form_of("nvfp4")) == {
        "weight": TensorInfo("U8", (N, K // 2)),
        "weight_scale": TensorInfo("F8_E4M3", (N, K // 16)),
        "weight_scale_2": scalar,
        "input_scale": scalar,
    }


# the config


def context_of(name: str, static: bool = False, **changes: Any) -> FileContext:
    """Layers of FLUX.1's names, with those outside of blocks kept."""
    form = form_of(name, static=static)
    linears = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out")
    return FileContext(
        model="toy",
        scheme=RUNTIME.adapt(schemes()[name], ""),
        rank=0,
        config={"_class_name": "FluxTransformer2DModel"},
        layers=dict.fromkeys(linears, form),
        kept=("x_embedder", "proj_out", "transformer_blocks.0.img_mod.1"),
        **changes,
    )


def said_of(context: FileContext) -> dict[str, Any]:
    config = RUNTIME.config(context)
    assert config is not None and config["_class_name"] == "FluxTransformer2DModel"
    said: dict[str, Any] = config["quantization_config"]
    assert json.loads(json.dumps(said)) == said
    return said


KEPT = ["x_embedder", "transformer_blocks.0.img_mod.1", "transformer_blocks.0.img_mod"]


def test_methods_are_told_what_they_read() -> None:
    dynamic = {"activation_scheme": "dynamic", "modules_to_not_convert": KEPT}
    assert said_of(context_of("fp8-tensor")) == {"quant_method": "fp8", **dynamic}
    assert said_of(context_of("mxfp8")) == {"quant_method": "mxfp8", **dynamic}
    block = {"quant_method": "fp8", "weight_block_size": [128, 128], **dynamic}
    assert said_of(context_of("fp8-block128")) == block


def test_transformers_reads_the_config_of_blocks() -> None:
    from transformers.utils.quantization_config import FineGrainedFP8Config

    found = FineGrainedFP8Config.from_dict(said_of(context_of("fp8-block128")))
    assert list(found.weight_block_size) == [128, 128]
    assert found.modules_to_not_convert == KEPT
    assert found.activation_scheme == "dynamic"


@pytest.mark.parametrize(("name", "algorithm"), [("fp8-tensor", "FP8"), ("nvfp4", "NVFP4")])
def test_the_config_of_static_formats_is_modelopts(name: str, algorithm: str) -> None:
    modelopt()
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    kept = ["x_embedder", "proj_out", *KEPT[1:]]
    theirs = {"quantization": {"quant_algo": algorithm, "exclude_modules": kept}}
    said = said_of(context_of(name, static=True))
    assert said == convert_hf_quant_config_format(theirs)


def test_no_name_takes_a_packed_layer_with_it() -> None:
    """fp8 compares parts of names: proj_out would be that of every single block."""

    def skipped(entry: str, prefix: str) -> bool:
        return entry == prefix or f".{entry}." in f".{prefix}."

    context = context_of("fp8-block128")
    listed = said_of(context)["modules_to_not_convert"]
    assert not [layer for layer in context.layers if any(skipped(e, layer) for e in listed)]
    assert any(skipped(e, "transformer_blocks.0.img_mod") for e in listed)
    assert all(
        folder.dotted(e, p) == skipped(e, p)
        for e in ("proj_out", "a.b", "b")
        for p in ("a.b.c", "proj_out", "x.proj_out", "xproj_out", "a.bc")
    )


def test_a_config_that_takes_packed_layers_with_it_is_named() -> None:
    context, infos = samples.context_of(RUNTIME, schemes()["fp8-block128"])
    config = RUNTIME.config(context)
    assert config is not None
    config["quantization_config"]["modules_to_not_convert"] = ["linear"]
    file = RUNTIME.recognize(infos, RUNTIME.metadata(context), config)
    assert file is not None
    assert file.problems[0].endswith(".linear: packed, but the config keeps 'linear' unquantized")


# files


@pytest.mark.parametrize("name", SCHEMES)
def test_every_missing_or_wrong_tensor_is_named(name: str) -> None:
    optional = frozenset({"input_scale"} if name == "fp8-tensor" else ())
    assert damage.unnamed(RUNTIME, schemes()[name], "", optional) == []


def test_a_static_file_without_a_scale_is_named() -> None:
    """Where the loader would take 1 and go on."""
    context = context_of("fp8-tensor", static=True)
    infos = {
        f"{layer}.{suffix}": info
        for layer, form in context.layers.items()
        for suffix, info in RUNTIME.promise(form).items()
        if suffix != "input_scale"
    }
    file = RUNTIME.recognize(infos, {}, RUNTIME.config(context) or {})
    assert file is not None
    assert [line.split(":")[0] for line in file.problems] == [
        f"{layer}.input_scale" for layer in context.layers
    ]


def test_files_of_others_that_it_reads_are_recognized() -> None:
    """By their config alone, also under the other name of the list."""
    infos = samples.context_of(RUNTIME, schemes()["fp8-block128"])[1]
    said = {"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": ["norm"]}
    file = RUNTIME.recognize(infos, {"format": "pt"}, {"quantization_config": said})
    assert file is not None
    assert (file.scheme, file.problems) == ("fp8-block128", ())
    for other in ({"quant_method": "gptq"}, {"quant_method": "fp8", "weight_block_size": [1, 32]}):
        assert RUNTIME.recognize(infos, {}, {"quantization_config": other}) is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("int8", "none of channels"),
        ("fp8", "not fp8"),
        ("mxfp4", "not mxfp4"),
        ("gptq-w4a16", "not w4a16"),
        ("convrot-int8", "rotated weights"),
        ("svdquant-nvfp4", "a low-rank branch"),
    ],
)
def test_what_it_does_not_load_is_refused(name: str, reason: str) -> None:
    assert reason in (RUNTIME.accepts(schemes()[name]) or "")


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (replace(form_of("nvfp4"), input_scale=False), "takes 1"),
        (form_of("nvfp4", 64, 40), "do not divide"),
        (replace(form_of("mxfp8"), parts=2), "stacks 2"),
        (replace(form_of("fp8-block128"), input_scale=True), "no static scale"),
    ],
)
def test_layers_without_a_layout_are_refused(form: PackedForm, reason: str) -> None:
    assert reason in (RUNTIME.problem(form) or "")


def test_linears_of_one_input_share_tensor_scales_and_find_input_scales_at_run_time() -> None:
    shared = [name for name in SCHEMES if RUNTIME.adapt(schemes()[name], "").shared]
    assert shared == ["fp8-tensor", "nvfp4"]
    scheme = schemes()["fp8-tensor"]
    found = RUNTIME.activation(form_of("fp8-tensor"), scheme)
    assert found is not None and found.tile == (1, ALL)
    assert RUNTIME.activation(form_of("fp8-tensor", static=True), scheme) == scheme.activation


def test_a_model_as_sglang_builds_it(tmp_path: Path) -> None:
    """Its FLUX.1 has no quantized feed-forwards in double blocks."""
    out = tmp_path / "out"
    words = ("--scheme", "fp8-tensor", "--target", "sglang", "-o", out)
    said = checkpoints.done("flux-digits", *words)
    assert "scale 1" not in said
    config = json.loads((out / "transformer" / "config.json").read_text())
    listed = config["quantization_config"]["modules_to_not_convert"]
    assert "transformer_blocks.0.ff.net.2" in listed
    assert "proj_out" not in listed
    from safetensors import safe_open

    with safe_open(out / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "single_transformer_blocks.0.proj_out.weight_scale" in names
    assert "transformer_blocks.0.attn.to_q.weight_scale" in names
    assert not [n for n in names if n.endswith("weight_scale") and (".ff" in n or "norm" in n)]
    checkpoints.done("verify", out, "--against", "flux-digits")
