"""A quantized file back to a plain bf16 checkpoint, in the dialect that the source had.

What was folded and centered is unfolded again, so that LoRAs of the original fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dqconvert.converter.canonical import compose, composed_info, entries_of
from dqconvert.converter.family import fill, leaves, stacked_rows
from dqconvert.converter.precondition import load
from dqconvert.converter.reopen import PackedLayer, Reopened, reopen
from dqconvert.formats.writer import StreamWriter
from dqconvert.quantizers.errors import OutputError, SourceError
from dqconvert.quantizers.forward import effective_weight, shift_surplus
from dqconvert.quantizers.spec import TensorInfo


def dequantize(out: Path, output: Path, overwrite: bool = False) -> Path:
    """Write the checkpoint; returns its path.

    Raises SourceError where the file is broken, OutputError where the output exists.
    """
    if output.suffix != ".safetensors":
        raise OutputError(f"{output}: must end in .safetensors")
    if output.exists() and not overwrite:
        raise OutputError(f"{output}: exists; choose another -o, or give --overwrite")
    found = reopen(out)
    fatal = getattr(found.target, "fatal", None)  # of targets whose readers want more than we do
    header = fatal(found.source.infos, found.recognized.forms) if fatal else None
    problems = [*(found.recognized.problems if header is None else header)]
    problems += [f"{name}: missing" for name in found.missing()]
    if problems:
        raise SourceError(f"{out}: {len(problems)} problems, the first: {problems[0]}")
    weights = _Weights(found)
    dialect = found.manifest.dialect
    infos: dict[str, TensorInfo] = {}
    plan = []
    for entry, index in entries_of(found.family, dialect, weights.infos):
        for leaf in leaves(entry):
            ours = [fill(name, index) for name in leaf.ours]
            if ours[0] not in weights.infos:
                continue
            name = fill(leaf.theirs, index)
            infos[name] = composed_info(leaf, [weights.infos[one] for one in ours])
            plan.append((name, leaf, ours))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output.parent}: no folder to write to ({error.strerror})") from error
    with StreamWriter(output, infos, {"format": "pt"}) as writer:
        for name, leaf, ours in plan:
            writer.write(name, compose(leaf, [weights.read(one) for one in ours]))
    return output


class _Weights:
    """Canonical tensors of a quantized file, in bf16; the layer in hand is kept for its parts."""

    def __init__(self, found: Reopened) -> None:
        self._found = found
        folded = load(found)
        self._undo = None if folded is None else folded.inverse
        self._pieces: dict[str, list[tuple[PackedLayer, int]]] = {}
        for layer in found.layers:
            for place, module in enumerate(layer.modules):
                self._pieces.setdefault(module, []).append((layer, place))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[0].entry.columns is not None and _start(piece[0]))
        self._last: tuple[str, Tensor, Tensor | None] | None = None
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo("BF16", self._shape(name)) for name in sorted(found.names())
        }

    def read(self, name: str) -> Tensor:
        """A canonical tensor [bf16]."""
        found = self._plain if self._undo is None else self._unfolded
        return found(name).bfloat16()

    def _unfolded(self, name: str) -> Tensor:
        assert self._undo is not None
        return self._undo.transformed(name, self._plain)

    def _plain(self, name: str) -> Tensor:
        """A canonical tensor as the file has it, fp32 where it was quantized."""
        module, _, leaf = name.rpartition(".")
        if module not in self._pieces:
            return self._found.read_kept(name)
        pieces = [self._piece(layer, place, leaf) for layer, place in self._pieces[module]]
        if leaf == "bias":  # the others are zeros: it went to the last piece of a split linear
            return pieces[-1]
        return torch.cat(pieces, dim=1)

    def _piece(self, layer: PackedLayer, place: int, leaf: str) -> Tensor:
        if self._last is None or self._last[0] != layer.name:
            q = self._found.unpack(layer)
            bias = None if q.bias is None else q.bias.float()
            surplus = shift_surplus(q)
            if bias is not None and surplus is not None:
                bias = bias + surplus
            self._last = (layer.name, effective_weight(q), bias)
        whole = self._last[1] if leaf == "weight" else self._last[2]
        if whole is None:
            whole = torch.zeros(layer.form.shape[0])
        start, stop = self._rows(layer, place)
        return whole[start:stop]

    def _rows(self, layer: PackedLayer, place: int) -> tuple[int, int]:
        return stacked_rows(layer.entry, place, self._found.hidden, layer.form.shape[0])

    def _shape(self, name: str) -> tuple[int, ...]:
        module, _, leaf = name.rpartition(".")
        if module in self._pieces:
            layer, place = self._pieces[module][0]
            start, stop = self._rows(layer, place)
            width = sum(piece.form.shape[1] for piece, _ in self._pieces[module])
            return (stop - start, width) if leaf == "weight" else (stop - start,)
        theirs, entry = self._found.kept[name]
        shape = self._found.source.infos[theirs].shape
        if len(entry.ours) == 1 and entry.view is None:
            return shape
        return tuple(self._found.read_kept(name).shape)


def _start(layer: PackedLayer) -> bool:
    """Whether a piece of a split linear begins after its first column."""
    assert layer.entry.columns is not None
    return layer.entry.columns[0] != 0
