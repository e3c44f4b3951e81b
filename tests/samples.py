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


def forms(runtime: Target, scheme: Scheme) -> Iterator[PackedForm]:
    """Every form that the target takes of this scheme, of the shapes tried."""
    for shape in ((128, 128), (384, 256), (96, 192), (40, 24)):
        for plain in (
            PackedForm(scheme.weight, shape, rank=scheme.rank),
            PackedForm(scheme.weight, shape, rank=scheme.rank, bias=False, bias_dtype="F32"),
            PackedForm(scheme.weight, shape, rank=16 if scheme.rank else 0, parts=2),
            PackedForm(scheme.weight, shape, rank=scheme.rank, input_scale=True, bias_dtype="F16"),
        ):
            yield replace(plain, shift=runtime.shift(plain))
        separate = runtime.ROLES.get("modulation") == "modulation" and scheme.modulation
        spec, rank = (scheme.modulation, 0) if separate else (scheme.weight, scheme.rank)
        assert spec is not None
        for splits in (3, 6):
            yield PackedForm(spec, shape, rank=rank, splits=splits)
            yield PackedForm(spec, shape, rank=rank, splits=splits, bias=False)


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
    code = CODES[spec.code]
    if code.name == "e2m1":
        return torch.randint(0, 16, shape, generator=rng).to(torch.uint8)
    if code.is_float:
        dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[code.name]
        return torch.randn(shape, generator=rng).to(dtype)
    top = int(code.maximum)
    return torch.randint(-top, top + 1, shape, generator=rng).to(torch.int8)


def result_of(form: PackedForm, spec_smooth: bool) -> QuantizedTensor:
    """A random logical result of that form."""
    rng = generator(form)
    (n, k), spec = form.shape, form.spec

    def values(*shape: int, dtype: str = "BF16") -> Tensor:
        return torch.randn(shape, generator=rng).abs().add(0.01).to(TORCH_DTYPES[dtype])

    second = None
    if spec.tensor_scale is not None:
        each = values(form.parts, dtype=spec.tensor_scale)
        second = each if form.parts == 1 else each.repeat_interleave(n // form.parts)
    branch = form.rank > 0
    return QuantizedTensor(
        spec=spec,
        codes=codes_of(spec, form.shape, rng),
        scale=values(*spec.grid(form.shape), dtype=spec.scale),
        tensor_scale=second,
        bias=-values(n, dtype=form.bias_dtype) if form.bias else None,
        smooth=values(k) if spec_smooth and branch else None,
        lowrank=LowRank(values(form.rank, k), -values(n, form.rank)) if branch else None,
        shift=form.shift,
        input_scale=values(1, dtype="F32").reshape(()) if form.input_scale else None,
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


def context_of(runtime: Target, scheme: Scheme) -> tuple[FileContext, dict[str, TensorInfo]]:
    """A file with a layer of each form that can be told from a header."""
    layers = {}
    for i, form in enumerate(forms(runtime, scheme)):
        uniform = replace(form, rank=scheme.rank if form.rank else 0)
        if runtime.problem(uniform) is None:
            layers[f"transformer_blocks.{i}.linear"] = uniform
    context = FileContext(
        model="toy",
        scheme=scheme,
        rank=scheme.rank,
        config={"_class_name": "FluxTransformer2DModel", "num_layers": 2},
        layers=layers,
        facts={"model_class": "NunchakuFluxTransformer2dModel", "comfy_config": {"a": [1]}},
    )
    infos = {
        f"{layer}.{suffix}": info
        for layer, form in layers.items()
        for suffix, info in runtime.promise(form).items()
    }
    return context, infos | {"norm.weight": TensorInfo("BF16", (8,))}


def files() -> list[Any]:
    return [
        pytest.param(runtime, scheme, id=f"{name}-{scheme.name}")
        for name, runtime in targets().items()
        for scheme in schemes().values()
        if name in scheme.targets
    ]
