"""A pipeline of another family cannot calibrate a transformer."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

torch.set_num_threads(1)
HERE = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("QwenImagePipeline", "a QwenImagePipeline, which runs Qwen-Image; FLUX.1 runs in Flux"),
        ("SomebodysFluxPipeline", None),
        ("FluxKontextPipeline", None),
    ],
)
def test_the_pipeline_must_be_of_the_family(kind: str, said: str | None, tmp_path: Path) -> None:
    folder = checkpoints.tiny_pipeline(tmp_path / "pipeline")
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": kind}))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    words = (folder, "--scheme", "svdquant-w4a4", "--calib", prompts, "--dry-run")
    result = checkpoints.dqconvert(*words, "-o", tmp_path / "out")
    if said is None:
        assert result.exit_code == 0, result.stderr
    else:
        assert result.exit_code == 1 and said in result.stderr
