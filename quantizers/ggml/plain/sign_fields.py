"""Signs, scales and words of the IQ types as bits.

A sign byte has a bit for each of 8 weights, set where it is negative. Types that make the number
of minus signs even keep 7 of them.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from dqconvert.quantizers.ggml import grids
from dqconvert.quantizers.ggml.plain.packing import join, split


@cache
def signs(device: torch.device) -> Tensor:
    """The factors 1 and -1 [256, 8] fp32 that sign bytes stand for."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy(1 - 2 * bits.astype(np.float32)).to(device)


@cache
def even_signs(device: torch.device) -> Tensor:
    """The same [128, 8] for 7 bits of them."""
    return signs(device)[torch.from_numpy(grids.signs()).to(device).int()]


def multiply(scales: Tensor, values: Tensor, factors: Tensor) -> Tensor:
    """Weights [n, 256] of scales [n, subs], values [n, points, dims] and signs [n, 32, 8]."""
    scaled = scales[..., None] * values.view(*scales.shape, -1)
    return scaled.flatten(1) * factors.flatten(1)


def nibbles(codes: Tensor) -> Tensor:
    """Bytes [n, subs / 2] uint8 of codes [n, subs] in 4 bits, the first in the lower ones."""
    return join(codes.unflatten(1, (-1, 2)).transpose(1, 2), 4)


def split_nibbles(packed: Tensor) -> Tensor:
    """The opposite, uint8."""
    return split(packed, 4).transpose(1, 2).flatten(1)


def sevens(sign: Tensor, codes: Tensor) -> Tensor:
    """Words [n, 8] int64 of sign bytes [n, 32], 7 bits of each, and codes [n, 8] above them."""
    shifts = torch.arange(0, 28, 7, device=sign.device)
    low: Tensor = (sign & 127).long().unflatten(1, (8, 4)) << shifts
    return low.sum(-1) | codes.long() << 28


def split_sevens(words: Tensor) -> tuple[Tensor, Tensor]:
    """The opposite: signs [n, 32] in 7 bits and codes [n, 8], int64."""
    shifts = torch.arange(0, 28, 7, device=words.device)
    return ((words[..., None] >> shifts) & 127).flatten(1), words >> 28


def little(values: Tensor, count: int) -> Tensor:
    """Unsigned integers [.., n] as bytes [.., n * count] uint8, the lowest first."""
    shifts = torch.arange(0, 8 * count, 8, device=values.device)
    return ((values.long()[..., None] >> shifts) & 255).to(torch.uint8).flatten(-2)


def from_little(packed: Tensor, count: int) -> Tensor:
    """The opposite, int64."""
    shifts = torch.arange(0, 8 * count, 8, device=packed.device)
    parts: Tensor = packed.long().unflatten(-1, (-1, count)) << shifts
    return parts.sum(-1)
