"""A quantized file under canonical names, its linears cut and joined as another layout has them.

Nothing is rounded here: codes, scales and branches go from one layer to another as they are, and
what has no exact place in the other layout is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

from dqconvert.converter.canonical import CanonicalSource
from dqconvert.converter.pieces import Pieces
from dqconvert.converter.plan import LayerPlan
from dqconvert.converter.reopen import PackedLayer, Reopened
from dqconvert.formats.form import PackedForm
from dqconvert.quantizers.spec import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from dqconvert.quantizers.tensors import QuantizedTensor

AT_HAND = 3
"""Layers of the file that are remembered: q, k and v may come from one, or be fused from three."""


class PackedSource(CanonicalSource):
    """What a plan needs of a quantized file, and its linears by canonical name.

    pieces: the packed layers of each canonical linear. Packed linears count as BF16, which they
    are read as.
    """

    def __init__(self, found: Reopened) -> None:
        self.found = found
        super().__init__(found.source, found.family, found.manifest.dialect, {})
        self.ignored = 0
        self.pieces = Pieces(found)
        self.infos: Mapping[str, TensorInfo] = {
            name: self._info(name) for name in self.pieces.names()
        }
        self._last: dict[str, QuantizedTensor] = {}

    def layer(self, planned: LayerPlan) -> QuantizedTensor:
        """The logical result of a layer of another layout. ValueError where there is none."""
        from dqconvert.quantizers import slicing

        if planned.columns is None:
            return slicing.join_rows([self.linear(module) for module in planned.modules])
        (module,) = planned.modules
        parts = self._parts(module)
        ends = [*accumulate(part.codes.shape[1] for part in parts)]
        cuts = list(zip([0, *ends], ends, strict=False))
        if planned.columns in cuts:  # as it is in the file: nothing is joined that is cut again
            q = parts[cuts.index(planned.columns)]
        else:
            q = slicing.columns(slicing.join_columns(parts), *planned.columns)
        return replace(q, bias=slicing.summed_bias(parts) if planned.carries_bias else None)

    def linear(self, module: str) -> QuantizedTensor:
        """A canonical linear behind an input without shift, from all layers that hold parts."""
        from dqconvert.quantizers import slicing

        return slicing.join_columns(self._parts(module))

    def read(self, name: str) -> Tensor:
        """A canonical tensor; dequantized in bf16 where it is packed."""
        import torch

        from dqconvert.quantizers.forward import effective_weight

        module, _, leaf = name.rpartition(".")
        if module not in self.pieces:
            return self.found.read_kept(name)
        parts = self._parts(module)
        if leaf == "weight":
            return torch.cat([effective_weight(part) for part in parts], 1).bfloat16()
        biases = [part.bias.float() for part in parts if part.bias is not None]
        whole = sum(biases, start=torch.zeros(len(parts[0].codes)))
        return whole.bfloat16()

    def _parts(self, module: str) -> list[QuantizedTensor]:
        from dqconvert.quantizers import slicing

        found = []
        for piece in self.pieces[module]:
            q = slicing.shifted(self._unpacked(piece[0]), 0.0)
            found.append(slicing.rows(q, *self.pieces.rows(piece)))
        return found

    def _unpacked(self, layer: PackedLayer) -> QuantizedTensor:
        if layer.name not in self._last:
            while len(self._last) >= AT_HAND:
                del self._last[next(iter(self._last))]
            self._last[layer.name] = self.found.unpack(layer)
        return self._last[layer.name]

    def _info(self, name: str) -> TensorInfo:
        module, _, leaf = name.rpartition(".")
        if module not in self.pieces:
            return self.found.info_of(name)
        layer, _ = self.pieces[module][0]
        dtype = layer.form.bias_dtype if leaf == "bias" else "BF16"
        return TensorInfo(dtype, self.pieces.shape(name))


def unfit(form: PackedForm | None, found: PackedForm) -> str | None:
    """Why a packed layer cannot be one of that form, by headers; None where it may."""
    if form is None:
        return None
    one, two = (
        (s.code, s.tile, s.zero_point, s.unit, s.tensor_scale is None, s.scale[:2] == "F8")
        for s in (form.spec, found.spec)
    )
    if one != two:
        return f"{found.spec.code} in tiles of {found.spec.tile} would have to be rounded again"
    if form.input_scale and not found.input_scale:
        return "the runtime wants a static scale of its input, and the file has none"
    return None
