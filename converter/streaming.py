"""Layers quantized in blocks of rows that stay in the processor's cache.

For targets whose layout is plain rows, and schemes that look at a weight once: read some rows,
round, pack, write, measure; no weight is ever in memory as a whole. The bytes are those that
layers.py gives.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from torch import Tensor

from dqconvert.converter.canonical import CanonicalSource
from dqconvert.converter.job import LayerReport
from dqconvert.converter.plan import LayerPlan, Plan
from dqconvert.formats.fileset import FileSet
from dqconvert.formats.form import PackedForm
from dqconvert.quantizers import recipe, rtn
from dqconvert.quantizers.spec import ALL, QuantSpec
from dqconvert.quantizers.tensors import QuantizedTensor


def streams(layer: LayerPlan, plan: Plan, calibrated: bool) -> bool:
    """Whether a layer can go in blocks of rows."""
    form = layer.form
    return (
        plan.target.ROWS
        and not plan.scheme.steps
        and not calibrated
        and form is not None
        and layer.columns is None
        and form.spec.tensor_scale is None
    )


def stream_layer(
    layer: LayerPlan, plan: Plan, source: CanonicalSource, bias: Tensor | None, writer: FileSet
) -> LayerReport:
    """Quantize and write one layer; what its packed bytes give back is what is reported.

    bias: [N] or None. Raises DataError on NaN or infinity.
    """
    assert layer.form is not None
    start = time.perf_counter()
    spec = layer.form.spec
    names = [f"{module}.weight" for module in layer.modules]
    whole = _whole_scale(layer.form, source, names)
    off = total = 0.0
    for rows in spec.row_blocks(layer.form.shape):
        weight = source.stack(names, rows).float()
        q = rtn.quantize(weight, spec) if whole is None else _under(weight, whole, spec)
        q = replace(q, bias=None if bias is None else bias[slice(*rows)])
        form = replace(layer.form, shape=(rows[1] - rows[0], layer.form.shape[1]))
        packed = plan.target.pack(form, q)
        for suffix, tensor in packed.items():
            _write(f"{layer.name}.{suffix}", tensor, rows, layer, writer)
        errors = recipe.squared_error(plan.target.unpack(form, packed), weight)
        off, total = off + errors[0], total + errors[1]
    return LayerReport(
        name=layer.name,
        format=layer.form.label,
        shape=layer.form.shape,
        nbytes=layer.nbytes,
        weight_error=math.sqrt(off / total if total else off),
        seconds=time.perf_counter() - start,
        scheme=(layer.scheme or plan.scheme).name,
    )


def _write(
    name: str, tensor: Tensor, rows: tuple[int, int], layer: LayerPlan, writer: FileSet
) -> None:
    """Rows of a tensor into their place; what does not depend on rows, with the first block."""
    shape = layer.outputs[name].shape
    if shape and layer.form is not None and shape[0] == layer.form.shape[0]:
        writer.write(name, tensor, rows[0])
    elif rows[0] == 0:
        writer.write(name, tensor)


def _whole_scale(form: PackedForm, source: CanonicalSource, names: list[str]) -> Tensor | None:
    """The scale that all rows share, from a first pass over the weight; None if they have own."""
    if form.spec.tile[0] != ALL:
        return None
    tops = [
        rtn.absmax(source.stack(names, rows), form.spec)
        for rows in form.spec.row_blocks(form.shape)
    ]
    return rtn.first_scales(torch.stack(tops).amax(0), form.spec, None)


def _under(weight: Tensor, scale: Tensor, spec: QuantSpec) -> QuantizedTensor:
    return QuantizedTensor(spec, rtn.encode(weight, scale, None, spec), scale)
