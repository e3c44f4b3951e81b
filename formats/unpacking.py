"""Packed layers of a file as fp32 weights again, one layer at a time. Torch-free until read.

8-bit layers whose tensors lie row by row are read so; of others the codes of the layer in hand are
kept, a byte for each weight, and rows are decoded from them. Threads that read the same layer share
it, and it is gone when all of them read another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol
from weakref import WeakValueDictionary

from dqconvert.formats.form import PackedForm
from dqconvert.quantizers.spec import ALL, FLOAT_DTYPES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from dqconvert.quantizers.tensors import QuantizedTensor

ROWS = ("int8", "e4m3", "e5m2")
"""Codes that lie row by row, where nothing else than a scale belongs to them."""

Unpack = Callable[[PackedForm, Mapping[str, "Tensor"]], "QuantizedTensor"]


class Reader(Protocol):
    """What is needed of a file: see formats/source.py."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor: ...


@dataclass(eq=False)
class _Layer:
    """A layer in hand. lock: held by who unpacks it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    result: QuantizedTensor | None = None


class Layers:
    """The packed layers of a file, by name."""

    def __init__(self, source: Reader, unpack: Unpack, forms: Mapping[str, PackedForm]) -> None:
        self.forms = forms
        self._source, self._unpack = source, unpack
        self._suffixes: dict[str, list[str]] = {}
        for name in source.infos:
            layer = layer_of(name)
            if layer in forms:
                self._suffixes.setdefault(layer, []).append(name.removeprefix(f"{layer}."))
        self._shared: WeakValueDictionary[str, _Layer] = WeakValueDictionary()
        self._lock, self._own = threading.Lock(), threading.local()

    def weight(self, layer: str, rows: tuple[int, int]) -> Tensor:
        """Rows start .. stop of a layer's weight [rows, K], fp32, in fresh memory."""
        from dqconvert.quantizers.forward import effective_weight, take_rows

        tile = self._tile(layer)
        if tile:
            first = rows[0] // tile * tile
            last = min(-(-rows[1] // tile) * tile, self.forms[layer].shape[0])
            whole = effective_weight(self._read(layer, (first, last), tile))
            return whole[rows[0] - first : rows[1] - first]
        q = self.unpacked(layer)
        height = q.spec.tile_of((q.codes.shape[0], q.codes.shape[1]))[0]
        if height in (1, q.codes.shape[0]):
            return effective_weight(take_rows(q, *rows))
        return effective_weight(q)[rows[0] : rows[1]].clone()

    def bias(self, layer: str) -> Tensor | None:
        """A layer's bias [N], with what its shifted input adds to it given back; None without."""
        from dqconvert.quantizers.forward import shift_surplus

        if not self.forms[layer].bias:
            return None
        if self._tile(layer):
            return self._source.read(f"{layer}.bias")
        q = self.unpacked(layer)
        surplus = shift_surplus(q)
        if q.bias is None or surplus is None:
            return q.bias
        return q.bias.float() + surplus

    def unpacked(self, layer: str) -> QuantizedTensor:
        """The logical result of a layer; the one that the thread read last is at hand."""
        with self._lock:
            held = self._shared.get(layer) or _Layer()
            self._shared[layer] = self._own.layer = held
        with held.lock:
            if held.result is None:
                held.result = self._read(layer)
            return held.result

    def _read(
        self, layer: str, rows: tuple[int, int] | None = None, tile: int = 1
    ) -> QuantizedTensor:
        form = self.forms[layer]
        n = form.shape[0]
        tensors = {}
        for suffix in self._suffixes[layer]:
            name = f"{layer}.{suffix}"
            tensors[suffix] = self._source.read(name, self._part(name, n, (rows, tile)))
        if rows is not None:
            form = replace(form, shape=(rows[1] - rows[0], form.shape[1]))
        return self._unpack(form, tensors)

    def _part(
        self, name: str, n: int, part: tuple[tuple[int, int] | None, int]
    ) -> tuple[int, int] | None:
        """The rows of one tensor that some rows of the weight need; None for all."""
        rows, tile = part
        shape = self._source.infos[name].shape
        if rows is None or not shape or name.endswith(".comfy_quant"):
            return None
        if shape[0] == n:
            return rows
        return (rows[0] // tile, -(-rows[1] // tile)) if shape[0] == -(-n // tile) else None

    def _tile(self, layer: str) -> int:
        """How many rows belong together in a layer that can be read by rows; 0 in others."""
        form, infos = self.forms[layer], self._source.infos
        spec = form.spec
        plain = spec.code in ROWS and spec.scale in FLOAT_DTYPES and not spec.tensor_scale
        weight = infos.get(f"{layer}.weight")
        if not plain or weight is None or weight.shape != form.shape:
            return 0
        if form.rank or form.shift or form.smooth or form.splits or spec.zero_point:
            return 0
        return 1 if spec.tile[0] == ALL else spec.tile[0]


def layer_of(name: str) -> str:
    """The module of a tensor, also where its weight has parts: <layer>.weight.absmax."""
    layer, parted, _ = name.partition(".weight.")
    return layer if parted else name.rpartition(".")[0]
