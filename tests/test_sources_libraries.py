"""Folders as torchao, compressed-tensors and modelopt make them, against their own numbers."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dqconvert.converter.opening import open_model

torch.set_num_threads(1)
checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))
done, refused = checkpoints.done, checkpoints.refused
Tensors = dict[str, Tensor]
CONFIG = checkpoints.flux_config(
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=64,
    num_attention_heads=2,
    joint_attention_dim=64,
    pooled_projection_dim=32,
    axes_dims_rope=[8, 28, 28],
    _class_name="FluxTransformer2DModel",
)


@pytest.fixture(scope="module")
def exact() -> Tensors:
    found: Tensors = checkpoints.filled(checkpoints.meta_model(CONFIG))
    return found


def is_linear(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and "blocks" in name and name.endswith(".weight")


def folder(path: Path, tensors: Tensors, said: Any, words: dict[str, str] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / checkpoints.WEIGHTS, {"format": "pt", **(words or {})})
    (path / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": said}))
    return path


def agrees(path: Path, exact: Tensors, needed: Tensors, step: float = 2.0**-8) -> None:
    """needed may be rounded to BF16."""
    found = open_model(path, json.loads((path / "config.json").read_text()))
    assert found.infos.keys() == exact.keys()
    for name, tensor in needed.items():
        torch.testing.assert_close(found.read(name), tensor.float(), rtol=step, atol=1e-6)
        part = found.stack([name], (3, 9))
        torch.testing.assert_close(part, tensor[3:9].float(), rtol=step, atol=1e-6)
    assert found.notes[0].startswith("made from quantized weights")


def torchao_tensors() -> dict[str, Any]:
    """Ways to quantize a weight."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    from torchao.quantization import PerRow, PerTensor
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

    top = torch.tensor(1 / 2688)
    return {
        "int8": lambda w: Int8Tensor.from_hp(w, granularity=PerRow()),
        "fp8": lambda w: Float8Tensor.from_hp(w, granularity=PerRow()),
        "fp8-tensor": lambda w: Float8Tensor.from_hp(w, granularity=PerTensor()),
        "nvfp4": lambda w: NVFP4Tensor.to_nvfp4(w, per_tensor_scale=w.abs().max() * top),
        "nvfp4-one-level": NVFP4Tensor.to_nvfp4,
        "nvfp4-swizzled": lambda w: NVFP4Tensor.to_nvfp4(
            w, per_tensor_scale=w.abs().max() * top, is_swizzled_scales=True
        ),
    }


@pytest.mark.parametrize(
    "kind", ["int8", "fp8", "fp8-tensor", "nvfp4", "nvfp4-one-level", "nvfp4-swizzled"]
)
def test_torchao(exact: Tensors, tmp_path: Path, kind: str) -> None:
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    make = torchao_tensors()[kind]
    state = {n: make(t) if is_linear(n, t) else t for n, t in exact.items()}
    needed = {n: t.dequantize() for n, t in state.items() if is_linear(n, exact[n])}
    flat, words = support.flatten_tensor_state_dict(state)
    said = {"quant_method": "torchao", "quant_type": {"default": {}}}
    path = folder(tmp_path / "ao", {n: t.contiguous() for n, t in flat.items()}, said, words)
    agrees(path, exact, needed)
    done(path, "--scheme", "int8", "--dry-run")


@pytest.mark.parametrize(
    "preset", ["W8A8", "W4A16_ASYM", "FP8", "FP8_BLOCK", "NVFP4A16", "NVFP4", "MXFP4", "MXFP8A16"]
)
def test_compressed_tensors(exact: Tensors, tmp_path: Path, preset: str) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    model = checkpoints.build_model(CONFIG).bfloat16()
    model.load_state_dict(exact)
    kept = [n for n, m in model.named_modules() if "blocks" not in n and hasattr(m, "weight")]
    group = quantization.preset_name_to_scheme(preset, ["Linear"])
    config = quantization.QuantizationConfig(config_groups={"group_0": group}, ignore=kept)
    quantization.apply_quantization_config(model, config)
    needed = {}
    for name, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is not None:
            measured(module)
            zero, second = (
                getattr(module, f"weight_{x}", None) for x in ("zero_point", "global_scale")
            )
            args = (module.weight.data, module.weight_scale.data, zero, group.weights)
            needed[f"{name}.weight"] = fake_quantize(*args, global_scale=second)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    path = folder(tmp_path / "ct", state, {})
    compressor.update_config(str(path))
    agrees(path, exact, needed)
    done(path, "--scheme", "int8", "--dry-run")


def measured(module: Any) -> None:
    """The parameters of a module that is to be compressed, by its weight; any of the inputs."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args, w = module.quantization_scheme.weights, module.weight.data.float()
    rows, columns = w.shape
    height, width = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "block": tuple(args.block_structure or ()),
    }.get(str(getattr(args.strategy, "value", args.strategy)), (1, args.group_size))
    tiles = w.view(rows // height, height, columns // width, width)
    low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
    second = {}
    if hasattr(module, "weight_global_scale"):
        second = {"global_scale": generate_gparam(low.min().view(1), high.max().view(1))}
        module.weight_global_scale.data.copy_(second["global_scale"])
    scale, zero = calculate_qparams(low, high, args, **second)
    module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
    for name in ("input_scale", "input_global_scale"):
        if hasattr(module, name):
            getattr(module, name).data.fill_(0.5)


MODELOPT = {
    "FP8": ("weight_scale", "input_scale"),
    "W8A8_SQ_PER_CHANNEL": ("weight_scale", "input_scale", "pre_quant_scale"),
    "FP8_PER_CHANNEL_PER_TOKEN": ("weight_scale",),
    "fp8_pb_wo": ("weight_scale",),
}


@pytest.mark.parametrize("kind", MODELOPT)
def test_modelopt(exact: Tensors, tmp_path: Path, kind: str) -> None:
    """Shapes as its export of 0.47 writes them; the weights in float64."""
    tensors, needed = dict(exact), {}
    rng = torch.Generator().manual_seed(0)
    for name, tensor in exact.items():
        if not is_linear(name, tensor):
            continue
        rows, columns = tensor.shape
        grid = {"FP8": (1, 1), "fp8_pb_wo": (rows // 128, columns // 128)}.get(kind, (rows, 1))
        scale = torch.rand(grid, generator=rng) / 256 + 1e-3
        wide = scale.double().repeat_interleave(rows // grid[0], 0)
        wide = wide.repeat_interleave(columns // grid[1], 1)
        codes = (tensor.double() / wide).clamp(-127, 127)
        integer = kind.startswith("W8A8")
        codes = codes.round().to(torch.int8) if integer else codes.to(torch.float8_e4m3fn)
        smooth = torch.rand(columns, generator=rng).bfloat16() + 0.5
        shape = {"FP8": (), "fp8_pb_wo": (grid[0], 1, grid[1], 1)}.get(kind, (rows,))
        parts = {
            "weight_scale": scale.reshape(shape),
            "input_scale": torch.tensor(0.3),
            "pre_quant_scale": smooth,
        }
        layer = name.removesuffix(".weight")
        tensors |= {name: codes} | {f"{layer}.{part}": parts[part] for part in MODELOPT[kind]}
        needed[name] = codes.double() * wide * (smooth.double() if integer else 1.0)
    said = {"quant_method": "modelopt", "quant_algo": kind, "ignore": ["proj_out", "norm_out*"]}
    path = folder(tmp_path / "modelopt", tensors, said)
    agrees(path, exact, needed, 1e-6)
    done(path, "--scheme", "int8", "--dry-run")


def test_what_is_not_read_is_never_passed_over(exact: Tensors, tmp_path: Path) -> None:
    """Zeros of 8-bit codes, in formats without room for them."""
    names = [name for name, tensor in exact.items() if is_linear(name, tensor)]
    tensors = dict(exact)
    for name in names:
        layer, rows = name.removesuffix(".weight"), len(exact[name])
        tensors[name] = torch.zeros_like(exact[name], dtype=torch.int8)
        tensors |= {f"{layer}.weight_scale": torch.ones(rows, 1)}
    first = names[0].removesuffix(".weight")
    zeros = {f"{first}.weight_zero_point": torch.ones(len(exact[names[0]]), 1, dtype=torch.int8)}
    cases = (
        ({"quant_method": "int8"}, zeros),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, zeros),
    )
    for number, (said, extra) in enumerate(cases):
        path = folder(tmp_path / f"x{number}", {**tensors, **extra}, said)
        text = refused(tmp_path, path, "--scheme", "fp8", "-o", tmp_path / "out")
        assert first in text, text
    text = refused(tmp_path, path, "--scheme", "fp8", "-o", tmp_path / "out")
    assert "config.json calls it quantized (compressed-tensors, int-quantized)" in text
