"""Element codes: rounding values that are already divided by their scale, and what codes stand for.

Integers are held in int8, float8 in torch's own dtypes, smaller floats as sign and magnitude bits
in uint8, codebooks as the index of a level in uint8.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from dqconvert.quantizers.spec import CODES, Code

DTYPES = {
    "e2m1": torch.uint8,
    "e3m2": torch.uint8,
    "nf4": torch.uint8,
    "fp4": torch.uint8,
    "lut4": torch.uint8,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
}


def dtype_of(code: str) -> torch.dtype:
    """What holds a code."""
    return DTYPES.get(code, torch.int8)


def round_to(values: Tensor, code: str, full_range: bool = False) -> Tensor:
    """Round values that are already divided by their scale, in place, to their nearest codes.

    full_range: signed integers reach one further down.
    """
    kind = CODES[code]
    if code == "e2m1":
        return _round_e2m1(values)
    if code == "e3m2":
        return _round_e3m2(values)
    if kind.levels:
        return torch.bucketize(values, _borders(code).to(values.device)).to(torch.uint8)
    low = -kind.maximum - full_range if kind.signed else 0.0
    if not kind.is_float:
        values = values.round_()
    return values.clamp_(low, kind.maximum).to(dtype_of(code))


def decode(codes: Tensor, code: str) -> Tensor:
    """What codes stand for, before any scale: fp32."""
    kind = CODES[code]
    if kind.levels:
        levels = _levels(code).to(codes.device)
        return levels.index_select(0, codes.reshape(-1).int()).view(codes.shape)
    if dtype_of(code) == torch.uint8:
        return _decode_small(codes, kind)
    if code == "e4m3" and _all_numbers(codes):
        # Torch converts float8 one by one. The bits of e4m3, seven places up, are those of an
        # fp16 that is 2^-8 times as large; sign extension has left ones to clear.
        half = (codes.view(torch.int8).to(torch.int16) << 7) & ~(1 << 14)
        return half.view(torch.float16).float().mul_(256.0)
    if code == "e5m2":  # the upper halves of fp16
        half = codes.contiguous().view(torch.uint8).to(torch.int16) << 8
        return half.view(torch.float16).float()
    return codes.float()


def _round_e2m1(values: Tensor) -> Tensor:
    """Nearest e2m1 codes, ties to even. Writes over the values.

    The magnitudes step by 1/2 up to 2, by 1 up to 4, by 2 up to 6; the code counts steps, and
    the smallest count of the three rulers is the right one.
    """
    sign = (values.view(torch.int32) >> 28).bitwise_and_(8).to(torch.uint8)
    m = values.abs_().clamp_(max=6.0)
    steps = (m * 2).round_()
    torch.minimum(steps, m.round().add_(2), out=steps)
    torch.minimum(steps, m.mul_(0.5).round_().add_(4), out=steps)
    return steps.to(torch.uint8).bitwise_or_(sign)


def _round_e3m2(values: Tensor) -> Tensor:
    """Nearest e3m2 codes, ties to even, saturating at 28.

    From 1/4 on, the upper bits of an fp32, rounded, are the code but for the exponent's bias of
    3 instead of 127; below, the code counts steps of 1/16.
    """
    m = values.abs().clamp_(max=28.0)
    bits = m.view(torch.int32)
    upper = (bits + (0xFFFFF + ((bits >> 21) & 1))) >> 21
    code = torch.where(m < 0.25, (m * 16).round_().int(), upper - ((127 - 3) << 2)).to(torch.uint8)
    return code.bitwise_or_(torch.signbit(values).to(torch.uint8) << 5)


def _decode_small(codes: Tensor, kind: Code) -> Tensor:
    """Floats of fewer than 8 bits: fp32.

    Exponent and mantissa, moved to where fp16 has them, are an fp16 that is too small by what
    the biases differ.
    """
    wide, sign = codes.to(torch.int16), 1 << (kind.bits - 1)
    half = (wide & (sign - 1)) << (10 - kind.mantissa)
    half |= (wide & sign) << (16 - kind.bits)
    bias = 2 ** (kind.exponent - 1) - 1
    return half.view(torch.float16).float().mul_(2.0 ** (15 - bias))


@cache
def _levels(code: str) -> Tensor:
    """The levels of a codebook, fp32. Not to be written to."""
    return torch.tensor(CODES[code].levels)


@cache
def _borders(code: str) -> Tensor:
    """Midpoints of a codebook's levels; a value on one goes down. Not to be written to."""
    levels = _levels(code)
    return (levels[1:] + levels[:-1]) / 2


def _all_numbers(codes: Tensor) -> bool:
    """Whether no e4m3 code is NaN."""
    return codes.numel() == 0 or int((codes.view(torch.uint8) & 127).amax()) < 127
