"""The eight formats that ComfyUI loads, and what a file says of a packed layer. Torch-free.

A layer is announced by a tensor <layer>.comfy_quant, U8, the bytes of some JSON, or by the entry
of its name in the header, under _quantization_metadata; the entry wins. ComfyUI knows the
arithmetic of a layer from there alone: a rotation that is not said is not undone.

Source: ComfyUI comfy/quant_ops.py (QUANT_ALGOS), comfy/ops.py (_load_quantized_module) and
comfy/utils.py (convert_old_quants); comfy_kitchen/tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dqconvert.formats.form import PackedForm
from dqconvert.formats.layouts import Layout
from dqconvert.formats.layouts.blocked import BlockScaled
from dqconvert.formats.layouts.kitchen import (
    Affine,
    Codebook,
    Int4Rows,
    rotation_reasons,
)
from dqconvert.formats.layouts.scaled import Scaled
from dqconvert.quantizers.spec import ALL, QuantSpec

BOTH, MARKERS, HEADER, LEGACY = "comfy-quant", "markers", "header", "scaled-fp8"
"""Who announces the layers: markers and header, one of them, or the older scaled_fp8."""

ENTRIES = "_quantization_metadata"
FULL_PRECISION = "full_precision_matrix_mult"
SYMMETRIC = "symmetric"
"""Ours, in entries of awq_w4a16: all its offsets are 0. ComfyUI ignores what it does not know."""

ROW, TENSOR = (1, ALL), (ALL, ALL)
WIDEST = 256
"""The rotation where an entry names none."""

GROUPS = {"awq_w4a16": 64, "asym_w4a8_int8": 16}
"""The groups where an entry names none."""


@dataclass(frozen=True, slots=True)
class Format:
    """A format of ComfyUI.

    since: a version that is known to load it; rotates: "never", "maybe" or "always"; packed:
    whether the weight's shape in the file is not the layer's; static: whether it has a static
    activation scale.
    """

    name: str
    layout: Layout
    since: str = "0.29.0"
    rotates: str = "never"
    packed: bool = False
    static: bool = False

    def problem(self, form: PackedForm) -> str | None:
        """None, or why this layer cannot have this format."""
        reasons = []
        if form.input_scale and not self.static:
            reasons.append(f"{self.name} has no static activation scale")
        if self.rotates == "maybe":
            reasons += rotation_reasons(form) if form.rotation else []
        inner = self.layout.problem(self.inner(form))
        return "; ".join([*reasons, *([inner] if inner else [])]) or None

    def inner(self, form: PackedForm) -> PackedForm:
        """The form that the layout sees: plain rows do not care that they are rotated."""
        return replace(form, rotation=0) if self.rotates == "maybe" else form


NVFP4 = BlockScaled(
    tensor_scale="weight_scale_2",
    input_scale="input_scale",
    smooth="pre_quant_scale",
    high_first=True,
    swizzled=True,
    pad=(16, 16),
)
MXFP8 = BlockScaled(codes="F8_E4M3", scales="F8_E8M0", swizzled=True, pad=(32, 32))

FORMATS = {
    one.name: one
    for one in (
        Format("int8_tensorwise", Scaled(), rotates="maybe"),
        Format("float8_e4m3fn", Scaled(), static=True),
        Format("float8_e5m2", Scaled(), static=True),
        Format("mxfp8", MXFP8),
        Format("nvfp4", NVFP4, packed=True, static=True),
        Format("convrot_w4a4", Int4Rows(), rotates="always", packed=True),
        Format("asym_w4a8_int8", Codebook(), since="0.38.1", rotates="always", packed=True),
        Format("awq_w4a16", Affine(), since="0.38.1", packed=True),
    )
}
SCALED_FP8 = Format(
    "scaled_fp8", Scaled(scale="scale_weight", static="scale_input"), static=True, since="0.3.0"
)
"""What came before: e4m3 layers that one tensor in the file announces."""

NAMES = {
    ("int8", ROW, "F32"): "int8_tensorwise",
    ("int8", TENSOR, "F32"): "int8_tensorwise",
    ("e4m3", TENSOR, "F32"): "float8_e4m3fn",
    ("e5m2", TENSOR, "F32"): "float8_e5m2",
    ("e4m3", (1, 32), "F8_E8M0"): "mxfp8",
    ("e2m1", (1, 16), "F8_E4M3"): "nvfp4",
    ("int4", ROW, "F32"): "convrot_w4a4",
}


def format_of(spec: QuantSpec, layout: str = BOTH) -> Format | None:
    """The format of a weight, None if ComfyUI has none."""
    if spec.unit:
        return None
    grouped = spec.tile[0] == 1 and spec.tile[1] > 1
    name = NAMES.get((spec.code, spec.tile, spec.scale))
    if spec.code == "lut4" and grouped:
        name = "asym_w4a8_int8"
    if spec.code in ("int4", "uint4") and grouped and spec.tensor_scale is None:
        name = "awq_w4a16"
    if layout == LEGACY:
        return SCALED_FP8 if name == "float8_e4m3fn" else None
    return FORMATS[name] if name else None


def adapted(spec: QuantSpec) -> QuantSpec:
    """A weight as ComfyUI's format has it: scales of int4 groups in 16 bit; small blocks may end
    before they are full.
    """
    found = format_of(spec)
    if found is not None and found.name == "awq_w4a16" and spec.scale not in ("BF16", "F16"):
        return replace(spec, scale="BF16")
    small = found is not None and isinstance(found.layout, BlockScaled)
    return replace(spec, ragged=True) if small else spec


def known(form: PackedForm) -> Format:
    """The format of a form that has no problem. ValueError for others."""
    found = format_of(form.spec, form.layout)
    if found is None:
        raise ValueError(f"ComfyUI has no format for {form.spec}")
    return found


def entry(form: PackedForm) -> dict[str, Any]:
    """What the marker and the header say of a layer."""
    name = known(form).name
    said: dict[str, Any] = {"format": name}
    if name == "int8_tensorwise" and form.rotation:
        said["convrot"] = True
    if name in ("asym_w4a8_int8", "awq_w4a16"):
        said["group_size"] = form.spec.tile[1]
    if name == "awq_w4a16" and not form.spec.zero_point:
        said[SYMMETRIC] = True
    if form.rotation:
        said["convrot_groupsize"] = form.rotation
    if form.full_precision:
        said[FULL_PRECISION] = True
    return said


def marker(form: PackedForm) -> bytes:
    """The bytes of a layer's comfy_quant; none where the layout has no markers."""
    return b"" if form.layout in (HEADER, LEGACY) else json.dumps(entry(form)).encode()


@dataclass(frozen=True, slots=True)
class Said:
    """An entry or marker, understood. format: a name in FORMATS; rotation: 0 for none; group: of
    columns, None where the format has none; fault: what makes ComfyUI refuse it.
    """

    format: str = ""
    rotation: int = 0
    group: int | None = None
    symmetric: bool = False
    full_precision: bool = False
    fault: str | None = None


def understood(value: object) -> Said:
    """What ComfyUI reads in an entry; parameters may also lie under "params"."""
    if not isinstance(value, Mapping):
        return Said(fault="not a JSON object")
    params = value.get("params")
    said = {**value, **(params if isinstance(params, Mapping) else {})}
    name = said.get("format")
    if name is None:
        return Said(fault="names no format: ComfyUI refuses the file")
    if not isinstance(name, str) or name not in FORMATS:
        return Said(fault=f"format {name!r} is not one of {', '.join(FORMATS)}")
    numbers = {key: said.get(key) for key in ("convrot_groupsize", "group_size")}
    if any(not isinstance(number, int | None) for number in numbers.values()):
        return Said(name, fault=f"group sizes are integers, not {numbers}")
    rotates = FORMATS[name].rotates
    rotated = rotates == "always" or (rotates == "maybe" and bool(said.get("convrot")))
    return Said(
        name,
        rotation=(numbers["convrot_groupsize"] or WIDEST) if rotated else 0,
        group=numbers["group_size"] or GROUPS.get(name),
        symmetric=said.get(SYMMETRIC) is True,
        full_precision=bool(said.get(FULL_PRECISION)),
    )
