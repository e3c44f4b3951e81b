"""Manifests that are broken themselves, and what is not the fault of a file."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))

INT4 = ("svdquant-w4a4", "nunchaku")

BROKEN: list[dict[str, Any]] = [
    {"files": []},
    {"files": {"x": {}}},
    {"files": {"x": None}},
    {"files": {"x": {"sha256": 5}}},
    {"layers": [{}]},
    {"layers": [None]},
    {"layers": {}},
    {"layers": [{"name": "x", "weight_error": "y"}]},
    {"calibration": "x"},
    {"calibration": {"key": 5}},
    {"options": None},
    {"options": {"keep": 5}},
    {"source": []},
    {"source": {"dialect": "nope"}},
    {"source": {"dialect": "nunchaku"}},
    {"source": {"dialect": None}},
    {"scheme": ["int8"]},
]


@pytest.mark.parametrize("change", BROKEN, ids=json.dumps)
def test_a_broken_manifest_is_one_error(shop: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    out = shop.damaged(shop.output(INT4))
    beside = out / "dqconvert.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | change))
    for words in (
        ("verify", out, "--against", shop.model),
        ("verify", out),
        ("inspect", out),
        ("dequantize", out, "-o", tmp_path / "back.safetensors"),
    ):
        text = checkpoints.refused(tmp_path, *words)
        assert "dqconvert.json" in text and text.count("\n") == 1


def test_what_a_manifest_leaves_out_is_not_missed(shop: Any) -> None:
    out = shop.damaged(shop.output(INT4))
    (out / "dqconvert.json").write_text("{}")
    assert "the file is sound" in checkpoints.done("verify", out, "--against", shop.model)


def test_lost_statistics_are_done_without_and_broken_ones_are_an_error(
    shop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DQCONVERT_CACHE", str(tmp_path))
    out = shop.damaged(shop.output(INT4))
    beside = out / "dqconvert.json"
    said = json.loads(beside.read_text()) | {"calibration": {"key": "abc"}}
    beside.write_text(json.dumps(said))
    assert "the file is sound" in checkpoints.done("verify", out, "--against", shop.model)
    (tmp_path / "abc.safetensors").write_bytes(b"cut")
    text = checkpoints.refused(tmp_path, "verify", out, "--against", shop.model)
    assert "abc.safetensors" in text


# --------------------------------------------------------------------------------- what verify says


def test_what_cannot_be_compared_was_unpacked(shop: Any, tmp_path: Path) -> None:
    """A model of other widths is not a file that cannot be unpacked."""
    pair = ("int8", "comfyui")
    model = tmp_path / "model"
    shutil.copytree(shop.model / "transformer", model)
    weights = load_file(model / "diffusion_pytorch_model.safetensors")
    name = "transformer_blocks.0.ff.net.0.proj"
    for leaf in ("weight", "bias"):
        weights[f"{name}.{leaf}"] = weights[f"{name}.{leaf}"][:-8].clone()
    save_file(weights, model / "diffusion_pytorch_model.safetensors")
    result = checkpoints.dqconvert("verify", shop.output(pair), "--against", model)
    assert "double_blocks.0.img_mlp.0: cannot be compared" in result.stderr
    assert "cannot be unpacked" not in result.stderr
