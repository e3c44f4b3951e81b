"""Four-bit integers in groups, packed eight to an int32: weights of GPTQ and of compressed-tensors.

    GPTQ             <layer>.qweight I32 [K/8, N]             along K
                     <layer>.qzeros  I32 [K/g, N/8]           along N, less the offset
                     <layer>.scales      [K/g, N]
    pack-quantized   <layer>.weight_packed I32 [N, K/8]       along K
                     <layer>.weight_scale      [N, K/g]
                     <layer>.weight_shape  I64 [2]            N, K
                     <layer>.weight_zero_point I32 [N/8, K/g] along N, only with zero points
    both             <layer>.bias                             as it was

w = (nibble - zero) · scale, where nibble is code + 8 and zero is 8 for signed codes. Nibble i of
a word is bits 4i .. 4i + 3. Rows that do not fill a word end in nibbles of 0.

Sources: auto_round_extension/torch/qlinear_torch.py and qlinear_torch_zp.py; compressed_tensors/
compressors/pack_quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dqconvert.formats.form import PackedForm
from dqconvert.formats.layouts import beside
from dqconvert.quantizers.spec import FLOAT_DTYPES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from dqconvert.quantizers.tensors import QuantizedTensor

WORD = 8
"""Codes in an int32."""

MIDDLE = 8
"""What is added to signed codes, and their zero point then."""


@dataclass(frozen=True, slots=True)
class Gptq:
    """offset: what is taken from the stored zero points, 1 in the first version of the format."""

    offset: int = 1

    def problem(self, form: PackedForm) -> str | None:
        """See formats/layouts."""
        reasons = _reasons(form)
        n, k = form.shape
        if n % 32 or k % 32:
            reasons.append(f"needs extents that are multiples of 32; {form.shape} are not")
        if form.spec.scale != "F16":
            reasons.append(f"scales are F16, not {form.spec.scale}")
        return "; ".join(reasons) or None

    def promise(self, form: PackedForm) -> dict[str, TensorInfo]:
        """See formats/layouts."""
        n, k = form.shape
        groups = form.spec.grid(form.shape)[1]
        return {
            "qweight": TensorInfo("I32", (k // WORD, n)),
            "qzeros": TensorInfo("I32", (groups, n // WORD)),
            "scales": TensorInfo(form.spec.scale, (groups, n)),
        } | beside.promise_bias(form)

    def pack(self, form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
        """See formats/layouts. ValueError on a zero point that the offset takes below 0."""
        import torch

        zeros = _stored_zeros(q)
        if zeros is None:
            zeros = torch.full_like(q.scale, MIDDLE, dtype=torch.uint8)
        if zeros.numel() and int(zeros.min()) < self.offset:
            raise ValueError(f"zero points begin at {self.offset}; found {int(zeros.min())}")
        tensors = {
            "qweight": pack_nibbles(_stored_codes(q)).t().contiguous(),
            "qzeros": pack_nibbles((zeros - self.offset).t()),
            "scales": q.scale.t().contiguous(),
        }
        return tensors | beside.pack_bias(form, q)

    def unpack(self, form: PackedForm, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
        """See formats/layouts. ValueError on zero points where the form has none."""
        n, k = form.shape
        nibbles = unpack_nibbles(tensors["qweight"].t(), k)
        zeros = unpack_nibbles(tensors["qzeros"], n).t().contiguous() + self.offset
        if not form.spec.zero_point and bool((zeros != MIDDLE).any()):
            raise ValueError(f"qzeros: not {MIDDLE}, but the layer is said to be symmetric")
        return _result(form, nibbles, tensors["scales"].t().contiguous(), zeros, tensors)


@dataclass(frozen=True, slots=True)
class PackQuantized:
    """The layout of compressed-tensors that is called pack-quantized."""

    def problem(self, form: PackedForm) -> str | None:
        """See formats/layouts."""
        reasons = _reasons(form)
        if form.spec.scale not in FLOAT_DTYPES:
            reasons.append(f"scales are floats of 16 or more bits, not {form.spec.scale}")
        return "; ".join(reasons) or None

    def promise(self, form: PackedForm) -> dict[str, TensorInfo]:
        """See formats/layouts."""
        n, k = form.shape
        groups = form.spec.grid(form.shape)[1]
        infos = {
            "weight_packed": TensorInfo("I32", (n, -(-k // WORD))),
            "weight_scale": TensorInfo(form.spec.scale, (n, groups)),
            "weight_shape": TensorInfo("I64", (2,)),
        }
        if form.spec.zero_point:
            infos["weight_zero_point"] = TensorInfo("I32", (-(-n // WORD), groups))
        return infos | beside.promise_bias(form)

    def pack(self, form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
        """See formats/layouts."""
        import torch

        tensors = {
            "weight_packed": pack_nibbles(_stored_codes(q)),
            "weight_scale": q.scale.contiguous(),
            "weight_shape": torch.tensor(form.shape, dtype=torch.int64),
        }
        zeros = _stored_zeros(q)
        if zeros is not None:
            tensors["weight_zero_point"] = pack_nibbles(zeros.t()).t().contiguous()
        return tensors | beside.pack_bias(form, q)

    def unpack(self, form: PackedForm, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
        """See formats/layouts. ValueError where weight_shape is not the form's."""
        n, k = form.shape
        said = tensors.get("weight_shape")
        if said is not None and said.tolist() != [n, k]:
            raise ValueError(f"weight_shape: says {said.tolist()}, the tensors say {[n, k]}")
        zeros = None
        if form.spec.zero_point:
            zeros = unpack_nibbles(tensors["weight_zero_point"].t(), n).t().contiguous()
        nibbles = unpack_nibbles(tensors["weight_packed"], k)
        return _result(form, nibbles, tensors["weight_scale"], zeros, tensors)


def _reasons(form: PackedForm) -> list[str]:
    spec, reasons = form.spec, beside.surplus(form)
    if spec.code != ("uint4" if spec.zero_point else "int4"):
        reasons.append(f"weights are int4, or uint4 with zero points, not {spec.code}")
    if spec.tile[0] != 1 or spec.tile[1] < WORD or spec.tile[1] % WORD:
        reasons.append(f"groups lie along the rows, in multiples of {WORD}, not {spec.tile}")
    elif form.shape[1] % spec.tile[1]:
        reasons.append(f"{form.shape[1]} columns do not make groups of {spec.tile[1]}")
    return reasons


def _stored_codes(q: QuantizedTensor) -> Tensor:
    """Codes [N, K] as nibbles 0 .. 15, uint8."""
    import torch

    codes = q.codes if q.spec.zero_point else q.codes + MIDDLE
    return codes.view(torch.uint8)


def _stored_zeros(q: QuantizedTensor) -> Tensor | None:
    """Zero points in grid shape, uint8 in 0 .. 15; None for signed codes. ValueError otherwise."""
    import torch

    if q.zero is None:
        return None
    zeros = q.zero.to(torch.uint8)
    if not torch.equal(zeros.float(), q.zero.float()) or bool((zeros > 15).any()):
        raise ValueError("zero points must be integers from 0 to 15")
    return zeros


def _result(
    form: PackedForm,
    nibbles: Tensor,
    scale: Tensor,
    zeros: Tensor | None,
    tensors: Mapping[str, Tensor],
) -> QuantizedTensor:
    import torch

    from dqconvert.quantizers.tensors import QuantizedTensor

    stored = form.spec.zero_point
    return QuantizedTensor(
        spec=form.spec,
        codes=nibbles.view(torch.int8) if stored else nibbles.view(torch.int8) - MIDDLE,
        scale=scale.clone(),
        bias=tensors["bias"] if form.bias else None,
        zero=zeros.float() if stored and zeros is not None else None,
    )


def pack_nibbles(nibbles: Tensor) -> Tensor:
    """uint8 [R, C] of 0 .. 15 to int32 [R, ceil(C/8)], the first nibble lowest."""
    import torch

    rows, columns = nibbles.shape
    words = -(-columns // WORD)
    if columns % WORD:
        nibbles = torch.nn.functional.pad(nibbles, (0, words * WORD - columns))
    pairs = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    return pairs.reshape(-1).view(torch.int32).view(rows, words)


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """int32 [R, ceil(C/8)] to uint8 [R, C]; the inverse of pack_nibbles."""
    import torch

    rows, words = packed.shape
    plain = packed.clone().reshape(-1)  # a view of a file may be unaligned
    pairs = plain.view(torch.uint8).view(rows, words * WORD // 2)
    nibbles = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)
    return nibbles[:, :columns].contiguous()
