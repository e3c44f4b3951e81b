"""ggml's types with a scale for 32 weights; in a block, scale and minimum are fp16.

    q4_0   scale                        16 bytes of codes    scale · (code - 8)
    q4_1   scale, minimum               16 bytes of codes    scale · code + minimum
    q5_0   scale, 4 bytes fifth bits    16 bytes of codes    scale · (code - 16)
    q5_1   scale, minimum, fifth bits   16 bytes of codes    scale · code + minimum
    q8_0   scale                        32 signed codes      scale · code

Without importance the scale comes from a block's extremes (quantize_row_*_ref of ggml-quants.c),
with it from a search (quantize_row_*_impl).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqconvert.quantizers.ggml.plain import packing
from dqconvert.quantizers.ggml.plain.fits import Sweep, affine, symmetric
from dqconvert.quantizers.ggml.plain.lanes import (
    CHUNK,
    Dequantize,
    Quantize,
    dequantizer,
    divide,
    lanes,
    peak,
    quantizer,
    root,
    total,
)

_WEIGHTS = 32
_UNDER_HALF = 0.49999997


def _symmetric(blocks: Tensor, weights: Tensor | None, bits: int) -> Tensor:
    """Blocks of codes around 0; weights: [B, 32], what errors count."""
    x, reach = lanes(blocks, _WEIGHTS), 1 << (bits - 1)
    if weights is None:
        scale = divide(peak(x), -reach)
        slope = inverse(scale)
        offset = torch.where((slope == 0) & (scale != 0), 0.5, reach + 0.5)
        codes = (x * slope + offset).clamp(max=2 * reach - 1)
    else:
        scale, codes = symmetric(x, lanes(weights, _WEIGHTS), reach)
    return torch.cat((packing.half(scale), _pack(codes, bits)), 1)


def _affine(blocks: Tensor, weights: Tensor | None, bits: int) -> Tensor:
    """Blocks of codes from a minimum on."""
    x, top = lanes(blocks, _WEIGHTS), (1 << bits) - 1
    low, high = _range(x)
    if weights is None:
        scale = divide(high - low, top)
        slope = inverse(scale)
        codes = (x - torch.where(slope == 0, 0, low)) * slope + 0.5
        codes = codes.clamp(max=top)
    else:
        x = torch.where((x == 0) & (low == 0), low, x)  # the least zero has a sign
        sweep = Sweep(top, -0.9, 0.05, 36)
        scale, shift, codes = affine(x, lanes(weights, _WEIGHTS), sweep)
        low = -shift
    return torch.cat((packing.half(scale), packing.half(low), _pack(codes, bits)), 1)


def _range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest number of each lane; where zeros of both signs are least, the first."""
    low = high = x[0]
    for row in x[1:]:
        low = torch.where(row < low, row, low)
        high = torch.where(row > high, row, high)
    return low, high


def _eight(blocks: Tensor, _: Tensor | None) -> Tensor:
    scale = divide(blocks.abs().amax(1), 127)
    scaled = blocks * inverse(scale).unsqueeze(1)
    codes = scaled + torch.copysign(scaled.new_full((), _UNDER_HALF), scaled)
    return torch.cat((packing.half(scale), codes.to(torch.int8).view(torch.uint8)), 1)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where that is infinite, as ggml's codes are 0 there."""
    found = divide(1, scale)
    return torch.where(found.isfinite(), found, 0)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Bytes of codes [32, B]; the fraction goes."""
    codes = codes.T.to(torch.uint8)
    low = packing.join((codes & 15).view(-1, 2, 16), 4)
    if bits == 4:
        return low
    fifth = packing.join((codes >> 4).view(-1, 4, 8).transpose(1, 2), 1)
    return torch.cat((fifth, low), 1)


def _unpack(packed: Tensor) -> Tensor:
    """Codes [B, 32] of 16 bytes, or of 20 with fifth bits."""
    codes = packing.split(packed[:, -16:], 4).flatten(1)
    if packed.shape[1] == 16:
        return codes
    fifth = packing.split(packed[:, :4], 1).transpose(1, 2).flatten(1)
    return codes | (fifth << 4)


def _symmetric_weights(blocks: Tensor, bits: int) -> Tensor:
    return packing.halves(blocks[:, :2]) * (_unpack(blocks[:, 2:]).float() - (1 << (bits - 1)))


def _affine_weights(blocks: Tensor, _: int) -> Tensor:
    ends = packing.halves(blocks[:, :4])
    return ends[:, :1] * _unpack(blocks[:, 4:]) + ends[:, 1:]


def _eight_weights(blocks: Tensor) -> Tensor:
    return packing.halves(blocks[:, :2]) * blocks[:, 2:].view(torch.int8)


def _two_ways(kernel: Quantize) -> Quantize:
    """A kernel over blocks as one over rows, whose importance becomes what errors count."""
    over_rows = quantizer(kernel, _WEIGHTS)

    def quantize(rows: Tensor, importance: Tensor | None) -> Tensor:
        if importance is None:
            return over_rows(rows, None)
        some = max(1, CHUNK.get(rows.device.type, CHUNK["cpu"]) // rows.shape[1])
        return torch.cat([over_rows(part, _count(part, importance)) for part in rows.split(some)])

    return quantize


def _count(rows: Tensor, importance: Tensor) -> Tensor:
    """What errors count [N, K]: more where weights are large, and as inputs matter."""
    squares = rows * rows
    mean = divide(total(squares.T.contiguous()), rows.shape[1])
    return importance * root(mean.unsqueeze(1) + squares)


def _quantizers() -> dict[str, Quantize]:
    def symmetric_way(bits: int) -> Quantize:
        return _two_ways(lambda blocks, weights: _symmetric(blocks, weights, bits))

    def affine_way(bits: int) -> Quantize:
        return _two_ways(lambda blocks, weights: _affine(blocks, weights, bits))

    return {
        "q4_0": symmetric_way(4),
        "q4_1": affine_way(4),
        "q5_0": symmetric_way(5),
        "q5_1": affine_way(5),
        "q8_0": quantizer(_eight, _WEIGHTS),
    }


def _dequantizers() -> dict[str, Dequantize]:
    return {
        "q4_0": dequantizer(lambda blocks: _symmetric_weights(blocks, 4), 18),
        "q4_1": dequantizer(lambda blocks: _affine_weights(blocks, 4), 20),
        "q5_0": dequantizer(lambda blocks: _symmetric_weights(blocks, 5), 22),
        "q5_1": dequantizer(lambda blocks: _affine_weights(blocks, 5), 24),
        "q8_0": dequantizer(_eight_weights, 34),
    }


QUANTIZERS = _quantizers()
DEQUANTIZERS = _dequantizers()
