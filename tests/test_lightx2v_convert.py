"""Whole models for LightX2V: every linear that its class quantizes, in the files that it opens."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))


STREAMS = [f"{s}_mlp.net.{n}" for s in ("img", "txt") for n in ("0.proj", "2")]
LINEARS = {
    **{f"attn.{n}": (1, 1) for n in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")},
    **{f"attn.add_{n}_proj": (1, 1) for n in "qkv"},
    **{name: (4, 1) if name.endswith("proj") else (1, 4) for name in STREAMS},
    **{f"{s}_mod.1": (6, 1) for s in ("img", "txt")},
}
"""What LightX2V's class of Qwen-Image quantizes in a block, and its shape in units of the width."""


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen-Image of width 128 and two blocks, weights at random."""
    outside = {
        **{"img_in": (128, 64), "txt_in": (128, 48), "norm_out.linear": (256, 128)},
        **{f"time_text_embed.timestep_embedder.linear_{i}": (128, 256 // i) for i in (1, 2)},
        **{"proj_out": (64, 128), "txt_norm": (48,)},
    }
    norms = {f"attn.norm_{n}": (128,) for n in ("q", "k", "added_q", "added_k")}
    inside = {name: (128 * n, 128 * k) for name, (n, k) in LINEARS.items()} | norms
    blocks = {
        f"transformer_blocks.{i}.{name}": shape for i in (0, 1) for name, shape in inside.items()
    }
    shapes = outside | blocks
    tensors = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    tensors |= {f"{n}.bias": torch.randn(s[0]) for n, s in shapes.items() if len(s) == 2}
    file = tmp_path_factory.mktemp("qwen") / "model.safetensors"
    save_file({name: t.bfloat16() for name, t in tensors.items()}, file)
    return file


def test_a_model_in_blocks(qwen: Path, tmp_path: Path) -> None:
    """Every linear that LightX2V's class quantizes is, and only those."""
    out = tmp_path / "out"
    words = ("--scheme", "fp8", "--target", "lightx2v", "--save-by-block", "-o", out, "-q")
    checkpoints.done(qwen, *words)
    files = {file.stem: load_file(file) for file in out.glob("*.safetensors")}
    assert sorted(files) == ["block_0", "block_1", "non_block"]
    for index in (0, 1):
        block = files[f"block_{index}"]
        linears = {name.removesuffix(".weight") for name, t in block.items() if t.ndim == 2}
        linears -= {name for name in linears if name.endswith("weight_scale")}
        assert all(f"{name}.weight_scale" in block for name in linears)
        assert {name.split(".", 2)[2] for name in linears} == LINEARS.keys()
    assert not [name for name in files["non_block"] if name.endswith("weight_scale")]
    said = json.loads((out / "config.json").read_text())
    assert said["dit_quant_scheme"] == "fp8-sgl"
    checkpoints.done("verify", out, "--against", qwen)


def test_what_lightx2v_does_not_load_is_refused(qwen: Path, tmp_path: Path) -> None:
    words = ("--target", "lightx2v", "-o", tmp_path / "out")
    refused = checkpoints.refused
    assert "does not run FLUX.1" in refused(tmp_path, "flux-digits", "--scheme", "int8", *words)
    assert "--keep" in refused(tmp_path, qwen, "--scheme", "int8", "--keep", "img_mlp", *words)
    assert "--calib" in refused(tmp_path, qwen, "--scheme", "nvfp4", *words)
    assert "computes no int8" in refused(
        tmp_path, qwen, "--scheme", "int8", "--kernel", "fp8-sgl", *words, "--dry-run"
    )
    assert not (tmp_path / "out").exists()
