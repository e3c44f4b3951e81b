"""K-quants around zero: w = d · scale · code.

    q3_k   32 bytes  codes' third bits           q6_k  128 bytes  codes' low 4 bits
           64 bytes  codes' low 2 bits                  64 bytes  codes' high 2 bits
           12 bytes  6-bit scales                       16 bytes  int8 scales
            2 bytes  fp16 d                              2 bytes  fp16 d

Blocks have 256 weights, sub-blocks 16; codes are stored from 0 up, q3_k's for -4 .. 3, q6_k's for
-32 .. 31. Without importance quantize_row_*_K_ref of ggml-quants.c, with it quantize_row_*_K_impl.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqconvert.quantizers.ggml.plain import packing
from dqconvert.quantizers.ggml.plain.fits import settled, symmetric
from dqconvert.quantizers.ggml.plain.lanes import (
    TINY,
    dequantizer,
    divide,
    lanes,
    nearest,
    peak,
    quantizer,
    root,
    total,
)


def _q3(blocks: Tensor, importance: Tensor | None) -> Tensor:
    x = lanes(blocks, 16)
    if importance is None:
        scale, found = settled(x, 4)
        scales, d = _q3_scales(scale.view(-1, 16))
    else:
        variance = total(lanes(blocks * blocks, 256)) * 2 / 256
        weights = lanes(importance, 16) * root(variance.repeat_interleave(16) + x * x)
        scale, found = symmetric(x, weights, 4)
        d, levels = symmetric(lanes(scale, 16), lanes(total(weights), 16), 32)
        scales = levels.T
    end = packing.half(d)
    codes = _recode(x, packing.halves(end) * (scales - 32), 4, found)
    return torch.cat(
        (
            packing.join((codes >> 2).view(-1, 8, 32), 1),
            packing.join((codes & 3).view(-1, 2, 4, 32), 2).flatten(1),
            _join_scales(scales.to(torch.uint8)),
            end,
        ),
        1,
    )


def _q6(blocks: Tensor, importance: Tensor | None) -> Tensor:
    x = lanes(blocks, 16)
    scale, found = symmetric(x, x * x if importance is None else lanes(importance, 16), 32)
    scale = scale.view(-1, 16)
    highest = peak(scale.T)
    inverse = divide(-128, highest)
    end = packing.half(divide(1, inverse))
    scales = nearest(inverse.unsqueeze(1) * scale).clamp_(max=127).to(torch.int32).to(torch.int8)
    codes = _recode(x, packing.halves(end) * scales, 32, found)
    halves = codes.view(-1, 2, 2, 64)
    packed = torch.cat(
        (
            packing.join(halves & 15, 4).flatten(1),
            packing.join((codes >> 4).view(-1, 2, 4, 32), 2).flatten(1),
            scales.view(torch.uint8),
            end,
        ),
        1,
    )
    return packed.masked_fill_((highest.abs() < TINY).unsqueeze(1), 0)


def _recode(x: Tensor, steps: Tensor, levels: int, found: Tensor) -> Tensor:
    """Codes [B, 256] uint8 for the rounded steps [B, 16]; as found where a step is zero."""
    steps = steps.flatten()
    codes = nearest(x / steps).clamp_(-levels, levels - 1) + levels
    return torch.where(steps == 0, found, codes).T.reshape(-1, 256).to(torch.uint8)


def _q3_scales(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes 0 .. 63 [B, 16] fp32 of scales, and the step [B] between them."""
    highest = peak(scale.T)
    inverse = divide(-32, highest)
    codes = (nearest(inverse.unsqueeze(1) * scale) + 128).remainder_(256) - 128
    some = highest != 0
    codes = torch.where(some.unsqueeze(1), codes.clamp_(-32, 31) + 32, 0)
    return codes, torch.where(some, divide(1, inverse), 0)


def _join_scales(scales: Tensor) -> Tensor:
    """Twelve bytes [B, 12] of 6-bit scales [B, 16]: low halves of n and n + 8, then high bits."""
    low = packing.join((scales & 15).view(-1, 2, 8), 4)
    return torch.cat((low, packing.join((scales >> 4).view(-1, 4, 4), 2)), 1)


def _from_q3(blocks: Tensor) -> Tensor:
    third, low, packed, end = blocks.split((32, 64, 12, 2), 1)
    scales = packing.split(packed[:, :8], 4).reshape(-1, 16)
    scales = scales | (packing.split(packed[:, 8:], 2).reshape(-1, 16) << 4)
    codes = packing.split(low.reshape(-1, 2, 32), 2).reshape(-1, 8, 32)
    codes = (codes | (packing.split(third, 1) << 2)).view(-1, 16, 16)
    return _decode(end, scales.float() - 32, codes.float() - 4)


def _from_q6(blocks: Tensor) -> Tensor:
    low, high, scales, end = blocks.split((128, 64, 16, 2), 1)
    codes = packing.split(low.reshape(-1, 2, 64), 4).reshape(-1, 16, 16)
    codes = codes | (packing.split(high.reshape(-1, 2, 32), 2).reshape(-1, 16, 16) << 4)
    return _decode(end, scales.contiguous().view(torch.int8).float(), codes.float() - 32)


def _decode(end: Tensor, scales: Tensor, codes: Tensor) -> Tensor:
    """Weights [B, 256] of codes [B, 16, 16] in natural order."""
    return ((packing.halves(end) * scales).unsqueeze(2) * codes).flatten(1)


QUANTIZERS = {"q3_k": quantizer(_q3, 256), "q6_k": quantizer(_q6, 256)}

DEQUANTIZERS = {"q3_k": dequantizer(_from_q3, 110), "q6_k": dequantizer(_from_q6, 210)}
