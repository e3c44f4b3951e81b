"""Rotation of channel groups by regular Hadamard matrices (ConvRot, arXiv 2512.03673, Theorem 3.3).

All rows of a regular Hadamard matrix have the same sum, so that no channel collects the mean of a
group as the first one of a Walsh matrix does.

Laws (tests/test_hadamard.py): orthogonal, symmetric and so its own inverse; rows add up to 1; a
row's result does not depend on the rows beside it; equal to comfy-kitchen's bit for bit.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))
"""The regular Hadamard matrix of order 4; the larger ones are its Kronecker powers."""

FEWEST = 16
"""Fewer rows than that take another path through a BLAS, which adds in another order."""


@cache
def matrix(group: int) -> Tensor:
    """H [g, g] fp32 with H Hᵀ = 1. ValueError unless g is a power of 4. Not to be written to."""
    if group < 4 or group & (group - 1) or group.bit_length() % 2 == 0:
        raise ValueError(f"a regular Hadamard matrix needs a power of 4, not {group}")
    block = torch.tensor(BLOCK4, dtype=torch.float32) / 2
    h = block
    while h.shape[0] < group:
        h = torch.kron(h, block)
    return h


def rotate(x: Tensor, group: int) -> Tensor:
    """Rotate every g values of the last axis: fp32, shape of x. Group 0 leaves them as they are.

    ValueError where the groups do not divide the axis. For weights of a linear, W H goes with
    inputs x H, because H is its own inverse.
    """
    values = x.to(torch.float32)
    if not group:
        return values
    if x.shape[-1] % group:
        raise ValueError(f"groups of {group} do not divide {x.shape[-1]} channels")
    rows = values.reshape(-1, group)
    count = rows.shape[0]
    if count < FEWEST:
        rows = torch.cat([rows, rows.new_zeros(FEWEST - count, group)])
    # Transposed as comfy-kitchen has it: the same numbers, added in the same order.
    return torch.mm(rows, matrix(group).to(x.device).T)[:count].view(x.shape)
