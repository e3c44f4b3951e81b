"""Outputs of every scheme and target, and damaged copies of them, for the tests of verify."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))

Pair = tuple[str, str]
Tensors = dict[str, Tensor]


class Workshop:
    """The tiny pipeline, and an output of it for each scheme and target."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model: Path = checkpoints.tiny_pipeline(folder / "tiny")
        self.outputs: dict[Pair, Path] = {}
        for scheme, target in checkpoints.PAIRS:
            out = folder / f"{scheme}-{target}"
            words = (self.model, "--scheme", scheme, "--target", target, "-o", out, "-q")
            checkpoints.done(*words)
            self.outputs[scheme, target] = out

    def tensors(self, pair: Pair) -> Tensors:
        return dict(load_file(self.file(self.outputs[pair])))

    def file(self, out: Path) -> Path:
        (found,) = out.rglob("*.safetensors")
        return found

    def damaged(
        self, pair: Pair, tensors: Tensors | None = None, said: dict[str, str] | None = None
    ) -> Path:
        """A copy of an output with other tensors or other metadata."""
        copy = self.folder / "damaged"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.outputs[pair], copy)
        file = self.file(copy)
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        save_file(tensors or self.tensors(pair), file, {**metadata, **(said or {})})
        manifest = json.loads((copy / "dqconvert.json").read_text())
        (copy / "dqconvert.json").write_text(json.dumps({**manifest, "files": {}}))
        return copy

    def without_manifest(self, *words: Any, **changes: Any) -> Path:
        """A damaged copy that nothing but its own bytes can betray."""
        copy = self.damaged(*words, **changes)
        (copy / "dqconvert.json").unlink()
        return copy

    def problems(self, out: Path, reference: bool = False) -> str:
        """What verify says of a broken file."""
        words = ["verify", out, *(["--against", self.model] if reference else [])]
        result = checkpoints.dqconvert(*words)
        assert result.exit_code == 1, result.output
        assert "the file is broken" in result.stdout or result.stderr.startswith("Error: ")
        assert "Traceback" not in result.output
        return str(result.stderr)
