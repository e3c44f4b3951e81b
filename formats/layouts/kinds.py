"""The number formats by a word that does not change with the dtype of their scales. Torch-free."""

from __future__ import annotations

from collections.abc import Collection

from dqconvert.formats.form import FileContext
from dqconvert.quantizers.errors import PlanError
from dqconvert.quantizers.spec import ALL, QuantSpec, Scheme

ROW, TENSOR = (1, ALL), (ALL, ALL)

_KINDS = {
    ("int8", ROW): "int8",
    ("e4m3", ROW): "fp8",
    ("e4m3", TENSOR): "fp8-tensor",
    ("e4m3", (128, 128)): "fp8-block128",
    ("e4m3", (1, 32)): "mxfp8",
    ("e3m2", (1, 32)): "mxfp6",
    ("e2m1", (1, 32)): "mxfp4",
    ("e2m1", (1, 16)): "nvfp4",
}

_STEPS = {
    "rotate": "rotated weights, since the runtime does not rotate the inputs",
    "smooth": "a smooth vector, since the runtime divides no inputs",
    "lowrank": "a low-rank branch",
}


def kind_of(spec: QuantSpec) -> str:
    """int8, fp8, ..., nvfp4; w4a16 for int4 groups; "" for others."""
    if spec.unit or (spec.tensor_scale is None) == ((spec.code, spec.tile) == ("e2m1", (1, 16))):
        return ""
    if spec.code in ("int4", "uint4") and spec.tile[0] == 1 and spec.tile[1] != ALL:
        return "w4a16"
    return _KINDS.get((spec.code, spec.tile), "")


def refusal(scheme: Scheme, kinds: Collection[str], runtime: str) -> str | None:
    """None where the scheme's format is one of kinds and the rest of it fits; else the reason."""
    rooms = [reason for step, reason in _STEPS.items() if step in scheme.steps]
    if rooms:
        return f"{runtime} has no room for {' and '.join(rooms)}"
    kind = kind_of(scheme.weight)
    if kind not in kinds:
        what = kind or f"{scheme.weight.code} in tiles of {scheme.weight.tile}"
        return f"{runtime} loads {', '.join(kinds)}, not {what}"
    if kind == "w4a16" and scheme.activation is not None:
        return f"{runtime} multiplies int4 groups in 16 bit; the scheme quantizes inputs"
    if kind != "w4a16" and scheme.activation is None:
        return f"{runtime} quantizes the inputs of {kind} layers as well; the scheme does not"
    return None


def check_uniform(context: FileContext, runtime: str) -> None:
    """PlanError where a layer's format is not the one that the config says of them all."""
    spec = context.scheme.weight
    others = [name for name, form in context.layers.items() if form.spec != spec]
    if others:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        raise PlanError(
            [
                f"{runtime} reads one format for all layers, that of {context.scheme.name}; "
                f"another for {others[0]}{more}"
            ]
        )
