"""ComfyUI's files read again, ours and others', from the header alone. Torch-free.

What ComfyUI would do with a file decides what is a problem: what it ignores is none, what it
refuses is one, and what it loads without a word and computes wrongly is one above all.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dqconvert.formats.comfy import (
    BOTH,
    ENTRIES,
    FORMATS,
    HEADER,
    LEGACY,
    MARKERS,
    ROW,
    SCALED_FP8,
    TENSOR,
    Format,
    Said,
    adapted,
    format_of,
    known,
    marker,
    understood,
)
from dqconvert.formats.form import PackedForm
from dqconvert.formats.recognition import Infos, describe, differences, json_object, layers_with
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import FLOAT_DTYPES, QuantSpec, TensorInfo

PREFIXES = ("", "model.diffusion_model.", "model.model.", "net.")
"""What ComfyUI takes off names."""

PROBED = (
    "img_in", "txt_in", "vector_in", "x_embedder", "cap_embedder", "patch_embedding",
    "patchify_proj", "final_layer",
)  # fmt: skip
"""Modules whose shapes ComfyUI reads to recognise a model."""

FOREIGN_NAMES = "single_transformer_blocks."
"""Diffusers' blocks of FLUX: ComfyUI renames their weights and loses their scales."""

PACKED_DTYPES = ("I8", "U8", "F8_E4M3", "F8_E5M2")
BYTES = ({"U8", "F8_E8M0"}, {"U8", "F8_E4M3"})
"""Dtypes that ComfyUI views as one another."""


@dataclass(slots=True)
class ComfyFile:
    """The layers of a file, the tensors that belong to all of them, and what is wrong with it.

    loading: what ComfyUI alone has against it.
    """

    forms: dict[str, PackedForm] = field(default_factory=dict)
    extras: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)
    loading: list[str] = field(default_factory=list)


def read(infos: Infos, metadata: Mapping[str, str]) -> ComfyFile | None:
    """A file with markers, with entries in its metadata, or with scaled_fp8; None for others."""
    marked = layers_with(infos, "comfy_quant")
    older = next((p + "scaled_fp8" for p in PREFIXES if p + "scaled_fp8" in infos), None)
    if ENTRIES not in metadata and not marked and older is None:
        return None
    found = ComfyFile(extras=(older,) if older else ())
    entries = _entries(infos, metadata, found)
    for layer in dict.fromkeys([*entries, *marked]):
        said = understood(entries[layer]) if layer in entries else None
        layout = BOTH if layer in marked and said else MARKERS if layer in marked else HEADER
        _layer(layer, infos, (said, layout), found)
    if older and ENTRIES not in metadata:
        _legacy(infos, infos[older].numel == 2, found)
    found.loading += _unsaid(infos, {*entries, *marked, *found.forms})
    found.loading += _misplaced(found.forms)
    return found if found.forms or found.problems or found.loading else None


def within(metadata: Mapping[str, Any], others: Collection[str]) -> Mapping[str, Any]:
    """The metadata without entries for layers whose weights are among these tensors."""
    header = json_object(metadata.get(ENTRIES))
    layers = (header or {}).get("layers")
    if header is None or not isinstance(layers, dict):
        return metadata
    own = {name: said for name, said in layers.items() if f"{name}.weight" not in others}
    rest = {key: value for key, value in metadata.items() if key != ENTRIES}
    return {**rest, ENTRIES: json.dumps({**header, "layers": own})} if own else rest


def _unsaid(infos: Infos, said: set[str]) -> Iterator[str]:
    """Packed weights of which ComfyUI is told nothing."""
    for suffix in ("weight_scale", "scale_weight", "weight_s_rel"):
        for layer in layers_with(infos, suffix):
            weight = infos.get(f"{layer}.weight")
            if layer not in said and weight and weight.dtype in PACKED_DTYPES:
                yield (
                    f"{layer}.{suffix}: neither a marker nor the metadata names the layer, so "
                    "ComfyUI drops its scales and takes the weight as it is"
                )


def _entries(infos: Infos, metadata: Mapping[str, str], found: ComfyFile) -> dict[str, Any]:
    """The layers of the metadata, under their names in the file."""
    header = json_object(metadata.get(ENTRIES))
    if header is None and ENTRIES in metadata:
        found.problems.append(f"metadata {ENTRIES}: not a JSON object")
    layers = (header or {}).get("layers")
    if header is not None and not isinstance(layers, dict):
        found.problems.append(f"metadata {ENTRIES}: names no layers")
    return {
        next((n for n in _spellings(name) if f"{n}.weight" in infos), name): value
        for name, value in (layers if isinstance(layers, dict) else {}).items()
    }


def _spellings(name: str) -> Iterator[str]:
    """A layer's name, with what ComfyUI takes off names and without."""
    yield from (prefix + name for prefix in PREFIXES)
    yield from (name.removeprefix(prefix) for prefix in PREFIXES)


def _layer(layer: str, infos: Infos, way: tuple[Said | None, str], found: ComfyFile) -> None:
    said, layout = way
    if said is not None and said.fault:
        found.problems.append(f"metadata {ENTRIES}, {layer}: {said.fault}")
        return
    weight, groups = infos.get(f"{layer}.weight"), infos.get(f"{layer}.weight_s_rel")
    said = said or _looks(layer, infos)
    if weight is None or len(weight.shape) != 2 or said is None:
        what = "missing" if weight is None else f"{describe(weight)} is no packed weight"
        found.problems.append(f"{layer}.weight: {what}, but the layer is said to be one")
        return
    if groups and weight.shape[1] * 4 == groups.shape[-1] * (said.group or 16) * 3:
        found.problems.append(f"{layer}.weight: six bits a weight, which is not supported")
        return
    form = _form(layer, infos, said, layout)
    if layout == MARKERS:
        form = _by_size(form, infos[f"{layer}.comfy_quant"])
    style = FORMATS[said.format]
    reason = style.problem(form)
    if reason:
        found.problems.append(f"{layer}.weight: {reason}")
        return
    if said.group is not None and form.spec.tile[1] not in (said.group, *ROW, *TENSOR):
        found.problems.append(
            f"metadata {ENTRIES}, {layer}: says groups of {said.group}, "
            f"its scales are of {form.spec.tile[1]}"
        )
    differs, like = _differences(layer, style, form, infos), _looks(layer, infos)
    if differs and like and like.format != said.format:
        found.problems.append(
            f"metadata {ENTRIES}, {layer}: says {said.format}, its tensors look like {like.format}"
        )
    found.problems += differs
    found.forms[layer] = form


def _looks(layer: str, infos: Infos) -> Said | None:
    """The format that dtypes and shapes speak for, where only the marker's bytes know it."""
    weight, scale = infos.get(f"{layer}.weight"), infos.get(f"{layer}.weight_scale")
    dtype = weight.dtype if weight else ""
    if dtype == "F8_E4M3":
        small = scale is not None and scale.dtype in BYTES[0]
        return Said("mxfp8" if small else "float8_e4m3fn")
    if dtype == "I8" and f"{layer}.weight_s_rel" in infos:
        return Said("asym_w4a8_int8", rotation=_widest(weight))
    if dtype == "I8" and f"{layer}.weight_zeros" in infos:
        return Said("awq_w4a16")
    if dtype == "I8" and scale is not None and len(scale.shape) == 1 and scale.shape != (1,):
        return Said("convrot_w4a4", rotation=_widest(weight))
    name = {"F8_E5M2": "float8_e5m2", "U8": "nvfp4", "I8": "int8_tensorwise"}.get(dtype)
    return Said(name) if name else None


def _widest(weight: TensorInfo | None) -> int:
    columns = 2 * weight.shape[-1] if weight and weight.shape else 0
    return next((group for group in (256, 64, 16) if columns % group == 0), 0)


def _form(layer: str, infos: Infos, said: Said, layout: str) -> PackedForm:
    """The form of a layer from its format and its shapes."""
    style = FORMATS[said.format]
    bias = infos.get(f"{layer}.bias")
    smooth = infos.get(f"{layer}.pre_quant_scale") if said.format == "nvfp4" else None
    n, k = infos[f"{layer}.weight"].shape
    k = 2 * k if style.packed else k
    if said.format in ("mxfp8", "nvfp4"):  # the rest may be filled up
        side = 32 if said.format == "mxfp8" else 16
        n = bias.shape[0] if bias and bias.shape and -(-bias.shape[0] // side) * side == n else n
        k = smooth.shape[0] if smooth and smooth.shape else k
    return PackedForm(
        spec=_spec(layer, infos, said, k),
        shape=(n, k),
        bias=bias is not None,
        input_scale=style.static and f"{layer}.input_scale" in infos,
        bias_dtype="BF16" if bias is None else bias.dtype,
        layout=layout,
        rotation=said.rotation,
        smooth=smooth is not None,
        full_precision=said.full_precision,
    )


def _spec(layer: str, infos: Infos, said: Said, k: int) -> QuantSpec:
    """As a scheme of ours has it, so that its other fields are right."""
    scale = infos.get(f"{layer}.weight_scale")
    if said.format == "int8_tensorwise":
        return _ours(said.format, TENSOR if scale and scale.shape in ((), (1,)) else ROW)
    if said.format == "asym_w4a8_int8":
        scale = infos.get(f"{layer}.weight_s_rel")
        groups = scale.shape[-1] if scale and scale.shape else 0
        return _ours(said.format, (1, k // groups if groups else said.group or 16))
    if said.format != "awq_w4a16":
        return _ours(said.format)
    groups = scale.shape[0] if scale and scale.shape else 0
    spec = _ours(said.format, (1, k // groups if groups else said.group or 64))
    dtype = scale.dtype if scale and scale.dtype in FLOAT_DTYPES else spec.scale
    if said.symmetric:
        return replace(spec, scale=dtype)
    return replace(spec, code="uint4", scale=dtype, zero_point=True, full_range=False)


def _ours(name: str, tile: tuple[int, int] | None = None) -> QuantSpec:
    weights = [scheme.weight for scheme in schemes().values() if "comfyui" in scheme.targets]
    fits = [adapted(w) for w in weights if (found := format_of(w)) and found.name == name]
    exact = [spec for spec in fits if tile in (None, spec.tile)]
    return exact[0] if exact else replace(fits[0], tile=tile or fits[0].tile)


def _by_size(form: PackedForm, info: TensorInfo) -> PackedForm:
    """What a marker of that many bytes most likely says; only its bytes know."""
    for exact in (False, True):
        for rotation in dict.fromkeys((form.rotation, 0, 256, 64, 16)):
            symmetric = [form.spec]
            if form.spec.zero_point:
                spec = replace(form.spec, code="int4", zero_point=False, full_range=True)
                symmetric = [spec, form.spec]
            for spec in symmetric:
                guess = replace(form, spec=spec, rotation=rotation, full_precision=exact)
                style = FORMATS[known(guess).name]
                if style.problem(guess) is None and info.shape == (len(marker(guess)),):
                    return guess
    return form


def _differences(layer: str, style: Format, form: PackedForm, infos: Infos) -> list[str]:
    """What is not as the format has it, but for what ComfyUI does not mind."""
    promised = dict(style.layout.promise(style.inner(form)))
    for suffix, need in promised.items():
        found = infos.get(f"{layer}.{suffix}")
        if found is not None and _alike(found, need, style):
            promised[suffix] = found
    return differences(layer, promised, infos, ("weight_codebook",))


def _alike(found: TensorInfo, need: TensorInfo, style: Format) -> bool:
    """Whether ComfyUI takes one for the other: one value for a scalar, bytes for small floats."""
    dtypes = {found.dtype, need.dtype}
    same = len(dtypes) == 1 or any(dtypes <= alike for alike in BYTES)
    if style is SCALED_FP8 or (len(need.shape) == 1 and need.dtype == "BF16"):
        same = same or dtypes <= FLOAT_DTYPES
    return same and (found.shape == need.shape or {found.shape, need.shape} == {(), (1,)})


def _legacy(infos: Infos, exact: bool, found: ComfyFile) -> None:
    """The layers of scaled_fp8: those that have a scale_weight."""
    for layer in layers_with(infos, "scale_weight"):
        weight, bias = infos.get(f"{layer}.weight"), infos.get(f"{layer}.bias")
        if weight is None or weight.dtype != "F8_E4M3" or len(weight.shape) != 2:
            what = "missing" if weight is None else describe(weight)
            found.problems.append(f"{layer}.weight: {what}; scaled_fp8 is for F8_E4M3 matrices")
            continue
        form = PackedForm(
            spec=_ours("float8_e4m3fn"),
            shape=(weight.shape[0], weight.shape[1]),
            bias=bias is not None,
            input_scale=f"{layer}.scale_input" in infos,
            bias_dtype="BF16" if bias is None else bias.dtype,
            layout=LEGACY,
            full_precision=exact,
        )
        found.problems += _differences(layer, SCALED_FP8, form, infos)
        found.forms[layer] = form


def _misplaced(forms: Mapping[str, PackedForm]) -> Iterator[str]:
    """Layers that ComfyUI loads, but not as what they are."""
    for name, form in forms.items():
        bare = name.removeprefix(max((p for p in PREFIXES if name.startswith(p)), key=len))
        style = FORMATS.get(known(form).name)
        if bare.split(".")[0] in PROBED and style is not None and style.packed:
            yield (
                f"{name}.weight: ComfyUI recognises the model by this shape, which is not the "
                "layer's when packed"
            )
    foreign = next((name for name in forms if FOREIGN_NAMES in name), None)
    if foreign:
        yield (
            f"{foreign}: diffusers' name; ComfyUI renames such layers without their scales, and "
            "computes noise without an error"
        )
