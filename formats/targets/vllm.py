"""vLLM-Omni: a diffusers folder whose transformer/config.json says how it is quantized.

    int8            <layer>.weight I8 [N, K]        weight_scale F32 [N, 1]
    fp8             <layer>.weight F8_E4M3 [N, K]   weight_scale F32 [N]
    fp8-tensor      <layer>.weight F8_E4M3 [N, K]   weight_scale F32 []
                    input_scale F32 [] when calibrated
    fp8-block128    <layer>.weight F8_E4M3 [N, K]   weight_scale_inv F32 [N/128, K/128], up
    nvfp4           <layer>.weight U8 [N, K/2]      weight_scale F8_E4M3 [N, K/16]
                    weight_scale_2 F32 []           input_scale F32 []
    int4 groups     <layer>.weight_packed ...       formats/layouts/grouped.py
    all             <layer>.bias                    as it was

`--layout compressed-tensors` is for those that vLLM's own methods do not read, or where other
tools of vLLM's should (formats/layouts/compressed.py); `auto-round` for int4 groups in models
where vLLM-Omni reads nothing else in some of the blocks.

q, k and v are fused: they share a tensor's scale, or the loader would round again. Linears are
kept by their whole name, but by any part of it under modelopt, where a pattern stands for the
names that others contain.

Source: vllm model_executor/layers/quantization (fp8.py, modelopt.py, compressed_tensors/),
vllm_omni/quantization (factory.py, int8_config.py, component_config.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.layouts import Layout, compressed
from dqconvert.formats.layouts import diffusers_folder as folder
from dqconvert.formats.layouts.blocked import BlockScaled
from dqconvert.formats.layouts.grouped import Gptq
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

NAME = "vllm"
SUMMARY = "diffusers folder for vLLM-Omni"
DIALECT = "diffusers"
KEEP_DTYPE = None
ROLES = {"attention": "weight", "mlp": "weight"}
PARTIAL = True
FOLDER = "transformer"

COMPRESSED, AUTO_ROUND = compressed.METHOD, "auto-round"

OWN: Mapping[str, tuple[str, Layout]] = {
    "int8": ("int8", Scaled()),
    "fp8": ("modelopt", Scaled(column=False)),
    "fp8-tensor": ("fp8", Scaled()),
    "fp8-block128": ("fp8", Scaled("weight_scale_inv")),
    "nvfp4": ("modelopt", BlockScaled(tensor_scale="weight_scale_2", input_scale="input_scale")),
}
"""Method and layout of the kinds of formats that vLLM's own methods read."""

KINDS = tuple(dict.fromkeys([*OWN, *compressed.LAYOUTS]))

ALGORITHMS = {"fp8": "FP8_PER_CHANNEL_PER_TOKEN", "fp8-tensor": "FP8", "nvfp4": "NVFP4"}
"""What modelopt calls them."""

KEPT = "ignored_layers"

PER_TOKEN = QuantSpec("e4m3", (1, ALL))


def accepts(scheme: Scheme) -> str | None:
    """See formats/targets."""
    return refusal(scheme, KINDS, "vLLM-Omni")


def layouts(scheme: Scheme) -> tuple[str, ...]:
    """The quant_method of the config; fp8-tensor has modelopt's when calibrated."""
    return _layouts(kind_of(scheme.weight))


def _layouts(kind: str) -> tuple[str, ...]:
    own = (OWN[kind][0],) if kind in OWN else ()
    others = (COMPRESSED,) if kind in compressed.LAYOUTS else ()
    return (*own, *others, AUTO_ROUND) if kind == "w4a16" else own + others


def adapt(scheme: Scheme, layout: str) -> Scheme:
    """Linears that read one input share the scale of the tensor; int4 has scales in 16 bit."""
    kind = kind_of(scheme.weight)
    if kind == "w4a16":
        scale = "F16" if layout == AUTO_ROUND else "BF16"
        return replace(scheme, weight=replace(scheme.weight, scale=scale))
    return replace(scheme, shared=kind in ("fp8-tensor", "nvfp4"))


def static(scheme: Scheme, layout: str) -> str:
    """See formats/targets."""
    return {"fp8-tensor": "optional", "nvfp4": "required"}.get(kind_of(scheme.weight), "never")


def _layout(form: PackedForm) -> Layout:
    """The layout that a form names, the default where it names none."""
    kind = kind_of(form.spec)
    name = form.layout or _layouts(kind)[0]
    if name == AUTO_ROUND:
        return Gptq()
    return compressed.LAYOUTS[kind] if name == COMPRESSED else OWN[kind][1]


def problem(form: PackedForm) -> str | None:
    """See formats/targets."""
    kind = kind_of(form.spec)
    if kind not in KINDS:
        return f"no method for {form.spec.code} in tiles of {form.spec.tile}"
    if reason := _layout(form).problem(form):
        return reason
    if form.layout == AUTO_ROUND and form.spec.zero_point:
        return "auto-round's layout is read without zero points"
    if form.input_scale and kind not in ("fp8-tensor", "nvfp4"):
        return f"inputs of {kind} layers have no static scale"
    if kind == "nvfp4" and not form.input_scale:
        return "without a static scale of the inputs the loader reads what memory holds"
    return f"modules stay apart; the layer stacks {form.parts}" if form.parts > 1 else None


def shift(form: PackedForm) -> float:
    """Nothing is added to inputs."""
    return 0.0


def rows(form: PackedForm) -> bool:
    """Not int4 groups, which say the shape of the whole."""
    return kind_of(form.spec) != "w4a16"


def activation(form: PackedForm, scheme: Scheme) -> QuantSpec | None:
    """Per token where fp8-tensor has no static scale."""
    dynamic = kind_of(form.spec) == "fp8-tensor" and not form.input_scale
    return PER_TOKEN if dynamic else scheme.activation


def promise(form: PackedForm) -> dict[str, TensorInfo]:
    """See formats/targets."""
    return _layout(form).promise(form)


def pack(form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
    """See formats/targets."""
    return _layout(form).pack(form, q)


def unpack(form: PackedForm, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    """See formats/targets."""
    return _layout(form).unpack(form, tensors)


def recognize(
    infos: Infos, metadata: Mapping[str, str], config: Mapping[str, Any]
) -> Recognized | None:
    """Folders whose config names a method that vLLM reads.

    Those that SGLang reads as well are this target's where the header says so.
    """
    said = folder.said(config)
    runtime = metadata.get(folder.RUNTIME)
    first = _first(said)
    if first is None or (runtime or NAME) != NAME or (runtime is None and _shared(said)):
        return None
    kind = kind_of(first.spec)
    name = metadata.get("scheme", "gptq-w4a16") if kind == "w4a16" else kind
    forms, problems = read_forms(infos, _layout(first), first, promise, problem)
    forms, loading = spared(forms, problems)
    lost = folder.swallowed(_kept(said), forms, _rule(str(said.get("quant_method"))))
    return Recognized(
        scheme=name, rank=0, forms=forms, problems=(*problems, *lost), loading=(*loading, *lost)
    )


def _shared(said: Mapping[str, Any]) -> bool:
    """Whether SGLang reads this config, too, and nothing in it is vLLM's alone."""
    per_token = said.get("quant_algo") == ALGORITHMS["fp8"]
    ours = {"is_checkpoint_fp8_serialized", KEPT} & said.keys()
    return said.get("quant_method") in ("fp8", "modelopt") and not per_token and not ours


def _first(said: Mapping[str, Any]) -> PackedForm | None:
    """What all forms of a file have in common, from its config; None for configs of others."""
    method = said.get("quant_method")
    found = compressed.kind_said(said)
    if found is not None:
        kind, arguments = found
        asymmetric = kind == "w4a16" and arguments.get("symmetric") is False
        return _form(kind, COMPRESSED, arguments.get("group_size"), asymmetric)
    if method == AUTO_ROUND and said.get("bits") == 4 and said.get("sym") is True:
        plain = said.get("packing_format") == "auto_round:auto_gptq"
        return _form("w4a16", AUTO_ROUND, said.get("group_size")) if plain else None
    if method == "modelopt":
        algorithm = said.get("quant_algo")
        kind = next((kind for kind, name in ALGORITHMS.items() if name == algorithm), "")
        form = _form(kind, OWN[kind][0]) if kind else None
        return form and replace(form, input_scale=kind != "fp8")
    if method == "fp8":
        block = {"None": "fp8-tensor", "[128, 128]": "fp8-block128"}
        kind = block.get(str(said.get("weight_block_size")), "")
        return _form(kind, "fp8") if kind else None
    return _form("int8", "int8") if method == "int8" else None


def _form(kind: str, layout: str, group: Any = None, asymmetric: bool = False) -> PackedForm | None:
    name = "gptq-w4a16" if kind == "w4a16" else kind
    scheme = next(s for s in schemes().values() if s.name == name)
    weight = scheme.weight
    if kind == "w4a16":
        if group not in (32, 64, 128):
            return None
        weight = replace(weight, tile=(1, group))
        if asymmetric:
            weight = replace(weight, code="uint4", zero_point=True, full_range=False)
    adapted = adapt(replace(scheme, weight=weight), layout)
    required = static(adapted, layout) == "required"
    return PackedForm(adapted.weight, (1, 1), layout=layout, input_scale=required)


def _rule(method: str) -> folder.Rule:
    return folder.contained if method == "modelopt" else folder.equal


def _kept(said: Mapping[str, Any]) -> list[Any]:
    """Entries of the list of unquantized modules, whatever the method calls it."""
    for key in (KEPT, "ignore", "modules_to_not_convert", "extra_config"):
        found = said.get(key)
        if isinstance(found, list | dict):
            return list(found)
    return []


def filename(context: FileContext) -> str:
    """The name that diffusers gives the weights."""
    return folder.FILE


def metadata(context: FileContext) -> dict[str, str]:
    """See formats/layouts/diffusers_folder; the tensors do not tell GPTQ from AWQ."""
    said = folder.metadata(NAME)
    grouped = kind_of(context.scheme.weight) == "w4a16"
    return {**said, "scheme": context.scheme.name} if grouped else said


def config(context: FileContext) -> dict[str, Any]:
    """The model's config with the quantization_config. PlanError on several formats."""
    check_uniform(context, "vLLM-Omni")
    spec = context.scheme.weight
    kind = kind_of(spec)
    method = context.layout or _layouts(kind)[0]
    if kind == "fp8-tensor" and all(form.input_scale for form in context.layers.values()):
        method = "modelopt"
    kept = folder.kept_names(context, _rule(method), patterns=method == "modelopt")
    if method == COMPRESSED:
        return folder.joined(context, compressed.compressed_config(kind, spec, kept))
    if method == AUTO_ROUND:
        return folder.joined(context, _auto_round(context, kept))
    if method == "modelopt":
        return folder.joined(context, modelopt_config(ALGORITHMS[kind], kept))
    said: dict[str, Any] = {"quant_method": method, "activation_scheme": "dynamic"}
    said["is_checkpoint_int8_serialized" if kind == "int8" else "is_checkpoint_fp8_serialized"] = (
        True
    )
    if kind == "fp8-block128":
        said["weight_block_size"] = [128, 128]
    return folder.joined(context, {**said, KEPT: kept})


def _auto_round(context: FileContext, kept: list[str]) -> dict[str, Any]:
    """auto-round's GPTQ packing: the lists of blocks, and what stays in 16 bit of them."""
    blocks = dict.fromkeys(name.split(".")[0] for name in context.layers)
    inside = [name for name in kept if name.split(".")[0] in blocks]
    return {
        "quant_method": AUTO_ROUND,
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": context.scheme.weight.tile[1],
        "sym": True,
        "data_type": "int",
        "block_name_to_quantize": ",".join(blocks),
        "extra_config": {name: {"bits": 16, "data_type": "float"} for name in inside},
    }
