"""Quantized linears cut and joined without touching a code.

Rows are output channels, columns input channels. What stands for several rows or columns at once
(tiles of scales, the scale of a tensor, rotated groups) decides where a linear can be cut, and
which linears can be one. ValueError, with the reason, where only another rounding would help.

Laws (tests/test_slicing.py): the effective weight of a part is that part of the effective weight,
and parts joined again are the whole, codes and scales bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dqconvert.quantizers import forward, rtn
from dqconvert.quantizers.spec import ALL, CODES
from dqconvert.quantizers.tensors import LowRank, QuantizedTensor


def rows(q: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """The linear that gives output channels start .. stop alone."""
    total, tile = q.codes.shape[0], q.spec.tile[0]
    if (start, stop) == (0, total):
        return q
    if tile != ALL and (start % tile or (stop % tile and stop != total)):
        raise ValueError(f"rows {start} to {stop} end inside of a tile of {tile} rows")
    part = forward.take_rows(q, start, stop)
    return replace(part, tensor_scale=_collapsed(part.tensor_scale))


def columns(q: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """The linear that reads input channels start .. stop alone; it has no bias."""
    total, tile = q.codes.shape[1], q.spec.tile[1]
    if CODES[q.spec.code].block:
        raise ValueError("rows of ggml's blocks are not cut")
    if (start, stop) == (0, total):
        return q
    for what, size in (("tile", tile if tile != ALL else 1), ("rotated group", q.rotation or 1)):
        if start % size or (stop % size and stop != total):
            raise ValueError(f"columns {start} to {stop} end inside of a {what} of {size} columns")
    if q.shift:
        raise ValueError("a shifted input is cut by nobody: take the shift out first")
    cut = slice(start, stop)
    grid = slice(None) if tile == ALL else slice(start // tile, -(-stop // tile))
    branch = q.lowrank
    return replace(
        q,
        codes=q.codes[:, cut].contiguous(),
        scale=q.scale[:, grid].contiguous(),
        zero=None if q.zero is None else q.zero[:, grid].contiguous(),
        bias=None,
        smooth=None if q.smooth is None else q.smooth[cut],
        lowrank=None if branch is None else trimmed(replace(branch, down=branch.down[:, cut])),
    )


def join_rows(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """The linear whose outputs are those of all parts, one after the other."""
    first = parts[0]
    if len(parts) == 1:
        return first
    _check_alike(parts)
    tile = first.spec.tile
    if tile[0] not in (1, ALL) and any(len(part.codes) % tile[0] for part in parts[:-1]):
        raise ValueError(f"their rows do not fill tiles of {tile[0]} rows")
    if any(not _equal(part.smooth, first.smooth) for part in parts):
        raise ValueError("they divide the input by different smooth vectors")
    whole = tile[0] == ALL and not first.spec.unit
    if whole and any(not _equal(part.scale, first.scale) for part in parts):
        raise ValueError("they have different scales, and the whole has one")
    biases = [part.bias for part in parts]
    bias = None
    if any(one is not None for one in biases):
        bias = torch.cat([_bias(part) for part in parts])
    return replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        scale=first.scale if whole else torch.cat([part.scale for part in parts]),
        zero=None if first.zero is None else torch.cat([_given(part.zero) for part in parts]),
        tensor_scale=_stacked([part.tensor_scale for part in parts], [len(p.codes) for p in parts]),
        bias=bias,
        lowrank=_stacked_branches([part.lowrank for part in parts]),
    )


def join_columns(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """The linear whose outputs are the sums of those of all parts, which read its input in turn.

    Where parts have tensor scales of their own, the smooth vectors take up the difference.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    _check_alike(parts)
    tile = first.spec.tile[1]
    for what, size in (("tiles", tile if tile != ALL else 1), ("rotated groups", first.rotation)):
        if size and any(part.codes.shape[1] % size for part in parts[:-1]):
            raise ValueError(f"their columns do not fill {what} of {size} columns")
    if tile == ALL and any(not _equal(part.scale, first.scale) for part in parts):
        raise ValueError("they have different scales, and rows of the whole have one each")
    smooths = _under_one_scale(parts)
    scales = first.scale if tile == ALL else torch.cat([part.scale for part in parts], 1)
    zeros = [_given(part.zero) for part in parts if first.zero is not None]
    return replace(
        first,
        codes=torch.cat([part.codes for part in parts], 1),
        scale=scales,
        zero=torch.cat(zeros, 1) if zeros else None,
        bias=summed_bias(parts),
        smooth=None if smooths is None else torch.cat(smooths),
        lowrank=_summed_branches([part.lowrank for part in parts]),
    )


def summed_bias(parts: Sequence[QuantizedTensor]) -> Tensor | None:
    """The bias [N] of parts that read an input in turn: as it is where only one is not zero."""
    biases = [part.bias for part in parts if part.bias is not None]
    alive = [bias for bias in biases if bool(bias.any())]
    if len(alive) < 2:
        return next(iter([*alive, *biases]), None)
    return torch.stack([bias.float() for bias in alive]).sum(0)


def shifted(q: QuantizedTensor, shift: float) -> QuantizedTensor:
    """The same linear behind another shift of its input: its bias makes up for it, in fp32."""
    if shift == q.shift:
        return q
    before = forward.shift_surplus(q)
    after = forward.shift_surplus(replace(q, shift=shift))
    bias = q.codes.new_zeros(len(q.codes), dtype=torch.float32) if q.bias is None else q.bias
    bias = bias.float()
    bias = bias if before is None else bias + before
    return replace(q, shift=shift, bias=bias if after is None else bias - after)


def one_tensor_scale(q: QuantizedTensor, top: Tensor | None = None) -> QuantizedTensor:
    """The same linear with one second-level scale [1], top where it is given.

    Exact, or ValueError: a ratio of two of them must leave every first-level scale in its dtype.
    """
    second = _collapsed(q.tensor_scale)
    if second is None or (second.numel() == 1 and (top is None or torch.equal(second, top))):
        return replace(q, tensor_scale=second)
    top = second.amax().view(1) if top is None else top
    exact = rtn.effective_scale(q.scale, second)
    scale = (exact.double() / top.double()).float().to(q.scale.dtype)
    if not torch.equal(rtn.effective_scale(scale, top), exact):
        raise ValueError(
            "its tensor scales differ, and no scales of blocks can take up the difference exactly"
        )
    return replace(q, scale=scale, tensor_scale=top)


def trimmed(branch: LowRank) -> LowRank:
    """A low-rank branch without the components that give nothing."""
    alive = (branch.down != 0).any(1) & (branch.up != 0).any(0)
    if bool(alive.all()):
        return branch
    return LowRank(branch.down[alive], branch.up[:, alive].contiguous())


def widened(branch: LowRank, rank: int) -> LowRank:
    """A low-rank branch with so many components; the new ones are zeros. Never fewer."""
    missing = rank - len(branch.down)
    if missing < 0:
        raise ValueError(f"a low-rank branch of {len(branch.down)} does not fit a rank of {rank}")
    pad = torch.nn.functional.pad
    return LowRank(pad(branch.down, (0, 0, 0, missing)), pad(branch.up, (0, missing)))


def _check_alike(parts: Sequence[QuantizedTensor]) -> None:
    first = parts[0]
    for part in parts[1:]:
        if part.spec != first.spec or part.codes.dtype != first.codes.dtype:
            raise ValueError("they have different formats")
        if (part.rotation, part.shift) != (first.rotation, first.shift):
            raise ValueError("their inputs are rotated or shifted differently")
        if not _equal(part.codebook, first.codebook):
            raise ValueError("they have different codebooks")
        if not _equal(part.input_scale, first.input_scale):
            raise ValueError("they have different static scales of the input")
        if (part.lowrank is None) != (first.lowrank is None):
            raise ValueError("not all of them have a low-rank branch")


def _under_one_scale(parts: Sequence[QuantizedTensor]) -> list[Tensor] | None:
    """Smooth vectors for parts that are to share the tensor scale of the first."""
    first = parts[0]
    found = []
    for part in parts:
        if (part.smooth is None) != (first.smooth is None):
            raise ValueError("not all of them have a smooth vector")
        smooth = part.smooth
        if not _equal(part.tensor_scale, first.tensor_scale):
            ratio = _given(first.tensor_scale).float() / _given(part.tensor_scale).float()
            if smooth is None or not bool((ratio == ratio[0]).all()):
                raise ValueError("they have different tensor scales")
            smooth = smooth.float() * ratio[0]
        found += [] if smooth is None else [smooth]
    return found or None


def _stacked(scales: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    if scales[0] is None:
        return None
    found = [_given(scale) for scale in scales]
    spread = [one.expand(size) for one, size in zip(found, sizes, strict=True)]
    return _collapsed(torch.cat(spread))


def _stacked_branches(branches: Sequence[LowRank | None]) -> LowRank | None:
    """One branch for stacked outputs: the shared one, else all of them side by side."""
    found = [trimmed(branch) for branch in branches if branch is not None]
    if not found:
        return None
    if all(_equal(one.down, found[0].down) for one in found):
        return LowRank(found[0].down, torch.cat([one.up for one in found]))
    return LowRank(torch.cat([one.down for one in found]), _diagonal([one.up for one in found]))


def _summed_branches(branches: Sequence[LowRank | None]) -> LowRank | None:
    """One branch for inputs side by side: the shared one, else all of them, one after another."""
    found = [trimmed(branch) for branch in branches if branch is not None]
    if not found:
        return None
    if all(_equal(one.up, found[0].up) for one in found):
        return LowRank(torch.cat([one.down for one in found], 1), found[0].up)
    return LowRank(_diagonal([one.down for one in found]), torch.cat([o.up for o in found], 1))


def _diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """Blocks along the diagonal, zeros elsewhere."""
    shape = sum(len(block) for block in blocks), sum(block.shape[1] for block in blocks)
    whole, row, column = blocks[0].new_zeros(shape), 0, 0
    for block in blocks:
        whole[row : row + len(block), column : column + block.shape[1]] = block
        row, column = row + len(block), column + block.shape[1]
    return whole


def _collapsed(scale: Tensor | None) -> Tensor | None:
    """One value [1] where all are the same."""
    if scale is None or scale.numel() < 2 or not bool((scale == scale[0]).all()):
        return scale
    return scale[:1].clone()


def _bias(q: QuantizedTensor) -> Tensor:
    return q.codes.new_zeros(len(q.codes), dtype=torch.float32) if q.bias is None else q.bias


def _equal(one: Tensor | None, two: Tensor | None) -> bool:
    if one is None or two is None:
        return one is two
    return one.shape == two.shape and bool((one == two).all() if one.numel() else True)


def _given(value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError("not all of them have the same kinds of scales")
    return value
