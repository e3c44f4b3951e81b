"""Codes of four and six bits in whole bytes: each packer beside its inverse.

    nibbles     U8 [N, K/2]     byte j = column 2j | column 2j + 1 << 4, or the other way round
    sixes       U8 [N, 3K/4]    columns a b c d in three bytes, the lowest bits first:
                                a | b << 6,  b >> 2 | c << 4,  c >> 4 | d << 2

Sources: comfy_kitchen/float_utils.py and modelopt NVFP4QTensor for the two orders of nibbles,
LightX2V's mxfp6 kernels for the sixes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_nibbles(codes: Tensor, high_first: bool = False) -> Tensor:
    """int8 or uint8 codes [N, K] to uint8 [N, K/2]; only their low four bits count."""
    pairs = codes.contiguous().view(torch.int16)
    if high_first:
        return (pairs << 4).bitwise_and_(240).bitwise_or_((pairs >> 8) & 15).to(torch.uint8)
    return (pairs & 15).bitwise_or_((pairs >> 4).bitwise_and_(240)).to(torch.uint8)


def unpack_nibbles(packed: Tensor, dtype: torch.dtype, high_first: bool = False) -> Tensor:
    """One byte [N, K/2] to codes [N, K]: int8 extends the sign, uint8 does not."""
    pairs = packed.contiguous().view(dtype)
    codes = torch.empty((*packed.shape, 2), dtype=dtype, device=packed.device)
    codes[..., int(high_first)] = (pairs << 4) >> 4
    codes[..., 1 - int(high_first)] = pairs >> 4
    return codes.view(packed.shape[0], -1)


def pack_sixes(codes: Tensor) -> Tensor:
    """uint8 codes [N, K] in 0 .. 63 to uint8 [N, 3K/4]."""
    a, b, c, d = codes.reshape(codes.shape[0], -1, 4).unbind(-1)
    packed = torch.stack((a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2), dim=-1)
    return packed.view(codes.shape[0], -1)


def unpack_sixes(packed: Tensor) -> Tensor:
    """The inverse of pack_sixes."""
    x, y, z = packed.contiguous().view(torch.uint8).view(packed.shape[0], -1, 3).unbind(-1)
    codes = torch.stack((x, x >> 6 | y << 2, y >> 4 | z << 4, z >> 2), dim=-1)
    return codes.bitwise_and_(63).view(packed.shape[0], -1)
