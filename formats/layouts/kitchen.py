"""Four-bit weights as comfy-kitchen stores them: two codes in a byte, the even column low.

    Int4Rows    weight            I8 [N, K/2]       two's complement
                weight_scale      F32 [N]
                                  w = code · weight_scale, of the rotated weight
    Codebook    weight            I8 [N, K/2]       index into the codebook
                weight_s_rel      F8_E4M3 [N, K/group]
                weight_s_channel  F32 [N]
                weight_codebook   F32 [16]; code - 8 where it is missing
                                  w = round(codebook[index] · s_rel) · s_channel, rotated
    Affine      weight            I8 [N, K/2]       0 .. 15
                weight_scale      BF16 or F16 [K/group, N]
                weight_zeros      the same
                                  w = (code - 8) · weight_scale + weight_zeros
    all         bias              [N]

Source: comfy_kitchen/tensor/convrot_w4a4.py, w4a8_int8.py and awq_w4a16.py, and their eager
backends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dqconvert.formats.form import PackedForm
from dqconvert.formats.layouts import beside
from dqconvert.quantizers.spec import ALL, LUT4_LEVELS, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from dqconvert.quantizers.tensors import QuantizedTensor

MIDDLE = 8
"""The unsigned code that stands for 0 without zero points."""

ROTATIONS = (4, 16, 64, 256, 1024, 4096)
"""Sizes of a regular Hadamard matrix."""

COLUMNS = 64
"""Columns of the int4 kernel: K is a multiple."""


@dataclass(frozen=True, slots=True)
class Int4Rows:
    """See the module docstring."""

    def problem(self, form: PackedForm) -> str | None:
        """See formats/layouts."""
        reasons = [*beside.surplus(form, ("rotation",)), *rotation_reasons(form)]
        if (form.spec.code, form.spec.tile) != ("int4", (1, ALL)):
            reasons.append(f"weights are int4 rows, not {form.spec.code} in {form.spec.tile}")
        if form.shape[1] % COLUMNS:
            reasons.append(f"{form.shape[1]} input channels are no multiple of {COLUMNS}")
        return "; ".join(reasons) or None

    def promise(self, form: PackedForm) -> dict[str, TensorInfo]:
        """See formats/layouts."""
        n, k = form.shape
        return {
            "weight": TensorInfo("I8", (n, k // 2)),
            "weight_scale": TensorInfo("F32", (n,)),
        } | beside.promise_bias(form)

    def pack(self, form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
        """See formats/layouts."""
        return {
            "weight": _packed(q.codes),
            "weight_scale": q.scale.float().reshape(-1),
        } | beside.pack_bias(form, q)

    def unpack(self, form: PackedForm, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
        """See formats/layouts."""
        from dqconvert.quantizers.tensors import QuantizedTensor

        return QuantizedTensor(
            form.spec,
            _codes(tensors["weight"], signed=True),
            tensors["weight_scale"].float().reshape(-1, 1),
            bias=tensors.get("bias"),
            rotation=form.rotation,
        )


@dataclass(frozen=True, slots=True)
class Codebook:
    """See the module docstring."""

    def problem(self, form: PackedForm) -> str | None:
        """See formats/layouts."""
        reasons = [*beside.surplus(form, ("rotation",)), *rotation_reasons(form)]
        k, group = form.shape[1], form.spec.tile[1]
        if form.spec.code != "lut4" or form.spec.tile[0] != 1:
            reasons.append(f"weights are lut4 groups, not {form.spec.code} in {form.spec.tile}")
        elif group < 4 or (16 % group and group % 16):
            reasons.append(f"groups divide 16 or are a multiple of it, not {group}")
        elif k % 16 or k % group:
            reasons.append(f"{k} input channels are no multiple of 16 and of {group}")
        return "; ".join(reasons) or None

    def promise(self, form: PackedForm) -> dict[str, TensorInfo]:
        """See formats/layouts."""
        n, k = form.shape
        return {
            "weight": TensorInfo("I8", (n, k // 2)),
            "weight_s_rel": TensorInfo("F8_E4M3", (n, k // form.spec.tile[1])),
            "weight_s_channel": TensorInfo("F32", (n,)),
            "weight_codebook": TensorInfo("F32", (len(LUT4_LEVELS),)),
        } | beside.promise_bias(form)

    def pack(self, form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
        """See formats/layouts."""
        import torch

        levels = torch.tensor(LUT4_LEVELS) if q.codebook is None else q.codebook.float()
        if q.tensor_scale is None:
            raise ValueError("the result lacks the scales of its rows")
        return {
            "weight": _packed(q.codes),
            "weight_s_rel": q.scale.contiguous(),
            "weight_s_channel": q.tensor_scale.float().expand(form.shape[0]).contiguous(),
            "weight_codebook": levels,
        } | beside.pack_bias(form, q)

    def unpack(self, form: PackedForm, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
        """See formats/layouts."""
        import torch

        from dqconvert.quantizers.tensors import QuantizedTensor

        found = tensors.get("weight_codebook")
        levels = torch.arange(16.0) - MIDDLE if found is None else found.float().cpu()
        own = not torch.equal(levels, torch.tensor(LUT4_LEVELS))
        return QuantizedTensor(
            form.spec,
            _codes(tensors["weight"], signed=False),
            tensors["weight_s_rel"].view(torch.float8_e4m3fn),
            tensors["weight_s_channel"].float(),
            bias=tensors.get("bias"),
            rotation=form.rotation,
            codebook=levels if own else None,
        )


@dataclass(frozen=True, slots=True)
class Affine:
    """See the module docstring."""

    def problem(self, form: PackedForm) -> str | None:
        """See formats/layouts."""
        reasons, spec = beside.surplus(form), form.spec
        if spec.code != ("uint4" if spec.zero_point else "int4") or spec.tile[0] != 1:
            reasons.append(f"weights are int4 groups, not {spec.code} in {spec.tile}")
        elif spec.tile[1] < 1 or form.shape[1] % spec.tile[1] or form.shape[1] % 2:
            reasons.append(f"{form.shape[1]} input channels are no multiple of {spec.tile[1]}")
        if spec.scale not in ("BF16", "F16"):
            reasons.append(f"scales are BF16 or F16, not {spec.scale}")
        return "; ".join(reasons) or None

    def promise(self, form: PackedForm) -> dict[str, TensorInfo]:
        """See formats/layouts."""
        n, k = form.shape
        scale = TensorInfo(form.spec.scale, (k // form.spec.tile[1], n))
        return {
            "weight": TensorInfo("I8", (n, k // 2)),
            "weight_scale": scale,
            "weight_zeros": scale,
        } | beside.promise_bias(form)

    def pack(self, form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
        """See formats/layouts."""
        from dqconvert.quantizers.tensors import TORCH_DTYPES

        dtype = TORCH_DTYPES[form.spec.scale]
        scale = q.scale.to(dtype).t().contiguous()
        zeros = scale.new_zeros(scale.shape)
        if q.zero is not None:
            zeros = ((MIDDLE - q.zero.float()) * q.scale.float()).to(dtype).t().contiguous()
        codes = q.codes if form.spec.zero_point else q.codes + MIDDLE
        return {
            "weight": _packed(codes),
            "weight_scale": scale,
            "weight_zeros": zeros,
        } | beside.pack_bias(form, q)

    def unpack(self, form: PackedForm, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
        """See formats/layouts. Zero points are what the runtime's offsets amount to: no integers.

        ValueError on an offset where the form has no zero points.
        """
        import torch

        from dqconvert.quantizers.tensors import QuantizedTensor

        codes = _codes(tensors["weight"], signed=False).view(torch.int8)
        scale, zeros = tensors["weight_scale"], tensors["weight_zeros"]
        zero = None
        if form.spec.zero_point:
            zero = MIDDLE - (zeros.float() / scale.float()).t().contiguous()
        elif zeros.numel() and bool((zeros != 0).any()):
            raise ValueError("weight_zeros: not zero, but the layer is said to be symmetric")
        return QuantizedTensor(
            form.spec,
            codes if form.spec.zero_point else codes - MIDDLE,
            scale.t().contiguous(),
            bias=tensors.get("bias"),
            zero=zero,
        )


def rotation_reasons(form: PackedForm) -> list[str]:
    """Why the runtime cannot rotate the input of a layer."""
    k, group = form.shape[1], form.rotation
    if group in ROTATIONS and k % group == 0:
        return []
    if not group:
        return [f"the runtime rotates the input, and {k} channels make no group of 16"]
    return [f"{k} input channels do not divide into rotated groups of {group}"]


def _packed(codes: Tensor) -> Tensor:
    import torch

    from dqconvert.formats.layouts.nibbles import pack_nibbles

    return pack_nibbles(codes).view(torch.int8)


def _codes(packed: Tensor, signed: bool) -> Tensor:
    import torch

    from dqconvert.formats.layouts.nibbles import unpack_nibbles

    return unpack_nibbles(packed, torch.int8 if signed else torch.uint8)
