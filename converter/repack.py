"""Layers of a quantized file in another target's layout, and what that costs.

Codes never change. Scales, biases and branches may lose digits where the other layout has fewer of
them: what its bytes give back is compared with what the file had, so every loss is a measured one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dqconvert.converter.canonical import compose
from dqconvert.converter.family import fill, leaves
from dqconvert.converter.job import LayerReport
from dqconvert.converter.plan import LayerPlan, Plan
from dqconvert.converter.regroup import PackedSource
from dqconvert.formats.fileset import FileSet
from dqconvert.quantizers import slicing
from dqconvert.quantizers.tensors import TORCH_DTYPES, QuantizedTensor

PARTS = {
    "scale": "scales",
    "tensor_scale": "tensor scales",
    "zero": "zero points",
    "smooth": "smooth vectors",
    "down": "low-rank branches",
    "up": "low-rank branches",
    "bias": "biases",
    "input_scale": "static scales of inputs",
}
"""What may lose digits, by the field that holds it."""

OFFSET = 1 / 16
"""How far from a whole number a zero point may be that an offset in 16 bit stands for."""


@dataclass(slots=True)
class Losses:
    """What was lost: {what: (layers, the most of its norm, where)}; problems: what cannot be."""

    parts: dict[str, tuple[int, float, str]] = field(default_factory=dict)
    dropped: int = 0
    signed: int = 0
    decoded: int = 0
    dequantized: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def hear(self, part: str, size: float, where: str) -> None:
        """One loss more."""
        count, most, worst = self.parts.get(part, (0, 0.0, ""))
        self.parts[part] = (count + 1, *max((most, worst), (size, where)))

    def notes(self) -> Iterator[str]:
        """For the user, the weighty ones first."""
        if self.dequantized:
            yield f"{len(self.dequantized)} layers were dequantized to 16 bit"
        if self.signed:
            yield (
                f"{self.signed} layers behind a GELU quantize their input in another way: with its "
                "sign, or shifted above zero; codes are the same, results are not"
            )
        for part, (count, most, where) in self.parts.items():
            yield f"{part} of {count} layers lose digits: {most:.2g} of their norm in {where}"
        if self.dropped:
            yield f"static scales of inputs have no place, and are gone in {self.dropped} layers"
        if self.decoded:
            yield f"{self.decoded} other tensors lose digits in the target's dtype"


def repack(
    plan: Plan, source: PackedSource, files: FileSet, losses: Losses
) -> Iterator[LayerReport]:
    """Write every tensor of a plan; a report of each packed layer. Problems go to losses."""
    for group in plan.groups:
        packed = [layer for layer in group if layer.form is not None]
        for layer in group:
            if layer.form is None:
                _keep(layer, source, files, losses)
        yield from _pack(plan, packed, source, files, losses)


def logical(plan: Plan, layer: LayerPlan, source: PackedSource) -> QuantizedTensor:
    """A layer as the form wants it, before its low-rank branch is widened. ValueError if none."""
    assert layer.form is not None
    q = source.layer(layer)
    reason = None
    if q.rotation != layer.form.rotation:
        reason = f"it is rotated in groups of {q.rotation}, there of {layer.form.rotation}"
    if reason is None and q.smooth is not None and not (layer.form.smooth or layer.form.rank):
        reason = "the runtime divides no inputs by a smooth vector"
    if reason is not None:
        raise ValueError(reason)
    q = slicing.shifted(q, layer.form.shift)
    return replace(q, spec=layer.form.spec, zero=_whole(q.zero))


def _pack(
    plan: Plan,
    group: Sequence[LayerPlan],
    source: PackedSource,
    files: FileSet,
    losses: Losses,
) -> Iterator[LayerReport]:
    """Layers that may have to share the scale of a tensor."""
    found: list[tuple[LayerPlan, QuantizedTensor]] = []
    for layer in group:
        try:
            found.append((layer, _one_scale(plan, logical(plan, layer, source))))
        except ValueError as error:
            losses.problems.append(f"{layer.name}: {error}")
    found = list(_shared(plan, found, losses))
    for layer, q in found:
        assert layer.form is not None
        if losses.problems:
            continue
        q = _fitted(layer, q, plan, source, losses)
        tensors = plan.target.pack(layer.form, _rounded(q))
        again = plan.target.unpack(layer.form, tensors)
        _compare(layer.name, q, again, losses)
        for suffix, tensor in tensors.items():
            files.write(f"{layer.name}.{suffix}", tensor)
        scheme = layer.scheme or plan.scheme
        form = layer.form
        yield LayerReport(
            layer.name, form.label, form.shape, layer.nbytes, None, scheme=scheme.name
        )


def _one_scale(plan: Plan, q: QuantizedTensor) -> QuantizedTensor:
    """Only SVDQuant's layouts have a tensor scale for each row."""
    return q if q.lowrank is not None else slicing.one_tensor_scale(q)


def _shared(
    plan: Plan, found: Sequence[tuple[LayerPlan, QuantizedTensor]], losses: Losses
) -> Iterator[tuple[LayerPlan, QuantizedTensor]]:
    """Linears that read one input share the scale of the tensor where the runtime fuses them."""
    if not plan.scheme.shared:
        yield from found
        return
    for site in dict.fromkeys(layer.site for layer, _ in found):
        members = [(layer, q) for layer, q in found if layer.site == site]
        whole = members[0][1].spec.tensor_scale is None
        scales = [q.scale if whole else q.tensor_scale for _, q in members]
        top = torch.cat([scale.view(1) for scale in scales if scale is not None]).amax().view(1)
        for layer, q in members:
            try:
                if whole and not torch.equal(q.scale.view(1), top):
                    raise ValueError("has a scale of its own, but the runtime fuses it with others")
                yield layer, q if whole else slicing.one_tensor_scale(q, top)
            except ValueError as error:
                losses.problems.append(f"{layer.name}: {error}")


def _fitted(
    layer: LayerPlan, q: QuantizedTensor, plan: Plan, source: PackedSource, losses: Losses
) -> QuantizedTensor:
    """The result with what the form has room for, and its branch as wide as all."""
    assert layer.form is not None
    if q.input_scale is not None and not layer.form.input_scale:
        losses.dropped += 1
        q = replace(q, input_scale=None)
    if q.lowrank is not None:
        q = replace(q, lowrank=slicing.widened(slicing.trimmed(q.lowrank), layer.form.rank))
    before = {p.form.shift for module in layer.modules for p, _ in source.pieces[module]}
    if before != {layer.form.shift}:
        losses.signed += 1
    if q.bias is None and layer.form.bias and not layer.form.rank and not layer.form.splits:
        q = replace(q, bias=torch.zeros(layer.form.shape[0]))
    return q


def _rounded(q: QuantizedTensor) -> QuantizedTensor:
    """Scales in the dtypes that the runtime has them in, whatever the file has room for."""
    second = q.tensor_scale
    if second is not None and q.spec.tensor_scale is not None:
        second = second.to(TORCH_DTYPES[q.spec.tensor_scale])
    return replace(q, scale=q.scale.to(TORCH_DTYPES[q.spec.scale]), tensor_scale=second)


def _compare(name: str, q: QuantizedTensor, again: QuantizedTensor, losses: Losses) -> None:
    """What the bytes give back against what was packed."""
    if not torch.equal(q.codes.view(torch.uint8), again.codes.view(torch.uint8)):
        raise ValueError(f"{name}: codes came back otherwise than they were packed")
    for part, was in _parts(q).items():
        now = _parts(again).get(part)
        if now is None:
            continue
        one, two = was.float(), now.float()
        if one.shape != two.shape:  # one scale for all, or one for each row
            one, two = torch.broadcast_tensors(one, two)
        off = float((two - one).norm() / one.norm()) if bool(one.any()) else float(two.norm())
        if not off < 1 / 16:
            losses.problems.append(f"{name}: its {PARTS[part]} do not fit the target's dtype")
        elif off:
            losses.hear(PARTS[part], off, name)


def _parts(q: QuantizedTensor) -> dict[str, Tensor]:
    found = {part: getattr(q, part) for part in PARTS if hasattr(q, part)}
    if q.lowrank is not None:
        found |= {"down": q.lowrank.down, "up": q.lowrank.up}
    return {part: value for part, value in found.items() if value is not None}


def _whole(zero: Tensor | None) -> Tensor | None:
    """Zero points as whole numbers where offsets in 16 bit stand for such."""
    if zero is None or not bool(((zero - zero.round()).abs() < OFFSET).all()):
        return zero
    return zero.round()


def _keep(layer: LayerPlan, source: PackedSource, files: FileSet, losses: Losses) -> None:
    """A module that is not packed, in the target's naming and dtype."""
    packed = [module for module in layer.modules if module in source.pieces]
    if packed:
        losses.dequantized += packed
    for leaf in leaves(layer.entry):
        name = fill(leaf.theirs, layer.index)
        if name not in layer.outputs:
            continue
        whole = compose(leaf, [source.read(fill(ours, layer.index)) for ours in leaf.ours])
        tensor = whole.to(TORCH_DTYPES[layer.outputs[name].dtype])
        losses.decoded += not torch.equal(tensor.to(whole.dtype), whole)
        files.write(name, tensor)
