"""Forms of packed layers from a header, for targets whose files say what format they hold.

Torch-free. Single scales of shape [] and [1] load alike everywhere, and so do F32, BF16 and F16
scales, which loaders copy into their own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dqconvert.formats.form import PackedForm
from dqconvert.formats.recognition import Infos, describe, differences, layers_with
from dqconvert.quantizers.spec import CODES, DTYPE_BITS, QuantSpec, TensorInfo

LOOSE = frozenset({"F32", "BF16", "F16"})


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the layers of a file should look like.

    spec, layout: of their forms; weight, dtype: suffix and dtype of the codes; scale: suffix of the
    first scales; static: suffix of the static scale of inputs; required: whether there is always
    one; promise, problem: the target's.
    """

    spec: QuantSpec
    layout: str
    weight: str
    dtype: str
    scale: str
    static: str
    required: bool
    promise: Callable[[PackedForm], Mapping[str, TensorInfo]]
    problem: Callable[[PackedForm], str | None]


def read_forms(infos: Infos, wanted: Wanted) -> tuple[dict[str, PackedForm], list[str]]:
    """The forms of all packed layers by name, and a line for everything that is not as wanted."""
    coded = [
        layer
        for layer in layers_with(infos, wanted.weight)
        if infos[f"{layer}.{wanted.weight}"].dtype == wanted.dtype
    ]
    forms: dict[str, PackedForm] = {}
    problems: list[str] = []
    for layer in dict.fromkeys([*coded, *layers_with(infos, wanted.scale)]):
        name = f"{layer}.{wanted.weight}"
        found = infos.get(name)
        if found is None or len(found.shape) != 2:
            what = "missing" if found is None else f"found {describe(found)}"
            problems.append(f"{name}: {what}; needed a matrix of {wanted.dtype}")
            continue
        form = _form(layer, found, infos, wanted)
        if reason := wanted.problem(form):
            problems.append(f"{layer}.{wanted.weight}: {reason}")
            continue
        forms[layer] = form
        problems += differences(layer, _loosened(layer, wanted.promise(form), infos), infos)
    return forms, problems


def _form(layer: str, found: TensorInfo, infos: Infos, wanted: Wanted) -> PackedForm:
    width = found.shape[1] * DTYPE_BITS[wanted.dtype] // CODES[wanted.spec.code].bits
    bias = infos.get(f"{layer}.bias")
    return PackedForm(
        spec=wanted.spec,
        shape=(found.shape[0], width),
        bias=bias is not None,
        input_scale=wanted.required or f"{layer}.{wanted.static}" in infos,
        bias_dtype="BF16" if bias is None else bias.dtype,
        layout=wanted.layout,
    )


def _loosened(layer: str, promised: Mapping[str, TensorInfo], infos: Infos) -> Infos:
    """The promise, with what was found where that loads alike."""
    needed = dict(promised)
    for suffix, need in promised.items():
        found = infos.get(f"{layer}.{suffix}")
        if found is None or need.dtype != "F32" or found.dtype not in LOOSE:
            continue
        if found.shape == need.shape or {found.shape, need.shape} == {(), (1,)}:
            needed[suffix] = found
    return needed
