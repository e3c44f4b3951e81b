"""auto-round: int4 groups in GPTQ's packing, with or without zero points; inputs in 16 bit.

Symmetric files say auto_round:auto_gptq, whose stored zero points are one less; files with zero
points say auto_round, which stores them as they are (under the other word its loader finds only
linears that cannot be loaded). Every linear of the named blocks is packed unless extra_config says
16 bit of it. `algorithm` is ours, for the reader: GPTQ and AWQ write the same bytes.

Source: diffusers/quantizers/autoround/autoround_quantizer.py, auto_round/inference
(convert_model.py, backend.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.layouts.grouped import WORD, Gptq
from dqconvert.formats.loaders import TARGET, Loader, checked, section_of, with_bias
from dqconvert.formats.recognition import Infos, describe, disagreements, layers_with, scheme_for
from dqconvert.formats.targets import Recognized
from dqconvert.quantizers.errors import PlanError
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import QuantSpec, Scheme

NAME = "auto-round"
GROUPS = (32, 64, 128)

FORMATS = {False: "auto_round:auto_gptq", True: "auto_round"}
"""The word for the packing, without and with zero points."""


class AutoRound(Loader):
    """See the module docstring."""

    names = (NAME,)

    def layouts(self, scheme: Scheme) -> tuple[str, ...]:
        """Int4 groups whose inputs stay as they are; AWQ's steps leave no trace in the file."""
        grouped = scheme.weight.code in ("int4", "uint4") and scheme.weight.tile[1] in GROUPS
        plain = scheme.activation is None and not {"rotate", "smooth", "lowrank"} & {*scheme.steps}
        return self.names if grouped and plain else ()

    def adapt(self, scheme: Scheme, layout: str) -> Scheme:
        """Scales are F16."""
        return replace(scheme, weight=replace(scheme.weight, scale="F16"))

    def layout(self, form: PackedForm) -> Gptq:
        """Zero points are stored as they are where they matter."""
        return Gptq(offset=0 if form.spec.zero_point else 1)

    def problem(self, form: PackedForm) -> str | None:
        """See Loader."""
        reason = super().problem(form)
        if reason is None and form.spec.tile[1] not in GROUPS:
            return f"groups are of 32, 64 or 128 columns, not {form.spec.tile[1]}"
        return reason

    def section(self, context: FileContext) -> dict[str, Any] | None:
        """See Loader."""
        specs = {name: form.spec for name, form in context.layers.items()}
        usual = context.scheme.weight
        if {spec.zero_point for spec in specs.values()} - {usual.zero_point}:
            raise PlanError(["auto-round has one packing for a file: zero points for all or none"])
        blocks = dict.fromkeys(_blocks(name) for name in context.layers)
        inside = [name for name in context.kept if name.startswith(tuple(blocks))]
        extra: dict[str, Any] = {name: {"bits": 16, "data_type": "float"} for name in inside}
        for name, spec in specs.items():
            if spec.tile != usual.tile:
                extra[name] = {"bits": 4, "group_size": spec.tile[1]}
        return {
            "quant_method": NAME,
            "bits": 4,
            "group_size": usual.tile[1],
            "sym": not usual.zero_point,
            "data_type": "int",
            "packing_format": FORMATS[usual.zero_point],
            "block_name_to_quantize": ",".join(blocks),
            "algorithm": context.scheme.name,
            **({"extra_config": extra} if extra else {}),
        }

    def recognize(
        self, infos: Infos, metadata: Mapping[str, str], config: Mapping[str, Any]
    ) -> Recognized | None:
        """Folders whose config says so."""
        said = section_of(config, NAME)
        if said is None:
            return None
        packing, forms = said.get("packing_format"), {}
        problems = disagreements("config bits", said.get("bits"), [4])
        if packing not in FORMATS.values():
            problems.append(f"config packing_format: is {packing}, should be {FORMATS[False]}")
        zero_point = packing == FORMATS[True]
        extra = said.get("extra_config")
        for layer in dict.fromkeys([*layers_with(infos, "qweight"), *layers_with(infos, "scales")]):
            form = _form(layer, infos, zero_point)
            if isinstance(form, str):
                problems.append(f"{layer}.{form}")
                continue
            forms[layer] = form
            problems += checked(self, layer, form, infos)
            own = extra.get(layer) if isinstance(extra, Mapping) else None
            group = own.get("group_size") if isinstance(own, Mapping) else said.get("group_size")
            problems += disagreements(f"{layer}: config group_size", group, [form.spec.tile[1]])
        problems += disagreements("config sym", said.get("sym"), [not zero_point])
        return Recognized(_scheme(said, forms), 0, forms, tuple(problems))


def _blocks(layer: str) -> str:
    """The module list that a layer is in: its name up to the first number."""
    parts = layer.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), 1)
    return ".".join(parts[:place])


def _form(layer: str, infos: Infos, zero_point: bool) -> PackedForm | str:
    """The form of a layer, or what is wrong with the tensor that decides it."""
    qweight, scales = infos.get(f"{layer}.qweight"), infos.get(f"{layer}.scales")
    for name, found in (("qweight", qweight), ("scales", scales)):
        if found is None or len(found.shape) != 2 or not all(found.shape):
            return f"{name}: {'missing' if found is None else f'found {describe(found)}'}"
    assert qweight is not None
    assert scales is not None
    k, n = qweight.shape[0] * WORD, qweight.shape[1]
    spec = QuantSpec(
        "uint4" if zero_point else "int4",
        (1, k // scales.shape[0]),
        scale="F16",
        zero_point=zero_point,
        full_range=not zero_point,
    )
    return with_bias(PackedForm(spec, (n, k), layout=NAME), layer, infos)


def _scheme(said: Mapping[str, Any], forms: Mapping[str, PackedForm]) -> str | None:
    """The scheme that the config names, where these bytes can be its."""
    name = said.get("algorithm")
    fits = name in schemes() and scheme_for(TARGET, forms.values()) is not None
    return str(name) if fits else scheme_for(TARGET, forms.values())
