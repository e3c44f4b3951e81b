"""Quantized checkpoints of others: what their libraries, or float64 by hand, make of them."""

from __future__ import annotations

import json
import math
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dqconvert.formats.scaled_source import Rescaled
from dqconvert.formats.source import open_source

torch.set_num_threads(1)
checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))
PAIRS, done, refused = checkpoints.PAIRS, checkpoints.done, checkpoints.refused
opened, off, is_linear = checkpoints.opened, checkpoints.off, checkpoints.is_linear
Tensors = dict[str, Tensor]
LOST = "what they lost stays lost"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = checkpoints.tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")
    return found


@pytest.fixture(scope="module")
def exact(pipeline: Path) -> Tensors:
    found: Tensors = checkpoints.weights_of(pipeline)
    return found


# ------------------------------------------------------------------------------ files of others


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bitsandbytes_own_nf4(
    pipeline: Path, exact: Tensors, tmp_path: Path, double: bool, dtype: torch.dtype
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    tensors, needed = {}, {}
    for name, tensor in exact.items():
        tensors[name] = tensor.to(dtype)
        if is_linear(name, tensor):
            tensors[name], state = functional.quantize_4bit(
                tensor.to(dtype), blocksize=64, quant_type="nf4", compress_statistics=double
            )
            parts = state.as_dict(packed=True)
            tensors |= {f"{name}.{key}": value for key, value in parts.items()}
            needed[name] = functional.dequantize_4bit(tensors[name], state)
    said = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": "float32",
    }
    folder(tmp_path / "nf4", pipeline, tensors, said)
    found = opened(tmp_path / "nf4")
    for name, tensor in needed.items():
        assert torch.equal(found.read(name).to(dtype), tensor), name
    done(tmp_path / "nf4", "--scheme", "int8", "--dry-run")


def folder(path: Path, pipeline: Path, tensors: Tensors, said: Mapping[str, Any]) -> Path:
    """A model folder as diffusers saves it, with a quantization_config."""
    path.mkdir()
    save_file(tensors, path / checkpoints.WEIGHTS, {"format": "pt"})
    config = json.loads((pipeline / "transformer" / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    return path


KITCHENS: dict[str, tuple[str, dict[str, Any]]] = {
    "float8_e4m3fn": ("TensorCoreFP8Layout", {}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}),
    "nvfp4": ("TensorCoreNVFP4Layout", {}),
    "int8_tensorwise": (
        "TensorWiseINT8Layout",
        {"convrot": True, "convrot_groupsize": 64, "per_channel": True},
    ),
    "convrot_w4a4": ("TensorCoreConvRotW4A4Layout", {"convrot_groupsize": 64}),
}


@pytest.mark.parametrize("kind", KITCHENS)
def test_files_that_comfy_kitchen_quantized(exact: Tensors, tmp_path: Path, kind: str) -> None:
    kitchen = pytest.importorskip("comfy_kitchen.tensor")
    layout, words = KITCHENS[kind]
    marker = torch.tensor(list(json.dumps({"format": kind, **words}).encode()), dtype=torch.uint8)
    original, needed = checkpoints.original(exact), {}

    def change(name: str, tensor: Tensor) -> Tensors:
        made = kitchen.QuantizedTensor.from_float(tensor.float(), layout, **words)
        needed[name] = made.dequantize()[: tensor.shape[0], : tensor.shape[1]]
        found = {key: t.clone() for key, t in made.state_dict("weight").items()}
        return {**found, "comfy_quant": marker.clone()}

    save_file(changed(original, change), tmp_path / "kitchen.safetensors")
    found = opened(tmp_path / "kitchen.safetensors")
    theirs = checkpoints.original({name: found.read(name) for name in exact})
    for name, tensor in needed.items():
        torch.testing.assert_close(theirs[name].float(), tensor, rtol=1e-5, atol=1e-6)
    done(tmp_path / "kitchen.safetensors", "--scheme", "gguf-q8_0", "--dry-run")


Change = Callable[[str, Tensor], dict[str, Tensor]]


def changed(tensors: Tensors, change: Change, prefix: str = "") -> Tensors:
    found: Tensors = {}
    for name, tensor in tensors.items():
        new = change(name, tensor) if is_linear(name, tensor) else {"": tensor}
        layer = name.rpartition(".")[0]
        found |= {
            f"{prefix}{layer}.{leaf}" if leaf else prefix + name: t for leaf, t in new.items()
        }
    return found


def per_tensor(dtype: torch.dtype, suffix: str, shape: tuple[int, ...]) -> Change:
    def change(name: str, tensor: Tensor) -> Tensors:
        scale = tensor.float().abs().max() / torch.finfo(dtype).max
        scale = torch.full(shape, float(scale))
        return {"weight": (tensor.float() / scale).to(dtype), suffix: scale}

    return change


def per_row(dtype: torch.dtype, suffix: str, flat: bool) -> Change:
    def change(name: str, tensor: Tensor) -> Tensors:
        top = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
        scale = (tensor.float().abs().amax(1, keepdim=True) / top).bfloat16().float()
        codes = (tensor.float() / scale).clamp(-top, top)
        codes = codes.round() if dtype == torch.int8 else codes
        return {"weight": codes.to(dtype), suffix: scale.flatten() if flat else scale}

    return change


def per_block(name: str, tensor: Tensor) -> Tensors:
    """Blocks of 96 rows and 64 columns, the last of them cut off where they do not fit."""
    rows, columns = -(-len(tensor) // 128), tensor.shape[1] // 64
    scale = torch.rand(rows, columns) + 0.5
    whole = scale.double().repeat_interleave(128, 0).repeat_interleave(64, 1)[: len(tensor)]
    return {"weight": (tensor.double() / whole).to(E4M3), "weight_scale_inv": scale}


def cast(name: str, tensor: Tensor) -> Tensors:
    return {"weight": tensor.to(E5M2 if "mlp" in name else E4M3)}


def stands_for(layer: Mapping[str, Tensor]) -> Tensor:
    """The weight in float64, by the definition: codes times whatever lies beside them."""
    codes = layer["weight"].double()
    scales = [t for leaf, t in layer.items() if "scale" in leaf]
    if not scales:
        return codes
    scale = scales[0].double()
    if scale.numel() == 1:
        return codes * scale.item()
    if scale.ndim == 1 or scale.shape[1] == 1:
        return codes * scale.reshape(-1, 1)
    return codes * scale.repeat_interleave(128, 0).repeat_interleave(64, 1)[: len(codes)]


FORMS: dict[str, tuple[Change, str]] = {
    "kijai": (per_tensor(E4M3, "scale_weight", (1,)), "F8_E4M3 with scales"),
    "kijai-e5m2": (per_tensor(E5M2, "scale_weight", ()), "F8_E5M2 with scales"),
    "rows": (per_row(E4M3, "weight_scale", flat=True), "F8_E4M3 with scales"),
    "int8-rows": (per_row(torch.int8, "weight_scale", flat=False), "I8 with scales"),
    "blocks": (per_block, "F8_E4M3 with scales"),
    "casts": (cast, "without scales"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_8_bit_files_of_others(exact: Tensors, tmp_path: Path, form: str, prefix: str) -> None:
    """In one file with other components, too, whose own 8-bit tensors are none of ours."""
    change, said = FORMS[form]
    original = checkpoints.original(exact)
    tensors = changed(original, change, prefix)
    if "kijai" in form:
        tensors[f"{prefix}scaled_fp8"] = torch.empty(0, dtype=E5M2 if "e5m2" in form else E4M3)
    if prefix:
        tensors["vae.decoder.conv_in.weight"] = torch.ones(4, 4, 3, 3, dtype=torch.bfloat16)
        tensors["text_encoders.t5xxl.shared.weight"] = torch.ones(8, 8).to(E4M3)
    file = tmp_path / "others.safetensors"
    save_file(tensors, file)
    found = opened(file)
    assert (found.dialect, found.family.name) == ("original", "flux")
    pieces = {
        name: leaves(tensors, prefix + name) for name in original if is_linear(name, original[name])
    }
    needed = changed(original, lambda name, t: {"weight": stands_for(pieces[name])})
    for name in exact:
        assert found.infos[name].dtype == "BF16"
    theirs = checkpoints.original({name: found.read(name) for name in found.infos})
    for name, tensor in needed.items():
        assert off(theirs[name], tensor) < 1e-7, name
    out = tmp_path / "out"
    text = done(file, "--scheme", "convrot-int8", "-o", out)
    assert LOST in text
    assert not prefix or "2 tensors of other components were left out" in text
    assert "sound" in done("verify", out, "--against", file)
    assert "FLUX.1" in done("inspect", file)
    assert said in text or "e4m3" in text or "int8" in text


def leaves(tensors: Tensors, name: str) -> Tensors:
    prefix = name.removesuffix("weight")
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def test_markers_beside_plain_casts(exact: Tensors, tmp_path: Path) -> None:
    """ComfyUI announces its layers one by one; the others are what they are."""
    original = checkpoints.original(exact)
    marker = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)

    def change(name: str, tensor: Tensor) -> Tensors:
        if "single" in name:
            return cast(name, tensor)
        return {**per_tensor(E4M3, "weight_scale", ())(name, tensor), "comfy_quant": marker.clone()}

    tensors = changed(original, change)
    file = tmp_path / "mixed.safetensors"
    save_file(tensors, file)
    theirs = checkpoints.original({n: opened(file).read(n) for n in exact})
    for name in original:
        if is_linear(name, original[name]):
            assert off(theirs[name], stands_for(leaves(tensors, name))) < 1e-7, name
    assert LOST in done(file, "--scheme", "nvfp4", "-o", tmp_path / "out")


def test_markers_under_diffusers_names(exact: Tensors, tmp_path: Path) -> None:
    """ComfyUI does not load them, but what they say is clear."""
    marker = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)

    def change(name: str, tensor: Tensor) -> Tensors:
        return {**per_tensor(E4M3, "weight_scale", ())(name, tensor), "comfy_quant": marker.clone()}

    tensors = changed(exact, change)
    save_file(tensors, tmp_path / "named.safetensors")
    found = opened(tmp_path / "named.safetensors")
    assert found.dialect == "diffusers" and LOST in found.notes[0]
    for name, tensor in exact.items():
        if is_linear(name, tensor):
            assert off(found.read(name), stands_for(leaves(tensors, name))) < 1e-7, name


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_every_code_of_a_cast(tmp_path: Path, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).view(16, 16)
    save_file({"a.weight": codes}, tmp_path / "x.safetensors")
    source = Rescaled(open_source(tmp_path / "x.safetensors"))
    needed = [float(code) for code in codes.flatten()]
    for wide in (torch.float32, torch.bfloat16):
        got = source.read("a.weight").to(wide).flatten().tolist()
        assert all(
            one == two or (math.isnan(one) and math.isnan(two))
            for one, two in zip(got, needed, strict=True)
        )
    assert torch.equal(source.read("a.weight", (3, 5)), codes[3:5].float())
