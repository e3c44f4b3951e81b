"""K-quants with a minimum for each sub-block: w = d · scale · code - dmin · min.

    q2_k   16 bytes  scale | min << 4 of each 16      q4_k    4 bytes  fp16 d, dmin
           64 bytes  codes of 2 bits                         12 bytes  6-bit scales and mins
            4 bytes  fp16 d, dmin                    (q5_k)  32 bytes  codes' fifth bits
                                                            128 bytes  codes' low 4 bits

Blocks have 256 weights, sub-blocks 16 in q2_k and 32 in the others. Without importance
quantize_row_*_K_ref of ggml-quants.c, with it quantize_row_*_K_impl.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dqconvert.quantizers.ggml.plain import packing
from dqconvert.quantizers.ggml.plain.fits import Sweep, affine, unsigned
from dqconvert.quantizers.ggml.plain.lanes import (
    dequantizer,
    divide,
    lanes,
    nearest,
    quantizer,
    root,
    top,
    total,
)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What differs between types.

    size: of a sub-block; ceiling: the largest scale; plain, weighted: the searches without and
    with importance; spread: what importance multiplies grows with the mean square times this;
    spills: a scale past the ceiling is stored all the same, over its neighbours' bits.
    """

    size: int
    ceiling: int
    plain: Sweep
    weighted: Sweep
    spread: int = 2
    spills: bool = True


_Q2 = _Kind(16, 15, Sweep(3, -0.5, 0.1, 15, absolute=True), Sweep(3, -0.9, 0.05, 36), spread=1)
_Q4 = _Kind(32, 63, Sweep(15, -1.0, 0.1, 20), Sweep(15, -0.9, 0.05, 36))
_Q5 = _Kind(32, 63, Sweep(31, -0.5, 0.1, 15), Sweep(31, -0.9, 0.05, 36), spills=False)


def _q2(blocks: Tensor, importance: Tensor | None) -> Tensor:
    codes, scales, mins, ends = _encode(_Q2, blocks, importance)
    packed = packing.join(codes.view(-1, 2, 4, 32), 2).flatten(1)
    return torch.cat((scales | (mins << 4), packed, ends), 1)


def _q4(blocks: Tensor, importance: Tensor | None) -> Tensor:
    codes, scales, mins, ends = _encode(_Q4, blocks, importance)
    packed = packing.join(codes.view(-1, 4, 2, 32), 4).flatten(1)
    return torch.cat((ends, packing.join_six(scales, mins), packed), 1)


def _q5(blocks: Tensor, importance: Tensor | None) -> Tensor:
    codes, scales, mins, ends = _encode(_Q5, blocks, importance)
    fifth = packing.join((codes >> 4).view(-1, 8, 32), 1)
    packed = packing.join((codes & 15).view(-1, 4, 2, 32), 4).flatten(1)
    return torch.cat((ends, packing.join_six(scales, mins), fifth, packed), 1)


def _encode(
    kind: _Kind, blocks: Tensor, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [B, 256], scales and mins [B, sub-blocks], and fp16 d and dmin [B, 4], all uint8.

    Codes are those of the nearest value once the scales are rounded; sub-blocks whose scale
    comes out as zero keep what the search found.
    """
    x = lanes(blocks, kind.size)
    subs = 256 // kind.size
    if importance is None:
        scale, low, found = affine(x, _plain_weights(kind, x), kind.plain)
        scales, d = _rounded(kind, scale.view(-1, subs))
        mins, dmin = _rounded(kind, low.view(-1, subs))
    else:
        weights = _weights(kind, blocks, x, importance)
        scale, low, found = affine(x, weights, kind.weighted)
        both = torch.cat((lanes(scale, subs), lanes(low, subs)), 1)
        gain, levels = unsigned(both, total(weights).view(-1, subs).T.repeat(1, 2), kind.ceiling)
        levels = levels if kind.spills else levels.clamp(max=kind.ceiling)
        (scales, mins), (d, dmin) = levels.T.to(torch.uint8).chunk(2), gain.chunk(2)
    ends = torch.cat((packing.half(d), packing.half(dmin)), 1)
    step, shift = _products(ends, *_stored(kind, scales, mins))
    step, shift = step.flatten(), shift.flatten()
    codes = nearest((x + shift) / step).clamp_(0, kind.plain.levels)
    codes = torch.where(step == 0, found, codes)
    return codes.T.reshape(-1, 256).to(torch.uint8), scales, mins, ends


def _plain_weights(kind: _Kind, x: Tensor) -> Tensor:
    """What errors of [size, lanes] weigh without importance: more where weights are large."""
    if kind.plain.absolute:
        return x.abs()
    return root(total(x * x) / kind.size) + x.abs()


def _weights(kind: _Kind, blocks: Tensor, x: Tensor, importance: Tensor) -> Tensor:
    """The same with importance [B, 256]."""
    variance = total(lanes(blocks * blocks, 256)) * kind.spread / 256
    variance = variance.repeat_interleave(256 // kind.size)
    return lanes(importance, kind.size) * root(variance + x * x)


def _rounded(kind: _Kind, values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [B, n] uint8 of scales or mins, and the step [B] between them."""
    highest = top(values.T)
    inverse = torch.where(highest > 0, divide(kind.ceiling, highest), 0)
    codes = nearest(inverse.unsqueeze(1) * values).remainder_(256)
    return codes.clamp_(max=kind.ceiling).to(torch.uint8), divide(highest, kind.ceiling)


def _stored(kind: _Kind, scales: Tensor, mins: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and mins as a reader finds them, without the bits that did not fit."""
    if kind.ceiling == 15:
        packed = scales | (mins << 4)
        return packed & 15, packed >> 4
    return packing.split_six(packing.join_six(scales, mins))


def _products(ends: Tensor, scales: Tensor, mins: Tensor) -> tuple[Tensor, Tensor]:
    """d · scale and dmin · min [B, n] fp32."""
    d, dmin = packing.halves(ends).split(1, 1)
    return d * scales, dmin * mins


def _decode(ends: Tensor, scales: Tensor, mins: Tensor, codes: Tensor) -> Tensor:
    """Weights [B, 256] of codes in natural order."""
    step, shift = _products(ends, scales, mins)
    codes = codes.reshape(*step.shape, -1)
    return (step.unsqueeze(2) * codes - shift.unsqueeze(2)).flatten(1)


def _from_q2(blocks: Tensor) -> Tensor:
    packed, codes, ends = blocks.split((16, 64, 4), 1)
    codes = packing.split(codes.reshape(-1, 2, 32), 2)
    return _decode(ends, packed & 15, packed >> 4, codes)


def _from_q4(blocks: Tensor) -> Tensor:
    ends, six, codes = blocks.split((4, 12, 128), 1)
    return _decode(ends, *packing.split_six(six), packing.split(codes.reshape(-1, 4, 32), 4))


def _from_q5(blocks: Tensor) -> Tensor:
    ends, six, fifth, codes = blocks.split((4, 12, 32, 128), 1)
    low = packing.split(codes.reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    return _decode(ends, *packing.split_six(six), low | (packing.split(fifth, 1) << 4))


QUANTIZERS = {
    "q2_k": quantizer(_q2, 256),
    "q4_k": quantizer(_q4, 256),
    "q5_k": quantizer(_q5, 256),
}

DEQUANTIZERS = {
    "q2_k": dequantizer(_from_q2, 84),
    "q4_k": dequantizer(_from_q4, 144),
    "q5_k": dequantizer(_from_q5, 176),
}
