"""4-bit codes of uneven levels: w = d · level, in iq4_xs d · scale · level.

    iq4_nl   2 bytes  fp16 d                   iq4_xs    2 bytes  fp16 d
            16 bytes  codes of 32 weights                2 bytes  scales' high 2 bits
                                                         4 bytes  scales' low 4 bits
                                                       128 bytes  codes of 8 x 32 weights

Both ways are quantize_row_iq4_nl_impl of ggml-quants.c; without importance, errors weigh the
square of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqconvert.quantizers.ggml.plain import packing
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

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the codes stand for (kvalues_iq4nl of ggml-common.h)."""

_TRIES = 7
_REACH = 254
"""Twice the largest level: halves of integers, where levels meet, lie within."""


def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The nearest code (uint8) and its level (fp32) for 2 x rounded down, from -_REACH on.

    Levels are integers, so that the border between two is a multiple of a half: all numbers
    that share this key share their level.
    """
    levels = torch.tensor(LEVELS)
    keys = torch.arange(-_REACH, _REACH + 1)
    codes = (keys.unsqueeze(1) >= levels[1:] + levels[:-1]).sum(1)
    return codes.to(device, torch.uint8), levels[codes].to(device, torch.float32)


class _Search:
    """Scales of sub-blocks [32, lanes]: least squares for the levels that candidates pick."""

    def __init__(self, x: Tensor, weights: Tensor) -> None:
        self.x, self.weights = x, weights
        self.levels = _tables(x.device)[1]
        self.level = torch.empty(x.numel(), device=x.device)
        self.room = torch.empty_like(x)

    def sums(self, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Of weight · level · x and weight · level² with the levels nearest to x · inverse."""
        key = torch.mul(self.x, inverse * 2, out=self.room).floor_().add_(_REACH)
        key = key.clamp_(0, 2 * _REACH).int().view(-1)
        torch.index_select(self.levels, 0, key, out=self.level)
        level = self.level.view(self.x.shape)
        product = torch.mul(self.weights, level, out=self.room)
        square = total(level.mul_(product))
        return total(product.mul_(self.x)), square

    def scale(self) -> Tensor:
        """The best scales [lanes], 0 where all numbers are tiny."""
        extreme = peak(self.x)
        tiny = extreme.abs() < TINY
        first = divide(1, divide(-extreme, LEVELS[0]))
        across, square = self.sums(torch.where(tiny, 0, first))
        scale = torch.where(square > 0, across / square, 0)
        best = scale * across
        for step in range(-_TRIES, _TRIES + 1):
            trial = torch.where(tiny, 0, divide(step + LEVELS[0], extreme))
            across, square = self.sums(trial)
            better = (square > 0) & (across * across > best * square)
            scale = torch.where(better, across / square, scale)
            best = torch.where(better, scale * across, best)
        return torch.where(tiny, 0, scale)


def _scales(blocks: Tensor, x: Tensor, importance: Tensor | None) -> Tensor:
    """Scales [lanes] of the sub-blocks [32, lanes] of blocks [B, size]."""
    if importance is None:
        return _Search(x, x * x).scale()
    size = blocks.shape[1]
    variance = total(lanes(blocks * blocks, size)) * (2 / size)
    weights = lanes(importance, 32) * root(variance.repeat_interleave(size // 32) + x * x)
    return _Search(x, weights).scale()


def _codes(x: Tensor, steps: Tensor) -> Tensor:
    """Bytes [lanes, 16] of the codes of [32, lanes] nearest to x / step."""
    values = x * torch.where(steps == 0, 0, divide(1, steps))
    key = (values * 2).floor_().add_(_REACH).clamp_(0, 2 * _REACH)
    key = torch.where(values.isnan(), 2 * _REACH, key)
    codes = _tables(x.device)[0][key.int()]
    return packing.join(codes.T.contiguous().view(-1, 2, 16), 4)


def _nl(blocks: Tensor, importance: Tensor | None) -> Tensor:
    x = lanes(blocks, 32)
    scale = _scales(blocks, x, importance)
    return torch.cat((packing.half(scale), _codes(x, scale)), 1)


def _xs(blocks: Tensor, importance: Tensor | None) -> Tensor:
    x = lanes(blocks, 32)
    scale = _scales(blocks, x, importance).view(-1, 8)
    d = -peak(scale.T) * (1 / 32)
    inverse = torch.where(d == 0, 0, divide(1, d))
    levels = nearest(inverse.unsqueeze(1) * scale).clamp_(-32, 31)
    codes = _codes(x, (d.unsqueeze(1) * levels).flatten())
    levels = (levels + 32).to(torch.uint8)
    high = packing.join((levels >> 4).view(-1, 2, 4).transpose(1, 2), 2)
    low = packing.join((levels & 15).view(-1, 4, 2).transpose(1, 2), 4)
    return torch.cat((packing.half(d), high, low, codes.view(-1, 128)), 1)


def _decode(steps: Tensor, packed: Tensor) -> Tensor:
    """Weights [B, 32 n] of steps [B, n] and codes [B, 16 n]."""
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=steps.device)
    codes = packing.split(packed.reshape(*steps.shape, 16), 4).flatten(2)
    return (steps.unsqueeze(2) * levels[codes.int()]).flatten(1)


def _from_nl(blocks: Tensor) -> Tensor:
    end, codes = blocks.split((2, 16), 1)
    return _decode(packing.halves(end), codes)


def _from_xs(blocks: Tensor) -> Tensor:
    end, high, low, codes = blocks.split((2, 2, 4, 128), 1)
    levels = packing.split(low, 4).transpose(1, 2).reshape(-1, 8)
    levels = levels | (packing.split(high, 2).transpose(1, 2).reshape(-1, 8) << 4)
    return _decode(packing.halves(end) * (levels.float() - 32), codes)


QUANTIZERS = {"iq4_nl": quantizer(_nl, 32), "iq4_xs": quantizer(_xs, 256)}

DEQUANTIZERS = {"iq4_nl": dequantizer(_from_nl, 18), "iq4_xs": dequantizer(_from_xs, 136)}
