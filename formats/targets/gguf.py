"""One GGUF file for ComfyUI-GGUF, stable-diffusion.cpp and diffusers.

    <layer>.weight   a block type, F16 or BF16 [N, K]      <layer>.bias   F32
    all else         F32; matrices that stay unquantized, in the 16 or 32 bit that they had

The names are the model's original ones, as ComfyUI has them, text encoders' those of llama.cpp.
Every tensor keeps its dimensions, [1, D] and five of them too: loaders tell models apart by them.
Vectors, parameters without a module (whose name does not end in .weight), convolutions and what
has up to 1024 elements are F32: ComfyUI copies such as they are, and diffusers takes BF16 for a
quantized type that only its linears know.

Blocks of 256 need a width that 256 divides. Other layers get Q5_1 in the place of types up to
5.5 bits and Q8_0 in that of Q6_K where 32 divides the width, and F16 otherwise.

Sources: ComfyUI-GGUF loader.py and tools/convert.py, stable-diffusion.cpp src/model_loader.cpp,
diffusers quantizers/gguf/utils.py, ggml/docs/gguf.md for the keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.gguf_readers import NAME_LIMIT
from dqconvert.formats.recognition import Infos, describe, layers_with
from dqconvert.formats.targets import Recognized
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.schemes.gguf import AUTO, PREFIX, block_spec
from dqconvert.quantizers.spec import BLOCKS, CODES, QuantSpec, Scheme, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from dqconvert.quantizers.tensors import QuantizedTensor

NAME = "gguf"
SUMMARY = "GGUF for ComfyUI-GGUF, stable-diffusion.cpp and diffusers"
DIALECT = "original"
KEEP_DTYPE = None
ROLES = {"attention": "weight", "mlp": "weight", "modulation": "weight"}
PARTIAL = True
FOLDER = ""

PURE = "pure"
"""The layout of a file type without its mix."""

TINY = 1024
"""Tensors with up to so many elements are F32."""

UNDECODED = (
    "position_embedding.weight", "attn_rel_b.weight", "addition_t_embedding.weight",
    ".ff_i.gate.weight",
)  # fmt: skip
"""Matrices that no linear decodes: text encoders add two of them as they are, diffusers looks rows
of Qwen-Image-Layered's up, and HiDream's routers multiply by theirs."""

HALVES = ("F16", "BF16")
PROVENANCE = "general."
"""What keys that say who made a file begin with; ARCHITECTURE and others in KEYS say what it is."""

ARCHITECTURE, FILE_TYPE = "general.architecture", "general.file_type"
VERSION = "general.quantization_version"
KEYS = (ARCHITECTURE, FILE_TYPE, VERSION, "general.type")

RESHAPED = "comfy.gguf.orig_shape."
"""What keys begin with that give a tensor the shape it had; only ComfyUI-GGUF reads them."""

FILE_TYPES = {
    "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11,
    "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17,
    "q6_k": 18, "iq2_xxs": 19, "iq2_xs": 20, "iq3_xxs": 23, "iq1_s": 24, "iq4_nl": 25,
    "iq3_s": 26, "iq2_s": 28, "iq4_xs": 30, "iq1_m": 31, "bf16": 32, "tq1_0": 36, "tq2_0": 37,
    "mxfp4": 38, "q3_k": 11, "q4_k": 14, "q5_k": 16,
}  # fmt: skip
"""llama.cpp's enum llama_ftype; a pure K-quant calls itself small."""


def accepts(scheme: Scheme) -> str | None:
    """See formats/targets."""
    code = CODES[scheme.weight.code]
    if not code.block and code.bits != 16:
        return f"GGUF has no type for {code.name} in tiles of {scheme.weight.tile}"
    if scheme.activation is not None or scheme.steps:
        return "readers of GGUF only decode weights"
    return None


def layouts(scheme: Scheme) -> tuple[str, ...]:
    """A type alone, where its name stands for a mix."""
    return (
        ("", PURE) if scheme.mixes and scheme.name.removeprefix(PREFIX).upper() in BLOCKS else ("",)
    )


def adapt(scheme: Scheme, layout: str) -> Scheme:
    """See formats/targets."""
    return replace(scheme, mixes=()) if layout == PURE else scheme


def static(scheme: Scheme, layout: str) -> str:
    """Activations are not quantized."""
    return "never"


def fitting(spec: QuantSpec, shape: tuple[int, int]) -> QuantSpec:
    """The type that a weight of this shape can have in the place of another."""
    block = CODES[spec.code].block
    if not block or shape[1] % block == 0:
        return spec
    if shape[1] % 32:
        return block_spec("f16")
    return block_spec("q8_0" if spec.bits >= 6 else "q5_1")


def kept(name: str, info: TensorInfo) -> str:
    """The dtype of a tensor that stays unquantized."""
    matrix = name.endswith(".weight") and len(info.shape) == 2 and info.numel > TINY
    matrix = matrix and not name.endswith(UNDECODED)
    return info.dtype if matrix and info.dtype in HALVES else "F32"


def problem(form: PackedForm) -> str | None:
    """See formats/targets."""
    if form.smooth or form.rotation or form.rank or form.shift or form.input_scale:
        return "GGUF has room for blocks and a bias alone"
    if form.spec != fitting(form.spec, form.shape):
        return f"{form.spec.code} needs a width that {CODES[form.spec.code].block} divides"
    return None


def shift(form: PackedForm) -> float:
    """Nothing is added to inputs."""
    return 0.0


def rows(form: PackedForm) -> bool:
    """Blocks lie within rows."""
    return True


def activation(form: PackedForm, scheme: Scheme) -> QuantSpec | None:
    """Nothing."""
    return None


def promise(form: PackedForm) -> dict[str, TensorInfo]:
    """See formats/targets."""
    infos = {"weight": TensorInfo(form.spec.code.upper(), form.shape)}
    return infos | ({"bias": TensorInfo("F32", form.shape[:1])} if form.bias else {})


def pack(form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
    """See formats/targets."""
    bias = {} if q.bias is None else {"bias": q.bias.float()}
    return {"weight": q.codes} | bias


def unpack(form: PackedForm, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    """See formats/targets."""
    from dqconvert.quantizers.ggml.blocks import wrap

    weight = tensors["weight"]
    q = wrap(weight, form.spec)
    if not CODES[form.spec.code].block:
        q = replace(q, scale=q.scale.new_ones(len(weight), 1))
    return replace(q, bias=tensors.get("bias"))


def recognize(
    infos: Infos, metadata: Mapping[str, Any], config: Mapping[str, Any]
) -> Recognized | None:
    """Files with blocks, or with an architecture in their metadata."""
    blocked = any(info.dtype in BLOCKS for info in infos.values())
    if not blocked and ARCHITECTURE not in metadata:
        return None
    file_type = metadata.get(FILE_TYPE)
    halves = next((code.upper() for code in ("f16", "bf16") if FILE_TYPES[code] == file_type), "")
    forms = {
        layer: PackedForm(
            block_spec(info.dtype.lower()),
            (info.shape[0], info.shape[1]),
            bias=f"{layer}.bias" in infos,
            bias_dtype="F32",
        )
        for layer in layers_with(infos, "weight")
        for info in [infos[f"{layer}.weight"]]
        if len(info.shape) == 2 and (info.dtype in BLOCKS or info.dtype == halves)
    }
    return Recognized(
        scheme=_scheme_of(file_type, [form.spec.code for form in forms.values()]),
        rank=0,
        forms=forms,
        problems=tuple(_problems(infos, metadata, forms)),
    )


def _scheme_of(file_type: Any, codes: list[str]) -> str | None:
    """The scheme that a file type means where its base type is there; else of the usual type."""
    named = [PREFIX + name for name, number in FILE_TYPES.items() if number == file_type]
    found = [name for name in named if schemes()[name].weight.code in codes]
    common = Counter(codes).most_common(1)
    return found[0] if found else (PREFIX + common[0][0] if common else None)


def _problems(
    infos: Infos, metadata: Mapping[str, Any], forms: Mapping[str, PackedForm]
) -> list[str]:
    """What makes a file unfit for each of its readers."""
    lines = [*_lies(metadata, forms), *fatal(infos, forms)]
    for name, info in infos.items():
        if len(name) > NAME_LIMIT:
            lines.append(f"{name}: {len(name)} characters; readers allow {NAME_LIMIT}")
        if name.removesuffix(".weight") in forms:
            continue
        if info.dtype in BLOCKS:
            lines.append(f"{name}: {describe(info)}; only matrices of linears can be blocks")
        elif info.dtype == "BF16" and kept(name, info) == "F32":
            lines.append(f"{name}: found {describe(info)}, needed F32")
    return lines


def fatal(infos: Infos, forms: Mapping[str, PackedForm]) -> list[str]:
    """What is wrong with a file for anybody: biases that are not their layer's."""
    biases = {layer: infos[f"{layer}.bias"] for layer in forms if f"{layer}.bias" in infos}
    return [
        f"{layer}.bias: found {list(bias.shape)}, needed {list(forms[layer].shape[:1])}"
        for layer, bias in biases.items()
        if bias.shape != forms[layer].shape[:1]
    ]


def _lies(metadata: Mapping[str, Any], forms: Mapping[str, PackedForm]) -> Iterator[str]:
    """What the keys do not say, or say otherwise than the tensors."""
    if not isinstance(metadata.get(ARCHITECTURE), str):
        yield f"{ARCHITECTURE}: missing; ComfyUI-GGUF has to guess it"
    if metadata.get(VERSION, 2) != 2:
        yield f"{VERSION}: is {metadata[VERSION]!r}; readers know 2"
    codes = Counter(form.spec.code for form in forms.values())
    file_type = metadata.get(FILE_TYPE)
    bases = [_base(name) for name, number in FILE_TYPES.items() if number == file_type]
    if codes and bases and not codes.keys() & set(bases):
        yield (
            f"{FILE_TYPE}: is {file_type}, which means {bases[0].upper()}; "
            f"most layers are {codes.most_common(1)[0][0].upper()}, and none is that"
        )
    for key in metadata:
        if key.startswith(RESHAPED):
            yield f"{key}: gives a tensor another shape, for ComfyUI-GGUF alone"


def _base(name: str) -> str:
    """The code that a file type gives to most layers."""
    return schemes()[PREFIX + name].weight.code


def filename(context: FileContext) -> str:
    """flux1-dev-Q4_K_M.gguf; flux1-dev-4.50BPW.gguf where each layer has the type it needs.

    Of a vision tower, qwen-image-text_encoder.visual-mmproj-Q8_0.gguf: ComfyUI-GGUF looks for it
    by that word.
    """
    name = context.scheme.name.removeprefix(PREFIX).upper()
    if context.scheme.name == AUTO:
        forms = list(context.layers.values())
        weights = sum(form.shape[0] * form.shape[1] for form in forms)
        size = sum(promise(form)["weight"].nbytes for form in forms)
        name = f"{8 * size / max(weights, 1):.2f}BPW"
    what = "-mmproj" if context.facts.get("general.type") == "mmproj" else ""
    return f"{context.model}{what}-{name}.gguf"


def metadata(context: FileContext) -> dict[str, Any]:
    """What a reader must know of the file, and where it comes from."""
    name = context.scheme.name.removeprefix(PREFIX)
    codes = Counter(form.spec.code for form in context.layers.values())
    if name not in FILE_TYPES or _base(name) not in codes:
        name = codes.most_common(1)[0][0] if codes else "f16"
    known = {key: value for key, value in context.facts.items() if "." in key}
    said = {
        ARCHITECTURE: str(context.facts.get("architecture", "")),
        **context.provenance,
        **context.facts.get("metadata", {}),
        VERSION: 2,
        FILE_TYPE: FILE_TYPES[name],
        **known,
    }
    return {key: value for key, value in said.items() if value != ""}


def config(context: FileContext) -> dict[str, Any] | None:
    """Readers need none."""
    return None
