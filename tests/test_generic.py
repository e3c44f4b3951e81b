"""A diffusers model of no known family: told by its names, converted, verified, dequantized."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dqconvert.converter import generic
from dqconvert.converter.detect import open_canonical
from dqconvert.quantizers.errors import SourceError

torch.set_num_threads(1)
HERE = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
PATH = Path("memory.safetensors")

MODELS: dict[str, dict[str, Any]] = {
    "AllegroTransformer3DModel": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 96,
        "cross_attention_dim": 192,
        "caption_channels": 64,
    },
    "CogVideoXTransformer3DModel": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "time_embed_dim": 64,
        "text_embed_dim": 48,
    },
}
"""Classes that no family here has, and what one finds in their blocks by reading diffusers."""
LINEARS = {
    "AllegroTransformer3DModel": {
        *(f"attn{n}.{leaf}" for n in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
        "ff.net.0.proj",
        "ff.net.2",
    },
    "CogVideoXTransformer3DModel": {
        *(f"attn1.{leaf}" for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
        "norm1.linear",
        "norm2.linear",
        "ff.net.0.proj",
        "ff.net.2",
    },
}


def folder_of(kind: str, path: Path) -> Path:
    config = {"_class_name": kind, **MODELS[kind]}
    tensors = checkpoints.filled(checkpoints.meta_model(config))
    path.mkdir()
    save_file(tensors, path / checkpoints.WEIGHTS)
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("kind", MODELS)
def test_linears_and_roles_are_told_by_names(kind: str) -> None:
    config = {"_class_name": kind, **MODELS[kind]}
    found = open_canonical(checkpoints.Memory(checkpoints.meta_model(config)), PATH, config=config)
    assert generic.is_generic(found.family) and found.family.title == kind
    assert found.family.blocks == ("transformer_blocks",)
    names = {one.name for one in found.family.linears}
    assert names == {f"transformer_blocks.{i}.{leaf}" for i in (0, 1) for leaf in LINEARS[kind]}
    roles = {one.name.split(".", 2)[2]: one.role for one in found.family.linears}
    assert roles["attn1.to_q"] == "attention" and roles["ff.net.2"] == "mlp"
    assert roles.get("norm1.linear", "modulation") == "modulation"


def test_without_a_class_it_stays_unknown() -> None:
    config = {"_class_name": "CogVideoXTransformer3DModel", **MODELS["CogVideoXTransformer3DModel"]}
    with pytest.raises(SourceError, match="not a diffusion transformer that is known"):
        open_canonical(checkpoints.Memory(checkpoints.meta_model(config)), PATH)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("scheme", ["int8", "bnb-nf4"])
def test_it_converts_and_comes_back(kind: str, scheme: str, tmp_path: Path) -> None:
    folder, out = folder_of(kind, tmp_path / "model"), tmp_path / "out"
    said = checkpoints.dqconvert(folder, "--scheme", scheme, "--target", "diffusers", "-o", out)
    assert said.exit_code == 0, said.stderr
    assert "names alone" in said.output + said.stderr
    checkpoints.done("verify", out, "--against", folder)
    checkpoints.done("dequantize", out, "-o", tmp_path / "back.safetensors")
    before, back = load_file(folder / checkpoints.WEIGHTS), load_file(tmp_path / "back.safetensors")
    assert before.keys() == back.keys()
    for name, tensor in before.items():
        error = (tensor.float() - back[name].float()).norm() / tensor.float().norm().clamp(min=1e-9)
        assert error < 0.2, name
        quantized = name.removesuffix(".weight").split(".", 2)[-1] in LINEARS[kind]
        assert bool(error == 0) or quantized, name


def test_other_runtimes_say_that_they_do_not_run_it(tmp_path: Path) -> None:
    folder = folder_of("CogVideoXTransformer3DModel", tmp_path / "model")
    said = checkpoints.dqconvert(folder, "--scheme", "gguf-q8_0", "--target", "gguf", "--dry-run")
    assert "target gguf does not run CogVideoXTransformer3DModel" in said.stderr
