"""A quantized file as a checkpoint of plain weights under the file's own names.

For layouts that say all that is needed to undo them; where a family's knowledge is wanted (shifts
behind a GELU, interleaved modulation), see converter/dequantized.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dqconvert.formats.container import Derived
from dqconvert.formats.form import PackedForm
from dqconvert.formats.gguf_source import LOST
from dqconvert.formats.scaled_source import Rescaled
from dqconvert.formats.source import Source
from dqconvert.formats.unpacking import Layers, Unpack, layer_of
from dqconvert.quantizers.spec import FLOAT_DTYPES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


class Unpacked(Derived):
    """A checkpoint whose packed layers are read as weights in F32, kept in BF16.

    extras: tensors that belong to the file as a whole, which are left out.
    """

    def __init__(
        self,
        source: Source,
        unpack: Unpack,
        forms: Mapping[str, PackedForm],
        extras: tuple[str, ...] = (),
    ) -> None:
        self.source: Source = source
        self._rest = Rescaled(source)
        self._extras = extras
        self._layers = Layers(source, unpack, forms)

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What is read: packed layers first."""
        found: dict[str, TensorInfo] = {}
        for layer, form in self._layers.forms.items():
            found[f"{layer}.weight"] = TensorInfo("F32", form.shape)
            if form.bias:
                found[f"{layer}.bias"] = TensorInfo("F32", form.shape[:1])
        for name, info in self._rest.infos.items():
            if layer_of(name) not in self._layers.forms and name not in self._extras:
                found[name] = info
        return found

    @cached_property
    def kept(self) -> Mapping[str, str]:
        """Weights are worth 16 bits; biases are what they were."""
        found = {f"{layer}.weight": "BF16" for layer in self._layers.forms}
        found |= {f"{n}.bias": bias_dtype(form) for n, form in self._layers.forms.items()}
        return {**self._rest.kept, **found}

    @property
    def notes(self) -> tuple[str, ...]:
        """That the weights were quantized before, and as what."""
        return (lost(self._layers.forms.values()),)

    def where(self, name: str) -> Path:
        """The file that holds a tensor, or a part of it."""
        if name in self.source.infos:
            return self.source.where(name)
        layer = layer_of(name)
        return self.source.where(next(n for n in self.source.infos if layer_of(n) == layer))

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or its rows start .. stop, in fresh memory; SourceError if bytes lack."""
        layer, _, leaf = name.rpartition(".")
        if layer not in self._layers.forms:
            return self._rest.read(name, rows)
        if leaf == "weight":
            return self._layers.weight(layer, rows or (0, self.infos[name].shape[0]))
        bias = self._layers.bias(layer)
        assert bias is not None
        return (bias if rows is None else bias[slice(*rows)]).float()

    def fill(self, name: str, out: Tensor, rows: tuple[int, int] | None = None) -> None:
        """The same into a contiguous tensor of its dtype and size; SourceError if bytes lack."""
        if name.rpartition(".")[0] in self._layers.forms:
            out.copy_(self.read(name, rows))
        else:
            self._rest.fill(name, out, rows)


def bias_dtype(form: PackedForm) -> str:
    """The dtype in which a packed layer's bias is kept."""
    return form.bias_dtype if form.bias_dtype in FLOAT_DTYPES else "BF16"


def lost(forms: Iterable[PackedForm]) -> str:
    """A note that weights were quantized before, by format."""
    found = Counter(form.label for form in forms)
    types = ", ".join(f"{count} {label}" for label, count in found.items())
    return f"{LOST} ({types}): what they lost stays lost"
