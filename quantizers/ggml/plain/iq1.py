"""IQ1_S and IQ1_M: points of 8 levels out of -1, 0, 1, all of them ⅛ higher or lower.

    iq1_s     2 bytes  fp16 d                      iq1_m    32 bytes  points' low 8 bits
             32 bytes  points' low 8 bits                   16 bytes  2 x high 3 bits, shift sign
             16 bytes  8 x 4 points' high 3 bits,            8 bytes  4 x 4 scales of 3 bits, then
                       scale of 3 bits, shift sign                    4 bits of fp16 d

w = d (2 scale + 1) · (level ± ⅛): quantize_row_iq1_*_impl and dequantize_row_iq1_* of
ggml-quants.c. Shifts are those of 32 weights in iq1_s, which has no way without importance, and of
8 in iq1_m. The levels that suit weights best are sought in all ways to cut their ascending order
into three parts, then moved to points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dqconvert.quantizers.ggml.plain.codebook import Codebook, codebook
from dqconvert.quantizers.ggml.plain.cuts import Cut, cut_by_eights, cut_together
from dqconvert.quantizers.ggml.plain.lanes import (
    dequantizer,
    divide,
    lanes,
    nearest,
    quantizer,
    total,
)
from dqconvert.quantizers.ggml.plain.magnitude_search import weigh
from dqconvert.quantizers.ggml.plain.packing import half, halves
from dqconvert.quantizers.ggml.plain.sign_fields import from_little, little

_SHIFT = 0.125


@dataclass(frozen=True, eq=False)
class _Fitted:
    """Sub-blocks side by side: points and shifts [groups, lanes], scales [lanes]."""

    points: Tensor
    shifts: Tensor
    scale: Tensor

    def largest(self, count: int) -> Tensor:
        """The largest scale of each block of count sub-blocks [n]."""
        return self.scale.view(-1, count).amax(1)

    def codes(self, count: int) -> Tensor:
        """The scales in 3 bits [n, count] int32."""
        largest = self.largest(count)[:, None]
        inverse = divide(1, divide(largest, 15))
        found = nearest((inverse * self.scale.view(-1, count) - 1) * 0.5).clamp(0, 7)
        return torch.where(largest > 0, found, 0).int()


def _fit(x: Tensor, weight: Tensor, cut: Cut, book: Codebook) -> _Fitted:
    """Points for levels [count, lanes], and scales for those where one was moved.

    Levels of a scale below 0 are taken the other way round.
    """
    below = cut.scale < 0
    levels = torch.where(below, -cut.levels, cut.levels)
    shifts = torch.where(below, -cut.shifts, cut.shifts) * _SHIFT
    scale = cut.scale.abs()
    groups = len(x) // 8
    codes = book.codes((levels + 1).unflatten(0, (groups, 8)))
    x8, weight8 = (of.unflatten(0, (groups, 8)).transpose(0, 1).flatten(1) for of in (x, weight))
    scales = scale.expand(groups, -1).flatten()
    points = book.choose(codes.flatten(), x8, weight8, scales, shifts.flatten())
    moved = (book.index.index_select(0, codes.flatten()) < 0).view(codes.shape).any(0)
    factors = book.factors.index_select(1, points).view(8, groups, -1) + shifts
    factors = factors.transpose(0, 1).flatten(0, 1)
    xq, qq = total(weight * factors * x), total(weight * factors * factors)
    scale = torch.where(moved & (xq > 0) & (qq > 0), xq / qq, scale)
    points = torch.where(cut.found, points.view(codes.shape), 0)
    return _Fitted(points, shifts, torch.where(cut.found, scale, 0))


def _pack_s(blocks: Tensor, importance: Tensor | None) -> Tensor:
    x, weight = lanes(blocks, 32), lanes(weigh(blocks, importance), 32)
    cut = cut_together(x, weight, 1e-12)
    found = _fit(x, weight, cut, codebook("iq1_s", blocks.device))
    points = found.points.T.reshape(len(blocks), 8, 4)
    minus = torch.where(cut.found, found.shifts[0] < 0, False).view(-1, 8)
    largest = found.largest(8)
    top = found.codes(8) | (minus & (largest > 0)[:, None]).int() << 3
    high = ((points >> 8) << torch.arange(0, 12, 3, device=blocks.device)).sum(-1)
    low = (points & 255).to(torch.uint8).flatten(1)
    return torch.cat([half(divide(largest, 15) * 1.125), low, little(high | top << 12, 2)], 1)


def _pack_m(blocks: Tensor, importance: Tensor | None) -> Tensor:
    weights = weigh(blocks, importance)
    x, weight = lanes(blocks, 16), lanes(weights, 16)
    book = codebook("iq1_m", blocks.device)
    cut = cut_by_eights(x, weight, 1e-7)
    found = _fit(x, weight, cut, book)
    shifts = torch.where(cut.found, found.shifts, _SHIFT)
    points, minus = (of.T.reshape(len(blocks), 32) for of in (found.points, shifts < 0))
    codes, some = found.codes(16), found.largest(16) > 0
    factors = book.factors[:, points] + shifts.T.reshape(len(blocks), 32)
    factors = factors * (2 * codes + 1).repeat_interleave(2, 1)
    step = _step(blocks, weights, factors.permute(1, 2, 0).flatten(1), found.largest(16))
    high = (points >> 8) | (minus & some[:, None]).int() << 3
    scales = (codes.unflatten(1, (4, 4)) << torch.arange(0, 12, 3, device=blocks.device)).sum(-1)
    nibbles = from_little(half(step * 1.1125), 2) >> torch.arange(0, 16, 4, device=blocks.device)
    scales |= torch.where(some[:, None], (nibbles & 15) << 12, 0)
    low = (points & 255).to(torch.uint8)
    pairs = high.view(-1, 16, 2)
    high = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)
    return torch.cat([low, high, little(scales, 2)], 1)


def _step(blocks: Tensor, weights: Tensor, factors: Tensor, largest: Tensor) -> Tensor:
    """What the scales of blocks [n, 256] are multiples of, for what it is multiplied with."""
    weighted = weights * factors
    xq = total((weighted * blocks).T.contiguous())
    qq = total((weighted * factors).T.contiguous())
    return torch.where(qq > 0, xq / qq, divide(largest, 15))


def _weights_s(blocks: Tensor) -> Tensor:
    scale, low, words = blocks.split((2, 32, 16), 1)
    high = from_little(words, 2)
    shifts = torch.where((high >> 15).bool(), -_SHIFT, _SHIFT)
    places = torch.arange(0, 12, 3, device=blocks.device)
    points = low.long() | ((high[..., None] >> places & 7) << 8).flatten(1)
    values = codebook("iq1_s", blocks.device).values[points].view(-1, 8, 32) + shifts[..., None]
    scales = halves(scale) * (2 * (high >> 12 & 7) + 1)
    return (scales[..., None] * values).flatten(1)


def _weights_m(blocks: Tensor) -> Tensor:
    low, high, words = blocks.split((32, 16, 8), 1)
    high = torch.stack((high & 15, high >> 4), -1).flatten(1).int()
    points = low.int() | (high & 7) << 8
    shifts = torch.where((high >> 3).bool(), -_SHIFT, _SHIFT)
    values = codebook("iq1_m", blocks.device).values[points] + shifts[..., None]
    packed = from_little(words, 2)
    places = torch.arange(0, 16, 4, device=blocks.device)
    scale = halves(little(((packed >> 12) << places).sum(-1, keepdim=True), 2))
    codes = (packed[..., None] >> torch.arange(0, 12, 3, device=blocks.device) & 7).flatten(1)
    scales = scale * (2 * codes + 1)
    return (scales[..., None] * values.view(-1, 16, 16)).flatten(1)


QUANTIZERS = {
    "iq1_s": quantizer(_pack_s, 256),
    "iq1_m": quantizer(_pack_m, 256),
}
DEQUANTIZERS = {"iq1_s": dequantizer(_weights_s, 50), "iq1_m": dequantizer(_weights_m, 56)}
