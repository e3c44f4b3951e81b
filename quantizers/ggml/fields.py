"""What the bytes of a block say of each weight: weight = step · level of its code + offset.

    plane    codes' bits side by side in bytes: n bytes hold 8 / bits runs of n weights, the first
             run in the lowest bits; the high bits of wide codes have a plane of their own
    scales   step and offset of each sub-block from fp16 and integer fields, computed in the order
             of the type's dequantize_row_* (ggml-quants.c; structs block_* of ggml-common.h)

Of the IQ types only those of scalar levels are here: a code of the others stands for several
weights at once.

Laws (tests/test_ggml_gptq.py): joining what was split gives the same bytes; step · level + offset
equals dequantize bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dqconvert.quantizers.ggml.plain import packing
from dqconvert.quantizers.ggml.plain.iq4 import LEVELS
from dqconvert.quantizers.spec import BLOCKS

Scales = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Step and offset [B, sub-blocks] fp32 of blocks [B, bytes], None for an offset of zero."""


@dataclass(frozen=True, slots=True)
class Plane:
    """Bits of the codes: the byte where they start, how many of each code, weights of a run.

    shift: the place of the lowest of them in the code.
    """

    start: int
    bits: int
    run: int
    shift: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """A type. levels: what the codes 0, 1, ... of its bytes stand for."""

    scales: Scales
    planes: tuple[Plane, ...]
    levels: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Fields:
    """step, offset: [N, sub-blocks] fp32, None for an offset of zero. codes: [N, K] uint8, places
    among the rising levels."""

    step: Tensor
    offset: Tensor | None
    codes: Tensor


def levels(code: str, device: torch.device | None = None) -> Tensor:
    """The levels of a type, rising, [levels] fp32."""
    return torch.tensor(LAYOUTS[code].levels, dtype=torch.float32, device=device).sort()[0]


def split(blocks: Tensor, code: str) -> Fields:
    """The fields of rows of blocks [N, row bytes] uint8."""
    layout = LAYOUTS[code]
    weights, size = BLOCKS[code.upper()]
    rows, across = len(blocks), blocks.shape[1] // size
    single = blocks.reshape(-1, size)
    codes = torch.zeros(len(single), weights, dtype=torch.uint8, device=blocks.device)
    for plane in layout.planes:
        packed = single[:, _bytes_of(plane, weights)].unflatten(1, (-1, plane.run))
        codes |= packing.split(packed, plane.bits).view(codes.shape) << plane.shift
    step, offset = layout.scales(single)
    places = _order(layout, blocks.device).argsort().to(torch.uint8)
    return Fields(
        step.reshape(rows, across * step.shape[1]),
        None if offset is None else offset.reshape(rows, across * step.shape[1]),
        places[codes.int()].view(rows, across * weights),
    )


def join(blocks: Tensor, code: str, codes: Tensor) -> Tensor:
    """The same blocks with other codes [N, K] uint8, places among the rising levels."""
    layout = LAYOUTS[code]
    weights, size = BLOCKS[code.upper()]
    single = blocks.reshape(-1, size).clone()
    stored = _order(layout, blocks.device).to(torch.uint8)[codes.reshape(-1, weights).int()]
    for plane in layout.planes:
        runs = stored.unflatten(1, (-1, 8 // plane.bits, plane.run)) >> plane.shift
        packed = packing.join(runs & ((1 << plane.bits) - 1), plane.bits)
        single[:, _bytes_of(plane, weights)] = packed.flatten(1)
    return single.view(blocks.shape)


def _bytes_of(plane: Plane, weights: int) -> slice:
    return slice(plane.start, plane.start + weights * plane.bits // 8)


def _order(layout: Layout, device: torch.device) -> Tensor:
    """The codes of a type's bytes, by rising levels."""
    return torch.tensor(layout.levels, device=device).argsort(stable=True)


def _half(start: int) -> Scales:
    """One fp16 step."""
    return lambda blocks: (packing.halves(blocks[:, start : start + 2]), None)


def _step_and_minimum(blocks: Tensor) -> tuple[Tensor, Tensor]:
    step, minimum = packing.halves(blocks[:, :4]).split(1, 1)
    return step, minimum


def _power_of_two(blocks: Tensor) -> tuple[Tensor, None]:
    """Half of E8M0's power, since levels are doubled."""
    power = blocks[:, :1].int() - 128
    return torch.ldexp(torch.ones_like(power, dtype=torch.float32), power), None


def _products(ends: Tensor, scales: Tensor, minima: Tensor) -> tuple[Tensor, Tensor]:
    gain, gain_of_minima = packing.halves(ends).split(1, 1)
    return gain * scales, -(gain_of_minima * minima)


def _q2_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return _products(blocks[:, 80:84], blocks[:, :16] & 15, blocks[:, :16] >> 4)


def _six_bits(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return _products(blocks[:, :4], *packing.split_six(blocks[:, 4:16]))


def _q3_k(blocks: Tensor) -> tuple[Tensor, None]:
    low = packing.split(blocks[:, 96:104], 4).reshape(-1, 16)
    high = packing.split(blocks[:, 104:108], 2).reshape(-1, 16)
    return packing.halves(blocks[:, 108:110]) * ((low | high << 4).float() - 32), None


def _q6_k(blocks: Tensor) -> tuple[Tensor, None]:
    scales = blocks[:, 192:208].contiguous().view(torch.int8)
    return packing.halves(blocks[:, 208:210]) * scales, None


def _iq4_xs(blocks: Tensor) -> tuple[Tensor, None]:
    high = packing.split(blocks[:, 2:4], 2).transpose(1, 2).reshape(-1, 8)
    low = packing.split(blocks[:, 4:8], 4).transpose(1, 2).reshape(-1, 8)
    return packing.halves(blocks[:, :2]) * ((low | high << 4).float() - 32), None


_ROUND_ZERO = {bits: tuple(range(-(1 << bits - 1), 1 << bits - 1)) for bits in (3, 4, 5, 6)}
_FROM_ZERO = {bits: tuple(range(1 << bits)) for bits in (2, 4, 5)}
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)

LAYOUTS = {
    "q4_0": Layout(_half(0), (Plane(2, 4, 16),), _ROUND_ZERO[4]),
    "q4_1": Layout(_step_and_minimum, (Plane(4, 4, 16),), _FROM_ZERO[4]),
    "q5_0": Layout(_half(0), (Plane(6, 4, 16), Plane(2, 1, 1, shift=4)), _ROUND_ZERO[5]),
    "q5_1": Layout(_step_and_minimum, (Plane(8, 4, 16), Plane(4, 1, 1, shift=4)), _FROM_ZERO[5]),
    "q8_0": Layout(_half(0), (Plane(2, 8, 32),), (*range(128), *range(-128, 0))),
    "q2_k": Layout(_q2_k, (Plane(16, 2, 32),), _FROM_ZERO[2]),
    "q3_k": Layout(_q3_k, (Plane(32, 2, 32), Plane(0, 1, 32, shift=2)), _ROUND_ZERO[3]),
    "q4_k": Layout(_six_bits, (Plane(16, 4, 32),), _FROM_ZERO[4]),
    "q5_k": Layout(_six_bits, (Plane(48, 4, 32), Plane(16, 1, 32, shift=4)), _FROM_ZERO[5]),
    "q6_k": Layout(_q6_k, (Plane(0, 4, 64), Plane(128, 2, 32, shift=4)), _ROUND_ZERO[6]),
    "iq4_nl": Layout(_half(0), (Plane(2, 4, 16),), LEVELS),
    "iq4_xs": Layout(_iq4_xs, (Plane(8, 4, 16),), LEVELS),
    "mxfp4": Layout(_power_of_two, (Plane(1, 4, 16),), _E2M1 + tuple(-x for x in _E2M1)),
}
"""The types whose codes stand for one weight each."""
