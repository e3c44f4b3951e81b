"""bitsandbytes: NF4 with or without double quantization, and the rows of LLM.int8.

Its loader replaces every linear of the model, except those to skip. It compares these with whole
names and also with their last parts, so a top-level "proj_out" cannot be skipped alone where blocks
have a packed "proj_out" as well.

Source: diffusers/quantizers/bitsandbytes (bnb_quantizer.py, utils.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.layouts import Layout
from dqconvert.formats.layouts.bnb import STATE, Int8Rows, Nf4
from dqconvert.formats.loaders import TARGET, Loader, checked, section_of, with_bias
from dqconvert.formats.recognition import (
    Infos,
    describe,
    disagreements,
    json_object,
    layers_with,
    scheme_for,
)
from dqconvert.formats.targets import Recognized
from dqconvert.quantizers.errors import PlanError
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import Scheme

METHOD = "bitsandbytes"
SINGLE, DOUBLE = "bitsandbytes", "bitsandbytes-double"

SHAPES = "shapes"
"""Metadata of ours: {layer: [N, K]}."""

THRESHOLD = 6.0
"""LLM.int8 leaves input channels that pass it in 16 bit."""


class BitsAndBytes(Loader):
    """See the module docstring."""

    names = (SINGLE, DOUBLE)

    def layouts(self, scheme: Scheme) -> tuple[str, ...]:
        """Weights alone; absmax are quantized again in NF4 only."""
        if scheme.activation is not None or scheme.steps:
            return ()
        if scheme.weight == schemes()["bnb-nf4"].weight:
            return self.names
        return (SINGLE,) if scheme.weight == schemes()["bnb-int8"].weight else ()

    def layout(self, form: PackedForm) -> Layout:
        """See Loader."""
        return Int8Rows() if form.spec.code == "int8" else Nf4(double=form.layout == DOUBLE)

    def section(self, context: FileContext) -> dict[str, Any] | None:
        """See Loader."""
        eight = {form.spec.code == "int8" for form in context.layers.values()}
        if len(eight) > 1:
            raise PlanError(["bitsandbytes has one format for a file: nf4 or int8"])
        last = {name.rpartition(".")[2] for name in context.layers}
        caught = [name for name in context.kept if name in last]
        if caught:
            raise PlanError(
                f"{name}: bitsandbytes cannot skip it without every linear of a block that is "
                f"called so; quantize it as well, or --keep those"
                for name in caught
            )
        return _said(eight == {True}, context.layout == DOUBLE) | {
            "llm_int8_skip_modules": list(context.kept) or None
        }

    def metadata(self, context: FileContext) -> dict[str, str]:
        """Shapes as well, which NF4 has in its data alone."""
        shapes = {
            name: list(form.shape)
            for name, form in context.layers.items()
            if form.spec.code != "int8"
        }
        return super().metadata(context) | ({SHAPES: json.dumps(shapes)} if shapes else {})

    def recognize(
        self, infos: Infos, metadata: Mapping[str, str], config: Mapping[str, Any]
    ) -> Recognized | None:
        """Folders whose config says so."""
        said = section_of(config, METHOD)
        if said is None:
            return None
        eight = said.get("load_in_8bit") is True
        layout = DOUBLE if said.get("bnb_4bit_use_double_quant") is True else SINGLE
        lines = {
            key: disagreements(f"config {key}", said.get(key, value), [value])
            for key, value in _said(eight, layout == DOUBLE).items()
        }
        problems = [line for found in lines.values() for line in found]
        loading = tuple(line for key in _COMPUTED for line in lines.get(key, ()))
        parts = ("SCB", "weight_format") if eight else ("weight.absmax", "weight.quant_map", STATE)
        found = [layer for part in parts for layer in layers_with(infos, part)]
        shapes = {} if eight else json_object(metadata.get(SHAPES)) or {}
        forms: dict[str, PackedForm] = {}
        for layer in dict.fromkeys([*found, *shapes]):
            shape = _shape(layer, infos, shapes.get(layer), eight)
            if isinstance(shape, str):
                problems.append(f"{layer}.weight: {shape}")
                continue
            spec = schemes()["bnb-int8" if eight else "bnb-nf4"].weight
            form = with_bias(PackedForm(spec, shape, layout=layout), layer, infos)
            forms[layer] = form
            problems += checked(self, layer, form, _any_length(layer, form, infos))
        name = scheme_for(TARGET, forms.values())
        return Recognized(name, 0, forms, tuple(problems), loading=loading)


_COMPUTED = (
    "bnb_4bit_compute_dtype",
    "llm_int8_threshold",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
)
"""What a config says of the product alone, and nothing of the weights."""


def _said(eight: bool, double: bool) -> dict[str, Any]:
    return {
        "quant_method": METHOD,
        "load_in_4bit": not eight,
        "load_in_8bit": eight,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": THRESHOLD,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


def _any_length(layer: str, form: PackedForm, infos: Infos) -> Infos:
    """The header with the JSON of a layer as long as ours; bytes decide what it says."""
    name, found = f"{layer}.{STATE}", infos.get(f"{layer}.{STATE}")
    if found is None or found.dtype != "U8" or len(found.shape) != 1:
        return infos
    ours = Nf4(form.layout == DOUBLE).promise(form).get(STATE, found)
    return {**infos, name: ours}


def _shape(layer: str, infos: Infos, said: Any, eight: bool) -> tuple[int, int] | str:
    """The shape of a packed weight, or why it is not known: NF4 is flat, so its header's word
    counts, or the length of its bias.
    """
    weight, bias = infos.get(f"{layer}.weight"), infos.get(f"{layer}.bias")
    if weight is None or len(weight.shape) != 2:
        return "missing" if weight is None else f"found {describe(weight)}"
    if eight:
        return weight.shape[0], weight.shape[1]
    if isinstance(said, list) and len(said) == 2 and all(isinstance(e, int) for e in said):
        return said[0], said[1]
    rows = bias.shape[0] if bias is not None and len(bias.shape) == 1 else 0
    if not rows or weight.numel * 2 % rows:
        return f"nothing in the header says its shape ({SHAPES})"
    return rows, weight.numel * 2 // rows
