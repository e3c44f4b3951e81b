"""Verify, inspect and dequantize on what a conversion can be asked for: prompts, group sizes, zero
points, other layouts, several schemes in a file, preconditioning.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

torch.set_num_threads(1)
HERE = Path(__file__).parent
workshop = SimpleNamespace(**runpy.run_path(str(HERE / "workshop.py")))
weights = SimpleNamespace(**runpy.run_path(str(HERE / "test_verify_weights.py")))
checkpoints = workshop.checkpoints
done = checkpoints.done

Pair = tuple[str, str]
CALIBRATED = [
    "convrot-mixed comfyui",
    "gptq-w4a16 comfyui --group-size 32 --zero-points",
    "gptq-w4a16 diffusers --group-size 64",
    "gptq-w4a16 vllm --group-size 32",
    "gptq-w4a16 vllm --group-size 64 --zero-points",
    "gptq-w4a16 vllm --layout auto-round",
    "awq-w4a16 comfyui --group-size 128",
    "awq-w4a16 diffusers --group-size 32 --zero-points",
    "awq-w4a16 vllm --zero-points",
    "nvfp4 comfyui",
    "nvfp4 diffusers --layout bfl",
    "nvfp4 sglang",
    "nvfp4 vllm",
    "nvfp4 vllm --layout compressed-tensors",
    "fp8-tensor comfyui --layout scaled-fp8",
    "fp8-tensor sglang",
    "int8 comfyui --precondition auto",
    "nvfp4 comfyui --precondition auto",
    "svdquant-w4a4 nunchaku --precondition auto",
    "int8 comfyui --override ff=gptq-w4a16",
]
PLAIN = [
    "fp8-tensor comfyui --layout scaled-fp8",
    "int8 comfyui --layout markers",
    "int8 comfyui --layout header",
    "fp8 vllm --layout compressed-tensors",
    "fp8-block128 vllm --layout compressed-tensors",
    "int8 vllm --layout compressed-tensors",
    "int8 diffusers --layout torchao-weight-only",
    "fp8 diffusers --layout torchao-weight-only",
    "fp8 diffusers --layout bfl",
    "bnb-nf4 diffusers --layout bitsandbytes-double",
    "int8 comfyui --override ff=convrot-w4a4",
    "nvfp4 comfyui --override attn=int8 --override ff=mxfp8 --keep ff_context",
    "int8 diffusers --override ff=fp8",
]
VARIANTS = [f"{line} --calib" for line in CALIBRATED] + PLAIN
each = pytest.mark.parametrize("line", VARIANTS)


@pytest.fixture(scope="module", autouse=True)
def cache(shop: Any) -> Iterator[None]:
    """Statistics, collected for the first conversion."""
    (shop.folder / "prompts.txt").write_text("a cat\ntwo dogs\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DQCONVERT_CACHE", str(shop.folder / "cache"))
        yield


def made(shop: Any, line: str) -> tuple[Path, Pair]:
    """The output of a line: scheme, target, options."""
    scheme, target, *words = line.split()
    if words[-1:] == ["--calib"]:
        words += [str(shop.folder / "prompts.txt"), "--calib-steps", "2", "--size", "32x32"]
    return shop.output((scheme, target), *words), (scheme, target)


@each
def test_every_variant_is_sound_and_comes_back(shop: Any, tmp_path: Path, line: str) -> None:
    out, pair = made(shop, line)
    assert json.loads(done("inspect", out, "--json"))["problems"] == []
    assert "the file is sound" in done("verify", out)
    said = json.loads(done("verify", out, "--against", shop.model, "--json"))
    assert said["problems"] == [] and (said["scheme"], said["target"]) == pair
    manifest = json.loads((out / "dqconvert.json").read_text())
    errors = {row["name"]: row["weight_error"] for row in said["layers"]}
    rows = manifest["layers"]
    assert errors == pytest.approx({row["name"]: row["weight_error"] for row in rows}, rel=0.02)

    done("dequantize", out, "-o", tmp_path / "back.safetensors")
    back, exact = load_file(tmp_path / "back.safetensors"), checkpoints.weights_of(shop.model)
    assert back.keys() == exact.keys()
    packed = {module for layer in shop.opened(out).layers for module in layer.modules}
    folded = bool(manifest["precondition"])
    for name, tensor in exact.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and (folded or module in packed):
            off = (back[name].float() - tensor.float()).norm() / tensor.float().norm()
            assert off < (2.0 if folded else 1.25) * max(errors.values()) + 0.005, name
        elif module not in packed and not folded:
            assert checkpoints.same_bits(back[name], tensor), name


@each
def test_a_variant_without_manifest_is_sound(shop: Any, line: str) -> None:
    """Files that others wrote have none; those of several schemes are compared all the same."""
    out, _ = made(shop, line)
    copy = shop.without_manifest(out)
    assert "the file is sound" in done("verify", copy, "--against", shop.model)


@each
def test_every_tensor_of_a_variant_counts(shop: Any, line: str) -> None:
    out, _ = made(shop, line)
    for changes in shop.spoiled(out, weights._inverted):
        text = shop.problems(shop.damaged(out, changes), reference=True)
        for name in changes:
            assert f"{shop.names_of(out, name)[0]}: " in text or f"{name}: " in text, name


@each
def test_a_missing_tensor_of_a_variant_is_named(shop: Any, line: str) -> None:
    out, _ = made(shop, line)
    for changes in shop.spoiled(out, lambda _: None):
        text = shop.problems(shop.damaged(out, changes), reference=True)
        assert all(f"{name}: missing" in text for name in changes)


@each
def test_wrong_scales_of_a_variant_are_named(shop: Any, line: str) -> None:
    out, _ = made(shop, line)
    found = shop.opened(out)
    changes: dict[str, Tensor] = {}
    for layer in found.layers:
        changes |= shop.packed(out, layer, workshop.resized(found.unpack(layer), 1.1))
    text = shop.problems(shop.damaged(out, changes), reference=True)
    for layer in found.layers:
        assert f"{layer.name}: weight error" in text or f"{layer.name}: its quantized" in text


@pytest.mark.parametrize(
    ("scheme", "other", "target"),
    [
        ("svdquant-w4a4", "svdquant-nvfp4", "nunchaku"),
        ("svdquant-nvfp4", "svdquant-w4a4", "diffusers"),
        ("fp8", "int8", "vllm"),
        ("mxfp8", "fp8-block128", "sglang"),
    ],
)
def test_what_verify_would_call_broken_is_not_written(
    shop: Any, tmp_path: Path, scheme: str, other: str, target: str
) -> None:
    """A config that can name one format, and layers of two."""
    words = (shop.model, "--scheme", scheme, "--target", target, "--override", f"single.*={other}")
    assert "problem(s)" in checkpoints.refused(tmp_path, *words, "-o", tmp_path / "out")


# ------------------------------------------------------------------------------------- other models


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen-Image, for LightX2V."""
    config = SimpleNamespace(**runpy.run_path(str(HERE / "configs.py"))).qwen_image_config(
        num_layers=2, num_attention_heads=2, joint_attention_dim=128
    )
    rng = torch.Generator().manual_seed(0)
    tensors = checkpoints.filled(checkpoints.meta_model(config))
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            sizes = torch.exp(0.5 * torch.randn(len(tensor), 1, generator=rng))
            tensors[name] = (0.05 * tensor.float() * sizes).to(tensor.dtype)
    folder = tmp_path_factory.mktemp("qwen")
    save_file(tensors, folder / checkpoints.WEIGHTS)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


LIGHTX2V = ["int8", "fp8", "fp8-block128", "mxfp4", "mxfp6", "mxfp8"]


@pytest.mark.parametrize("scheme", LIGHTX2V)
def test_damage_in_files_for_lightx2v_is_named(qwen: Path, tmp_path: Path, scheme: str) -> None:
    """One file, and a file for each block: the one that is lost, too."""
    words = (qwen, "--scheme", scheme, "--target", "lightx2v", "-q", "-o")
    for more in ((), ("--save-by-block",)):
        out = tmp_path / f"out{len(more)}"
        done(*words, out, *more)
        assert "the file is sound" in done("verify", out, "--against", qwen)
        assert json.loads(done("inspect", out, "--json"))["problems"] == []
        back = tmp_path / f"back{len(more)}.safetensors"
        done("dequantize", out, "-o", back)
        plain, exact = load_file(back), load_file(qwen / checkpoints.WEIGHTS)
        limit = {"mxfp4": 0.25, "mxfp6": 0.12}.get(scheme, 0.05)
        for name, tensor in exact.items():
            assert (plain[name].float() - tensor.float()).norm() < limit * tensor.norm(), name

    beside = out / "dqconvert.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"files": {}}))
    layer = "transformer_blocks.1.img_mlp.net.0.proj"
    file = out / "block_1.safetensors"
    good = load_file(file)
    for leaf, tensor in good.items():
        if not leaf.startswith(layer):
            continue
        save_file(good | {leaf: weights._inverted(tensor)}, file, {"format": "pt"})
        assert f"{layer}: " in _found(out, qwen), leaf
        save_file({k: t for k, t in good.items() if k != leaf}, file, {"format": "pt"})
        assert f"{leaf}: missing" in _found(out, qwen)
    file.unlink()
    assert f"{layer}.weight: missing" in _found(out, qwen)


def _found(out: Path, model: Path) -> str:
    result = checkpoints.dqconvert("verify", out, "--against", model)
    assert result.exit_code == 1, result.output
    return str(result.stderr)
