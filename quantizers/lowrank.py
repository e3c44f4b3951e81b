"""The low-rank branch of SVDQuant (arXiv 2411.05007, section 4.2).

W diag(s) = L + R with L of rank r in 16 bit and R quantized. At run time the branch reads the
raw input, so its down projection is divided by the smooth vector once and for all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqconvert.quantizers.tensors import LowRank

OVERSAMPLING = 10
"""Extra directions of the randomized SVD; with 4 iterations the residual is within 0.1 % of the
exact truncation's."""


def truncate(weight: Tensor, rank: int, iterations: int = 4) -> tuple[Tensor, Tensor]:
    """Best rank-r factors (up [N, r], down [r, K]) of a weight [N, K] fp32, by randomized SVD.

    Reproducible in any thread: the random start is always the same, and its generator is not
    torch's global one (which rules out torch.svd_lowrank). Ranks beyond the weight's own are zero.
    """
    width = min(rank + OVERSAMPLING, *weight.shape)
    start = torch.randn(weight.shape[1], width, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(weight @ start.to(weight.device)).Q
    for _ in range(iterations):  # Halko et al., arXiv 0909.4061, algorithm 4.4
        basis = torch.linalg.qr(weight.T @ basis).Q
        basis = torch.linalg.qr(weight @ basis).Q
    u, s, vh = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    up, down = (basis @ (u * s))[:, :rank], vh[:rank]
    missing = rank - up.shape[1]
    if missing > 0:
        up = torch.nn.functional.pad(up, (0, missing))
        down = torch.nn.functional.pad(down, (0, 0, 0, missing))
    return up, down


def branch(weight: Tensor, rank: int, smooth: Tensor, iterations: int = 4) -> LowRank:
    """The 16-bit branch that a file will hold for a smoothed weight [N, K] fp32.

    smooth: [K]; down comes out divided by it.
    """
    up, down = truncate(weight, rank, iterations)
    return LowRank(down=(down / smooth).bfloat16(), up=up.bfloat16())


def product(lowrank: LowRank) -> Tensor:
    """up down, [N, K] fp32, in the basis of the raw input."""
    return lowrank.up.float() @ lowrank.down.float()
