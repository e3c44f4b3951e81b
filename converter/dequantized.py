"""A quantized file as plain weights: what is requantized, and what dequantize writes.

Smoothing, rotation and the low-rank branch are undone layer by layer, as each is read; folds of the
model itself are taken back by PreconditionedSource.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dqconvert.converter.canonical import CanonicalSource, Infos, expected
from dqconvert.converter.detect import OTHERS
from dqconvert.converter.pieces import Pieces
from dqconvert.converter.precondition import KEY, PreconditionedSource, load
from dqconvert.converter.reopen import Reopened
from dqconvert.formats.unpacked_source import bias_dtype, lost
from dqconvert.formats.unpacking import Layers
from dqconvert.quantizers.spec import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


def plain_weights(found: Reopened) -> CanonicalSource:
    """The weights that a quantized file stands for, as the original had them."""
    source = DequantizedSource(found)
    folded = load(found) if KEY in found.source.metadata else None
    return source if folded is None else PreconditionedSource(source, folded.inverse)


class DequantizedSource(CanonicalSource):
    """Canonical tensors of a quantized file: fp32 where they were quantized, worth BF16.

    Worker threads may read at once: see formats/unpacking.py.
    """

    def __init__(self, found: Reopened) -> None:
        self.source, self.family = found.source, found.family
        self.dialect, self.origins = _dialect(found), {}
        self._found = found
        forms = {layer.name: layer.form for layer in found.layers}
        self._layers = Layers(found.source, found.target.unpack, forms)
        self._pieces = Pieces(found)
        others = (*found.family.unread, *OTHERS)
        known = self._pieces.names()
        required, optional = expected(found.family, known)
        ours = [k for k in known if k in required or k in optional or not k.startswith(others)]
        self.infos: Infos = {name: self._info(name) for name in ours}
        self.ignored = found.source.outside + len(known) - len(ours)

    @property
    def notes(self) -> tuple[str, ...]:
        """That the weights were quantized before, and as what."""
        return (lost(self._layers.forms.values()),)

    def read(self, name: str) -> Tensor:
        """A canonical tensor, in fresh memory, fp32 where it was quantized."""
        import torch

        module, _, leaf = name.rpartition(".")
        if module not in self._pieces:
            return self._found.read_kept(name)
        if leaf == "weight":
            return self.stack([name])
        # the others are zeros: it went to the last piece of a split linear
        last = self._pieces[module][-1]
        start, stop = self._pieces.rows(last)
        bias = self._layers.bias(last[0].name)
        return torch.zeros(stop - start) if bias is None else bias[start:stop].clone()

    def stack(self, names: Sequence[str], rows: tuple[int, int] | None = None) -> Tensor:
        """Canonical tensors stacked on rows, or rows start .. stop of the stack, in one piece."""
        import torch

        weights = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
        if len(weights) < len(names) or not self._pieces.keys() >= set(weights):
            return torch.cat([self.read(name) for name in names])[slice(*(rows or (0, None)))]
        infos = [self.infos[name] for name in names]
        start, stop = rows or (0, sum(info.shape[0] for info in infos))
        whole = torch.empty(stop - start, infos[0].shape[1])
        first = 0
        for module, info in zip(weights, infos, strict=True):
            low, high = max(first, start), min(first + info.shape[0], stop)
            if low < high:
                self._fill(module, whole[low - start : high - start], low - first)
            first += info.shape[0]
        return whole

    def where(self, name: str) -> str:
        """File and tensor that a canonical tensor comes from, for messages."""
        module = name.rpartition(".")[0]
        if module in self._pieces:
            return f"{self._found.path}: layer {self._pieces[module][0][0].name}"
        theirs, _ = self._found.kept[name]
        return f"{self.source.where(theirs)}: tensor {theirs}"

    def _fill(self, module: str, out: Tensor, start: int) -> None:
        """Rows of a canonical weight from start on, as many as out [rows, K] has."""
        first = 0
        for layer, place in self._pieces[module]:
            low, _ = self._pieces.rows((layer, place))
            last = first + layer.form.shape[1]
            rows = (low + start, low + start + len(out))
            out[:, first:last] = self._layers.weight(layer.name, rows)
            first = last

    def _info(self, name: str) -> TensorInfo:
        module, _, leaf = name.rpartition(".")
        if module not in self._pieces:
            return self._found.info_of(name)
        layer, _ = self._pieces[module][-1]
        dtype = bias_dtype(layer.form) if leaf == "bias" else "BF16"
        return TensorInfo(dtype, self._pieces.shape(name))


def _dialect(found: Reopened) -> str:
    """The naming of what the file was made from: as it says, or its own where it says nothing."""
    if found.manifest.scheme is not None or found.dialect not in found.family.sources:
        return found.manifest.dialect
    named = any(layer.modules != (layer.name,) for layer in found.layers)
    return found.dialect if named else "diffusers"
