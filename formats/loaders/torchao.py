"""torchao: int8, fp8 and NVFP4 weights, with inputs quantized as they come or in 16 bit.

The config's quant_type is what diffusers would quantize with, if it had to; what it makes of a
packed weight stands in the header alone, weight by weight (formats/layouts/torchao.py), and a
tensor that the header does not list is not read.

diffusers compares a module to skip with the names of tensors as "<module>." inside or as the
whole name, so that a top-level "proj_out" would cover every block's: it is listed as
"proj_out.weight".

Source: diffusers/quantizers/torchao/torchao_quantizer.py, torchao/core/config.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.layouts import torchao
from dqconvert.formats.layouts.torchao import QDATA, TorchAo
from dqconvert.formats.loaders import TARGET, Loader, section_of, with_bias
from dqconvert.formats.recognition import (
    Infos,
    contradictions,
    differences,
    json_object,
    layers_with,
    parsed,
    scheme_for,
)
from dqconvert.formats.targets import Recognized
from dqconvert.quantizers.spec import Scheme

METHOD = "torchao"
DYNAMIC, WEIGHT_ONLY = "torchao", "torchao-weight-only"
SWIZZLED = "torchao-swizzled"
"""Read alone: scales of NVFP4 in cuBLAS' tiles."""

LISTED = "tensor_names"

BYTES = ("block_size", "_tensor_data_names")
"""What an entry says of the bytes; all else is of the product."""

_PER_ROW = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
_FP8 = {"_type": "torch.dtype", "_data": "float8_e4m3fn"}
CONFIGS: Mapping[tuple[str, str], tuple[str, int, dict[str, Any]]] = {
    ("int8", DYNAMIC): (
        "Int8DynamicActivationInt8WeightConfig",
        2,
        {
            "act_mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
            "weight_only_decode": False,
            "granularity": _PER_ROW,
            "set_inductor_config": True,
            "reduce_range": False,
        },
    ),
    ("int8", WEIGHT_ONLY): (
        "Int8WeightOnlyConfig",
        2,
        {"group_size": None, "granularity": _PER_ROW, "set_inductor_config": True},
    ),
    ("e4m3", DYNAMIC): (
        "Float8DynamicActivationFloat8WeightConfig",
        2,
        {
            "activation_dtype": _FP8,
            "weight_dtype": _FP8,
            "granularity": [_PER_ROW, _PER_ROW],
            "set_inductor_config": True,
        },
    ),
    ("e4m3", WEIGHT_ONLY): (
        "Float8WeightOnlyConfig",
        2,
        {"weight_dtype": _FP8, "set_inductor_config": True},
    ),
    ("e2m1", WEIGHT_ONLY): (
        "NVFP4WeightOnlyConfig",
        1,
        {"use_dynamic_per_tensor_scale": True},
    ),
}
"""By code and layout: type, version and fields of torchao's configuration."""


class TorchAoLoader(Loader):
    """See the module docstring."""

    names = (DYNAMIC, WEIGHT_ONLY, SWIZZLED)

    def layouts(self, scheme: Scheme) -> tuple[str, ...]:
        """Inputs are quantized like the weights, a scale per row; others stay in 16 bit."""
        weight = scheme.weight
        known = any(spec == weight for spec, _ in torchao.SPECS.values())
        if not known or scheme.steps or scheme.activation is None:
            return ()
        dynamic = weight in torchao.DYNAMIC and scheme.activation == weight
        return (DYNAMIC, WEIGHT_ONLY) if dynamic else (WEIGHT_ONLY,)

    def adapt(self, scheme: Scheme, layout: str) -> Scheme:
        """Weight-only layouts leave the inputs alone."""
        return scheme if layout == DYNAMIC else replace(scheme, activation=None)

    def layout(self, form: PackedForm) -> TorchAo:
        """See Loader."""
        return TorchAo(form.layout == DYNAMIC, form.layout == SWIZZLED)

    def problem(self, form: PackedForm) -> str | None:
        """A layer whose inputs are not quantized can stand beside others."""
        return self.layout(form).problem(form)

    def rows(self, form: PackedForm) -> bool:
        """Plain rows."""
        return True

    def section(self, context: FileContext) -> dict[str, Any] | None:
        """See Loader."""
        kind, version, data = CONFIGS[context.scheme.weight.code, context.layout]
        packed = [f"{layer}.weight" for layer in context.layers]
        skipped = [
            f"{name}.weight" if any(f"{name}." in other for other in packed) else name
            for name in context.kept
        ]
        return {
            "quant_method": METHOD,
            "quant_type": {"default": {"_type": kind, "_version": version, "_data": data}},
            "modules_to_not_convert": skipped,
        }

    def metadata(self, context: FileContext) -> dict[str, str]:
        """Every tensor of the file by its logical name, and what joins the packed ones."""
        entries: dict[str, Any] = {}
        for name in context.names:
            layer = name.rpartition(".")[0]
            form = context.layers.get(layer)
            if form is None or name == f"{layer}.bias":
                entries[name] = torchao.PLAIN
            else:
                entries[f"{layer}.weight"] = self.layout(form).entry(form)
        said = {name: json.dumps(entry) for name, entry in entries.items()}
        return super().metadata(context) | {LISTED: json.dumps(list(entries)), **said}

    def recognize(
        self, infos: Infos, metadata: Mapping[str, str], config: Mapping[str, Any]
    ) -> Recognized | None:
        """Folders whose config says so."""
        if section_of(config, METHOD) is None:
            return None
        entries = {
            name.removesuffix(".weight"): entry
            for name in metadata
            if name.endswith(".weight")
            and (entry := json_object(metadata[name])) is not None
            and entry != torchao.PLAIN
        }
        forms: dict[str, PackedForm] = {}
        problems: list[str] = []
        for layer in dict.fromkeys([*layers_with(infos, QDATA), *entries]):
            qdata, form = infos.get(f"{layer}.{QDATA}"), None
            if qdata is not None:
                form = torchao.read_form(entries.get(layer, {}), qdata.shape)
            if form is None:
                what = "missing" if qdata is None else "the header does not say how to join it"
                problems.append(f"{layer}.{QDATA}: {what}")
                continue
            forms[layer] = with_bias(form, layer, infos)
        loading: list[str] = []
        plain = all(form.full_precision for form in forms.values())
        for layer, form in forms.items():
            dynamic = not plain and form.spec in torchao.DYNAMIC
            swizzled = SWIZZLED if torchao.is_swizzled(entries[layer]) else WEIGHT_ONLY
            forms[layer] = form = replace(
                form,
                layout=DYNAMIC if dynamic else swizzled,
                full_precision=dynamic and form.full_precision,
            )
            layout = self.layout(form)
            found = _reshaped(layer, layout, form, infos)
            problems += differences(layer, layout.promise(form), found, (torchao.ZERO,))
            said = contradictions(f"{layer}.weight: header", entries[layer], layout.entry(form))
            problems += said
            loading += [line for line in said if not any(word in line for word in BYTES)]
        problems += _listing_problems(infos, metadata, forms)
        name = scheme_for(TARGET, forms.values())
        return Recognized(name, 0, forms, tuple(problems), loading=tuple(loading))


def _reshaped(layer: str, layout: TorchAo, form: PackedForm, infos: Infos) -> Infos:
    """The header with swizzled scales in the shape of ours; torchao has another for the same."""
    name, found = f"{layer}.{torchao.SCALE}", infos.get(f"{layer}.{torchao.SCALE}")
    need = layout.promise(form)[torchao.SCALE]
    alike = found is not None and (found.dtype, found.numel) == (need.dtype, need.numel)
    return {**infos, name: need} if layout.swizzled and alike else infos


def _listing_problems(
    infos: Infos, metadata: Mapping[str, str], forms: Mapping[str, PackedForm]
) -> Iterator[str]:
    """Tensors that the list in the header lacks, and entries that stand for nothing."""
    listed = parsed(metadata.get(LISTED, ""))
    listed = listed if isinstance(listed, list) else []
    for name in listed:
        if name not in metadata:
            yield f"{name}: in {LISTED}, but the header does not describe it"
        elif name not in infos and name.removesuffix(".weight") not in forms:
            yield f"{name}: missing; the header describes it"
    parts = {
        f"{layer}.{part}" for layer, form in forms.items() for part in TorchAo(False).promise(form)
    }
    wanted = [f"{layer}.weight" for layer in forms]
    wanted += [name for name in infos if name not in parts or name.endswith(".bias")]
    for name in wanted:
        if name not in listed:
            yield f"{name}: not in {LISTED} of the header, so it is not read"
