"""SGLang diffusion: a diffusers folder whose transformer/config.json says how it is quantized.

    fp8-tensor      <layer>.weight F8_E4M3 [N, K]   weight_scale F32 []
                    input_scale F32 [] when calibrated
    fp8-block128    <layer>.weight F8_E4M3 [N, K]   weight_scale_inv F32 [N/128, K/128], up
    mxfp8           <layer>.weight F8_E4M3 [N, K]   weight_scale_inv U8 [N, K/32], row by row
    nvfp4           <layer>.weight U8 [N, K/2]      weight_scale F8_E4M3 [N, K/16], row by row
                    weight_scale_2 F32 []           input_scale F32 []
    all             <layer>.bias                    as it was

weight_scale_inv is what codes are multiplied with, despite its name. The even column of a byte is
the low nibble. Without weight_scale_2 or input_scale the loader would take 1 and go on, so both
are always there; linears that fuse q, k and v take the largest of their scales, so these share one.

Linears are kept by name: fp8 and mxfp8 compare whole parts of it, modelopt all of it. SGLang calls
a linear inside a Sequential (img_mod.1) by the name of that (img_mod) in some models.

Source: sglang multimodal_gen/runtime/layers/quantization (fp8.py, mxfp8.py, modelopt_quant.py),
runtime/utils/quantization_utils.py, srt/layers/quantization/utils.py (is_layer_skipped).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.layouts import Layout
from dqconvert.formats.layouts import diffusers_folder as folder
from dqconvert.formats.layouts.blocked import BlockScaled
from dqconvert.formats.layouts.kinds import check_uniform, kind_of, refusal
from dqconvert.formats.layouts.modelopt import modelopt_config
from dqconvert.formats.layouts.reading import read_forms, spared
from dqconvert.formats.layouts.scaled import Scaled
from dqconvert.formats.recognition import Infos
from dqconvert.formats.targets import Recognized
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import ALL, QuantSpec, Scheme, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from dqconvert.quantizers.tensors import QuantizedTensor

NAME = "sglang"
SUMMARY = "diffusers folder for SGLang diffusion"
DIALECT = "diffusers"
KEEP_DTYPE = None
ROLES = {"attention": "weight", "mlp": "weight"}
PARTIAL = True
FOLDER = "transformer"

LAYOUTS: Mapping[str, Layout] = {
    "fp8-tensor": Scaled(),
    "fp8-block128": Scaled("weight_scale_inv"),
    "mxfp8": BlockScaled(scale="weight_scale_inv", codes="F8_E4M3", scales="U8"),
    "nvfp4": BlockScaled(tensor_scale="weight_scale_2", input_scale="input_scale"),
}
"""Layout of each kind of format."""

METHODS = {"fp8-tensor": "fp8", "fp8-block128": "fp8", "mxfp8": "mxfp8", "nvfp4": "modelopt"}
"""quant_method of each kind; that of fp8-tensor is modelopt, too, when calibrated."""

KEPT = "modules_to_not_convert"

PER_TOKEN = QuantSpec("e4m3", (1, ALL))


def accepts(scheme: Scheme) -> str | None:
    """See formats/targets."""
    if kind_of(scheme.weight) == "int8" and not scheme.steps:
        return "its int8 reads scales of blocks from a config, none of channels"
    return refusal(scheme, tuple(LAYOUTS), "SGLang")


def layouts(scheme: Scheme) -> tuple[str, ...]:
    """There is one."""
    return ("",)


def adapt(scheme: Scheme, layout: str) -> Scheme:
    """Linears that read one input share the scale of the tensor."""
    return replace(scheme, shared=kind_of(scheme.weight) in ("fp8-tensor", "nvfp4"))


def static(scheme: Scheme, layout: str) -> str:
    """See formats/targets."""
    return {"fp8-tensor": "optional", "nvfp4": "required"}.get(kind_of(scheme.weight), "never")


def problem(form: PackedForm) -> str | None:
    """See formats/targets."""
    kind = kind_of(form.spec)
    if kind not in LAYOUTS:
        return f"no method for {form.spec.code} in tiles of {form.spec.tile}"
    if reason := LAYOUTS[kind].problem(form):
        return reason
    if form.input_scale and kind == "fp8-block128":
        return "inputs are scaled in groups of 128 at run time; there is no static scale"
    if kind == "nvfp4" and not form.input_scale:
        return "without a static scale of the inputs the loader takes 1"
    return f"modules stay apart; the layer stacks {form.parts}" if form.parts > 1 else None


def shift(form: PackedForm) -> float:
    """Nothing is added to inputs."""
    return 0.0


def rows(form: PackedForm) -> bool:
    """Tiles of scales are no taller than blocks of rows."""
    return True


def activation(form: PackedForm, scheme: Scheme) -> QuantSpec | None:
    """Per token where fp8-tensor has no static scale."""
    dynamic = kind_of(form.spec) == "fp8-tensor" and not form.input_scale
    return PER_TOKEN if dynamic else scheme.activation


def promise(form: PackedForm) -> dict[str, TensorInfo]:
    """See formats/targets."""
    return LAYOUTS[kind_of(form.spec)].promise(form)


def pack(form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
    """See formats/targets."""
    return LAYOUTS[kind_of(form.spec)].pack(form, q)


def unpack(form: PackedForm, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    """See formats/targets."""
    return LAYOUTS[kind_of(form.spec)].unpack(form, tensors)


def recognize(
    infos: Infos, metadata: Mapping[str, str], config: Mapping[str, Any]
) -> Recognized | None:
    """Folders whose config names a method that SGLang reads, and no other runtime."""
    said = folder.said(config)
    kind = _kind(said)
    if kind is None or metadata.get(folder.RUNTIME, NAME) != NAME:
        return None
    modelopt = said.get("quant_method") == "modelopt"
    scheme = next(s for s in schemes().values() if s.name == kind)
    first = PackedForm(scheme.weight, (1, 1), input_scale=modelopt)
    forms, problems = read_forms(infos, LAYOUTS[kind], first, promise, problem)
    rule = folder.equal if modelopt else folder.dotted
    entries = said.get("ignore" if modelopt else KEPT, said.get("ignored_layers"))
    forms, loading = spared(forms, problems)
    lost = folder.swallowed(entries if isinstance(entries, list) else [], forms, rule)
    return Recognized(
        scheme=scheme.name,
        rank=0,
        forms=forms,
        problems=(*problems, *lost),
        loading=(*loading, *lost),
    )


def _kind(said: Mapping[str, Any]) -> str | None:
    """The kind of format that a quantization_config speaks of, None for those not read here."""
    method, block = said.get("quant_method"), said.get("weight_block_size")
    if method == "modelopt":
        return {"FP8": "fp8-tensor", "NVFP4": "nvfp4"}.get(str(said.get("quant_algo")))
    if method == "fp8":
        return {"None": "fp8-tensor", "[128, 128]": "fp8-block128"}.get(str(block))
    return "mxfp8" if method == "mxfp8" else None


def filename(context: FileContext) -> str:
    """The name that diffusers gives the weights."""
    return folder.FILE


def metadata(context: FileContext) -> dict[str, str]:
    """See formats/layouts/diffusers_folder."""
    return folder.metadata(NAME)


def config(context: FileContext) -> dict[str, Any]:
    """The model's config with the quantization_config. PlanError on several formats."""
    check_uniform(context, "SGLang")
    kind = kind_of(context.scheme.weight)
    method = METHODS[kind]
    if all(form.input_scale for form in context.layers.values()):
        method = "modelopt"
    rule = folder.equal if method == "modelopt" else folder.dotted
    kept = folder.kept_names(context, rule)
    if method == "modelopt":
        algorithm = "NVFP4" if kind == "nvfp4" else "FP8"
        return folder.joined(context, modelopt_config(algorithm, kept))
    said: dict[str, Any] = {"quant_method": method, "activation_scheme": "dynamic"}
    if kind == "fp8-block128":
        said["weight_block_size"] = [128, 128]
    return folder.joined(context, {**said, KEPT: kept})
