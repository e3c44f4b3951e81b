"""nunchaku: a single file with fused projections, for nunchaku, ComfyUI-nunchaku and sglang.

    <layer>.qweight, wscales, bias, and by layout
        v1      wtscale | wcscales   smooth, smooth_orig, lora_down, lora_up
        v2      wtscale | wcscales   smooth_factor, smooth_factor_orig, proj_down, proj_up
        unet    wcscales             smooth, smooth_orig, lora_down, lora_up
    <modulation>.qweight, wscales, wzeros, bias

v1 is FLUX.1's, which the C++ backend and ComfyUI read and the Python classes of version 2 rename
on load; there layers without a bias hold zeros. v2 is what the Python classes call their
parameters. The UNet's class renames v1's words, also inside those of v2, and knows no wtscale.
v2-flux is v2 with the biases of v1: its class cuts a linear in two, and gives both one.
skip-refiners is v2 with Z-Image's refiners in 16 bit. The file's name carries precision and rank,
and sglang takes them from there.

Source: nunchaku/merge_safetensors.py (metadata), src/Linear.cpp and src/FluxModel.cpp (names of
v1, and the shift of fc2), nunchaku/models/linear.py, models/transformers/utils.py and
models/unets/unet_sdxl.py (strict loading), deepcompressor/backend/nunchaku/convert.py (what is
folded where).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dqconvert.formats import svdq
from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.recognition import (
    Infos,
    disagreements,
    json_object,
    layers_with,
    scheme_named,
)
from dqconvert.formats.targets import Recognized
from dqconvert.quantizers.spec import QuantSpec, Scheme, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from dqconvert.quantizers.tensors import QuantizedTensor

NAME = "nunchaku"
SUMMARY = "single file for nunchaku, ComfyUI-nunchaku and sglang"
DIALECT = "nunchaku"
KEEP_DTYPE = "BF16"
ROLES = {"attention": "weight", "mlp": "weight", "modulation": "modulation"}
PARTIAL = False
FOLDER = ""

LAYOUT = svdq.Layout(
    smooth=("smooth", "smooth_orig"),
    down="lora_down",
    up="lora_up",
    bias=True,
    scales=svdq.NEED,
    modulation=True,
)
_V2 = svdq.Layout(
    smooth=("smooth_factor", "smooth_factor_orig"),
    down="proj_down",
    up="proj_up",
    bias=False,
    scales=svdq.NEED,
    modulation=True,
)
V1, V2, UNET, SKIP, V2_FLUX = "v1", "v2", "unet", "skip-refiners", "v2-flux"
LAYOUTS = {
    V1: LAYOUT,
    V2: _V2,
    UNET: replace(LAYOUT, bias=False, scales=svdq.CHANNEL),
    SKIP: _V2,
    V2_FLUX: replace(_V2, bias=True),
}
_FLUX_BLOCKS = "single_transformer_blocks."
_UNET_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")


def accepts(scheme: Scheme) -> str | None:
    """See formats/targets."""
    return svdq.accepts(scheme)


def layouts(scheme: Scheme) -> tuple[str, ...]:
    """Which one a loader reads depends on the family: see Family.layouts."""
    return tuple(LAYOUTS)


def adapt(scheme: Scheme, layout: str) -> Scheme:
    """The scheme fits as it is."""
    return scheme


def static(scheme: Scheme, layout: str) -> str:
    """See formats/targets."""
    return "never"


def problem(form: PackedForm) -> str | None:
    """See formats/targets."""
    return svdq.problem(_layout(form), form, shift(form))


def _layout(form: PackedForm) -> svdq.Layout:
    return LAYOUTS[form.layout or V1]


def shift(form: PackedForm) -> float:
    """int4 kernels quantize GELU(x) + 0.171875 to unsigned codes; NVFP4 has no unsigned ones."""
    if svdq.is_w4a16(form) or svdq.is_nvfp4(form.spec):
        return 0.0
    return svdq.SHIFT_GELU


def rows(form: PackedForm) -> bool:
    """Tiles of the layout span rows."""
    return False


def activation(form: PackedForm, scheme: Scheme) -> QuantSpec | None:
    """Inputs of modulation linears stay in 16 bit."""
    return None if svdq.is_w4a16(form) else scheme.activation


def promise(form: PackedForm) -> dict[str, TensorInfo]:
    """See formats/targets."""
    return svdq.promise(_layout(form), form)


def pack(form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
    """See formats/targets."""
    from dqconvert.formats import svdq_tensors

    return svdq_tensors.pack(_layout(form), form, q)


def unpack(form: PackedForm, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    """See formats/targets."""
    from dqconvert.formats import svdq_tensors

    return svdq_tensors.unpack(_layout(form), form, tensors)


def recognize(
    infos: Infos, metadata: Mapping[str, str], config: Mapping[str, Any]
) -> Recognized | None:
    """Files with the names of their layers' tensors, and those that only metadata gives away."""
    said = json_object(metadata.get("quantization_config")) or {}
    layers = layers_with(infos, "qweight")
    name = _layout_of(infos, layers, said)
    if name is None:
        return None
    read, problems = svdq.read_forms(LAYOUTS[name], layers, infos, said.get("rank"))
    forms = {layer: replace(form, layout=name) for layer, form in read.items()}
    linears = [form for form in forms.values() if not svdq.is_w4a16(form)]
    problems += _metadata_problems(metadata, said, linears)
    if not linears:
        problems.append("the file has no W4A4 layer")
    return Recognized(
        scheme=scheme_named(NAME, [form.spec for form in linears]),
        rank=max((form.rank for form in linears), default=0),
        forms=forms,
        problems=tuple(problems),
    )


def _layout_of(infos: Infos, layers: Sequence[str], said: Mapping[str, Any]) -> str | None:
    """The layout of a file; None if it is nobody's here, such as diffusers' nunchaku_lite."""
    if any(f"{layer}.lora_down" in infos for layer in layers):
        return UNET if any(layer.startswith(_UNET_BLOCKS) for layer in layers) else V1
    method = said.get("method") == "svdquant"
    own = any(f"{layer}.smooth_factor_orig" in infos for layer in layers)
    if own or (method and any(f"{layer}.proj_down" in infos for layer in layers)):
        if any(layer.startswith(_FLUX_BLOCKS) for layer in layers):
            return V2_FLUX
        return SKIP if said.get("skip_refiners") is True else V2
    return V1 if method else None


def _metadata_problems(
    metadata: Mapping[str, str], said: Mapping[str, Any], linears: list[PackedForm]
) -> list[str]:
    if json_object(metadata.get("quantization_config")) is None:
        return ["metadata quantization_config: missing or not a JSON object"]
    weight = said.get("weight")
    dtype = weight.get("dtype") if isinstance(weight, dict) else None
    found = ["fp4_e2m1_all" if svdq.is_nvfp4(form.spec) else "int4" for form in linears]
    problems = disagreements("metadata quantization_config.weight.dtype", dtype, found)
    ranks = [form.rank for form in linears]
    problems += disagreements("metadata quantization_config.rank", said.get("rank"), ranks)
    if json_object(metadata.get("config")) is None:
        problems.append("metadata config: missing or not a JSON object")
    return problems


def filename(context: FileContext) -> str:
    """svdq-int4_r32-flux1-dev.safetensors: sglang and nunchaku read precision and rank here."""
    return f"svdq-{_precision(context.scheme.weight)}_r{context.rank}-{context.model}.safetensors"


def misnamed(name: str, found: Recognized) -> str | None:
    """None, or what loaders would take from the file's name that its tensors are not."""
    said = re.match(r"svdq-(int4|fp4)_r(\d+)", name)
    linears = [form for form in found.forms.values() if not svdq.is_w4a16(form)]
    if said is None or not linears:
        return None
    needed = f"svdq-{_precision(linears[0].spec)}_r{found.rank}"
    return None if said[0] == needed else f"the name says {said[0]}, its tensors say {needed}"


def _precision(spec: QuantSpec) -> str:
    return "fp4" if svdq.is_nvfp4(spec) else "int4"


def metadata(context: FileContext) -> dict[str, str]:
    """The header entries that loaders read.

    facts: model_class; comfy_config, an object or its JSON, which ComfyUI requires for FLUX.
    """
    entries = {"config": json.dumps(dict(context.config))}
    if "model_class" in context.facts:
        entries["model_class"] = str(context.facts["model_class"])
    if "comfy_config" in context.facts:
        comfy = context.facts["comfy_config"]
        entries["comfy_config"] = comfy if isinstance(comfy, str) else json.dumps(comfy)
    entries["quantization_config"] = json.dumps(_quantization_config(context))
    return entries


def _quantization_config(context: FileContext) -> dict[str, Any]:
    nvfp4 = svdq.is_nvfp4(context.scheme.weight)
    dtype, group = ("fp4_e2m1_all", 16) if nvfp4 else ("int4", 64)
    scale = "fp8_e4m3_nan" if nvfp4 else None
    skipped = {"skip_refiners": True} if context.layout == SKIP else {}
    # "quant_method" is left out: sglang would take the file for one of another loader
    return {
        "method": "svdquant",
        "weight": {
            "dtype": dtype,
            "scale_dtype": [None, scale] if nvfp4 else None,
            "group_size": group,
        },
        "activation": {"dtype": dtype, "scale_dtype": scale, "group_size": group},
        "rank": context.rank,
        **skipped,
    }


def config(context: FileContext) -> dict[str, Any] | None:
    """None: the header holds it."""
    return None
