"""SVDQuant layouts: the exporter's bytes, comfy-kitchen's arithmetic, what files say."""

from __future__ import annotations

import json
import runpy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dqconvert.formats import svdq
from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.svdq import SHIFT_GELU
from dqconvert.formats.targets import target
from dqconvert.formats.targets.nunchaku import LAYOUT as NUNCHAKU
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.schemes.svdquant import INT4_GROUP64, NVFP4_BF16
from dqconvert.quantizers.spec import TensorInfo
from dqconvert.quantizers.tensors import LowRank, QuantizedTensor

GOLDEN = Path(__file__).parent / "data" / "nunchaku.safetensors"
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

samples = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("samples.py"))))
result_of, context_of, infos_of = samples.result_of, samples.context_of, samples.infos_of
generator, same = samples.generator, samples.same


# nunchaku: bytes of the reference exporter


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


def golden_result(golden: Mapping[str, Tensor], name: str) -> tuple[PackedForm, QuantizedTensor]:
    """A linear of the golden file as our quantizer would hand it over."""
    down = golden["linear.in.down_smoothed"].double() / golden["linear.in.smooth"].double()
    up = golden["linear.in.up"]
    nvfp4, shifted = name == "linear_nvfp4", name == "linear_int4_shifted"
    spec, shift = NVFP4_BF16 if nvfp4 else INT4_GROUP64, SHIFT_GELU if shifted else 0.0
    if nvfp4:
        values = golden[f"{name}.in.values"]
        codes = torch.searchsorted(E2M1[:8], values.abs()) | ((values < 0).long() << 3)
        bias = golden["linear_int4.in.bias"]
    else:
        codes, bias = golden[f"{name}.in.codes"], golden[f"{name}.in.bias_shifted"].double()
        # the branch sees the input before the shift: the runtime must not subtract its share
        bias = (bias + (up.double() @ down).sum(1) * shift).bfloat16()
    form = PackedForm(spec, (256, 384), rank=32, shift=shift)
    return form, QuantizedTensor(
        spec=spec,
        codes=codes.to(torch.uint8 if nvfp4 else torch.int8),
        scale=golden[f"{name}.in.scales"],
        tensor_scale=golden.get(f"{name}.in.tensor_scale"),
        bias=bias,
        smooth=golden["linear.in.smooth"],
        lowrank=LowRank(down.bfloat16(), up),
        shift=shift,
    )


LINEARS = ("linear_int4", "linear_int4_shifted", "linear_nvfp4")


@pytest.mark.parametrize("name", LINEARS)
def test_nunchaku_linears_are_the_exporters_bytes(golden: dict[str, Tensor], name: str) -> None:
    form, q = golden_result(golden, name)
    packed = target("nunchaku").pack(form, q)
    prefix = f"{name}.out."
    expected = {key.removeprefix(prefix): t for key, t in golden.items() if key.startswith(prefix)}
    assert packed.keys() == expected.keys()
    assert [key for key in packed if not same(packed[key], expected[key])] == []


@pytest.mark.parametrize("splits", [3, 6])
def test_nunchaku_modulation_is_the_exporters_bytes(golden: dict[str, Tensor], splits: int) -> None:
    name = f"awq{splits}"
    codes, bias = golden[f"{name}.codes"], golden[f"{name}.bias_natural"]
    q = QuantizedTensor(INT4_GROUP64, codes, golden[f"{name}.scales"], bias=bias)
    form = PackedForm(INT4_GROUP64, (len(codes), codes.shape[1]), splits=splits)
    packed = target("nunchaku").pack(form, q)
    assert all(same(packed[key], golden[f"{name}.{key}"]) for key in packed)
    natural = target("diffusers").pack(form, q)
    assert same(natural["bias"], bias)
    assert same(natural["wscales"], golden[f"{name}.scales"].t())
    back = target("diffusers").unpack(form, natural)
    assert same(back.codes, codes)


@pytest.mark.parametrize("name", LINEARS)
def test_both_layouts_hold_the_weight(golden: dict[str, Tensor], name: str) -> None:
    """Codes, scales, smoothing and branch of the file make up the weight of the linear."""
    form, q = golden_result(golden, name)
    weight = golden["linear.in.weight"].float()
    for runtime in (target("nunchaku"), target("diffusers")):
        back = runtime.unpack(form, runtime.pack(form, q))
        assert back.lowrank is not None
        assert back.smooth is not None
        branch = back.lowrank.up.float() @ back.lowrank.down.float()
        error = dequantized(back) / back.smooth.float() + branch - weight
        assert float(error.norm() / weight.norm()) < 0.12


def dequantized(q: QuantizedTensor) -> Tensor:
    """Plain formulas, in fp32."""
    values = E2M1[q.codes.long()] if q.codes.dtype == torch.uint8 else q.codes.float()
    grouped = values.view(*q.scale.shape, -1) * q.scale.float()[..., None]
    weight = grouped.flatten(1)
    return weight if q.tensor_scale is None else weight * q.tensor_scale.float().view(-1, 1)


@pytest.mark.parametrize("name", ["linear_int4", "linear_int4_shifted"])
def test_kitchen_runs_the_unpacked_layer(golden: dict[str, Tensor], name: str) -> None:
    """comfy-kitchen's W4A4 linear on the natural layout against ours on plain formulas."""
    eager = pytest.importorskip("comfy_kitchen.backends.eager.svdquant")
    form, q = golden_result(golden, name)
    q = target("nunchaku").unpack(form, target("nunchaku").pack(form, q))
    assert q.smooth is not None
    assert q.lowrank is not None
    assert q.bias is not None
    x = torch.nn.functional.gelu(torch.randn(32, 384, generator=generator(form)))
    down, up = q.lowrank.down.float(), q.lowrank.up.float()
    codes = q.codes.view(torch.uint8)
    nibbles = ((codes[:, 0::2] & 15) | (codes[:, 1::2] << 4)).view(torch.int8)
    unsigned = form.shift != 0
    acts, ascales, lora = eager.quantize_svdquant_w4a4(
        x + form.shift, q.smooth.float(), down.t(), 32, act_unsigned=unsigned, lora_x=x
    )
    theirs = eager.scaled_mm_svdquant_w4a4(
        acts, nibbles, ascales, q.scale.float().t(), lora, up, q.bias.float(), unsigned
    )
    smoothed = ((x + form.shift) / q.smooth.float()).view(32, -1, 64)
    step = smoothed.abs().amax(-1, keepdim=True) / (15 if unsigned else 7)
    rounded = ((smoothed / step).round() * step).flatten(1)
    ours = rounded @ dequantized(q).t() + x @ down.t() @ up.t() + q.bias.float()
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    exact = x @ golden["linear.in.weight"].float().t() + golden["linear_int4.in.bias"].float()
    assert float((theirs - exact).norm() / exact.norm()) < 0.2


def test_nunchaku_tells_loaders_what_they_read() -> None:
    runtime = target("nunchaku")
    group = {"dtype": "int4", "scale_dtype": None, "group_size": 64}
    context, _ = context_of(runtime, schemes()["svdquant-w4a4"])
    said = runtime.metadata(context)
    assert said.keys() == {"config", "model_class", "comfy_config", "quantization_config"}
    assert json.loads(said["config"]) == context.config
    assert json.loads(said["comfy_config"]) == {"a": [1]}
    expected = {"method": "svdquant", "weight": group, "activation": group, "rank": 32}
    assert json.loads(said["quantization_config"]) == expected
    assert runtime.filename(context) == "svdq-int4_r32-toy.safetensors"
    assert runtime.config(context) is None

    context, _ = context_of(runtime, schemes()["svdquant-nvfp4"])
    said = json.loads(runtime.metadata(context)["quantization_config"])
    weight = {"dtype": "fp4_e2m1_all", "scale_dtype": [None, "fp8_e4m3_nan"], "group_size": 16}
    activation = {"dtype": "fp4_e2m1_all", "scale_dtype": "fp8_e4m3_nan", "group_size": 16}
    assert (said["weight"], said["activation"]) == (weight, activation)
    assert runtime.filename(context) == "svdq-fp4_r32-toy.safetensors"


def test_int4_is_shifted_behind_a_gelu_by_nunchaku_only() -> None:
    int4 = PackedForm(INT4_GROUP64, (128, 128), rank=32)
    nvfp4 = PackedForm(NVFP4_BF16, (128, 128), rank=32)
    assert target("nunchaku").shift(int4) == SHIFT_GELU == 0.171875
    assert target("nunchaku").shift(nvfp4) == 0
    assert target("nunchaku").shift(PackedForm(INT4_GROUP64, (384, 128), splits=3)) == 0
    assert target("diffusers").shift(int4) == 0
    assert "0.171875" in (target("diffusers").problem(replace(int4, shift=SHIFT_GELU)) or "")


@pytest.mark.parametrize(
    ("form", "word"),
    [
        (PackedForm(replace(INT4_GROUP64, code="int8"), (128, 128), rank=32), "int8"),
        (PackedForm(INT4_GROUP64, (130, 128), rank=32), "128"),
        (PackedForm(INT4_GROUP64, (128, 64), rank=32), "128"),
        (PackedForm(INT4_GROUP64, (128, 128), rank=24), "rank"),
        (PackedForm(INT4_GROUP64, (128, 128)), "rank"),
        (PackedForm(INT4_GROUP64, (512, 256), rank=512), "a rank of 512 is more than"),
        (PackedForm(INT4_GROUP64, (128, 256), rank=144), "a rank of 144 is more than"),
        (PackedForm(INT4_GROUP64, (384, 32), splits=3), "64"),
        (PackedForm(NVFP4_BF16, (384, 64), splits=3), "int4"),
    ],
)
def test_svdquant_refuses_what_kernels_cannot_read(form: PackedForm, word: str) -> None:
    for name in ("nunchaku", "diffusers"):
        assert word in (target(name).problem(form) or "")


def test_only_rows_that_alternate_must_make_chunks() -> None:
    """The last block of SD3 has two chunks where the others have six."""
    form = PackedForm(INT4_GROUP64, (200, 64), splits=3)
    assert "chunks" in (target("nunchaku").problem(form) or "")
    assert target("diffusers").problem(form) is None


def test_targets_refuse_schemes_of_others() -> None:
    svdquant = schemes()["svdquant-w4a4"]
    weight_only = replace(svdquant, activation=None)
    assert "low-rank" in (target("nunchaku").accepts(schemes()["int8"]) or "")
    for name in ("nunchaku", "diffusers"):
        assert "activations" in (target(name).accepts(weight_only) or "")
        assert "modulation" in (target(name).accepts(replace(svdquant, modulation=None)) or "")
    assert "lowrank" in (target("comfyui").accepts(svdquant) or "")
    assert target("comfyui").accepts(replace(schemes()["int8"], steps=("lowrank",)))


def test_nvfp4_scales_of_stacked_linears_meet_in_diffusers() -> None:
    """A tensor with a scale per channel has wtscale 1, one with a single scale wcscales 1."""
    runtime = target("diffusers")
    form = PackedForm(NVFP4_BF16, (256, 128), rank=16)
    q = result_of(form, True)
    packed = runtime.pack(form, q)
    assert same(packed["wtscale"], q.tensor_scale)
    assert bool((packed["wcscales"] == 1).all())
    each = torch.tensor([0.5, 2.0], dtype=torch.bfloat16).repeat_interleave(128)
    packed = runtime.pack(form, replace(q, tensor_scale=each))
    assert float(packed["wtscale"]) == 1
    assert same(runtime.unpack(form, packed).tensor_scale, each)
    packed["wtscale"] = torch.full((1,), 3.0, dtype=torch.bfloat16)
    second = runtime.unpack(form, packed).tensor_scale
    assert second is not None
    assert torch.equal(second, each.float() * 3)


def test_zero_points_that_are_not_symmetric_are_refused() -> None:
    runtime = target("diffusers")
    form = PackedForm(INT4_GROUP64, (384, 64), splits=3)
    packed = runtime.pack(form, result_of(form, False))
    packed["wzeros"][0, 0] *= 1.5
    with pytest.raises(SourceError, match="wzeros"):
        runtime.unpack(form, packed)


def test_nunchaku_checks_what_its_metadata_says() -> None:
    runtime = target("nunchaku")
    context, infos = context_of(runtime, schemes()["svdquant-w4a4"])
    metadata = runtime.metadata(context)
    fp4 = runtime.metadata(replace(context, scheme=schemes()["svdquant-nvfp4"], rank=64))
    file = runtime.recognize(infos, metadata | fp4, {})
    assert file is not None
    assert len(file.problems) == 2
    file = runtime.recognize(infos, {}, {})
    assert file is not None
    assert any("quantization_config" in line for line in file.problems)


def test_a_name_of_another_kind_says_nothing() -> None:
    runtime = target("nunchaku")
    context, infos = context_of(runtime, schemes()["svdquant-w4a4"])
    file = runtime.recognize(infos, runtime.metadata(context), {})
    assert file is not None
    for name in ("svdq-int4_r32.safetensors", runtime.filename(context), "my-svdq-fp4_r8", "x"):
        assert runtime.misnamed(name, file) is None  # type: ignore[attr-defined]
    for name in ("svdq-fp4_r32-toy.safetensors", "svdq-int4_r320-toy.safetensors"):
        assert "int4_r32" in runtime.misnamed(name, file)  # type: ignore[attr-defined]


@pytest.mark.parametrize("said", [None, "64", 0, -16, 1.5])
def test_a_rank_that_is_not_said_is_the_loaders(said: object) -> None:
    info = TensorInfo("I8", (128, 64))
    forms, _ = svdq.read_forms(NUNCHAKU, ["a"], {"a.qweight": info}, said)
    assert forms["a"].rank == 32
    forms, _ = svdq.read_forms(NUNCHAKU, ["a"], {"a.qweight": info}, 64)
    assert forms["a"].rank == 64


def test_files_in_float16_are_whole() -> None:
    for name in ("nunchaku", "diffusers"):
        runtime = target(name)
        context, infos = context_of(runtime, schemes()["svdquant-w4a4"])
        half = {k: replace(i, dtype="F16") if i.dtype == "BF16" else i for k, i in infos.items()}
        file = runtime.recognize(half, runtime.metadata(context), runtime.config(context) or {})
        assert file is not None
        assert file.problems == ()
        half["transformer_blocks.0.linear.wscales"] = infos["transformer_blocks.0.linear.wscales"]
        file = runtime.recognize(half, runtime.metadata(context), runtime.config(context) or {})
        assert file is not None
        assert len(file.problems) == 1


def test_diffusers_config_lists_what_is_packed() -> None:
    runtime, scheme = target("diffusers"), schemes()["svdquant-nvfp4"]
    form = PackedForm(NVFP4_BF16, (128, 128), rank=32)
    context = FileContext("m", scheme, 32, {"_class_name": "X"}, {"a.to_q": form})
    config = runtime.config(context)
    section = {"precision": "nvfp4", "group_size": 16, "rank": 32, "targets": ["a.to_q"]}
    assert config == {
        "_class_name": "X",
        "quantization_config": {
            "quant_method": "nunchaku_lite",
            "compute_dtype": "bfloat16",
            "svdq_w4a4": section,
        },
    }
    infos = {f"b.to_q.{suffix}": info for suffix, info in runtime.promise(form).items()}
    file = runtime.recognize(infos, {}, config)
    assert file is not None
    assert [line.partition(":")[0] for line in file.problems] == ["a.to_q", "b.to_q"]
