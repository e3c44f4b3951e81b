"""Bit fields of blocks: narrow codes in bytes, fp16 scales, and the 12 bytes of 6-bit scales."""

from __future__ import annotations

import torch
from torch import Tensor


def join(codes: Tensor, bits: int) -> Tensor:
    """Bytes [..., n] of codes [..., 8 / bits, n]: the first of them in the lowest bits."""
    codes = codes.to(torch.uint8).contiguous()
    joined = codes[..., 0, :].clone()
    for place in range(1, codes.shape[-2]):
        joined |= codes[..., place, :] << (place * bits)
    return joined


def split(packed: Tensor, bits: int) -> Tensor:
    """Codes [..., 8 / bits, n] uint8 of bytes [..., n]."""
    mask = (1 << bits) - 1
    return torch.stack([(packed >> shift) & mask for shift in range(0, 8, bits)], -2)


def half(values: Tensor) -> Tensor:
    """Bytes [B, 2] of values [B], rounded to fp16."""
    return values.half().unsqueeze(1).view(torch.uint8)


def halves(packed: Tensor) -> Tensor:
    """Values [B, n] fp32 of fp16 bytes [B, 2 n]."""
    return packed.contiguous().view(torch.float16).float()


def join_six(scales: Tensor, mins: Tensor) -> Tensor:
    """Twelve bytes [B, 12] of eight scales and eight mins [B, 8] of 6 bits.

    0-3 the first four scales, 4-7 the first four mins, above them the high bits of the others,
    whose low halves are bytes 8-11.
    """
    scales, mins = scales.to(torch.uint8), mins.to(torch.uint8)
    first = torch.cat((scales[:, :4], mins[:, :4]), 1)
    last = torch.cat((scales[:, 4:], mins[:, 4:]), 1)
    low = join((last & 15).view(-1, 2, 4), 4)
    return torch.cat((first | (last >> 4 << 6), low), 1)


def split_six(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and mins [B, 8] uint8 of twelve bytes [B, 12]."""
    low = split(packed[:, 8:], 4).reshape(-1, 8)
    last = low | (packed[:, :8] >> 6 << 4)
    first = packed[:, :8] & 63
    scales = torch.cat((first[:, :4], last[:, :4]), 1)
    return scales, torch.cat((first[:, 4:], last[:, 4:]), 1)
