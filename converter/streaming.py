"""Layers quantized in blocks of rows that stay in the processor's cache.

For layouts of plain rows, and schemes that look at a weight once: read some rows, rotate, round,
pack, write, measure; no weight is ever in memory as a whole. The bytes are those that layers.py
gives. Scales that all rows share take a pass over the weight beforehand.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dqconvert.converter.canonical import CanonicalSource
from dqconvert.converter.job import LayerReport
from dqconvert.converter.plan import LayerPlan, Plan
from dqconvert.converter.work import Work
from dqconvert.formats.form import PackedForm
from dqconvert.formats.targets import Target
from dqconvert.quantizers import hadamard, recipe
from dqconvert.quantizers.errors import DataError
from dqconvert.quantizers.spec import ALL, BLOCK, QuantSpec, Scheme
from dqconvert.quantizers.tensors import LinearProblem

ALIGNMENT = 128
"""Rows of a block are a multiple of this: the tallest tile of scales, in any layout."""


def streams(layer: LayerPlan, plan: Plan, calibrated: bool) -> bool:
    """Whether a layer can go in blocks of rows."""
    form, scheme = layer.form, layer.scheme or plan.scheme
    return (
        form is not None
        and layer.columns is None
        and not calibrated
        and not {"smooth", "lowrank"} & set(scheme.steps)
        and not (scheme.shared and _whole(form.spec))
        and form.spec.code != "lut4"  # its codebook is decided by the weight as a whole
        and plan.target.rows(form)
    )


def stream_layer(layer: LayerPlan, bias: Tensor | None, work: Work) -> LayerReport:
    """Quantize and write one layer; what its packed bytes give back is what is reported.

    bias: [N] or None. Raises DataError on NaN or infinity.
    """
    assert layer.form is not None
    start = time.perf_counter()
    target, scheme = work.plan.target, layer.scheme or work.plan.scheme
    scheme = _data_free(layer.form, target, scheme)
    ceiling = _ceiling(layer, work.source) if _whole(layer.form.spec) else None
    steps = _steps(layer.form, target)
    off = total = 0.0
    for rows in _blocks(layer.form.shape):
        weight = work.source.stack(_names(layer), rows).to(work.options.device).float()
        own = None if bias is None else bias[slice(*rows)]
        if layer.form.rotation:  # once; its error is the same in the rotated basis
            weight = hadamard.rotate(weight, layer.form.rotation)
        problem = LinearProblem(weight, own, ceiling=ceiling)
        (q,) = recipe.quantize_group([problem], scheme, work.options)
        form = replace(layer.form, shape=(rows[1] - rows[0], layer.form.shape[1]))
        packed = target.pack(form, replace(q, rotation=layer.form.rotation))
        for suffix, tensor in packed.items():
            place = rows[0] // ALIGNMENT * steps[suffix]
            if steps[suffix]:
                work.files.write(f"{layer.name}.{suffix}", tensor, place)
            elif rows[0] == 0:
                work.files.write(f"{layer.name}.{suffix}", tensor)
        again = replace(target.unpack(form, packed), rotation=0)
        errors = recipe.squared_error(again, weight)
        off, total = off + errors[0], total + errors[1]
    return LayerReport(
        name=layer.name,
        format=layer.form.label,
        shape=layer.form.shape,
        nbytes=layer.nbytes,
        weight_error=math.sqrt(off / total if total else off),
        seconds=time.perf_counter() - start,
        scheme=scheme.name,
    )


def _blocks(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Rows start .. stop in blocks of about BLOCK weights."""
    step = ALIGNMENT * max(1, BLOCK // (ALIGNMENT * max(shape[1], 1)))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _steps(form: PackedForm, target: Target) -> dict[str, int]:
    """Rows of each packed tensor that ALIGNMENT rows of the weight make; 0 where rows are none."""
    one, two = (
        target.promise(replace(form, shape=(rows, form.shape[1])))
        for rows in (ALIGNMENT, 2 * ALIGNMENT)
    )
    return {
        suffix: info.shape[0] if info.shape != two[suffix].shape else 0
        for suffix, info in one.items()
    }


def _names(layer: LayerPlan) -> list[str]:
    return [f"{module}.weight" for module in layer.modules]


def _whole(spec: QuantSpec) -> bool:
    """Whether a scale belongs to all rows."""
    return spec.tensor_scale is not None or (spec.tile[0] == ALL and not spec.unit)


def _ceiling(layer: LayerPlan, source: CanonicalSource) -> Tensor:
    """The largest magnitude of a weight as it is rounded, [] fp32."""
    assert layer.form is not None
    tops: list[Tensor] = []
    for rows in _blocks(layer.form.shape):
        block = source.stack(_names(layer), rows)
        if layer.form.rotation:
            block = hadamard.rotate(block, layer.form.rotation)
        tops += torch.aminmax(block)
    ceiling = torch.stack(tops).float().abs().amax()
    if not bool(ceiling.isfinite()):
        raise DataError("holds NaN or infinity")
    return ceiling


def _data_free(form: PackedForm, target: Target, scheme: Scheme) -> Scheme:
    """The scheme with what the layer is: adaLN linears may have a format of their own."""
    weight = scheme.modulation if form.splits and scheme.modulation else scheme.weight
    return replace(scheme, weight=weight, activation=target.activation(form, scheme))
