"""Arithmetic on sub-blocks that stand side by side.

Values are [positions, lanes]: row i holds number i of every sub-block, so that one operation takes
a step for all of them while each adds its own numbers in order. Division and rounding are IEEE
754's on the processor, where torch alone is not enough: it multiplies by the reciprocal of a
Python number's divisor, and its sums and its fp32 square roots are not the sequential ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Numbers that are worked on at once: enough that calls cost little, few enough that memory is
bounded and a processor's caches hold most of it."""

TINY = 1e-15
"""Sub-blocks whose numbers are all smaller count as zero (GROUP_MAX_EPS of ggml-quants.c)."""

_MAGIC = 12582912.0

Quantize = Callable[[Tensor, Tensor | None], Tensor]
Dequantize = Callable[[Tensor], Tensor]


def quantizer(kernel: Quantize, size: int) -> Quantize:
    """A kernel over blocks [B, size] and the importance of their weights, as one over rows."""

    def quantize(rows: Tensor, importance: Tensor | None) -> Tensor:
        blocks = rows.reshape(-1, size)
        period = None if importance is None else importance.reshape(-1, size)
        parts = []
        for start, part in zip(*_chunks(blocks), strict=True):
            if period is None:
                parts.append(kernel(part, None))
                continue
            columns = torch.arange(start, start + len(part), device=rows.device) % len(period)
            parts.append(kernel(part, period[columns]))
        return torch.cat(parts).reshape(len(rows), -1)

    return quantize


def dequantizer(kernel: Dequantize, size: int) -> Dequantize:
    """A kernel over blocks [B, size] of bytes, as one over rows."""

    def dequantize(rows: Tensor) -> Tensor:
        _, parts = _chunks(rows.reshape(-1, size))
        return torch.cat([kernel(part) for part in parts]).reshape(len(rows), -1)

    return dequantize


def _chunks(blocks: Tensor) -> tuple[range, tuple[Tensor, ...]]:
    """Where the chunks of [B, size] begin, and the chunks."""
    step = max(1, CHUNK.get(blocks.device.type, CHUNK["cpu"]) // blocks.shape[1])
    return range(0, len(blocks), step), blocks.split(step)


def lanes(blocks: Tensor, size: int) -> Tensor:
    """Numbers [...] as [size, lanes]: sub-blocks of neighbours become lanes."""
    return blocks.reshape(-1, size).T.contiguous()


def total(values: Tensor) -> Tensor:
    """Sums [...] of [positions, ...], added from zero in order."""
    if values.device.type == "cpu" and values[0].numel() > 1:  # else numpy adds in pairs
        with np.errstate(all="ignore"):
            return torch.from_numpy(np.add.reduce(values.numpy(), axis=0, initial=0.0))
    found = torch.zeros_like(values[0])
    for row in values:
        found += row
    return found


def peak(values: Tensor) -> Tensor:
    """The first number of greatest magnitude [lanes] of [positions, lanes]; 0 where all are NaN."""
    found = torch.zeros_like(values[0])
    for row in values:
        found = torch.where(row.abs() > found.abs(), row, found)
    return found


def top(values: Tensor) -> Tensor:
    """The greatest number [lanes] of [positions, lanes], at least 0."""
    found = torch.zeros_like(values[0])
    for row in values:
        found = torch.where(row > found, row, found)
    return found


def divide(number: float | Tensor, by: float | Tensor) -> Tensor:
    """A quotient, at least one side of which is a tensor; rounded once."""
    if not isinstance(number, Tensor):
        assert isinstance(by, Tensor)
        return torch.div(by.new_full((), number), by)
    return torch.div(number, by if isinstance(by, Tensor) else number.new_full((), by))


def root(values: Tensor) -> Tensor:
    """fp32 square roots, rounded once."""
    return values.double().sqrt().float()


def nearest(values: Tensor) -> Tensor:
    """Nearest integers, ties to even, as fp32; whatever ggml's nearest_int makes of others.

    The mantissa of value + 1.5 · 2^23: right up to 2^22, 0 for NaN, -2^22 for infinities.
    """
    some = values.nan_to_num(0.0, torch.inf, -torch.inf)  # devices differ in what NaN looks like
    mantissa = (some + _MAGIC).view(torch.int32) & 0x7FFFFF
    return (mantissa - 0x400000).float()


def factors(levels: int, first: float, step: float, steps: Iterable[int], like: Tensor) -> Tensor:
    """The candidates first + step · i + levels of a search, fp32 on the device of another."""
    ladder = torch.tensor(list(steps), dtype=torch.float32)
    return (ladder * step + first + float(levels)).to(like)
