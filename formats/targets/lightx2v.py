"""LightX2V: a file, or one for each block, and a config.json that it merges over its user's.

    int8, fp8       <layer>.weight I8 or F8_E4M3 [N, K]   weight_scale F32 [N, 1]
    fp8-tensor      <layer>.weight F8_E4M3 [N, K]         weight_scale F32 []   input_scale F32 []
    fp8-block128    <layer>.weight F8_E4M3 [N, K]         weight_scale F32 [N/128, K/128], up
    nvfp4           <layer>.weight U8 [N, K/2]            weight_scale F8_E4M3, swizzled
                    input_global_scale F32 []             alpha F32 []
    mxfp8, 6, 4     <layer>.weight U8 [N, K bits/8]       weight_scale F8_E8M0, swizzled
    all             <layer>.bias                          as it was

input_global_scale is 2688 over the range of the input, alpha the tensor scale over it.

One scheme holds for the whole model: the loader looks for no exceptions, so every linear that its
class quantizes must be packed. It casts every float tensor to bf16, scales as well, except where
it reads blocks from disk; so scales are chosen in bf16 before codes are rounded, and
input_global_scale as a power of two, which leaves alpha the digits of a bf16 tensor scale.

`--save-by-block yes` writes block_<N>.safetensors for the N-th block of each list of blocks, and
non_block.safetensors, which loading block by block (lazy_load) needs. Facts may name a component:
transformer, t5 or clip; the config's keys follow it.

Source: LightX2V lightx2v/common/ops/mm/mm_weight.py, models/networks/base_model.py,
common/ops/utils.py, lightx2v_kernel/csrc/gemm, models/input_encoders/hf/wan; the long names of
older releases from docs/EN/source/method_tutorials/quantization.md of 2025.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.layouts import Layout
from dqconvert.formats.layouts.blocked import BlockScaled
from dqconvert.formats.layouts.kinds import check_uniform, kind_of, refusal
from dqconvert.formats.layouts.reading import read_forms
from dqconvert.formats.layouts.scaled import Scaled
from dqconvert.formats.recognition import Infos, layers_with
from dqconvert.formats.targets import Recognized
from dqconvert.quantizers.errors import PlanError
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import QuantSpec, Scheme, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from dqconvert.quantizers.tensors import QuantizedTensor

NAME = "lightx2v"
SUMMARY = "file or files by block for LightX2V, and its config"
DIALECT = "lightx2v"
KEEP_DTYPE = None
ROLES = {"attention": "weight", "mlp": "weight", "modulation": "weight"}
PARTIAL = False
FOLDER = ""

MX = BlockScaled(codes="U8", scales="F8_E8M0", swizzled=True)
LAYOUTS: Mapping[str, Layout] = {
    "int8": Scaled(),
    "fp8": Scaled(),
    "fp8-tensor": Scaled(),
    "fp8-block128": Scaled(),
    "nvfp4": BlockScaled(
        input_scale="input_global_scale", alpha="alpha", swizzled=True, divisors=True
    ),
    "mxfp8": MX,
    "mxfp6": MX,
    "mxfp4": MX,
}
"""Layout of each kind of format."""

KERNELS = {
    "int8": ("int8-vllm", "int8-sgl", "int8-q8f", "int8-triton", "int8-torchao", "int8-npu"),
    "fp8": ("fp8-sgl", "fp8-vllm", "fp8-q8f", "fp8-triton", "fp8-torchao", "fp8-intel-xpu"),
    "fp8-tensor": ("fp8-pertensor",),
    "fp8-block128": ("fp8-b128-deepgemm",),
    "nvfp4": ("nvfp4",),
    "mxfp8": ("mxfp8",),
    "mxfp6": ("mxfp6-mxfp8",),
    "mxfp4": ("mxfp4",),
}
"""Names by which LightX2V calls its kernels, the default of each kind first."""

SETTINGS = {
    "kernel": tuple(name for names in KERNELS.values() for name in names),
    "save-by-block": ("yes",),
}

_FP8, _INT8 = (f"W-{code}-channel-sym-A-{code}-channel-sym-dynamic-" for code in ("fp8", "int8"))
LONG_NAMES = {
    "fp8-vllm": f"{_FP8}Vllm",
    "fp8-sgl": f"{_FP8}Sgl",
    "fp8-q8f": f"{_FP8}Q8F",
    "int8-vllm": f"{_INT8}Vllm",
    "int8-sgl": f"{_INT8}Sgl-ActVllm",
    "int8-q8f": f"{_INT8}Q8F",
    "int8-torchao": f"{_INT8}Torchao",
    "fp8-b128-deepgemm": "W-fp8-block128-sym-A-fp8-channel-group128-sym-dynamic-Deepgemm",
}
"""What releases of 2025 call the kernels that they have."""

COMPONENTS = {"transformer": "dit", "t5": "t5", "clip": "clip"}
"""Beginning of the config's keys for each component."""

STATIC = ("fp8-tensor", "nvfp4")
"""Kinds whose loader fails without the range of the inputs."""

MULTIPLES = {
    "fp8-block128": (1, 128),
    "nvfp4": (32, 32),
    "mxfp8": (128, 32),
    "mxfp6": (128, 32),
    "mxfp4": (128, 128),
}
"""What the kernels want N and K to be multiples of."""


def accepts(scheme: Scheme) -> str | None:
    """See formats/targets."""
    return refusal(scheme, tuple(LAYOUTS), "LightX2V")


def layouts(scheme: Scheme) -> tuple[str, ...]:
    """There is one."""
    return ("",)


def adapt(scheme: Scheme, layout: str) -> Scheme:
    """Scales that survive the loader's cast to bf16."""
    weight = scheme.weight
    if kind_of(weight) == "nvfp4":
        activation = scheme.activation and replace(scheme.activation, tensor_scale="F8_E8M0")
        return replace(scheme, weight=replace(weight, tensor_scale="BF16"), activation=activation)
    if weight.scale == "F32":
        return replace(scheme, weight=replace(weight, scale="BF16"))
    return scheme


def static(scheme: Scheme, layout: str) -> str:
    """See formats/targets."""
    return "required" if kind_of(scheme.weight) in STATIC else "never"


def problem(form: PackedForm) -> str | None:
    """See formats/targets."""
    kind = kind_of(form.spec)
    if kind not in LAYOUTS:
        return f"no kernel for {form.spec.code} in tiles of {form.spec.tile}"
    if reason := LAYOUTS[kind].problem(form):
        return reason
    if form.input_scale != (kind in STATIC):
        need = "need a" if kind in STATIC else "have no"
        return f"inputs of {kind} layers {need} static scale"
    if form.parts > 1 and form.spec.tensor_scale:
        return f"one scale for the tensor; the layer stacks {form.parts}"
    rows, columns = MULTIPLES.get(kind, (1, 1))
    if form.shape[0] % rows or form.shape[1] % columns:
        height = f"{rows} rows and " if rows > 1 else ""
        return f"{kind} kernels want multiples of {height}{columns} columns"
    return None


def shift(form: PackedForm) -> float:
    """Nothing is added to inputs."""
    return 0.0


def rows(form: PackedForm) -> bool:
    """Tiles of scales are no taller than blocks of rows."""
    return True


def activation(form: PackedForm, scheme: Scheme) -> QuantSpec | None:
    """All inputs are quantized."""
    return scheme.activation


def promise(form: PackedForm) -> dict[str, TensorInfo]:
    """See formats/targets."""
    return LAYOUTS[kind_of(form.spec)].promise(form)


def pack(form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
    """See formats/targets. The static scale of NVFP4 inputs goes up to a power of two."""
    if form.spec.tensor_scale and q.input_scale is not None:
        import torch

        mantissa, exponent = torch.frexp(q.input_scale.float())
        exponent = exponent - (mantissa == 0.5).int()
        q = replace(q, input_scale=torch.ldexp(torch.ones_like(mantissa), exponent))
    return LAYOUTS[kind_of(form.spec)].pack(form, q)


def unpack(form: PackedForm, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    """See formats/targets."""
    return LAYOUTS[kind_of(form.spec)].unpack(form, tensors)


def recognize(
    infos: Infos, metadata: Mapping[str, str], config: Mapping[str, Any]
) -> Recognized | None:
    """Files whose config names a kernel; without one, files of the right tensors.

    The second are not those of other runtimes, which say so in a config or a header.
    """
    kernel = next(
        (config[f"{start}_quant_scheme"] for start in COMPONENTS.values()
         if f"{start}_quant_scheme" in config), None,
    )  # fmt: skip
    if kernel is None:
        kind = None if _foreign(infos, metadata, config) else _guess(infos)
    else:
        kind = next((kind for kind, names in KERNELS.items() if kernel in names), None)
    scheme = next((s for s in schemes().values() if kind and s.name == kind), None)
    if kind is None or scheme is None:
        return None
    first = PackedForm(adapt(scheme, "").weight, (1, 1), input_scale=kind in STATIC)
    forms, problems = read_forms(infos, LAYOUTS[kind], first, promise, problem)
    return Recognized(scheme=scheme.name, rank=0, forms=forms, problems=tuple(problems))


def _foreign(infos: Infos, metadata: Mapping[str, str], config: Mapping[str, Any]) -> bool:
    """Whether a file says that it is for another runtime."""
    marked = any(name.endswith((".comfy_quant", "scaled_fp8")) for name in infos)
    says = {"_quantization_metadata", "quantization_config", "runtime"} & metadata.keys()
    return marked or bool(says) or "quantization_config" in config


def _guess(infos: Infos) -> str | None:
    """The kind of format that the first layer with both weight and weight_scale is in."""
    for layer in layers_with(infos, "weight_scale"):
        weight, scale = infos.get(f"{layer}.weight"), infos[f"{layer}.weight_scale"]
        if weight is None or len(weight.shape) != 2:
            continue
        n, k = weight.shape
        if weight.dtype == "I8":
            return "int8"
        if weight.dtype == "F8_E4M3":
            if scale.shape in ((), (1,)):
                return "fp8-tensor"
            return "fp8" if scale.shape == (n, 1) else "fp8-block128"
        if weight.dtype == "U8" and scale.dtype == "F8_E4M3":
            return "nvfp4" if f"{layer}.alpha" in infos else None
        if weight.dtype == "U8" and scale.dtype == "F8_E8M0" and len(scale.shape) == 2:
            # four columns of scales are filled up: 32 · columns is 8 K / bits, or a little more
            return next(
                (kind for kind, bits in (("mxfp4", 4), ("mxfp6", 6), ("mxfp8", 8))
                 if -(-k * 8 // bits // 128) * 4 == scale.shape[1]), None,
            )  # fmt: skip
    return None


def filename(context: FileContext) -> str:
    """wan2.1-fp8.safetensors"""
    return f"{context.model}-{context.scheme.name}.safetensors"


def files(context: FileContext, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The files of an output and the names of the tensors in each.

    blocks.3.attn.q.weight goes to block_3.safetensors, as does double_blocks.3.attn.q.weight.
    """
    if "save-by-block" not in context.settings:
        return {filename(context): tuple(names)}
    found: dict[str, list[str]] = {}
    for name in names:
        blocks, index = [*name.split("."), ""][:2]
        block = blocks.endswith("blocks") and index.isdigit()
        found.setdefault(f"block_{index}" if block else "non_block", []).append(name)
    return {f"{file}.safetensors": tuple(held) for file, held in found.items()}


def metadata(context: FileContext) -> dict[str, str]:
    """What diffusers' reader of safetensors demands, and no more: the loader reads none."""
    return {"format": "pt"}


def config(context: FileContext) -> dict[str, Any]:
    """What LightX2V merges over its user's config, and nothing else.

    PlanError on several formats, on a kernel for another, and on those that encoders are not
    read in.
    """
    check_uniform(context, "LightX2V")
    kind = kind_of(context.scheme.weight)
    kernel = context.settings.get("kernel", KERNELS[kind][0])
    if kernel not in KERNELS[kind]:
        known = ", ".join(KERNELS[kind])
        raise PlanError([f"--kernel {kernel}: computes no {kind}; for that there is {known}"])
    component = str(context.facts.get("component", "transformer"))
    start = COMPONENTS.get(component)
    if start is None or (start != "dit" and kind not in ("int8", "fp8")):
        raise PlanError(
            [f"LightX2V reads no {component} in {kind}; t5 and clip may be int8 or fp8"]
        )
    said: dict[str, Any] = {f"{start}_quantized": True, f"{start}_quant_scheme": kernel}
    if start == "dit" and kernel in LONG_NAMES:
        said["mm_config"] = {"mm_type": LONG_NAMES[kernel]}
    return said
