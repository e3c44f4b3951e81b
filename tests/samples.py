"""Forms, logical results and headers that the tests of the targets share."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.targets import Target, targets
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import CODES, QuantSpec, Scheme, TensorInfo
from dqconvert.quantizers.tensors import DTYPE_NAMES, TORCH_DTYPES, LowRank, QuantizedTensor

SHAPES = ((128, 128), (384, 256), (96, 192), (40, 24))


def forms(runtime: Target, scheme: Scheme) -> Iterator[PackedForm]:
    """Every form that a plan may ask of this scheme, in all layouts, of the shapes tried."""
    if runtime.accepts(scheme) is None:
        for layout in runtime.layouts(scheme):
            yield from forms_in(runtime, runtime.adapt(scheme, layout), layout)


def forms_in(runtime: Target, scheme: Scheme, layout: str) -> Iterator[PackedForm]:
    """The forms of one layout. scheme: as the runtime needs it."""
    static, rank = runtime.static(scheme, layout), scheme.rank
    for shape in SHAPES:
        if scheme.rotation and not rotation_of(scheme, shape[1]):
            continue
        first = PackedForm(
            scheme.weight,
            shape,
            rank=rank,
            layout=layout,
            rotation=rotation_of(scheme, shape[1]),
            input_scale=static == "required",
        )
        calibrated = replace(first, bias_dtype="F16", input_scale=True)
        for plain in (
            first,
            replace(first, bias=False, bias_dtype="F32"),
            replace(first, rank=16 if rank else 0, parts=2),
            first if static == "never" else calibrated,
            replace(first, smooth=not rank),
            replace(first, full_precision=not rank),
        ):
            yield replace(plain, shift=runtime.shift(plain))
        separate = runtime.ROLES.get("modulation") == "modulation" and scheme.modulation
        if separate:
            assert scheme.modulation is not None
            first = replace(first, spec=scheme.modulation, rank=0, rotation=0, input_scale=False)
        for splits in (3, 6):
            yield replace(first, splits=splits)
            yield replace(first, splits=splits, bias=False)


def rotation_of(scheme: Scheme, k: int) -> int:
    """The widest group that the scheme allows and K holds, 0 for none."""
    return next((g for g in (256, 64, 16) if g <= scheme.rotation and k % g == 0), 0)


def cases() -> list[Any]:
    """(target, scheme, form) of everything that can be packed."""
    found = []
    for name, runtime in targets().items():
        for scheme in schemes().values():
            if name not in scheme.targets:
                continue
            fit = [form for form in forms(runtime, scheme) if runtime.problem(form) is None]
            found += [
                pytest.param(runtime, scheme, form, id=f"{name}-{scheme.name}-{i}")
                for i, form in enumerate(fit)
            ]
    return found


def generator(form: PackedForm) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(form).encode()))


def codes_of(spec: QuantSpec, shape: tuple[int, int], rng: torch.Generator) -> Tensor:
    """Random codes, every one that the spec allows."""
    code = CODES[spec.code]
    if code.block:
        rows = TensorInfo(spec.code.upper(), shape).stored.shape
        return torch.randint(0, 256, rows, generator=rng).to(torch.uint8)
    if code.bits == 16:
        return torch.randn(shape, generator=rng).to(TORCH_DTYPES[code.name.upper()])
    if code.levels or (code.is_float and code.bits < 8):
        return torch.randint(0, 2**code.bits, shape, generator=rng).to(torch.uint8)
    if code.is_float:
        dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[code.name]
        return torch.randn(shape, generator=rng).to(dtype)
    top = int(code.maximum)
    low = -top - spec.full_range if code.signed else 0
    return torch.randint(low, top + 1, shape, generator=rng).to(torch.int8)


def result_of(form: PackedForm, spec_smooth: bool) -> QuantizedTensor:
    """A random logical result of that form."""
    rng = generator(form)
    (n, k), spec = form.shape, form.spec

    def values(*shape: int, dtype: str = "BF16") -> Tensor:
        return torch.randn(shape, generator=rng).abs().add(0.01).to(TORCH_DTYPES[dtype])

    branch, grid = form.rank > 0, spec.grid(form.shape)
    second = None
    if spec.tensor_scale is not None:
        apart = form.parts if branch else 1  # without a branch, stacked linears share one scale
        each = values(apart, dtype=spec.tensor_scale)
        second = each if apart == 1 else each.repeat_interleave(n // apart)
        second = values(n, dtype=spec.tensor_scale) if spec.code == "lut4" else second
    zero = torch.randint(0, 16, grid, generator=rng).float() if spec.zero_point else None
    return QuantizedTensor(
        spec=spec,
        codes=codes_of(spec, form.shape, rng),
        scale=torch.ones(n, 0)
        if CODES[spec.code].block
        else torch.ones(grid)
        if spec.unit
        else values(*grid, dtype=spec.scale),
        tensor_scale=second,
        bias=-values(n, dtype=form.bias_dtype) if form.bias else None,
        smooth=values(k) if form.smooth or (spec_smooth and branch) else None,
        lowrank=LowRank(values(form.rank, k), -values(n, form.rank)) if branch else None,
        shift=form.shift,
        # a power of two, which every runtime can hold
        input_scale=values(1).float().log2().round().exp2()[0] if form.input_scale else None,
        zero=zero,
        rotation=form.rotation,
        codebook=values(16, dtype="F32").sort().values if spec.code == "lut4" else None,
    )


def infos_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    return {k: TensorInfo(DTYPE_NAMES[t.dtype], tuple(t.shape)) for k, t in tensors.items()}


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def same(one: Tensor | None, two: Tensor | None) -> bool:
    """Equal in dtype, shape and bytes."""
    if one is None or two is None:
        return one is two
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(raw(one), raw(two))


def context_of(
    runtime: Target, scheme: Scheme, layout: str | None = None
) -> tuple[FileContext, dict[str, TensorInfo]]:
    """A file with a layer of each form that can be told from a header."""
    layout = runtime.layouts(scheme)[0] if layout is None else layout
    adapted = runtime.adapt(scheme, layout)
    layers = {}
    for i, form in enumerate(forms_in(runtime, adapted, layout)):
        uniform = replace(form, rank=scheme.rank if form.rank else 0)
        if runtime.problem(uniform) is None:
            told = {"unet": "mid_block", "v2-flux": "single_transformer_blocks"}
            blocks = told.get(layout, "transformer_blocks")  # by which nunchaku's are told
            layers[f"{blocks}.{i}.linear"] = uniform
    infos = {
        f"{layer}.{suffix}": info
        for layer, form in layers.items()
        for suffix, info in runtime.promise(form).items()
    }
    norm = TensorInfo("BF16", (8,))
    kept = getattr(runtime, "kept", lambda name, info: info.dtype)
    infos["norm.weight"] = replace(norm, dtype=kept("norm.weight", norm))
    context = FileContext(
        model="toy",
        scheme=adapted,
        rank=scheme.rank,
        config={"_class_name": "FluxTransformer2DModel", "num_layers": 2},
        layers=layers,
        facts={
            "model_class": "NunchakuFluxTransformer2dModel",
            "comfy_config": {"a": [1]},
            "architecture": "flux",
        },
        layout=layout,
        names=tuple(infos),
    )
    extras = getattr(runtime, "extras", lambda _: {})(context)
    return replace(context, names=(*infos, *extras)), infos | extras


def files() -> list[Any]:
    return [
        pytest.param(runtime, scheme, id=f"{name}-{scheme.name}")
        for name, runtime in targets().items()
        for scheme in schemes().values()
        if name in scheme.targets
    ]
