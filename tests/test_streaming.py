"""Layers in blocks of rows: the same bytes and errors as whole layers, in no memory to speak of."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from dqconvert.converter import layers, streaming
from dqconvert.converter.reopen import reopen
from dqconvert.formats.form import PackedForm
from dqconvert.formats.targets import targets
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import Scheme

torch.set_num_threads(1)
checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX in original names: fused tensors, of which canonical ones are rows."""
    folder = tmp_path_factory.mktemp("model")
    weights = checkpoints.weights_of(checkpoints.tiny_pipeline(folder / "tiny"))
    path = folder / "original.safetensors"
    save_file(checkpoints.original(weights), path)
    return path


def manifest(folder: Path) -> list[dict[str, float]]:
    """The layers of an output's report, in the order of the plan."""
    found: list[dict[str, float]] = json.loads((folder / "dqconvert.json").read_text())["layers"]
    return found


SOME_BLOCKS = [(f"gguf-{code}", "gguf") for code in ("q8_0", "q4_1", "iq4_nl")]


def plain() -> list[tuple[str, str]]:
    """Schemes and targets whose layers go in blocks of rows."""
    return [
        (name, target)
        for name, target in (*checkpoints.PAIRS, *SOME_BLOCKS)
        if targets()[target].rows(form_of(target, schemes()[name])) and name != "convrot-w4a8"
    ]


def form_of(target: str, scheme: Scheme, shape: tuple[int, int] = (384, 256)) -> PackedForm:
    """A layer of that scheme as the planner would make it."""
    runtime = targets()[target]
    layout = runtime.layouts(scheme)[0]
    adapted = runtime.adapt(scheme, layout)
    return PackedForm(adapted.weight, shape, layout=layout, rotation=scheme.rotation)


@pytest.mark.parametrize("pair", plain(), ids="-".join)
@pytest.mark.parametrize("rows", [1, 300])
def test_blocks_of_rows_change_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: tuple[str, str], rows: int
) -> None:
    words = ("--scheme", pair[0], "--target", pair[1], "-q")
    monkeypatch.setattr(streaming, "BLOCK", rows * 256)
    checkpoints.done(source, *words, "-o", tmp_path / "rows")
    monkeypatch.setattr(layers, "streams", lambda *_: False)
    checkpoints.done(source, *words, "-o", tmp_path / "whole")
    ending = "*.gguf" if pair[1] == "gguf" else "*.safetensors"
    found, whole = (next((tmp_path / way).rglob(ending)) for way in ("rows", "whole"))
    assert found.read_bytes() == whole.read_bytes()
    errors = [
        [layer["weight_error"] for layer in manifest(tmp_path / way)] for way in ("rows", "whole")
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


def test_a_streamed_file_opens(source: Path, tmp_path: Path) -> None:
    checkpoints.done(source, "--scheme", "int8", "-o", tmp_path / "out", "-q")
    assert not reopen(tmp_path / "out").recognized.problems
