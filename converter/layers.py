"""One group of a plan: read it, quantize it, pack it, and say what was lost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dqconvert.converter.canonical import CanonicalSource, compose
from dqconvert.converter.family import fill, leaves
from dqconvert.converter.job import LayerReport
from dqconvert.converter.plan import LayerPlan, Plan
from dqconvert.converter.streaming import stream_layer, streams
from dqconvert.converter.work import Recipe, Stats, Work
from dqconvert.quantizers import recipe
from dqconvert.quantizers.errors import DataError
from dqconvert.quantizers.recipe import RecipeOptions
from dqconvert.quantizers.tensors import (
    TORCH_DTYPES,
    LinearProblem,
    QuantizedTensor,
)

Tensors = dict[str, Tensor]


def run_group(group: Sequence[LayerPlan], work: Work) -> list[LayerReport]:
    """Quantize layers that belong together, write all their tensors, report each.

    Raises DataError that names file and tensor where a weight holds NaN or infinity.
    """
    if group[0].form is None:
        for name, tensor in _kept(group[0], work.source).items():
            work.files.write(name, tensor)
        return []
    try:
        if all(streams(layer, work.plan, bool(work.stats)) for layer in group):
            return [stream_layer(one, _biases(one, work.source), work) for one in group]
        return _together(group, work)
    except DataError:
        _blame(group, work.source)
        raise


def _together(group: Sequence[LayerPlan], work: Work) -> list[LayerReport]:
    """Layers that share a smooth vector: all in memory at once."""
    start = time.perf_counter()
    reports = []
    for layer, problem, q in quantized_group(group, work):
        assert layer.form is not None
        if work.branch is not None:
            problem, q = work.branch.appended(layer, problem, q)
        packed = work.plan.target.pack(layer.form, q)
        for suffix, tensor in packed.items():
            work.files.write(f"{layer.name}.{suffix}", tensor)
        # What the bytes give back is what was lost, whatever was meant to be packed.
        again = work.plan.target.unpack(layer.form, packed)
        reports.append(_report(layer, problem, again, work.plan))
    seconds = time.perf_counter() - start
    return [replace(report, seconds=seconds) for report in reports]


def quantized_group(
    group: Sequence[LayerPlan], work: Recipe
) -> list[tuple[LayerPlan, LinearProblem, QuantizedTensor]]:
    """Layers that share a smooth vector, quantized: each with its problem and its result."""
    # Layers of one site share its statistics, which are read from the file at each look-up.
    stats = {site: work.stats[site] for site in {layer.site for layer in group} & work.stats.keys()}
    device = work.options.device
    problems = [problem_of(layer, work.source, stats).to(device) for layer in group]
    results = _quantize(group, problems, work.plan, work.options)
    return list(zip(group, problems, results, strict=True))


def problem_of(layer: LayerPlan, source: CanonicalSource, stats: Stats) -> LinearProblem:
    """The linear that a layer of the plan stands for, stacked and cut as the plan says."""
    assert layer.form is not None
    names = [f"{module}.weight" for module in layer.modules]
    parts = tuple(source.infos[name].shape[0] for name in names)
    bias = _biases(layer, source)
    found = stats.get(layer.site)
    weight = source.stack(names)
    if layer.columns is not None:
        weight = weight[:, slice(*layer.columns)].contiguous()
        found = found and found.columns(*layer.columns)
    return LinearProblem(
        weight,
        bias,
        # Only SVDQuant's layouts have a tensor scale for each row, and so for each part.
        parts if len(parts) > 1 and layer.form.rank else (),
        shift=layer.form.shift,
        rotation=layer.form.rotation,
        stats=found,
    )


def _quantize(
    group: Sequence[LayerPlan],
    problems: Sequence[LinearProblem],
    plan: Plan,
    options: RecipeOptions,
) -> list[QuantizedTensor]:
    form = group[0].form
    assert form is not None
    chosen = group[0].scheme or plan.scheme
    if form.splits and chosen.modulation is not None:
        return [recipe.quantize_modulation(p, form.spec, options) for p in problems]
    scheme = replace(chosen, activation=plan.target.activation(form, chosen))
    found = recipe.quantize_group(problems, scheme, options)
    return [
        q if layer.form and layer.form.input_scale else replace(q, input_scale=None)
        for layer, q in zip(group, found, strict=True)
    ]


def _report(
    layer: LayerPlan, problem: LinearProblem, q: QuantizedTensor, plan: Plan
) -> LayerReport:
    assert layer.form is not None
    scheme = layer.scheme or plan.scheme
    activation = plan.target.activation(layer.form, scheme)
    return LayerReport(
        name=layer.name,
        format=layer.form.label,
        shape=layer.form.shape,
        nbytes=layer.nbytes,
        weight_error=recipe.weight_error(q, problem.weight),
        output_error=recipe.output_error(q, problem, activation) if problem.stats else None,
        scheme=scheme.name,
    )


def _kept(layer: LayerPlan, source: CanonicalSource) -> Tensors:
    """A module that stays as it is, in the target's naming and dtype."""
    found: Tensors = {}
    for leaf in leaves(layer.entry):
        name = fill(leaf.theirs, layer.index)
        if name not in layer.outputs:
            continue
        parts = [_finite(fill(ours, layer.index), source) for ours in leaf.ours]
        found[name] = compose(leaf, parts).to(TORCH_DTYPES[layer.outputs[name].dtype])
    return found


def _biases(layer: LayerPlan, source: CanonicalSource) -> Tensor | None:
    """The bias [N] of a layer; zeros where another layer carries it, None if it has none."""
    assert layer.form is not None
    if not layer.form.bias:
        return None
    if not layer.carries_bias:
        return torch.zeros(layer.form.shape[0], dtype=TORCH_DTYPES[layer.form.bias_dtype])
    rows = [source.infos[f"{module}.weight"].shape[0] for module in layer.modules]
    return torch.cat([_bias(m, n, source) for m, n in zip(layer.modules, rows, strict=True)])


def _bias(module: str, rows: int, source: CanonicalSource) -> Tensor:
    name = f"{module}.bias"
    return _finite(name, source) if name in source.infos else torch.zeros(rows)


def _finite(name: str, source: CanonicalSource) -> Tensor:
    tensor = source.read(name)
    if tensor.numel() and not bool(torch.isfinite(tensor.abs().amax())):
        raise DataError(f"{source.where(name)} holds NaN or infinity; repair the checkpoint")
    return tensor


def _blame(group: Sequence[LayerPlan], source: CanonicalSource) -> None:
    """Find the tensor that is not finite; raises DataError with its name."""
    for layer in group:
        for name in layer.sources:
            _finite(name, source)
