"""Ternary types and MXFP4: quantize_row_tq1_0_ref, _tq2_0_ref and _mxfp4_ref of ggml-quants.c.

    tq1_0   48 bytes of 5 codes, 4 bytes of 4, fp16 scale    scale · (code - 1)
    tq2_0   64 bytes of 4 codes, fp16 scale                  scale · (code - 1)
    mxfp4   exponent, 16 bytes of 2 codes                    2^(exponent - 128) · value

tq1_0's codes are digits to base 3 of a number that is scaled from 243 to 256; the first weight of
a byte has the highest digit. mxfp4's values are 0, 1, 2, 3, 4, 6, 8, 12 and their negatives.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from dqconvert.quantizers.ggml.plain import packing
from dqconvert.quantizers.ggml.plain.lanes import dequantizer, quantizer
from dqconvert.quantizers.ggml.plain.legacy import inverse

_SPANS = ((160, 32, 5), (80, 16, 5), (16, 4, 4))
"""tq1_0's weights, the bytes that hold them, and digits of each byte that do."""

_VALUES = (0, 1, 2, 3, 4, 6, 8, 12)
_BOUNDS = tuple((low + high) / 2 for low, high in pairwise(_VALUES))


def _codes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Codes 0 .. 2 [B, 256], halves away from the middle, and scales [B]."""
    scale = blocks.abs().amax(1)
    scaled = blocks * inverse(scale).unsqueeze(1)
    return 1 + (scaled >= 0.5).to(torch.uint8) - (scaled <= -0.5).to(torch.uint8), scale


def _tq1(blocks: Tensor, _: Tensor | None) -> Tensor:
    codes, scale = _codes(blocks)
    parts = []
    for span, (_weights, width, digits) in zip(
        codes.split([weights for weights, *_ in _SPANS], 1), _SPANS, strict=True
    ):
        places = 3 ** torch.arange(4, 4 - digits, -1, device=blocks.device)
        numbers = (span.view(-1, digits, width) * places.unsqueeze(1)).sum(1)
        parts.append(((numbers * 256 + 242) // 243).to(torch.uint8))
    return torch.cat((*parts, packing.half(scale)), 1)


def _tq2(blocks: Tensor, _: Tensor | None) -> Tensor:
    codes, scale = _codes(blocks)
    packed = packing.join(codes.view(-1, 2, 4, 32), 2).flatten(1)
    return torch.cat((packed, packing.half(scale)), 1)


def _mxfp4(blocks: Tensor, _: Tensor | None) -> Tensor:
    size = blocks.abs()
    largest = size.amax(1, keepdim=True)
    power = torch.log2(largest.double()).float().floor() + 125  # C's log2f rounds up below powers
    exponent = torch.where(largest > 0, power, 0).to(torch.int32) & 255
    scale = _power(exponent)
    codes = torch.zeros_like(blocks, dtype=torch.uint8)
    for bound, value in zip(_BOUNDS, _VALUES[1:], strict=True):
        codes += (size > scale * bound) & (scale * value).isfinite()
    codes = torch.where((blocks < 0) & (codes > 0), codes | 8, codes)
    return torch.cat((exponent.to(torch.uint8), packing.join(codes.view(-1, 2, 16), 4)), 1)


def _power(exponent: Tensor) -> Tensor:
    """2^(exponent - 128) of int32 numbers 0 .. 255."""
    small, large = 0x200000 << exponent.clamp(max=1), (exponent - 1) << 23
    return torch.where(exponent < 2, small, large).view(torch.float32)


def _tq1_weights(blocks: Tensor) -> Tensor:
    parts = []
    for packed, (_weights, _width, digits) in zip(
        blocks[:, :52].split([width for _, width, _ in _SPANS], 1), _SPANS, strict=True
    ):
        powers = 3 ** torch.arange(digits, device=blocks.device, dtype=torch.int32)
        rest = (packed.unsqueeze(1) * powers.unsqueeze(1)) & 255
        parts.append((rest * 3 >> 8).flatten(1))
    return packing.halves(blocks[:, 52:]) * (torch.cat(parts, 1) - 1)


def _tq2_weights(blocks: Tensor) -> Tensor:
    codes = packing.split(blocks[:, :64].view(-1, 2, 32), 2).flatten(1)
    return packing.halves(blocks[:, 64:]) * (codes.float() - 1)


def _mxfp4_weights(blocks: Tensor) -> Tensor:
    values = torch.tensor((*_VALUES, *(-value for value in _VALUES)), device=blocks.device)
    codes = packing.split(blocks[:, 1:], 4).flatten(1)
    return _power(blocks[:, :1].int()) * values[codes.int()]


QUANTIZERS = {
    "tq1_0": quantizer(_tq1, 256),
    "tq2_0": quantizer(_tq2, 256),
    "mxfp4": quantizer(_mxfp4, 32),
}
DEQUANTIZERS = {
    "tq1_0": dequantizer(_tq1_weights, 54),
    "tq2_0": dequantizer(_tq2_weights, 66),
    "mxfp4": dequantizer(_mxfp4_weights, 17),
}
