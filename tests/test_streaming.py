"""Layers in blocks of rows: the same bytes and errors as whole layers, in no memory to speak of."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from dqconvert.converter import layers
from dqconvert.converter.reopen import reopen
from dqconvert.quantizers import spec

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


@pytest.mark.parametrize("scheme", ["int8", "fp8-tensor"])
@pytest.mark.parametrize("rows", [1, 37, 300])
def test_blocks_of_rows_change_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, rows: int
) -> None:
    monkeypatch.setattr(spec, "BLOCK", rows * 256)
    checkpoints.done(source, "--scheme", scheme, "-o", tmp_path / "rows", "-q")
    monkeypatch.setattr(layers, "streams", lambda *_: False)
    checkpoints.done(source, "--scheme", scheme, "-o", tmp_path / "whole", "-q")
    name = f"original-{scheme}.safetensors"
    found, whole = (tmp_path / way / name for way in ("rows", "whole"))
    assert found.read_bytes() == whole.read_bytes()
    errors = [
        [layer["weight_error"] for layer in manifest(tmp_path / way)] for way in ("rows", "whole")
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


def test_targets_that_pack_by_rows_say_so() -> None:
    """ROWS is a claim about bytes: packing two halves must be packing the whole."""
    from dqconvert.formats.form import PackedForm
    from dqconvert.formats.targets import targets
    from dqconvert.quantizers import rtn
    from dqconvert.quantizers.schemes import schemes

    for target in targets().values():
        if not target.ROWS:
            continue
        for scheme in schemes().values():
            if target.accepts(scheme) or scheme.weight.tile[0] != 1:
                continue
            weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
            q, top, low = (rtn.quantize(w, scheme.weight) for w in (weight, *weight.split(32)))
            form = PackedForm(scheme.weight, (64, 128), bias=False)
            half = PackedForm(scheme.weight, (32, 128), bias=False)
            packed = target.pack(form, q)
            halves = target.pack(half, top), target.pack(half, low)
            for suffix, tensor in packed.items():
                if tensor.shape[:1] == (64,):
                    joined = torch.cat([part[suffix] for part in halves])
                    assert torch.equal(joined.view(torch.uint8), tensor.view(torch.uint8)), suffix
                else:
                    assert torch.equal(halves[0][suffix], tensor), suffix


def test_a_streamed_file_opens(source: Path, tmp_path: Path) -> None:
    checkpoints.done(source, "--scheme", "int8", "-o", tmp_path / "out", "-q")
    assert not reopen(tmp_path / "out").recognized.problems
