"""The search for scales that IQ2 and IQ3 share: quantize_row_iq2_*_impl, .._iq3_*_impl.

A weight is ± scale * (2 level + 1). Each of some steps around largest / (2 base - 1) rounds the
magnitudes to levels, moves them to points of the grid, and fits a scale by least squares; the
step with the least error wins. What it moved is rounded once more with the scale it found, and the
scale is fitted again. 4 bits of scale per sub-block follow, relative to the largest of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dqconvert.quantizers.ggml.plain.codebook import Codebook, codebook
from dqconvert.quantizers.ggml.plain.fits import unsigned
from dqconvert.quantizers.ggml.plain.lanes import divide, factors, lanes, nearest, root, total
from dqconvert.quantizers.ggml.plain.packing import half


@dataclass(frozen=True, slots=True)
class Search:
    """What differs between types.

    code    the grid
    size    weights that share a scale
    steps   how many scales are tried on each side of the middle one, and how far apart they are
    floor   sub-blocks whose largest weight is smaller are 0
    spread  factor of the block's mean square, which importance is smoothed with
    offset  and the factor of that in the weights of errors when there is no importance
    even    whether the number of minus signs is even, so that 7 bits say 8 of them
    whole   whether all groups are rounded again when one was moved, not only those that were
    guess   whether the middle scale comes from a fit without the grid
    """

    code: str
    size: int
    steps: tuple[int, float]
    floor: float
    spread: float = 2.0
    offset: float = 0.0
    even: bool = False
    whole: bool = False
    guess: bool = False

    @property
    def numbers(self) -> int:
        """How many candidates for weights a block has."""
        return 256 * (2 * self.steps[0] + 1)


@dataclass(frozen=True, eq=False)
class Solution:
    """Blocks [n, 256] as numbers that are still to be packed.

    points [n, 256 / dims] int32, signs [n, 32] int32 (a byte of bits per 8 weights), scales
    [n, subs] fp32, largest [n, 1] fp32 of them; filled [n, subs] bool: not taken for 0.
    """

    points: Tensor
    signs: Tensor
    scales: Tensor
    largest: Tensor
    filled: Tensor

    def step(self, factor: float = 1.0) -> Tensor:
        """What scales are multiples of, in fp16 bytes [n, 2]; factor: which ggml finds better."""
        return half(divide(self.largest[:, 0], 31) * factor)

    def codes(self) -> Tensor:
        """The scales in 4 bits [n, subs] int32: step * (2 code + 1)."""
        inverse = divide(1, divide(self.largest, 31))
        found = nearest((inverse * self.scales - 1) * 0.5).clamp(0, 15).int()
        return torch.where(self.largest == 0, 0, found)

    def wiped(self) -> Solution:
        """Blocks without a scale have points and signs of 0 too."""
        blank = self.largest == 0
        points, signs = (torch.where(blank, 0, of) for of in (self.points, self.signs))
        return Solution(points, signs, self.scales, self.largest, self.filled)


@dataclass(frozen=True, eq=False)
class _Lanes:
    """Sub-blocks side by side, [groups, dims, lanes]: magnitudes, and weights of their errors."""

    book: Codebook
    x: Tensor
    weight: Tensor

    def levels(self, inverse: Tensor) -> Tensor:
        """Codes [.., groups, lanes] int32 of what inverse scales [.., lanes] round to."""
        scaled = (inverse[..., None, None, :] * self.x).sub_(1).mul_(0.5)
        return self.book.codes(nearest(scaled).clamp_(0, self.book.base - 1))

    def points(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Points [.., groups, lanes] for codes alike and scales [.., lanes]."""
        x, weight = (of.transpose(0, 1).flatten(1) for of in (self.x, root(self.weight)))
        scales = scale[..., None, :].expand(codes.shape).flatten()
        return self.book.choose(codes.flatten(), x, weight, scales).view(codes.shape)

    def sums(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Σ w x q and Σ w q² [.., lanes]: their ratio is the scale of least error."""
        taken = self.book.factors.index_select(1, points.flatten()).view(-1, *points.shape)
        weighted = self.weight * self.x
        found = taken.new_zeros((2, *points.shape[:-2], points.shape[-1]))
        for group in range(points.shape[-2]):
            for dim, factor in enumerate(taken.select(-2, group)):
                found[0] += weighted[group, dim] * factor
                found[1] += self.weight[group, dim] * factor * factor
        return found[0], found[1]


def solve(search: Search, blocks: Tensor, importance: Tensor | None) -> Solution:
    """Points, signs and scales of blocks [n, 256] fp32, with importance alike or without."""
    book = codebook(search.code, blocks.device)
    weight = weigh(blocks, importance, search.spread, search.offset)
    signs, x = _signs(blocks, weight, search.even)
    subs = _Lanes(book, *(_side_by_side(of, search.size, book.dims) for of in (x, weight)))
    largest = subs.x.flatten(0, 1).amax(0)
    filled = largest >= search.floor
    middle, scale = largest, divide(largest, 2 * book.base - 1)
    if search.guess:
        scale = unsigned(subs.x.flatten(0, 1), subs.weight.flatten(0, 1), book.base + 1)[0]
        middle = scale * book.base
        filled &= middle > 0
    points, moved, scale = _best(search, subs, middle, scale)
    points, scale = _again(subs, points, moved | search.whole, moved.any(0) & (scale > 0), scale)
    return _solution(points, signs, scale, filled)


def _solution(points: Tensor, signs: Tensor, scale: Tensor, filled: Tensor) -> Solution:
    """Lanes as blocks again, with 0 where they are empty and no scale below it.

    points [groups, lanes], signs [n, 32], scale and filled [lanes].
    """
    shape = (len(signs), -1)
    points = torch.where(filled, points, 0).T.reshape(shape)
    scale = torch.where(filled, scale, 0.0).view(shape)
    filled = filled.view(shape)
    signs = signs.view(*scale.shape, -1) ^ (scale < 0)[..., None] * 255
    signs = torch.where(filled[..., None], signs, 0).view(shape)
    scale = scale.abs()
    return Solution(points, signs, scale, scale.amax(1, keepdim=True), filled)


def weigh(
    blocks: Tensor, importance: Tensor | None, spread: float = 2.0, offset: float = 0.0
) -> Tensor:
    """What squared errors of blocks [n, 256] count; spread and offset as in Search."""
    square = blocks * blocks
    if importance is None and not offset:
        return square
    mean = (total(square.T.contiguous()) * spread / blocks.shape[1])[:, None]
    if importance is None:
        return mean * offset + square
    return importance * root(mean + square)


def _signs(blocks: Tensor, weight: Tensor, even: bool) -> tuple[Tensor, Tensor]:
    """Sign bytes [n, 32] int32 and magnitudes [n, 256].

    Where their number has to be even, the weight whose sign costs least gets the wrong one, and
    a magnitude below 0.
    """
    negative = (blocks < 0).unflatten(1, (-1, 8))
    if even:
        costs = (weight * blocks * blocks).unflatten(1, (-1, 8))
        odd = negative.sum(-1, keepdim=True) % 2 == 1
        cheapest = costs.argmin(-1, keepdim=True)
        negative = negative ^ torch.zeros_like(negative).scatter_(-1, cheapest, odd)
    bits: Tensor = negative.int() << torch.arange(8, device=blocks.device, dtype=torch.int32)
    x = torch.where(negative.flatten(1), -blocks, blocks)
    return bits.sum(-1, dtype=torch.int32), x


def _side_by_side(blocks: Tensor, size: int, dims: int) -> Tensor:
    """Sub-blocks of blocks [n, 256] as [groups, dims, lanes]."""
    found: Tensor = lanes(blocks, size).unflatten(0, (-1, dims))
    return found


def _best(
    search: Search, subs: _Lanes, middle: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Points [groups, lanes] of the step with the least error, whether they are moved, the scale.

    A sub-block without weight has no such step: its points are 0, its scale stays as it is.
    """
    top = 2 * subs.book.base - 1
    count, width = search.steps
    steps = factors(top, 0, width, range(-count, count + 1), middle)
    inverse = steps[:, None] / middle
    codes = subs.levels(inverse)
    points = subs.points(codes, divide(1, inverse))
    xq, qq = subs.sums(points)
    ratio = xq / qq
    score, square = ratio * xq, torch.where(qq > 0, xq * xq, -torch.inf)
    best = torch.zeros_like(middle)
    step = torch.full_like(middle, -1, dtype=torch.int64)
    for i in range(len(steps)):
        better = square[i] > best * qq[i]
        scale = torch.where(better, ratio[i], scale)
        best = torch.where(better, score[i], best)
        step = torch.where(better, i, step)
    taken = step.clamp(0).expand(1, *points.shape[1:])
    found = torch.where(step < 0, 0, points.gather(0, taken)[0])
    if search.guess:
        return found, torch.ones_like(found, dtype=torch.bool), scale
    moved = subs.book.index.index_select(0, codes.gather(0, taken).flatten()) < 0
    return found, torch.where(step < 0, search.whole, moved.view(found.shape)), scale


def _again(
    subs: _Lanes, points: Tensor, groups: Tensor, some: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Points and scales once more for some lanes, groups [groups, lanes] of them rounded anew."""
    inverse = divide(1, scale)
    found = subs.points(subs.levels(inverse), scale)
    points = torch.where(groups & some, found, points)
    xq, qq = subs.sums(points)
    return points, torch.where(some & (qq > 0), xq / qq, scale)
