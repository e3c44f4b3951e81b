"""Weights as bitsandbytes stores them: four bits in blocks of the flattened weight, int8 rows.

    NF4     <layer>.weight U8 [N·K/2, 1]            even element high
            <layer>.weight.absmax F32 [N·K/64]      0 where a block holds zeros alone
            <layer>.weight.quant_map F32 [16]       what the codes stand for
            <layer>.weight.quant_state.bitsandbytes__nf4 U8 [bytes]     JSON, filled up with spaces
    FP4     the same with another map, and bitsandbytes__fp4
    double  absmax U8 [N·K/64], nested_absmax F32 [ceil(N·K/64/256)], nested_quant_map F32 [256]
            absmax = nested_quant_map[code] · nested_absmax[block/256] + nested_offset
    int8    <layer>.weight I8 [N, K]    <layer>.SCB F32 [N], 127 scales
            <layer>.weight_format U8 []     0
    all     <layer>.bias

We write NF4 in blocks of 64 that lie in rows. Files of others have blocks of 32 to 4096, which
go on in the next row where they do not divide a row, and end before they are full.

The second quantization takes the mean of all absmax away (nested_offset, in the JSON) and rounds
the rest to the nearest of 256 values of a dynamic exponent (arXiv 1511.04561): its loss is part of
the format. A scale comes back from SCB within one unit in its last place, exactly where it was a
maximum divided by 127.

Source: bitsandbytes/functional.py (QuantState.as_dict, create_dynamic_map), nn/modules.py
(Linear8bitLt), backends/default/ops.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import TYPE_CHECKING, Any

from dqconvert.formats.form import PackedForm
from dqconvert.formats.layouts import beside
from dqconvert.formats.words import STATE as STATES
from dqconvert.quantizers.spec import ALL, CODES, NF4_LEVELS, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from dqconvert.quantizers.tensors import QuantizedTensor

BLOCK, NESTED = 64, 256
"""Weights that share an absmax, and absmax that share a nested one."""

ZERO_CODE = NF4_LEVELS.index(0.0)
STATE = f"{STATES}nf4"
FLOAT_WIDTH = 24
"""Characters of the longest double that JSON may have to hold."""


@dataclass(frozen=True, slots=True)
class Nf4:
    """A Layout; also of FP4, and of blocks of other sizes, which are read alone.

    double: absmax is quantized as well.
    """

    double: bool = False

    def problem(self, form: PackedForm) -> str | None:
        """See formats/layouts."""
        reasons = beside.surplus(form)
        spec = form.spec
        if (spec.code, spec.tile, spec.scale) != ("nf4", (1, BLOCK), "F32"):
            reasons.append(f"weights are nf4 in blocks of {BLOCK} with F32 scales, not {spec.code}")
        if form.shape[1] % BLOCK:
            reasons.append(f"{form.shape[1]} columns do not make blocks of {BLOCK}")
        return "; ".join(reasons) or None

    def promise(self, form: PackedForm) -> dict[str, TensorInfo]:
        """See formats/layouts."""
        count = form.shape[0] * form.shape[1]
        blocks = -(-count // form.spec.tile[1])
        infos = {
            "weight": TensorInfo("U8", (-(-count // 2), 1)),
            "weight.absmax": TensorInfo("U8" if self.double else "F32", (blocks,)),
            "weight.quant_map": TensorInfo("F32", (16,)),
            state_of(form.spec.code): TensorInfo("U8", (len(self.state(form, 0.0)),)),
        }
        if self.double:
            infos["weight.nested_absmax"] = TensorInfo("F32", (-(-blocks // NESTED),))
            infos["weight.nested_quant_map"] = TensorInfo("F32", (256,))
        return infos | beside.promise_bias(form)

    def state(self, form: PackedForm, offset: float) -> bytes:
        """What the JSON says of a layer; its length does not depend on the offset."""
        said: dict[str, Any] = {
            "quant_type": form.spec.code,
            "blocksize": form.spec.tile[1],
            "dtype": "bfloat16",
            "shape": list(form.shape),
        }
        if self.double:
            said |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": 0}
        width = len(json.dumps(said)) + (FLOAT_WIDTH if self.double else 0)
        if self.double:
            said["nested_offset"] = offset
        return json.dumps(said).ljust(width).encode()

    def pack(self, form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
        """See formats/layouts."""
        import torch

        codes = q.codes.contiguous().view(torch.uint8).view(-1, 2)
        tensors = {
            "weight": (codes[:, :1] << 4) | codes[:, 1:],
            "weight.quant_map": torch.tensor(NF4_LEVELS),
        }
        zeros = (q.codes.view(-1, BLOCK) == ZERO_CODE).all(1)
        absmax = q.scale.flatten().masked_fill(zeros, 0.0)
        offset = 0.0
        if self.double:
            shift = absmax.mean()
            offset = shift.item() if len(absmax) else 0.0
            tensors |= _nested(absmax - shift)
        else:
            tensors["weight.absmax"] = absmax
        tensors[STATE] = torch.frombuffer(bytearray(self.state(form, offset)), dtype=torch.uint8)
        return tensors | beside.pack_bias(form, q)

    def unpack(self, form: PackedForm, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
        """See formats/layouts. SourceError where the JSON or the map says something else."""
        import torch

        from dqconvert.quantizers.errors import SourceError
        from dqconvert.quantizers.tensors import QuantizedTensor

        state, block = state_of(form.spec.code), form.spec.tile[1]
        said = _said(state, tensors[state])
        needed = {"quant_type": form.spec.code, "blocksize": block, "shape": [*form.shape]}
        for key, need in needed.items():
            if said.get(key) != need:
                raise SourceError(f"{state}: {key} is {said.get(key)}, the tensors say {need}")
        packed = tensors["weight"].reshape(-1, 1)
        count = form.shape[0] * form.shape[1]
        codes = torch.cat((packed >> 4, packed & 15), dim=1).view(-1)[:count].view(form.shape)
        absmax = tensors["weight.absmax"]
        if self.double:
            absmax = _doubled(state, said, tensors)
        scale = torch.where(absmax == 0, 1.0, absmax.float())
        own = gcd(block, form.shape[1])  # of a row, in which nothing ends
        scale = scale.repeat_interleave(block // own)[: count // own]
        spec = replace(form.spec, tile=(1, own), ragged=False)
        return QuantizedTensor(
            spec=spec,
            codes=_ranked(form.spec.code, codes, tensors["weight.quant_map"]),
            scale=scale.view(spec.grid(form.shape)),
            bias=tensors.get("bias"),
        )


def state_of(code: str) -> str:
    """The tensor that says a weight's shape."""
    return f"{STATES}{code}"


def _said(name: str, state: Tensor) -> dict[str, Any]:
    from dqconvert.quantizers.errors import SourceError

    try:
        return {**json.loads(bytes(state.tolist()))}
    except (ValueError, TypeError) as error:
        raise SourceError(f"{name}: cannot be read ({error!r})") from error


def _ranked(code: str, codes: Tensor, found: Tensor) -> Tensor:
    """Codes of a file as places among the levels of our code. SourceError on other levels."""
    import torch

    from dqconvert.quantizers.errors import SourceError

    levels, found = torch.tensor(CODES[code].levels), found.float().flatten().cpu()
    near = (found[:, None] - levels).abs().argmin(1)
    if len(found) != 16 or not torch.allclose(found, levels[near]):
        raise SourceError(f"weight.quant_map: found other values than those of {code.upper()}")
    if torch.equal(near, torch.arange(16)):
        return codes
    return near.to(torch.uint8)[codes.int()]


def _doubled(state: str, said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """Absmax [blocks] from their codes."""
    from dqconvert.quantizers.errors import SourceError

    try:
        offset, size = float(said["nested_offset"]), int(said.get("nested_blocksize", NESTED))
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(f"{state}: cannot be read ({error!r})") from error
    table = tensors["weight.nested_quant_map"].float()
    codes = tensors["weight.absmax"]
    steps = tensors["weight.nested_absmax"].float().repeat_interleave(size)
    if len(steps) < len(codes):
        raise SourceError(f"{state}: blocks of {size} need more than the {len(steps)} absmax")
    return table[codes.int()] * steps[: len(codes)] + offset


def dynamic_map() -> Tensor:
    """The 256 values of bitsandbytes' signed dynamic 8-bit code, in rising order: fp32.

    For each power of ten 10^-6 .. 1 the midpoints of 1, 2, 4 .. 64 equal steps between 0.1 and 1,
    of both signs; 0; 1.
    """
    import torch

    found = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = ((edges[:-1] + edges[1:]) / 2.0 * 10.0 ** (i - 6)).tolist()
        found += [*middles, *(-middle for middle in middles)]
    return torch.tensor(sorted(found))


def _nested(rest: Tensor) -> dict[str, Tensor]:
    """Absmax without their mean, [blocks], in 8 bit."""
    import torch

    table = dynamic_map().to(rest.device)
    groups = torch.nn.functional.pad(rest, (0, -len(rest) % NESTED)).view(-1, NESTED)
    top = groups.abs().amax(1)
    unit = (groups * (1.0 / top.clamp(min=1e-38))[:, None]).clamp_(-1, 1).flatten()[: len(rest)]
    codes = torch.bucketize(unit, (table[:-1] + table[1:]) / 2, out_int32=True)
    return {
        "weight.absmax": codes.to(torch.uint8),
        "weight.nested_absmax": top,
        "weight.nested_quant_map": table,
    }


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """The Layout of LLM.int8."""

    def problem(self, form: PackedForm) -> str | None:
        """See formats/layouts."""
        reasons = beside.surplus(form)
        if (form.spec.code, form.spec.tile, form.spec.scale) != ("int8", (1, ALL), "F32"):
            reasons.append(f"weights are int8 with an F32 scale per row, not {form.spec.code}")
        return "; ".join(reasons) or None

    def promise(self, form: PackedForm) -> dict[str, TensorInfo]:
        """See formats/layouts."""
        return {
            "weight": TensorInfo("I8", form.shape),
            "SCB": TensorInfo("F32", form.shape[:1]),
            "weight_format": TensorInfo("U8", ()),
        } | beside.promise_bias(form)

    def pack(self, form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
        """See formats/layouts."""
        import torch

        return {
            "weight": q.codes.contiguous(),
            "SCB": q.scale.flatten() * 127.0,
            "weight_format": torch.zeros((), dtype=torch.uint8),
        } | beside.pack_bias(form, q)

    def unpack(self, form: PackedForm, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
        """See formats/layouts. ValueError where the weight does not lie in rows."""
        from dqconvert.quantizers.tensors import QuantizedTensor

        if "weight_format" in tensors and bool(tensors["weight_format"].any()):
            raise ValueError("weight_format: not 0, which bitsandbytes calls row")
        return QuantizedTensor(
            spec=form.spec,
            codes=tensors["weight"],
            scale=(tensors["SCB"].float() / 127.0)[:, None],
            bias=tensors.get("bias"),
        )
