"""diffusers (nunchaku_lite): a model folder that `from_pretrained` of diffusers >= 0.40 loads.

    diffusion_pytorch_model.safetensors, config.json with a "quantization_config"
    <linear>.qweight, wscales, wtscale and wcscales (NVFP4), smooth_factor, proj_down, proj_up,
             bias (if the linear has one)
    <modulation>.qweight, wscales, wzeros, bias

under the names of the model's own modules, so q, k and v stand apart. Modulation rows are in
natural order. Activations are never unsigned: nothing is added behind a GELU. Keys must match
exactly.

Source: diffusers/quantizers/nunchaku/utils.py, diffusers/quantizers/quantization_config.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from dqconvert.formats import svdq
from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.recognition import Infos, disagreements, layers_with, scheme_named
from dqconvert.formats.targets import Recognized
from dqconvert.quantizers.spec import QuantSpec, Scheme, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from dqconvert.quantizers.tensors import QuantizedTensor

NAME = "diffusers"
SUMMARY = "model folder for diffusers >= 0.40 (nunchaku_lite)"
DIALECT = "diffusers"
KEEP_DTYPE = "BF16"
ROLES = {"attention": "weight", "mlp": "weight", "modulation": "modulation"}
PARTIAL = True
ROWS = False
FOLDER = ""

LAYOUT = svdq.Layout(
    smooth=("smooth_factor",),
    down="proj_down",
    up="proj_up",
    bias=False,
    both_scales=True,
    modulation=False,
)


def accepts(scheme: Scheme) -> str | None:
    """See formats/targets."""
    return svdq.accepts(scheme)


def layouts(scheme: Scheme) -> tuple[str, ...]:
    """There is one."""
    return ("",)


def adapt(scheme: Scheme, layout: str) -> Scheme:
    """The scheme fits as it is."""
    return scheme


def static(scheme: Scheme, layout: str) -> str:
    """See formats/targets."""
    return "never"


def problem(form: PackedForm) -> str | None:
    """See formats/targets."""
    if form.parts != 1:
        return f"modules stay apart here; the layer stacks {form.parts}"
    return svdq.problem(LAYOUT, form, shift(form))


def shift(form: PackedForm) -> float:
    """Activations are always quantized with their sign."""
    return 0.0


def activation(form: PackedForm, scheme: Scheme) -> QuantSpec | None:
    """Inputs of modulation linears stay in 16 bit."""
    return None if svdq.is_w4a16(form) else scheme.activation


def promise(form: PackedForm) -> dict[str, TensorInfo]:
    """See formats/targets."""
    return svdq.promise(LAYOUT, form)


def pack(form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
    """See formats/targets."""
    from dqconvert.formats import svdq_tensors

    return svdq_tensors.pack(LAYOUT, form, q)


def unpack(form: PackedForm, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    """See formats/targets."""
    from dqconvert.formats import svdq_tensors

    return svdq_tensors.unpack(LAYOUT, form, tensors)


def recognize(
    infos: Infos, metadata: Mapping[str, str], config: Mapping[str, Any]
) -> Recognized | None:
    """Folders whose config says nunchaku_lite."""
    said = config.get("quantization_config")
    if not isinstance(said, Mapping) or said.get("quant_method") != "nunchaku_lite":
        return None
    w4a4, w4a16 = _section(said, "svdq_w4a4"), _section(said, "awq_w4a16")
    rank = w4a4.get("rank")
    forms, problems = svdq.read_forms(LAYOUT, layers_with(infos, "qweight"), infos, rank)
    linears = {name: form for name, form in forms.items() if not svdq.is_w4a16(form)}
    problems += _target_problems("svdq_w4a4", w4a4, linears)
    problems += _target_problems("awq_w4a16", w4a16, forms.keys() - linears.keys())
    precisions = [_precision(form) for form in linears.values()]
    problems += disagreements("config svdq_w4a4.precision", w4a4.get("precision"), precisions)
    ranks = [form.rank for form in linears.values()]
    problems += disagreements("config svdq_w4a4.rank", rank, ranks)
    return Recognized(
        scheme=scheme_named(NAME, [form.spec for form in linears.values()]),
        rank=max(ranks, default=0),
        forms=forms,
        problems=tuple(problems),
    )


def _section(said: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = said.get(name)
    return section if isinstance(section, Mapping) else {}


def _target_problems(name: str, section: Mapping[str, Any], packed: Collection[str]) -> list[str]:
    listed = section.get("targets")
    targets = set(listed) if isinstance(listed, list) else set()
    lines = [f"{layer}: a target of {name} that is not packed" for layer in targets - set(packed)]
    lines += [f"{layer}: packed, but not a target of {name}" for layer in set(packed) - targets]
    return sorted(lines)


def _precision(form: PackedForm) -> str:
    return "nvfp4" if svdq.is_nvfp4(form.spec) else "int4"


def filename(context: FileContext) -> str:
    """The name that diffusers looks for."""
    return "diffusion_pytorch_model.safetensors"


def metadata(context: FileContext) -> dict[str, str]:
    """What diffusers demands of a safetensors header."""
    return {"format": "pt"}


def config(context: FileContext) -> dict[str, Any] | None:
    """The model's config with the quantization_config that names every packed module."""
    said: dict[str, Any] = {"quant_method": "nunchaku_lite", "compute_dtype": "bfloat16"}
    names = context.layers
    linears = [name for name, form in names.items() if not svdq.is_w4a16(form)]
    modulation = [name for name, form in names.items() if svdq.is_w4a16(form)]
    if linears:
        nvfp4 = svdq.is_nvfp4(context.scheme.weight)
        said["svdq_w4a4"] = {
            "precision": "nvfp4" if nvfp4 else "int4",
            "group_size": 16 if nvfp4 else 64,
            "rank": context.rank,
            "targets": linears,
        }
    if modulation:
        said["awq_w4a16"] = {"precision": "int4", "group_size": 64, "targets": modulation}
    return {**context.config, "quantization_config": said}
