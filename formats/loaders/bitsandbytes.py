"""bitsandbytes: NF4 with or without double quantization, and the rows of LLM.int8.

Read are also FP4, blocks of other sizes, and single files without a config, whose layers say
themselves what they are (words.told).

Its loader replaces every linear of the model, except those to skip. It compares these with whole
names and also with their last parts, so a top-level "proj_out" cannot be skipped alone where blocks
have a packed "proj_out" as well.

Source: diffusers/quantizers/bitsandbytes (bnb_quantizer.py, utils.py).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.layouts import Layout
from dqconvert.formats.layouts.bnb import STATE, Int8Rows, Nf4, state_of
from dqconvert.formats.loaders import TARGET, Loader, section_of, with_bias
from dqconvert.formats.recognition import (
    Infos,
    describe,
    differences,
    disagreements,
    json_object,
    layers_with,
    scheme_for,
)
from dqconvert.formats.targets import Recognized
from dqconvert.formats.words import STATE as STATES
from dqconvert.quantizers.errors import PlanError
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import Scheme

METHOD = "bitsandbytes"
SINGLE, DOUBLE = "bitsandbytes", "bitsandbytes-double"

SHAPES = "shapes"
"""Metadata of ours: {layer: [N, K]}."""

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Weights that may share an absmax."""

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
        """Folders whose config says so, and files whose layers do."""
        said = section_of(config, METHOD)
        states = _states(infos)
        if said is None and (not states or "quantization_config" in config):
            return None
        eight = said is not None and said.get("load_in_8bit") is True
        layout = DOUBLE if any(f"{n}.weight.nested_absmax" in infos for n in states) else SINGLE
        problems, loading = _config_problems(said, eight, layout == DOUBLE, {*states.values()})
        parts = ("SCB", "weight_format") if eight else ("weight.absmax", "weight.quant_map")
        found = [layer for part in parts for layer in layers_with(infos, part)]
        shapes = {} if eight else json_object(metadata.get(SHAPES)) or {}
        forms: dict[str, PackedForm] = {}
        for layer in dict.fromkeys([*found, *states, *shapes]):
            state = json_object(metadata.get(f"{layer}.{states.get(layer, STATE)}")) or {}
            try:
                form = _form(layer, infos, {"shape": shapes.get(layer), **state}, eight)
            except ValueError as error:
                problems.append(f"{layer}.weight: {error}")
                continue
            forms[layer] = with_bias(replace(form, layout=layout), layer, infos)
            needed = self.layout(forms[layer]).promise(forms[layer])
            problems += differences(layer, needed, _any_length(layer, forms[layer], infos))
        name = scheme_for(TARGET, forms.values())
        return Recognized(name, 0, forms, tuple(problems), loading=loading)


def _states(infos: Infos) -> dict[str, str]:
    """What follows the layer in the names of the tensors that say shapes."""
    found = (name.partition(f".{STATES}") for name in infos)
    return {layer: f"{STATES}{code}" for layer, parted, code in found if parted}


def _config_problems(
    said: Mapping[str, Any] | None, eight: bool, double: bool, states: Collection[str]
) -> tuple[list[str], tuple[str, ...]]:
    """What a config has otherwise than its file, and the part of it that is diffusers' alone."""
    if said is None:
        line = "config quantization_config: missing; diffusers needs it"
        return [line], (line,)
    codes = {"bnb_4bit_quant_type": "fp4"} if states == {state_of("fp4")} else {}
    lines = {
        key: disagreements(f"config {key}", said.get(key, value), [value])
        for key, value in {**_said(eight, double), **codes}.items()
    }
    problems = [line for found in lines.values() for line in found]
    return problems, tuple(line for key in _COMPUTED for line in lines.get(key, ()))


_COMPUTED = (
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "llm_int8_threshold",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
)
"""What a config says of the product alone, and what the layers say better."""


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
    name = f"{layer}.{state_of(form.spec.code)}"
    found = infos.get(name)
    if found is None or found.dtype != "U8" or len(found.shape) != 1:
        return infos
    ours = Nf4(form.layout == DOUBLE).promise(form)
    return {**infos, name: ours[state_of(form.spec.code)]}


def _form(layer: str, infos: Infos, state: Mapping[str, Any], eight: bool) -> PackedForm:
    """The form of a layer, bias aside, or ValueError with what leaves it in doubt.

    Four bits lie flat, so its state or the header's word counts, or the length of its bias.
    """
    weight, bias = infos.get(f"{layer}.weight"), infos.get(f"{layer}.bias")
    if weight is None or len(weight.shape) != 2:
        raise ValueError("missing" if weight is None else f"found {describe(weight)}")
    if eight:
        return PackedForm(schemes()["bnb-int8"].weight, (weight.shape[0], weight.shape[1]))
    spec = schemes()["bnb-nf4"].weight
    code, block = state.get("quant_type", spec.code), state.get("blocksize", spec.tile[1])
    if code not in ("nf4", "fp4") or block not in BLOCKS:
        raise ValueError(f"bitsandbytes has no {code} in blocks of {block}")
    shape = state.get("shape")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int for n in shape)):
        rows = bias.shape[0] if bias is not None and len(bias.shape) == 1 else 0
        if not rows or weight.numel * 2 % rows:
            raise ValueError(f"nothing in the file says its shape ({SHAPES})")
        shape = [rows, weight.numel * 2 // rows]
    ragged = bool(shape[1] % block)
    spec = replace(spec, code=code, tile=(1, block), ragged=ragged)
    return PackedForm(spec, (shape[0], shape[1]))
