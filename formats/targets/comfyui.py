"""ComfyUI's own mixed-precision files: one file in the model's original naming.

    int8_tensorwise   <layer>.weight I8 [N, K]        weight_scale F32 [N, 1], [] for one scale
    float8_e4m3fn     <layer>.weight F8_E4M3 [N, K]   weight_scale F32 []   input_scale F32 []
    both              <layer>.comfy_quant U8 [bytes]  {"format": ...} in JSON
                      <layer>.bias                    as it was

w = weight · weight_scale. The header repeats every marker under _quantization_metadata, since
ComfyUI lets the header win: an entry that says less than its marker would silently take effect.

Source: ComfyUI comfy/utils.py (convert_old_quants) and comfy/ops.py (_load_quantized_module);
comfy_kitchen/tensor/int8.py and fp8.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.recognition import (
    Infos,
    differences,
    json_object,
    layers_with,
    scheme_named,
)
from dqconvert.formats.targets import Recognized
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import ALL, FLOAT_DTYPES, QuantSpec, Scheme, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from dqconvert.quantizers.tensors import QuantizedTensor

NAME = "comfyui"
SUMMARY = "single file for ComfyUI"
DIALECT = "original"
KEEP_DTYPE = None
ROLES = {"attention": "weight", "mlp": "weight", "modulation": "weight"}
PARTIAL = True
ROWS = True
FOLDER = ""

ROW, TENSOR = (1, ALL), (ALL, ALL)
FORMATS = {
    ("int8", ROW): "int8_tensorwise",
    ("int8", TENSOR): "int8_tensorwise",
    ("e4m3", TENSOR): "float8_e4m3fn",
}
CODES = {"int8_tensorwise": ("int8", "I8"), "float8_e4m3fn": ("e4m3", "F8_E4M3")}
"""Code and dtype of each format."""

HEADER = "_quantization_metadata"
FULL_PRECISION = "full_precision_matrix_mult"


def accepts(scheme: Scheme) -> str | None:
    """See formats/targets."""
    if scheme.steps:
        return f"ComfyUI's formats have no room for: {', '.join(scheme.steps)}"
    if (scheme.weight.code, scheme.weight.tile) not in FORMATS:
        return f"weights are int8 or e4m3, not {scheme.weight.code} in {scheme.weight.tile}"
    if scheme.activation is None or scheme.activation.code != scheme.weight.code:
        return f"ComfyUI quantizes activations like the weights, to {scheme.weight.code}"
    return None


def layouts(scheme: Scheme) -> tuple[str, ...]:
    """There is one."""
    return ("",)


def adapt(scheme: Scheme, layout: str) -> Scheme:
    """The scheme fits as it is."""
    return scheme


def static(scheme: Scheme, layout: str) -> str:
    """See formats/targets."""
    return "optional" if scheme.activation and scheme.activation.tile == TENSOR else "never"


def problem(form: PackedForm) -> str | None:
    """See formats/targets."""
    reasons = []
    if (form.spec.code, form.spec.tile) not in FORMATS:
        reasons.append(f"no format for {form.spec.code} in tiles of {form.spec.tile}")
    if form.rank:
        reasons.append("no room for a low-rank branch")
    if form.shift:
        reasons.append(f"the runtime adds nothing to the input, not {form.shift}")
    if form.input_scale and form.spec.code == "int8":
        reasons.append("int8 activations are scaled per token; there is no static scale")
    if form.bias_dtype not in FLOAT_DTYPES:
        reasons.append(f"a bias in {form.bias_dtype}")
    return "; ".join(reasons) or None


def shift(form: PackedForm) -> float:
    """Nothing is added to inputs."""
    return 0.0


def activation(form: PackedForm, scheme: Scheme) -> QuantSpec | None:
    """Nothing where the marker asks for a product in full precision."""
    return None if form.full_precision else scheme.activation


def marker(form: PackedForm) -> dict[str, Any]:
    """What comfy_quant and the header say of a layer."""
    said: dict[str, Any] = {"format": FORMATS[form.spec.code, form.spec.tile]}
    if form.full_precision:
        said[FULL_PRECISION] = True
    return said


def _marker_bytes(form: PackedForm) -> bytes:
    return json.dumps(marker(form)).encode()


def promise(form: PackedForm) -> dict[str, TensorInfo]:
    """See formats/targets."""
    n, _ = form.shape
    _, dtype = CODES[FORMATS[form.spec.code, form.spec.tile]]
    infos = {
        "weight": TensorInfo(dtype, form.shape),
        "weight_scale": TensorInfo("F32", _scale_shape(form)),
        "comfy_quant": TensorInfo("U8", (len(_marker_bytes(form)),)),
    }
    if form.input_scale:
        infos["input_scale"] = TensorInfo("F32", ())
    if form.bias:
        infos["bias"] = TensorInfo(form.bias_dtype, (n,))
    return infos


def _scale_shape(form: PackedForm) -> tuple[int, ...]:
    return () if form.spec.tile == TENSOR else (form.shape[0], 1)


def pack(form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
    """See formats/targets."""
    import torch

    from dqconvert.quantizers.tensors import TORCH_DTYPES

    tensors = {
        "weight": q.codes.contiguous(),
        "weight_scale": q.scale.float().reshape(_scale_shape(form)),
        "comfy_quant": torch.tensor(list(_marker_bytes(form)), dtype=torch.uint8),
    }
    if (q.input_scale is not None) != form.input_scale:
        raise ValueError("the form and the result disagree on a static activation scale")
    if (q.bias is not None) != form.bias:
        raise ValueError("the form and the result disagree on a bias")
    if q.input_scale is not None:
        tensors["input_scale"] = q.input_scale.float().reshape(())
    if q.bias is not None:
        tensors["bias"] = q.bias.to(TORCH_DTYPES[form.bias_dtype]).contiguous()
    return tensors


def unpack(form: PackedForm, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    """See formats/targets. SourceError on a marker that says more than this target writes."""
    from dqconvert.quantizers.tensors import QuantizedTensor

    if "comfy_quant" in tensors:
        said = json_object(bytes(tensors["comfy_quant"].tolist()).decode(errors="replace"))
        if reason := _entry_problem(said, form.spec.code):
            raise SourceError(f"comfy_quant: {reason}")
    static = tensors.get("input_scale")
    return QuantizedTensor(
        spec=form.spec,
        codes=tensors["weight"],
        scale=tensors["weight_scale"].reshape(form.spec.grid(form.shape)),
        bias=tensors.get("bias"),
        input_scale=None if static is None else static.reshape(()),
        shift=form.shift,
    )


def _entry_problem(said: Mapping[str, Any] | None, code: str) -> str | None:
    """None, or why a marker or header entry does not fit a weight of that code."""
    if said is None:
        return "not a JSON object"
    name = said.get("format")
    if name not in CODES:
        return f"format {name!r} is not one of {', '.join(CODES)}"
    if CODES[name][0] != code:
        return f"says {name}, but the weight is {code}"
    params = said.get("params")
    if said.get("convrot") or (isinstance(params, dict) and params.get("convrot")):
        return "the weight is rotated (convrot), which is not supported"
    return None


def recognize(
    infos: Infos, metadata: Mapping[str, str], config: Mapping[str, Any]
) -> Recognized | None:
    """Files with markers, in the header or as tensors."""
    marked = layers_with(infos, "comfy_quant")
    if not marked and HEADER not in metadata:
        return None
    header = json_object(metadata.get(HEADER))
    problems = []
    if header is None and HEADER in metadata:
        problems.append(f"metadata {HEADER}: not a JSON object")
    entries = (header or {}).get("layers")
    entries = entries if isinstance(entries, dict) else {}
    forms = {}
    for layer in dict.fromkeys([*entries, *marked]):
        form = _read_form(layer, infos)
        if form is None:
            problems.append(f"{layer}.weight: missing, or not one that this target writes")
            continue
        problems += _layer_problems(layer, form, infos, entries.get(layer))
        forms[layer] = form
    scheme = scheme_named(NAME, [form.spec for form in forms.values()])
    return Recognized(scheme=scheme, rank=0, forms=forms, problems=tuple(problems))


def _read_form(layer: str, infos: Infos) -> PackedForm | None:
    weight, scale = infos.get(f"{layer}.weight"), infos.get(f"{layer}.weight_scale")
    code = next((code for code, dtype in CODES.values() if weight and dtype == weight.dtype), None)
    if weight is None or code is None or len(weight.shape) != 2:
        return None
    per_row = code == "int8" and (scale is None or scale.shape not in ((), (1,)))
    bias = infos.get(f"{layer}.bias")
    return PackedForm(
        spec=_spec(code, ROW if per_row else TENSOR),
        shape=(weight.shape[0], weight.shape[1]),
        bias=bias is not None,
        input_scale=f"{layer}.input_scale" in infos,
        bias_dtype="BF16" if bias is None else bias.dtype,
    )


def _spec(code: str, tile: tuple[int, int]) -> QuantSpec:
    """As a scheme of ours has it, so that its other fields are right."""
    known = (s.weight for s in schemes().values() if accepts(s) is None)
    return next((w for w in known if (w.code, w.tile) == (code, tile)), QuantSpec(code, tile))


def _layer_problems(layer: str, form: PackedForm, infos: Infos, entry: object) -> list[str]:
    promised = promise(form)
    marker_info = promised.pop("comfy_quant")
    for name in ("weight_scale", "input_scale"):  # [1] loads like []
        found = infos.get(f"{layer}.{name}")
        if name in promised and found and (promised[name].shape, found.shape) == ((), (1,)):
            promised[name] = replace(promised[name], shape=(1,))
    problems = differences(layer, promised, infos)
    if entry is not None:
        reason = _entry_problem(entry if isinstance(entry, dict) else None, form.spec.code)
        return [*problems, f"metadata {HEADER}, {layer}: {reason}"] if reason else problems
    sizes = {marker_info, promise(replace(form, full_precision=True))["comfy_quant"]}
    if infos[f"{layer}.comfy_quant"] not in sizes:
        # only the header is at hand here; unpack reads the marker itself
        problems.append(f"{layer}.comfy_quant: says more than a format, and the header does not")
    return problems


def filename(context: FileContext) -> str:
    """flux1-dev-int8.safetensors"""
    return f"{context.model}-{context.scheme.name}.safetensors"


def metadata(context: FileContext) -> dict[str, str]:
    """The markers again, under the layers' names in the file."""
    layers = {name: marker(form) for name, form in context.layers.items()}
    return {HEADER: json.dumps({"format_version": "1.0", "layers": layers})}


def config(context: FileContext) -> dict[str, Any] | None:
    """None: ComfyUI infers the model from its tensors."""
    return None
