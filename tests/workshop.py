"""Outputs of every scheme and target, and damaged copies of them, for the tests of verify.

What a layer consists of is read from the output itself, so that a new target needs no line here.
"""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dqconvert.converter.reopen import PackedLayer, Reopened, reopen
from dqconvert.quantizers.spec import CODES
from dqconvert.quantizers.tensors import QuantizedTensor

checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))

Pair = tuple[str, str]
Tensors = dict[str, Tensor]
Damage = Callable[[Tensor], Tensor | None]


class Workshop:
    """A tiny pipeline, and an output of it for each scheme and target, made when first wanted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model: Path = checkpoints.tiny_pipeline(folder / "tiny")
        _vary(self.model / "transformer" / checkpoints.WEIGHTS)
        self._outputs: dict[Any, Path] = {}
        self._opened: dict[Path, Reopened] = {}
        self._tensors: dict[Path, Tensors] = {}

    def output(self, pair: Pair, *words: Any) -> Path:
        """The output of a conversion with these options."""
        scheme, target = pair
        key = (pair, *map(str, words))
        if key not in self._outputs:
            out = self.folder / f"{scheme}-{target}-{len(self._outputs)}"
            goal = ("--scheme", scheme, "--target", target, "-o", out, "-q")
            checkpoints.done(self.model, *goal, *words)
            self._outputs[key] = out
        return self._outputs[key]

    def opened(self, out: Path) -> Reopened:
        """An output, reopened."""
        if out not in self._opened:
            self._opened[out] = reopen(out)
        return self._opened[out]

    def tensors(self, out: Path) -> Tensors:
        """All tensors of an output, read once: not to be changed in place."""
        if out not in self._tensors:
            self._tensors[out] = dict(load_file(self.file(out)))
        return self._tensors[out]

    def file(self, out: Path) -> Path:
        (found,) = out.rglob("*.safetensors")
        return found

    def metadata(self, out: Path) -> dict[str, str]:
        with safe_open(self.file(out), "pt") as opened:
            return dict(opened.metadata() or {})

    def damaged(
        self,
        out: Path,
        changes: Mapping[str, Tensor | None] | None = None,
        said: Mapping[str, str] | None = None,
    ) -> Path:
        """A copy of an output with other tensors (None: without them) or other metadata.

        Its manifest has no hashes, so that they betray nothing.
        """
        copy = self.folder / "damaged"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(out, copy)
        tensors = {**self.tensors(out), **(changes or {})}
        kept = {name: t.contiguous() for name, t in tensors.items() if t is not None}
        save_file(kept, self.file(copy), {**self.metadata(out), **(said or {})})
        manifest = json.loads((copy / "dqconvert.json").read_text())
        (copy / "dqconvert.json").write_text(json.dumps({**manifest, "files": {}}))
        return copy

    def without_manifest(self, *words: Any) -> Path:
        """A damaged copy that nothing but its own bytes can betray."""
        copy = self.damaged(*words)
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

    # ------------------------------------------------------------------ what a file consists of

    def parts(self, out: Path, layer: PackedLayer) -> Tensors:
        """Tensors of a layer by their suffix."""
        prefix = f"{layer.name}."
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors(out).items()
            if name.startswith(prefix)
        }

    def twins(self, out: Path) -> tuple[PackedLayer, PackedLayer]:
        """Two layers of equal form."""
        layers = self.opened(out).layers
        found = [(a, b) for a in layers for b in layers if a.name < b.name and a.form == b.form]
        return max(found, key=lambda pair: pair[0].form.shape[0] * (not pair[0].form.splits))

    def kept(self, out: Path) -> str:
        """A tensor of the file that stays as it is, whatever the target."""
        return self.opened(out).kept["x_embedder.weight"][0]

    def packed(self, out: Path, layer: PackedLayer, q: QuantizedTensor) -> Tensors:
        """Tensors of the file that a layer with this result would have."""
        packed = self.opened(out).target.pack(layer.form, q)
        return {f"{layer.name}.{leaf}": tensor for leaf, tensor in packed.items()}

    def changed(self, out: Path, change: Callable[[QuantizedTensor], QuantizedTensor]) -> Tensors:
        """Tensors of all layers, each with its logical result changed."""
        found = self.opened(out)
        changes: Tensors = {}
        for layer in found.layers:
            changes |= self.packed(out, layer, change(found.unpack(layer)))
        return changes

    def codes(self, out: Path, layer: PackedLayer) -> str:
        """The tensor that holds a layer's codes, which has exactly their bits."""
        bits = CODES[layer.form.spec.code].bits
        size = layer.form.shape[0] * layer.form.shape[1] * bits // 8
        parts = self.parts(out, layer)
        leaf = next(leaf for leaf, tensor in parts.items() if tensor.nbytes == size)
        return f"{layer.name}.{leaf}"

    # ----------------------------------------------------------------------------------- damage

    def spoiled(self, out: Path, *damages: Damage) -> Iterator[dict[str, Tensor | None]]:
        """Changes that do each damage to a tensor of every kind, no two of them in one layer.

        A kind is a suffix in layers of one format. A damage that returns its argument is none.
        """
        rounds: list[tuple[set[str], dict[str, Tensor | None]]] = []
        kinds: dict[tuple[str, str], list[tuple[str, Tensor]]] = {}
        for layer in self.opened(out).layers:
            for leaf, tensor in self.parts(out, layer).items():
                kind = (layer.form.label, leaf)
                kinds.setdefault(kind, []).append((layer.name, tensor))
        for (_, leaf), places in kinds.items():
            for damage in damages:
                fresh = (
                    (seen, changes, *place)
                    for seen, changes in (*rounds, (set(), {}))
                    for place in places
                    if place[0] not in seen
                )
                seen, changes, layer_name, tensor = next(fresh)
                bad = damage(tensor)
                if bad is tensor:
                    continue
                seen.add(layer_name)
                changes[f"{layer_name}.{leaf}"] = bad
                if len(seen) == 1:
                    rounds.append((seen, changes))
        yield from (changes for _, changes in rounds)

    def names_of(self, out: Path, tensor: str) -> list[str]:
        """What verify may call the layer of a tensor: its name in the file, or those of linears."""
        for layer in self.opened(out).layers:
            if tensor.startswith(f"{layer.name}."):
                return [layer.name, *layer.modules]
        return [tensor.rpartition(".")[0]]


def _vary(file: Path) -> None:
    """Rows of different sizes, as trained weights have them: no scale is like the other."""
    rng = torch.Generator().manual_seed(0)
    weights = load_file(file)
    for name, tensor in weights.items():
        if "blocks." in name and tensor.ndim == 2:
            sizes = torch.exp(0.5 * torch.randn(len(tensor), 1, generator=rng))
            weights[name] = (tensor.float() * sizes).to(tensor.dtype)
    save_file(weights, file, {"format": "pt"})


def resized(q: QuantizedTensor, factor: float) -> QuantizedTensor:
    """Every weight times a factor, or a power of two where scales have no other values."""
    if q.scale.dtype == torch.float8_e8m0fnu:
        factor = 2.0 if factor > 1 else 0.5
    if q.tensor_scale is not None:
        return replace(q, tensor_scale=(q.tensor_scale.float() * factor).to(q.tensor_scale.dtype))
    return replace(q, scale=(q.scale.float() * factor).to(q.scale.dtype))


def reordered(q: QuantizedTensor, order: Tensor) -> QuantizedTensor:
    """Codes and scales of other rows; bias, smooth vector and low-rank branch stay."""
    side = len(order) // len(q.scale)
    grid = order[::side] // side
    second = q.tensor_scale
    return replace(
        q,
        codes=q.codes[order],
        scale=q.scale[grid],
        zero=None if q.zero is None else q.zero[grid],
        tensor_scale=second if second is None or second.numel() == 1 else second[order],
    )
