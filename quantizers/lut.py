"""Four-bit codebook weights over an int8 grid: comfy-kitchen's asym_w4a8_int8.

    w = round(clamp(codebook[code] * scale)) * channel, in the rotated basis

with a 16-level codebook per layer, an e4m3 scale per group and an fp32 scale per row. The runtime
multiplies in int8, so what is inside the brackets is an integer of -127 .. 127 and the levels of
each group are known before anything is assigned to them.

The plain mode (`quantize`) gives comfy-kitchen's bytes: the Lloyd-Max levels of a Gaussian, or
k-means where the groups have heavier tails; two alternating least-squares passes on the group
scale; nearest decoded level. Where more than a seventh of a layer is zero, comfy-kitchen's k-means
may leave its levels out of the order that its binary search relies on; here they are sorted.

`search` looks for better scales in the same format, never for a better codebook: refitted levels
lower the error of Gaussian groups by 0.2 %, and then comfy-kitchen's kernel for few rows, which
knows the Gaussian levels alone, has to be left.

Laws (tests/test_lut.py): comfy-kitchen's bytes and its decoder's values; search never has the
larger weighted squared error.

Source: comfy_kitchen/backends/eager/w4a8_int8.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dqconvert.quantizers.errors import DataError
from dqconvert.quantizers.spec import CODES, QuantSpec
from dqconvert.quantizers.tensors import TORCH_DTYPES, QuantizedTensor

GRID = 127
"""Largest integer of the grid that the runtime multiplies in."""

SMALLEST = 1e-8
"""Floor of all scales and divisors."""

PASSES = 2
"""Alternations between codes and group scales."""

SAMPLED_WEIGHTS = 1 << 22
"""Weights, in whole rows, that decide on the codebook."""

TAIL_SAMPLE, TAIL_LIMIT = 1 << 19, -0.1
"""Values whose excess kurtosis is measured, and the most that the Gaussian codebook takes."""

MEANS_SAMPLE, MEANS_ROUNDS = 300_000, 25
"""Values that k-means sees, and its iterations."""

REACH = 3
"""How many e4m3 codes up and down a search tries for the scale of a group."""

CUTS = (1.0, 0.95, 0.9)
"""What a search tries for the scale of a row: below 1, a finer grid at the cost of its ends."""


def quantize(weight: Tensor, spec: QuantSpec, codebook: Tensor | None = None) -> QuantizedTensor:
    """Round a rotated weight [N, K] to its nearest levels, as comfy-kitchen does.

    codebook: [16] rising, otherwise chosen for the layer. tensor_scale is [N]. Raises DataError on
    NaN or infinity, ValueError where the groups do not divide K.
    """
    shape = (weight.shape[0], weight.shape[1])
    grid = spec.grid(shape)
    table = fit_codebook(weight, spec) if codebook is None else codebook.float()
    codes = torch.empty(shape, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(grid, dtype=TORCH_DTYPES[spec.scale], device=weight.device)
    channel = torch.empty(shape[0], device=weight.device)
    for start, stop in spec.row_blocks(shape):
        groups = _grouped(weight[start:stop], spec)
        step, top = _fit_scales(groups, table)
        channel[start:stop] = top
        scale[start:stop] = (step / top[:, None]).to(scale.dtype)
        target = groups.div_(top[:, None, None])
        nearest = assign(target, levels(table, scale[start:stop]))
        codes[start:stop] = nearest.view(stop - start, shape[1])
    return QuantizedTensor(spec, codes, scale, channel, codebook=table)


def search(weight: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> QuantizedTensor:
    """Like quantize, with the scales that err least on the decoded grid.

    importance: [K] weights of the squared error (mean squares of the input). Never worse than
    quantize; a layer with a codebook of its own gives it up where the Gaussian one errs less.
    """
    plain = quantize(weight, spec)
    found, error = _searched(weight, plain, importance)
    gaussian = gaussian_codebook(weight.device)
    if torch.equal(codebook_of(plain), gaussian):
        return found
    usual, usual_error = _searched(weight, quantize(weight, spec, gaussian), importance)
    return usual if usual_error < error else found


def dequantize(q: QuantizedTensor) -> Tensor:
    """The weight that the runtime multiplies with: [N, K] fp32, in the rotated basis."""
    assert q.tensor_scale is not None
    table = codebook_of(q)
    values = torch.empty(q.codes.shape, device=q.codes.device)
    for start, stop in q.spec.row_blocks((q.codes.shape[0], q.codes.shape[1])):
        grid = levels(table, q.scale[start:stop])
        codes = q.codes[start:stop].view(*grid.shape[:2], -1)
        values[start:stop] = _take(grid, codes.long()).view(stop - start, -1)
    return values.mul_(q.tensor_scale[:, None])


def codebook_of(q: QuantizedTensor) -> Tensor:
    """The codebook [16] fp32 of a layer, the Gaussian one where it has none of its own."""
    return gaussian_codebook(q.codes.device) if q.codebook is None else q.codebook.float()


def gaussian_codebook(device: torch.device | None = None) -> Tensor:
    """The Lloyd-Max levels [16] fp32 of Gaussian groups that are divided by their maximum."""
    return torch.tensor(CODES["lut4"].levels, dtype=torch.float32, device=device)


def levels(codebook: Tensor, scale: Tensor) -> Tensor:
    """What each code of a group decodes to: [..., 16] fp32, integers in rising order.

    scale: [...] group scales. A row's scale is still to be multiplied.
    """
    return (scale.float()[..., None] * codebook).round_().clamp_(-GRID, GRID)


def assign(values: Tensor, levels: Tensor) -> Tensor:
    """Nearest of 16 rising levels, of two equally near ones the lower: uint8, shape of values.

    values: [..., G]; levels: [16], or [..., 16] with the same leading axes.
    """
    below = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    above = torch.empty(values.shape, dtype=torch.bool, device=values.device)
    for level in levels.unbind(-1):
        torch.gt(values, level[..., None], out=above)
        below.add_(above.view(torch.uint8))
    high = below.clamp(max=levels.shape[-1] - 1).long()
    low = below.long().sub_(1).clamp_(min=0)
    up = (values - _take(levels, high)).abs_() < (values - _take(levels, low)).abs_()
    return torch.where(up, high, low).to(torch.uint8)


def fit_codebook(weight: Tensor, spec: QuantSpec) -> Tensor:
    """The codebook [16] fp32 of a layer: Gaussian levels, or k-means where tails are heavier.

    Decided by a sample of rows and values that is always the same, so that a layer's bytes do not
    depend on how it is cut into blocks.
    """
    if not weight.numel():
        return gaussian_codebook(weight.device)
    count = max(1, SAMPLED_WEIGHTS // weight.shape[1])
    if weight.shape[0] > count:
        rows = torch.linspace(0, weight.shape[0] - 1, count, device=weight.device).long()
        weight = weight[rows]
    groups = _grouped(weight, spec)
    unit = groups.div_(_tops(groups)).view(-1)
    x = _sampled(unit, TAIL_SAMPLE)
    kurtosis = ((x - x.mean()) / (x.std() + 1e-9)).pow(4).mean() - 3.0
    return gaussian_codebook(weight.device) if kurtosis <= TAIL_LIMIT else _means(unit)


def _means(unit: Tensor) -> Tensor:
    """16 means of scaled weights [M] in rising order, by k-means from their quantiles."""
    x = _sampled(unit, MEANS_SAMPLE)
    count = len(CODES["lut4"].levels)
    means = torch.quantile(x, torch.linspace(0, 1, count, device=x.device))
    for _ in range(MEANS_ROUNDS):
        if bool((means.diff() > 0).all()):
            nearest = assign(x, means)
        else:  # quantiles were equal: the first of them takes all
            nearest = (x - means[:, None]).abs_().argmin(0).to(torch.uint8)
        order = nearest.sort(stable=True).indices
        members = x[order].split(nearest.bincount(minlength=count).tolist())
        means = torch.stack([m.mean() if len(m) else means[i] for i, m in enumerate(members)])
    return means.sort().values


def _fit_scales(groups: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Scales [N, K/G] of groups [N, K/G, G] by least squares, and those of the rows [N].

    Each pass takes the codes as they are, then the scale that suits them best.
    """
    step = _tops(groups)
    chosen = _nearest(groups, step, codebook)
    for _ in range(PASSES):
        fit = (groups * chosen).sum(-1, keepdim=True)
        energy = (chosen * chosen).sum(-1, keepdim=True).clamp_(min=SMALLEST)
        step = fit.div_(energy).clamp_(min=SMALLEST)
        chosen = _nearest(groups, step, codebook)
    top = chosen.mul_(step).abs_().amax((1, 2)).div_(GRID).clamp_(min=SMALLEST)
    return step.squeeze(-1), top


def _nearest(groups: Tensor, step: Tensor, codebook: Tensor) -> Tensor:
    """Level of the codebook that is nearest to each weight divided by its group's scale."""
    return _take(codebook, assign(groups / step, codebook).long())


def _searched(
    weight: Tensor, plain: QuantizedTensor, importance: Tensor | None
) -> tuple[QuantizedTensor, float]:
    """The best row and group scales around those of the plain mode, and their squared error."""
    assert plain.tensor_scale is not None
    spec, table = plain.spec, codebook_of(plain)
    codes, scale, channel = plain.codes.clone(), plain.scale.clone(), plain.tensor_scale.clone()
    total = 0.0
    for start, stop in spec.row_blocks((weight.shape[0], weight.shape[1])):
        groups = _grouped(weight[start:stop], spec)
        gain = torch.ones(1, device=weight.device) if importance is None else importance.float()
        gain = gain.expand(weight.shape[1]).reshape(groups.shape[1:])
        step, row = plain.scale[start:stop], plain.tensor_scale[start:stop]
        best = torch.full_like(row, torch.inf)
        for cut in CUTS:
            top = row * cut
            trial, error = _best_scales(groups / top[:, None, None], step, cut, table, gain)
            error = error.sum(-1) * top * top
            better = error < best
            best = torch.where(better, error, best)
            channel[start:stop] = torch.where(better, top, channel[start:stop])
            scale[start:stop] = _where(better[:, None], trial, scale[start:stop])
        total += float(best.sum())
        target = groups.div_(channel[start:stop, None, None])
        nearest = assign(target, levels(table, scale[start:stop]))
        codes[start:stop] = nearest.view(stop - start, -1)
    return replace(plain, codes=codes, scale=scale, tensor_scale=channel), total


def _best_scales(
    target: Tensor, step: Tensor, cut: float, codebook: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """Scales [N, K/G] near step / cut that err least on targets [N, K/G, G], and their errors."""
    limit = torch.finfo(step.dtype).max
    base = (step.float() / cut).clamp_(max=limit).to(step.dtype).view(torch.uint8).int()
    last = int(torch.tensor(limit).to(step.dtype).view(torch.uint8))
    best, error = step, torch.full_like(target[..., 0], torch.inf)
    for offset in sorted(range(-REACH, REACH + 1), key=abs):
        trial = (base + offset).clamp_(0, last).to(torch.uint8).view(step.dtype)
        off = _distance(target, levels(codebook, trial))
        trial_error = off.square_().mul_(gain).sum(-1)
        better = trial_error < error
        error = torch.where(better, trial_error, error)
        best = _where(better, trial, best)
    return best, error


def _distance(values: Tensor, levels: Tensor) -> Tensor:
    """Distance of values [..., G] to the nearest of their levels [..., 16]."""
    nearest = (values - levels[..., :1]).abs_()
    other = torch.empty_like(nearest)
    for level in levels[..., 1:].unbind(-1):
        torch.sub(values, level[..., None], out=other)
        torch.minimum(nearest, other.abs_(), out=nearest)
    return nearest


def _where(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """torch.where of float8 scales."""
    bits = torch.where(condition, yes.view(torch.uint8), no.view(torch.uint8))
    return bits.view(yes.dtype)


def _tops(groups: Tensor) -> Tensor:
    """Largest magnitude of each group, [N, K/G, 1]. DataError if one is not finite."""
    top = groups.abs().amax(-1, keepdim=True)
    if not bool(torch.isfinite(top).all()):
        raise DataError("holds NaN or infinity")
    return top.clamp_(min=SMALLEST)


def _grouped(rows: Tensor, spec: QuantSpec) -> Tensor:
    """A copy of rows [N, K] in fp32, as [N, K/G, G]."""
    copy = rows.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return copy.view(rows.shape[0], -1, spec.tile[1])


def _sampled(values: Tensor, count: int) -> Tensor:
    """Not more than so many values, drawn with replacement by a fixed seed."""
    if values.numel() <= count:
        return values
    rng = torch.Generator(values.device).manual_seed(0)
    return values[torch.randint(0, values.numel(), (count,), device=values.device, generator=rng)]


def _take(levels: Tensor, index: Tensor) -> Tensor:
    """Levels [16] or [..., 16] by int64 index [..., G]."""
    if levels.dim() == 1:
        return levels.index_select(0, index.reshape(-1)).view(index.shape)
    return torch.gather(levels, -1, index)
