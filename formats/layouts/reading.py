"""Forms of packed layers from a header, for targets whose files say what format they hold.

Torch-free. Single scales of shape [] and [1] load alike everywhere, and so do F32, BF16 and F16
scales, which loaders copy into their own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from dqconvert.formats.form import PackedForm
from dqconvert.formats.layouts import Layout
from dqconvert.formats.recognition import Infos, describe, differences, layers_with
from dqconvert.quantizers.spec import CODES, DTYPE_BITS, TensorInfo

Promise = Callable[[PackedForm], Mapping[str, TensorInfo]]
Problem = Callable[[PackedForm], str | None]

STATIC = (".input_scale", ".input_global_scale")
"""How the names of static scales of inputs end."""

ALTERING = ("pre_quant_scale", "weight_zero_point")
"""What a layer may have beside its codes that says more of the weight."""

LOOSE = frozenset({"F32", "BF16", "F16"})


def read_forms(
    infos: Infos, layout: Layout, first: PackedForm, promise: Promise, problem: Problem
) -> tuple[dict[str, PackedForm], list[str]]:
    """The forms of all packed layers by name, and a line for everything that is not as promised.

    first: what the forms have in common; with input_scale where there must be one, otherwise
    layers that have one get it. promise, problem: the target's.
    """
    weight, dtype, others = _suffixes(layout, first)
    coded = [
        layer for layer in layers_with(infos, weight) if infos[f"{layer}.{weight}"].dtype == dtype
    ]
    scaled = [layer for suffix in others for layer in layers_with(infos, suffix)]
    forms: dict[str, PackedForm] = {}
    problems: list[str] = []
    for layer in dict.fromkeys([*coded, *scaled]):
        name = f"{layer}.{weight}"
        found = infos.get(name)
        if found is None or len(found.shape) != 2:
            what = "missing" if found is None else f"found {describe(found)}"
            problems.append(f"{name}: {what}; needed a matrix of {dtype}")
            continue
        rows, words = found.shape if weight != "qweight" else found.shape[::-1]  # GPTQ's, across
        width = words * DTYPE_BITS[dtype] // CODES[first.spec.code].bits
        form = _fitted(replace(first, shape=(rows, width)), layer, layout, infos)
        if reason := problem(form):
            problems.append(f"{name}: {reason}")
            continue
        forms[layer] = form
        promised = promise(form)
        problems += differences(layer, _loosened(layer, promised, infos), infos)
        problems += [
            f"{layer}.{suffix}: changes the weight, and has no place in this layout"
            for suffix in ALTERING
            if suffix not in promised and f"{layer}.{suffix}" in infos
        ]
    return forms, problems


def spared(
    forms: Mapping[str, PackedForm], problems: Iterable[str]
) -> tuple[dict[str, PackedForm], list[str]]:
    """The forms without static scales of inputs that are missing, and the lines that say so.

    A runtime needs them, but nothing of the weights does.
    """
    lines = [line for line in problems if line.partition(": missing")[0].endswith(STATIC)]
    bare = {line.partition(": missing")[0].rpartition(".")[0] for line in lines}
    found = {n: replace(f, input_scale=f.input_scale and n not in bare) for n, f in forms.items()}
    return found, lines


def _suffixes(layout: Layout, first: PackedForm) -> tuple[str, str, list[str]]:
    """Suffix and dtype of the codes, and the suffixes that only packed layers have."""
    promised = layout.promise(replace(first, shape=(128, 128), bias=False))
    weight = next(iter(promised))
    return weight, promised[weight].dtype, [suffix for suffix in promised if suffix != weight]


def _fitted(form: PackedForm, layer: str, layout: Layout, infos: Infos) -> PackedForm:
    """The form with the bias and the static scale that the layer has."""
    plain, static = (
        layout.promise(replace(form, shape=(128, 128), bias=False, input_scale=scale)).keys()
        for scale in (False, True)
    )
    bias = infos.get(f"{layer}.bias")
    return replace(
        form,
        bias=bias is not None,
        bias_dtype="BF16" if bias is None else bias.dtype,
        input_scale=form.input_scale or any(f"{layer}.{name}" in infos for name in static - plain),
    )


def _loosened(layer: str, promised: Mapping[str, TensorInfo], infos: Infos) -> Infos:
    """The promise, with what was found where that loads alike."""
    needed = dict(promised)
    for suffix, need in promised.items():
        found = infos.get(f"{layer}.{suffix}")
        if found is None or not {need.dtype, found.dtype} <= LOOSE:
            continue
        if found.shape == need.shape or {found.shape, need.shape} == {(), (1,)}:
            needed[suffix] = found
    return needed
