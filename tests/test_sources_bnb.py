"""Files that bitsandbytes quantized, with whatever options, against its own dequantization."""

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

from dqconvert.converter.canonical import CanonicalSource
from dqconvert.converter.opening import open_model

torch.set_num_threads(1)
checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))
configs = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("configs.py"))))
done, refused = checkpoints.done, checkpoints.refused
functional = pytest.importorskip("bitsandbytes.functional")
Tensors = dict[str, Tensor]
LOST = "what they lost stays lost"

Z_IMAGE = configs.z_image_config(
    dim=384, n_layers=1, n_refiner_layers=1, n_heads=3, n_kv_heads=3, cap_feat_dim=128
)


def is_linear(name: str, tensor: Tensor) -> bool:
    named = any(word in name for word in ("blocks", "layers", "refiner"))
    return named and tensor.ndim == 2 and name.endswith(".weight")


def packed(tensors: Tensors, prefix: str = "", **options: Any) -> tuple[Tensors, Tensors]:
    """The tensors of a file, and what bitsandbytes makes of its weights."""
    found, needed = {}, {}
    for name, tensor in tensors.items():
        found[prefix + name] = tensor
        if is_linear(name, tensor):
            codes, state = functional.quantize_4bit(tensor, **options)
            parts = state.as_dict(packed=True)
            found |= {f"{prefix}{name}.{key}": value for key, value in parts.items()}
            found[prefix + name] = codes
            needed[name] = functional.dequantize_4bit(codes, state)
    return found, needed


def folder(path: Path, tensors: Tensors, config: dict[str, Any], **said: Any) -> Path:
    path.mkdir()
    save_file(tensors, path / checkpoints.WEIGHTS, {"format": "pt"})
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True, **said}
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    return path


def opened(path: Path) -> CanonicalSource:
    config = path / "config.json"
    return open_model(path, json.loads(config.read_text()) if config.exists() else {})


@pytest.mark.parametrize(
    ("kind", "block", "double"),
    [
        *(("nf4", 64, False), ("nf4", 64, True), ("nf4", 128, True), ("nf4", 4096, False)),
        *(("fp4", 64, False), ("fp4", 32, True)),
    ],
)
def test_layers_without_a_bias(tmp_path: Path, kind: str, block: int, double: bool) -> None:
    """Only the JSON in the data says the shapes."""
    exact = checkpoints.filled(checkpoints.meta_model(Z_IMAGE))
    options = {"quant_type": kind, "blocksize": block, "compress_statistics": double}
    tensors, needed = packed(exact, **options)
    said = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
    path = folder(tmp_path / "z", tensors, Z_IMAGE, **said)
    found = opened(path)
    assert found.notes[0].startswith("made from quantized weights") and kind in found.notes[0]
    assert {n: i.shape for n, i in found.infos.items()} == {
        n: tuple(t.shape) for n, t in exact.items()
    }
    for name, tensor in needed.items():
        assert torch.equal(found.read(name).bfloat16(), tensor), name
        assert torch.equal(found.stack([name], (3, 9)).bfloat16(), tensor[3:9]), name
    assert LOST in done(path, "--scheme", "int8", "-o", tmp_path / "out")
    assert kind in done("inspect", path)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_single_files_without_a_config(tmp_path: Path, prefix: str) -> None:
    """As they are made for Forge: names of the original, other components beside them."""
    pipeline = checkpoints.tiny_pipeline(tmp_path / "tiny")
    exact = checkpoints.weights_of(pipeline)
    tensors, needed = packed(checkpoints.original(exact), prefix, quant_type="nf4", blocksize=64)
    if prefix:
        tensors["vae.decoder.conv_in.weight"] = torch.ones(4, 4, 3, 3, dtype=torch.bfloat16)
        tensors["text_encoders.t5xxl.shared.weight"] = torch.ones(8, 8).to(torch.float8_e4m3fn)
    file = tmp_path / "flux.safetensors"
    save_file(tensors, file)
    found = opened(file)
    assert (found.family.name, found.dialect) == ("flux", "original")
    theirs = checkpoints.original({name: found.read(name) for name in exact})
    for name, tensor in needed.items():
        assert torch.equal(theirs[name].bfloat16(), tensor), name
    assert LOST in done(file, "--scheme", "gguf-q8_0", "-o", tmp_path / "out")
    assert "nf4" in done("inspect", file)


def test_a_state_that_lies_is_named(tmp_path: Path) -> None:
    exact = checkpoints.filled(checkpoints.meta_model(Z_IMAGE))
    tensors, _ = packed(exact, quant_type="nf4", blocksize=64)
    name = next(n for n in tensors if n.endswith("attention.to_q.weight"))
    state = f"{name}.quant_state.bitsandbytes__nf4"
    words = ("--scheme", "int8", "-o", tmp_path / "out")
    lies = {
        b"no json": "nothing in the file says its shape",
        b'{"quant_type": "nf4", "blocksize": 48, "shape": [384, 384]}': "blocks of 48",
        b'{"quant_type": "nf4", "blocksize": 64, "shape": [384, 1]}': f"{name}: found U8",
        b'{"quant_type": "nf4", "blocksize": 64, "shape": ["a", 2]}': "nothing in the file",
    }
    for number, (text, said) in enumerate(lies.items()):
        broken = {**tensors, state: torch.tensor(list(text), dtype=torch.uint8)}
        path = folder(tmp_path / f"z{number}", broken, Z_IMAGE)
        found = refused(tmp_path, path, *words)
        assert name.removesuffix(".weight") in found and said in found
