"""What goes wrong with ComfyUI's files without an error: each trap is seen in a file of others."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dqconvert.converter.detect import open_canonical
from dqconvert.converter.options import PlanOptions
from dqconvert.converter.plan import make_plan
from dqconvert.formats.form import PackedForm
from dqconvert.formats.targets import Recognized, target
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.forward import effective_weight
from dqconvert.quantizers.schemes import scheme
from dqconvert.quantizers.spec import ALL, TensorInfo

samples = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("samples.py"))))
result_of, infos_of, same = samples.result_of, samples.infos_of, samples.same
checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))

COMFYUI = target("comfyui")
ALL_SCHEMES = (
    "int8", "fp8-tensor", "fp8-e5m2", "mxfp8", "nvfp4", "convrot-int8", "convrot-w4a4",
    "convrot-w4a8", "gptq-w4a16",
)  # fmt: skip


def form_of(name: str, shape: tuple[int, int] = (64, 256), **changes: Any) -> PackedForm:
    spec = COMFYUI.adapt(scheme(name), "comfy-quant").weight
    rotation = 64 if scheme(name).rotation else 0
    return PackedForm(spec, shape, rotation=rotation, layout="comfy-quant", **changes)


def layer(form: PackedForm, name: str = "blocks.0.fc") -> dict[str, Tensor]:
    packed = COMFYUI.pack(form, result_of(form, False))
    return {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}


def text(said: object) -> Tensor:
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def header(**layers: Any) -> dict[str, str]:
    named = {name.replace("__", "."): said for name, said in layers.items()}
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": named})}


def read(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Recognized:
    file = COMFYUI.recognize(infos_of(tensors), metadata or {}, {})
    assert file is not None
    return file


def taken(tensors: dict[str, Tensor], name: str = "blocks.0.fc") -> dict[str, Tensor]:
    cut = len(name) + 1
    return {key[cut:]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


# the two carriers


@pytest.mark.parametrize("name", ALL_SCHEMES)
@pytest.mark.parametrize("exact", [False, True])
def test_a_file_is_read_from_either_carrier(name: str, exact: bool) -> None:
    """From the header, or from the marker's bytes; other words than ours are as good."""
    form = form_of(name, full_precision=exact)
    tensors = layer(form)
    said = json.loads(bytes(tensors["blocks.0.fc.comfy_quant"].tolist()))
    q = result_of(form, False)
    alone = {k: v for k, v in tensors.items() if not k.endswith("comfy_quant")}
    nested = {"format": said["format"], "params": said, "orig_dtype": "torch.bfloat16"}
    cases = [
        (tensors, header(blocks__0__fc=said), "comfy-quant", True),
        (alone, header(blocks__0__fc=nested), "header", True),
        (tensors, {}, "markers", True),
        (tensors | {"blocks.0.fc.comfy_quant": text(nested)}, {}, "markers", False),
    ]
    for found, metadata, layout, told in cases:
        file = read(found, metadata)
        assert file.problems == ()
        form_read = file.forms["blocks.0.fc"]
        back = COMFYUI.unpack(form_read, taken(found))
        torch.testing.assert_close(effective_weight(back), effective_weight(q))
        assert form_read.layout == layout
        if told:  # the size of a marker tells ours
            assert replace(form_read, layout="comfy-quant", rotation=form.rotation) == form


def test_the_header_beats_the_marker() -> None:
    """A header that forgets the rotation makes ComfyUI compute noise; no error anywhere."""
    tensors = layer(form_of("convrot-int8"))
    file = read(tensors, header(blocks__0__fc={"format": "int8_tensorwise"}))
    form = file.forms["blocks.0.fc"]
    assert form.rotation == 0  # as ComfyUI will have it
    with pytest.raises(SourceError, match=r"rotated in groups of 64.*metadata.*not rotated"):
        COMFYUI.unpack(form, taken(tensors))
    other = {"format": "int8_tensorwise", "convrot": True}
    form = read(tensors, header(blocks__0__fc=other)).forms["blocks.0.fc"]
    assert form.rotation == 256  # the default
    with pytest.raises(SourceError, match=r"groups of 64.*groups of 256"):
        COMFYUI.unpack(form, taken(tensors))


def test_a_header_hides_scaled_fp8() -> None:
    older = layer(replace(form_of("fp8-tensor"), layout="scaled-fp8"), "a")
    marked = layer(form_of("int8"), "b")
    both = older | marked | {"scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}
    file = read(both)
    assert (set(file.forms), file.problems) == ({"a", "b"}, ())
    file = read(both, header(b={"format": "int8_tensorwise"}))
    assert set(file.forms) == {"b"}
    (problem,) = file.problems
    assert problem.startswith("a.scale_weight: neither a marker nor the metadata")


def test_scales_without_a_marker_are_dropped() -> None:
    tensors = layer(form_of("nvfp4"), "a") | layer(form_of("fp8-tensor"), "b")
    del tensors["b.comfy_quant"]
    (problem,) = read(tensors).problems
    assert problem.startswith("b.weight_scale: ")
    assert "drops its scales" in problem
    tensors["b.weight"] = tensors["b.weight"].bfloat16()  # a scale left over does no harm
    assert read(tensors).problems == ()


# words that ComfyUI does not know


WORDS: list[tuple[object, str]] = [
    ({"convrot": True}, "names no format: ComfyUI refuses"),
    ({"format": "int8_blockwise"}, "format 'int8_blockwise' is not one of int8_tensorwise"),
    ({"format": "float8_e4m3fn_rowwise"}, "is not one of"),
    ({"format": ["int8_tensorwise"]}, "is not one of"),
    (["int8_tensorwise"], "not a JSON object"),
    ({"format": "convrot_w4a4", "convrot_groupsize": "64"}, "group sizes are integers"),
]


@pytest.mark.parametrize(("said", "reason"), WORDS)
def test_words_that_comfyui_refuses(said: object, reason: str) -> None:
    tensors = layer(form_of("int8"))
    file = read(tensors, header(blocks__0__fc=said))
    assert file.forms == {}
    assert file.problems[0].startswith("metadata _quantization_metadata, blocks.0.fc: ")
    assert reason in file.problems[0]
    marked = tensors | {"blocks.0.fc.comfy_quant": text(said)}
    form = read(marked).forms["blocks.0.fc"]
    with pytest.raises(SourceError, match="comfy_quant: "):
        COMFYUI.unpack(form, taken(marked))


def test_a_marker_of_another_format() -> None:
    tensors = layer(form_of("fp8-tensor")) | {"blocks.0.fc.comfy_quant": text({"format": "mxfp8"})}
    form = read(tensors).forms["blocks.0.fc"]
    with pytest.raises(SourceError, match="says mxfp8; the layer is float8_e4m3fn"):
        COMFYUI.unpack(form, taken(tensors))
    file = read(tensors, header(blocks__0__fc={"format": "mxfp8"}))
    assert any("blocks.0.fc.weight_scale" in line for line in file.problems)


def test_a_header_that_is_none() -> None:
    tensors = layer(form_of("int8"))
    for damaged in ("{", "[]", '{"format_version": "1.0"}'):
        (problem,) = read(tensors, {"_quantization_metadata": damaged}).problems
        assert problem.startswith("metadata _quantization_metadata: ")
    file = read({}, header(gone={"format": "int8_tensorwise"}))
    assert file.problems == ("gone.weight: missing, but the layer is said to be one",)


# names


def test_prefixes_do_not_separate_a_layer_from_its_entry() -> None:
    form = form_of("convrot-int8")
    name = "model.diffusion_model.blocks.0.fc"
    tensors = {k: v for k, v in layer(form, name).items() if not k.endswith("comfy_quant")}
    said = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
    for metadata in (header(blocks__0__fc=said), header(**{name: said})):
        file = read(tensors, metadata)
        assert (file.problems, set(file.forms)) == ((), {name})
        assert file.forms[name].rotation == 64


def test_a_file_with_prefixes_is_compared_with_its_model(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--scheme", "convrot-int8", "--target", "comfyui", "-o", out, "-q")
    checkpoints.done("flux-digits", *words)
    (file,) = out.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = {f"model.diffusion_model.{k}": t for k, t in load_file(file).items()}
    whole = tmp_path / "whole.safetensors"
    save_file(tensors | {"vae.x": torch.zeros(2)}, whole, metadata)
    assert "the file is sound" in checkpoints.done("verify", whole, "--against", "flux-digits")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("probed", ["img_in", "txt_in", "vector_in.in_layer"])
def test_a_packed_probe_breaks_the_recognition_of_the_model(prefix: str, probed: str) -> None:
    for name in ("nvfp4", "convrot-w4a4", "convrot-w4a8", "gptq-w4a16"):
        (problem,) = read(layer(form_of(name), prefix + probed)).problems
        assert problem.startswith(f"{prefix}{probed}.weight: ComfyUI recognises the model")
    assert read(layer(form_of("int8"), prefix + probed)).problems == ()  # the shape is still there


def test_diffusers_names_lose_their_scales() -> None:
    file = read(layer(form_of("fp8-tensor"), "single_transformer_blocks.0.proj_out"))
    (problem,) = file.problems
    assert "noise without an error" in problem
    # the names of Qwen-Image are diffusers' own
    assert read(layer(form_of("fp8-tensor"), "transformer_blocks.0.attn.to_q")).problems == ()


@pytest.fixture(scope="module")
def flux() -> Any:
    """A checkpoint in diffusers' names, headers alone."""
    tensors = checkpoints.meta_model(checkpoints.flux_config())
    return open_canonical(checkpoints.Memory(tensors), Path("memory"))


@pytest.mark.parametrize("name", ALL_SCHEMES)
def test_a_plan_packs_no_probe_and_has_the_models_own_names(flux: Any, name: str) -> None:
    options = PlanOptions(calibrated=True)
    plan = make_plan(flux, COMFYUI, scheme(name), options, ("toy", checkpoints.flux_config()))
    assert {layer.split(".")[0] for layer in plan.context.layers} == {
        "double_blocks",
        "single_blocks",
    }
    file = COMFYUI.recognize(plan.outputs, COMFYUI.metadata(plan.context), {})
    assert file is not None
    assert (file.problems, file.forms.keys()) == ((), plan.context.layers.keys())
    for layer, form in file.forms.items():
        known = plan.context.layers[layer]
        assert replace(form, splits=known.splits, parts=known.parts) == known


# tensors


def test_one_value_may_have_an_axis_and_small_floats_may_be_bytes() -> None:
    for name in ALL_SCHEMES:
        form = form_of(name)
        tensors = layer(replace(form, input_scale=COMFYUI.static(scheme(name), "") == "optional"))
        other = {
            key: tensor.view(1) if tensor.dim() == 0 else tensor for key, tensor in tensors.items()
        }
        for key, tensor in tensors.items():
            if key.endswith(("weight_scale", "s_rel")) and tensor.dtype.itemsize == 1:
                other[key] = tensor.view(torch.uint8)
        file = read(other)
        assert file.problems == ()
        form = file.forms["blocks.0.fc"]
        one, two = (COMFYUI.unpack(form, taken(found)) for found in (tensors, other))
        assert all(same(getattr(one, f), getattr(two, f)) for f in ("codes", "scale"))
        assert same(one.input_scale, two.input_scale)


def test_a_scale_in_bf16_is_reported() -> None:
    tensors = layer(form_of("fp8-tensor"))
    tensors["blocks.0.fc.weight_scale"] = tensors["blocks.0.fc.weight_scale"].bfloat16()
    (problem,) = read(tensors).problems
    assert problem == "blocks.0.fc.weight_scale: found BF16 [], needed F32 []"
    older = layer(replace(form_of("fp8-tensor"), layout="scaled-fp8"), "a")
    older["a.scale_weight"] = older["a.scale_weight"].bfloat16()  # these are cast when they load
    assert read(older | {"scaled_fp8": torch.zeros(0)}).problems == ()


@pytest.mark.parametrize(("name", "filled"), [("nvfp4", (48, 64)), ("mxfp8", (64, 64))])
def test_rows_and_columns_are_filled_up(name: str, filled: tuple[int, int]) -> None:
    """Of 33 rows only the bias knows; of 50 columns nobody, and the rest are zeros."""
    form = form_of(name, (33, 50))
    q = result_of(form, False)
    tensors = layer(form)
    assert tensors["blocks.0.fc.weight"].shape == (
        filled[0],
        filled[1] // (2 if name == "nvfp4" else 1),
    )
    found = read(tensors).forms["blocks.0.fc"]
    assert found.shape == (33, filled[1])
    back = effective_weight(COMFYUI.unpack(found, taken(tensors)))
    assert torch.equal(back[:, :50], effective_weight(q))
    assert not back[:, 50:].any()


def test_swizzled_scales_of_another_shape_are_reported() -> None:
    tensors = layer(form_of("nvfp4", (64, 128)))
    linear = tensors["blocks.0.fc.weight_scale"].view(torch.uint8)[:64].view(torch.float8_e4m3fn)
    tensors["blocks.0.fc.weight_scale"] = linear
    (problem,) = read(tensors).problems
    assert problem == "blocks.0.fc.weight_scale: found F8_E4M3 [64, 8], needed F8_E4M3 [128, 8]"


def test_groups_that_the_header_misnames() -> None:
    tensors = layer(form_of("gptq-w4a16"))
    (problem,) = read(
        tensors, header(blocks__0__fc={"format": "awq_w4a16", "group_size": 64})
    ).problems
    assert problem.endswith("says groups of 64, its scales are of 128")
    (problem,) = read(tensors, header(blocks__0__fc={"format": "awq_w4a16"})).problems
    assert problem.endswith("says groups of 64, its scales are of 128")  # the default
    marked = tensors | {"blocks.0.fc.comfy_quant": text({"format": "awq_w4a16"})}
    with pytest.raises(SourceError, match="says groups of 64, the scales are of 128"):
        COMFYUI.unpack(read(marked).forms["blocks.0.fc"], taken(marked))


def test_six_bits_and_other_weights_are_named() -> None:
    infos = {
        "a.weight": TensorInfo("I8", (64, 192)),
        "a.weight_s_rel": TensorInfo("F8_E4M3", (64, 16)),
        "a.comfy_quant": TensorInfo("U8", (80,)),
        "b.weight": TensorInfo("BF16", (64, 64)),
        "b.comfy_quant": TensorInfo("U8", (28,)),
        "c.weight": TensorInfo("I8", (64, 64, 3, 3)),
        "c.comfy_quant": TensorInfo("U8", (29,)),
    }
    file = COMFYUI.recognize(infos, {}, {})
    assert file is not None
    assert [line.partition(":")[0] for line in file.problems] == [
        "a.weight",
        "b.weight",
        "c.weight",
    ]
    assert "six bits" in file.problems[0]


def test_an_int8_tensor_may_have_one_scale() -> None:
    infos = {
        "a.weight": TensorInfo("I8", (8, 4)),
        "a.weight_scale": TensorInfo("F32", ()),
        "b.weight": TensorInfo("F8_E4M3", (8, 4)),
        "b.weight_scale": TensorInfo("F32", (1,)),
        "b.bias": TensorInfo("F16", (8,)),
    }
    said = header(a={"format": "int8_tensorwise"}, b={"format": "float8_e4m3fn"})
    file = COMFYUI.recognize(infos, said, {})
    assert file is not None
    assert (file.problems, file.scheme) == ((), None)
    assert file.forms["a"].spec.tile == (ALL, ALL)
    assert file.forms["b"].spec == scheme("fp8-tensor").weight
    assert file.forms["b"].bias_dtype == "F16"


def test_offsets_of_a_layer_that_is_said_to_be_symmetric() -> None:
    form = form_of("gptq-w4a16")
    tensors = taken(layer(form))
    tensors["weight_zeros"][0, 0] = 1
    with pytest.raises(ValueError, match="weight_zeros: not zero"):
        COMFYUI.unpack(form, tensors)
