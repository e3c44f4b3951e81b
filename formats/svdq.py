"""SVDQuant files: what the nunchaku and the diffusers layouts share. Torch-free.

Both hold the same packed bytes (formats/bits.py) under other names, and differ in what a
Layout says. A form with splits, or without a low-rank branch, is W4A16; all others are W4A4.

Source: nunchaku/models/linear.py, nunchaku/models/transformers/utils.py (strict loading),
diffusers/quantizers/nunchaku/utils.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from dqconvert.formats.form import PackedForm
from dqconvert.formats.recognition import Infos, differences
from dqconvert.quantizers.schemes.svdquant import INT4_GROUP64, NVFP4_BF16
from dqconvert.quantizers.spec import QuantSpec, Scheme, TensorInfo

SHIFT_GELU = 0.171875
"""Above -min(GELU) = 0.17; exact in bf16."""

TENSOR_SCALES = ("wtscale", "wcscales")

BOTH, NEED, CHANNEL = "both", "need", "channel"
"""Tensor scales that a loader of NVFP4 layers wants: see Layout."""

DEFAULT_RANK = 32
"""What loaders take for a rank that a file does not say."""

KINDS = tuple((spec.code, spec.tile) for spec in (INT4_GROUP64, NVFP4_BF16))
"""Weights that the W4A4 kernels read."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How one runtime lays out SVDQuant layers.

    smooth: names that hold the smoothing vector, the first is the one that is read; down, up:
    names of the low-rank branch; bias: write one even where the layer has none; scales: whether
    NVFP4 layers have a scale of the tensor and one per channel: BOTH, only the one they NEED, or
    always one per CHANNEL; modulation: W4A16 rows alternate between chunks, with 1 added to the
    scale biases.
    """

    smooth: tuple[str, ...]
    down: str
    up: str
    bias: bool
    scales: str
    modulation: bool


def is_w4a16(form: PackedForm) -> bool:
    """Whether the layer has 16-bit activations (modulation), and so no low-rank branch."""
    return form.splits > 0 or form.rank == 0


def is_nvfp4(spec: QuantSpec) -> bool:
    """Whether codes are e2m1; otherwise they are int4."""
    return spec.code == NVFP4_BF16.code


def accepts(scheme: Scheme) -> str | None:
    """None, or why the kernels cannot run this scheme."""
    if "lowrank" not in scheme.steps:
        return "these kernels add a low-rank branch; the scheme has none"
    weight = scheme.weight.code, scheme.weight.tile
    if weight not in KINDS:
        return f"weights are int4 in groups of 64 or e2m1 in groups of 16, not {weight}"
    activation = scheme.activation and (scheme.activation.code, scheme.activation.tile)
    if activation != weight:
        return f"activations are quantized like the weights, {weight}, not {activation}"
    modulation = scheme.modulation and (scheme.modulation.code, scheme.modulation.tile)
    if modulation != (INT4_GROUP64.code, INT4_GROUP64.tile):
        return f"modulation is int4 in groups of 64, not {modulation}"
    return None


def problem(layout: Layout, form: PackedForm, shift: float) -> str | None:
    """None, or all reasons why the layer cannot be packed. shift: what the runtime adds."""
    reasons = _w4a16_reasons(layout, form) if form.splits else _w4a4_reasons(form)
    if form.shift not in (0.0, shift):
        reasons.append(f"the runtime adds {shift} to the input, not {form.shift}")
    return "; ".join(reasons) or None


def _w4a4_reasons(form: PackedForm) -> list[str]:
    reasons = []
    if (form.spec.code, form.spec.tile) not in KINDS:
        reasons.append(f"the kernels read int4 or e2m1 in groups, not {form.spec.code}")
    if form.shape[0] % 128 or form.shape[1] % 128:
        reasons.append(f"needs extents that are multiples of 128; {form.shape} are not")
    if form.rank % 16 or form.rank <= 0:
        reasons.append(f"needs a rank that is a multiple of 16; {form.rank} is not")
    if form.rank > min(form.shape):
        reasons.append(f"a rank of {form.rank} is more than a weight of {form.shape} can have")
    if form.input_scale:
        reasons.append("activations are scaled per group; there is no static scale")
    return reasons


def _w4a16_reasons(layout: Layout, form: PackedForm) -> list[str]:
    reasons = []
    n, k = form.shape
    if (form.spec.code, form.spec.tile) != (INT4_GROUP64.code, INT4_GROUP64.tile):
        reasons.append(f"modulation is int4 in groups of 64, not {form.spec.code}")
    if n % 8 or k % 64:
        reasons.append(f"modulation needs multiples of 8 rows and 64 columns; {form.shape} are not")
    if layout.modulation and n % form.splits:
        reasons.append(f"{n} rows do not make {form.splits} chunks")
    if layout.modulation and form.splits not in (3, 6):
        reasons.append(f"modulation has 3 or 6 chunks, not {form.splits}")
    if layout.modulation and not (layout.bias or form.bias):
        reasons.append("the 1 that is added to scales has no place without a bias")
    return reasons


def promise(layout: Layout, form: PackedForm) -> dict[str, TensorInfo]:
    """Name, dtype and shape of all tensors of a packed layer."""
    n, k = form.shape
    bias = {"bias": TensorInfo("BF16", (n,))} if form.bias or layout.bias else {}
    if is_w4a16(form):
        scales = TensorInfo("BF16", (k // 64, n))
        qweight = TensorInfo("I32", (n // 4, k // 2))
        return {"qweight": qweight, "wscales": scales, "wzeros": scales} | bias
    tensors = {"qweight": TensorInfo("I8", (n, k // 2))} | _scale_infos(layout, form)
    tensors |= {name: TensorInfo("BF16", (k,)) for name in layout.smooth}
    tensors[layout.down] = TensorInfo("BF16", (k, form.rank))
    tensors[layout.up] = TensorInfo("BF16", (n, form.rank))
    return tensors | bias


def _scale_infos(layout: Layout, form: PackedForm) -> dict[str, TensorInfo]:
    n, k = form.shape
    if not is_nvfp4(form.spec):
        return {"wscales": TensorInfo("BF16", (k // 64, n))}
    infos = {"wscales": TensorInfo("F8_E4M3", (k // 16, n))}
    if layout.scales == BOTH or (layout.scales == NEED and form.parts == 1):
        infos["wtscale"] = TensorInfo("BF16", (1,))
    if layout.scales != NEED or form.parts > 1:
        infos["wcscales"] = TensorInfo("BF16", (n,))
    return infos


def read_forms(
    layout: Layout, layers: Iterable[str], infos: Infos, said: object
) -> tuple[dict[str, PackedForm], list[str]]:
    """Forms of packed layers by name, and what is wrong with their tensors.

    said: the rank in the file's metadata or config, for layers whose branch is missing. A file
    may be in F16 throughout. nunchaku's loader takes tensor scales that are missing as 1.
    """
    rank = said if isinstance(said, int) and said > 0 else DEFAULT_RANK
    forms, problems = {}, []
    half = {infos[name].dtype for name in infos if name.endswith(f".{layout.up}")}
    optional = TENSOR_SCALES if layout.scales == NEED else ()
    for layer in layers:
        qweight = infos[f"{layer}.qweight"]
        if qweight.dtype not in ("I8", "I32") or len(qweight.shape) != 2:
            problems.append(
                f"{layer}.qweight: found {qweight.dtype} {list(qweight.shape)}, "
                "needed I8 [N, K/2] or I32 [N/4, K/2]"
            )
            continue
        form = _read_form(layout, layer, infos, rank)
        if reason := None if is_w4a16(form) else problem(layout, form, 0.0):
            problems.append(f"{layer}: {reason}")
        parts = 2 if f"{layer}.wcscales" in infos else 1
        promised = promise(layout, replace(form, parts=parts))
        if half == {"F16"}:
            promised = {name: _in_f16(info) for name, info in promised.items()}
        problems += differences(layer, promised, infos, optional)
        forms[layer] = form
    return forms, problems


def _in_f16(info: TensorInfo) -> TensorInfo:
    return replace(info, dtype="F16") if info.dtype == "BF16" else info


def _read_form(layout: Layout, layer: str, infos: Infos, rank: int) -> PackedForm:
    qweight = infos[f"{layer}.qweight"]
    rows, columns = qweight.shape
    bias = f"{layer}.bias" in infos
    if qweight.dtype == "I32":
        return PackedForm(INT4_GROUP64, (rows * 4, columns * 2), bias=bias)
    scales = infos.get(f"{layer}.wscales")
    micro = scales is not None and scales.dtype == NVFP4_BF16.scale
    spec = NVFP4_BF16 if micro else INT4_GROUP64
    down = infos.get(f"{layer}.{layout.down}")
    if down is not None and len(down.shape) == 2 and down.shape[1]:
        rank = down.shape[1]
    return PackedForm(spec, (rows, columns * 2), bias=bias, rank=rank)
