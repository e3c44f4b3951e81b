"""ComfyUI's own mixed-precision files: one file in the model's original naming.

    int8_tensorwise   <layer>.weight I8 [N, K], rotated or not   weight_scale F32 [N, 1] or []
    float8_e4m3fn     <layer>.weight F8_E4M3 [N, K]   weight_scale F32 []   input_scale F32 []
    float8_e5m2       <layer>.weight F8_E5M2 [N, K]   the same
    mxfp8, nvfp4      see formats/layouts/blocked.py: swizzled, the even column in the high nibble
    convrot_w4a4, asym_w4a8_int8, awq_w4a16           see formats/layouts/kitchen.py
    all               <layer>.comfy_quant U8 [bytes]  {"format": ...} in JSON
                      <layer>.bias                    as it was

The header repeats every marker under _quantization_metadata, since ComfyUI lets the header win: an
entry that says less than its marker would silently take effect. The layouts "markers" and "header"
leave one of the two out. In the layout "scaled-fp8", which older versions load too,

    <layer>.weight F8_E4M3 [N, K]   scale_weight F32 []   scale_input F32 []
    scaled_fp8        F8_E4M3 [0], or [2] where all layers multiply in full precision

ComfyUI computes fp8 inputs without input_scale at scale 1; where nothing is calibrated a layer
asks for full precision. It also reads the shapes of some linears to recognise a model: none of
those may be packed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dqconvert.formats import comfy_files
from dqconvert.formats.comfy import (
    BOTH,
    ENTRIES,
    GROUPS,
    HEADER,
    LEGACY,
    MARKERS,
    ROW,
    adapted,
    entry,
    format_of,
    known,
    marker,
    understood,
)
from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.recognition import Infos, json_object, scheme_for
from dqconvert.formats.targets import Recognized
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.spec import CODES, QuantSpec, Scheme, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from dqconvert.quantizers.tensors import QuantizedTensor

NAME = "comfyui"
SUMMARY = "single file for ComfyUI"
DIALECT = "original"
KEEP_DTYPE = None
ROLES = {"attention": "weight", "mlp": "weight", "modulation": "weight"}
PARTIAL = True
FOLDER = ""

ANNOUNCED = "scaled_fp8"

ROOM = {"rotate": ("int8", "int4", "lut4"), "smooth": ("e2m1",)}
"""Codes that a step of a scheme goes with; fold and clip leave nothing for the runtime to do."""

INPUTS = {
    "int8_tensorwise": "int8",
    "float8_e4m3fn": "e4m3",
    "float8_e5m2": "e5m2",
    "mxfp8": "e4m3",
    "nvfp4": "e2m1",
    "convrot_w4a4": "int4",
    "asym_w4a8_int8": "int8",
}
"""What the runtime makes of inputs; nothing for the rest."""


def accepts(scheme: Scheme) -> str | None:
    """See formats/targets."""
    spec = scheme.weight
    found = format_of(spec)
    if found is None:
        return _no_format(spec)
    others = [
        s for s in scheme.steps if s not in ("fold", "clip") and spec.code not in ROOM.get(s, ())
    ]
    if others:
        return f"ComfyUI's {found.name} has no room for: {', '.join(others)}"
    if found.rotates == "always" and "rotate" not in scheme.steps:
        return f"ComfyUI rotates the inputs of {found.name}"
    inputs = scheme.activation.code if scheme.activation else None
    if inputs != INPUTS.get(found.name):
        return f"ComfyUI's {found.name} makes {INPUTS.get(found.name, 'nothing')} of inputs"
    return None


def _no_format(spec: QuantSpec) -> str:
    kind = CODES[spec.code]
    if spec.unit:
        return "ComfyUI has no format for weights without scales"
    if kind.is_float and kind.bits == 8 and spec.scale != "F8_E8M0":
        what = "rows" if spec.tile == ROW else f"blocks of {spec.tile[0]}x{spec.tile[1]}"
        return f"ComfyUI has one scale for an fp8 tensor, and no format for {what}"
    return f"ComfyUI has no format for {spec.code} in tiles of {spec.tile}, scales in {spec.scale}"


def layouts(scheme: Scheme) -> tuple[str, ...]:
    """Who announces the layers; the older form for fp8 alone."""
    found = format_of(scheme.weight, LEGACY)
    return (BOTH, MARKERS, HEADER, *([LEGACY] if found else []))


def adapt(scheme: Scheme, layout: str) -> Scheme:
    """Weights as the format has them, and inputs like them where they share it."""
    weight, inputs = adapted(scheme.weight), scheme.activation
    if inputs is not None and weight.ragged:
        inputs = replace(inputs, ragged=True)
    return replace(scheme, weight=weight, activation=inputs)


def static(scheme: Scheme, layout: str) -> str:
    """See formats/targets."""
    found = format_of(scheme.weight)
    return "optional" if found is not None and found.static else "never"


def problem(form: PackedForm) -> str | None:
    """See formats/targets."""
    found = format_of(form.spec, form.layout)
    return _no_format(form.spec) if found is None else found.problem(form)


def shift(form: PackedForm) -> float:
    """Nothing is added to inputs."""
    return 0.0


def rows(form: PackedForm) -> bool:
    """All but int4 groups, whose scales lie the other way."""
    return known(form).name != "awq_w4a16"


def activation(form: PackedForm, scheme: Scheme) -> QuantSpec | None:
    """Nothing where the marker asks for a product in full precision."""
    return None if form.full_precision else scheme.activation


def promise(form: PackedForm) -> dict[str, TensorInfo]:
    """See formats/targets."""
    found, said = known(form), marker(form)
    infos = found.layout.promise(found.inner(form))
    return infos | ({"comfy_quant": TensorInfo("U8", (len(said),))} if said else {})


def pack(form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
    """See formats/targets."""
    import torch

    if q.rotation != form.rotation:
        raise ValueError("the form and the result disagree on the rotation")
    found, said = known(form), marker(form)
    tensors = found.layout.pack(found.inner(form), q)
    if said:
        tensors["comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)
    return tensors


def unpack(form: PackedForm, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    """See formats/targets. Where there is no header, the marker decides on the rotation.

    SourceError where a marker is none, or says otherwise than the header.
    """
    found, rotation = known(form), form.rotation
    if "comfy_quant" in tensors and form.layout != LEGACY:
        rotation = _marked(form, _text(tensors["comfy_quant"]))
    q = found.layout.unpack(found.inner(replace(form, rotation=rotation)), tensors)
    return replace(q, rotation=rotation, shift=form.shift)


def _text(marker: Tensor) -> bytes:
    if marker.element_size() != 1 or marker.is_floating_point() or marker.ndim != 1:
        found = f"{str(marker.dtype).removeprefix('torch.')} {list(marker.shape)}"
        raise SourceError(f"comfy_quant: {found} is no text in bytes")
    return bytes(marker.tolist())


def _marked(form: PackedForm, text: bytes) -> int:
    """The rotation by a layer's marker, which must not contradict what is known of it."""
    said, name = understood(json_object(text.decode(errors="replace"))), known(form).name
    fault = said.fault
    if not fault and said.format != name:
        fault = f"says {said.format}; the layer is {name}"
    if not fault and name in GROUPS and said.group != form.spec.tile[1]:
        fault = f"says groups of {said.group}, the scales are of {form.spec.tile[1]}"
    if not fault and form.layout != MARKERS and said.rotation != form.rotation:
        fault = (
            f"says {_rotated(said.rotation)}, but the file's metadata says "
            f"{_rotated(form.rotation)}, which is what ComfyUI believes"
        )
    if fault:
        raise SourceError(f"comfy_quant: {fault}")
    return said.rotation


def _rotated(rotation: int) -> str:
    return f"rotated in groups of {rotation} (convrot)" if rotation else "not rotated (no convrot)"


def recognize(
    infos: Infos, metadata: Mapping[str, str], config: Mapping[str, Any]
) -> Recognized | None:
    """Files with markers, in the header or as tensors, and those of scaled_fp8."""
    found = comfy_files.read(infos, metadata)
    if found is None:
        return None
    return Recognized(
        scheme=scheme_for(NAME, found.forms.values()),
        rank=0,
        forms=found.forms,
        problems=(*found.problems, *found.loading),
        extras=found.extras,
        loading=tuple(found.loading),
    )


def filename(context: FileContext) -> str:
    """flux1-dev-int8.safetensors"""
    return f"{context.model}-{context.scheme.name}.safetensors"


def metadata(context: FileContext) -> dict[str, str]:
    """The markers again, under the layers' names in the file, and a version that loads them.

    None of that in a file with scaled_fp8, which ComfyUI does not look for beside a header. What
    it wants to be told of the model is in both.
    """
    forms, of_model = context.layers, dict(context.facts.get("metadata", {}))
    if any(form.layout == LEGACY for form in forms.values()):
        return of_model
    layers = {name: entry(form) for name, form in forms.items() if form.layout != MARKERS}
    since = max((known(form).since for form in forms.values()), key=_version, default="")
    said = of_model | ({"comfyui_min_version": since} if since else {})
    if layers:
        said[ENTRIES] = json.dumps({"format_version": "1.0", "layers": layers})
    return said


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def extras(context: FileContext) -> dict[str, TensorInfo]:
    """The tensor that announces layers of scaled_fp8, and those that make up for a config."""
    found = {name: TensorInfo("F32", (len(of),)) for name, of in _constants(context).items()}
    older = [form for form in context.layers.values() if form.layout == LEGACY]
    if not older:
        return found
    # Inputs of adaLN's are small enough for scale 1; where others want full precision, all get it.
    exact = any(form.full_precision and not form.splits for form in older)
    return found | {ANNOUNCED: TensorInfo("F8_E4M3", (2 if exact else 0,))}


def _constants(context: FileContext) -> Mapping[str, tuple[float, ...]]:
    found: Mapping[str, tuple[float, ...]] = context.facts.get("tensors", {})
    return found


def extra_tensors(context: FileContext) -> dict[str, Tensor]:
    """The same, as tensors."""
    import torch

    found = {name: torch.tensor(of) for name, of in _constants(context).items()}
    marks = {name: info for name, info in extras(context).items() if name not in found}
    return found | {
        name: torch.zeros(info.shape).to(torch.float8_e4m3fn) for name, info in marks.items()
    }


def config(context: FileContext) -> dict[str, Any] | None:
    """None: ComfyUI infers the model from its tensors."""
    return None
