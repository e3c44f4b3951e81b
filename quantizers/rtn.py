"""Scales from absolute maxima, rounding to the nearest code, and back.

Laws (tests/test_rtn.py): the scale grid has the shape of spec.grid; without second-level
rounding every weight returns within half a step; quantizing a dequantized weight changes
nothing; codes and scales equal comfy-kitchen's for its formats.

Sources: int4 and NVFP4 as deepcompressor/quantizer/impl/scale.py (specs of nunchaku), int8, fp8
and MXFP8 as comfy_kitchen/backends/eager/quantization.py, NF4 as bitsandbytes' CPU kernel.
"""

from __future__ import annotations

from itertools import starmap

import torch
from torch import Tensor

from dqconvert.quantizers import lut
from dqconvert.quantizers.codes import decode, dtype_of, round_to
from dqconvert.quantizers.errors import DataError
from dqconvert.quantizers.ggml import blocks
from dqconvert.quantizers.ggml.blocks import is_block
from dqconvert.quantizers.spec import ALL, QuantSpec
from dqconvert.quantizers.tensors import TORCH_DTYPES, QuantizedTensor


def quantize(
    weight: Tensor, spec: QuantSpec, parts: tuple[int, ...] = (), ceiling: Tensor | None = None
) -> QuantizedTensor:
    """Round a weight to its nearest codes.

    weight: [N, K], any float dtype; computed in fp32. parts: rows of each stacked linear, which
    then keep tensor scales of their own. ceiling: [] magnitude that tensor-wide scales must
    cover. Raises DataError on NaN or infinity, ValueError where the tile does not divide the
    shape.
    """
    if spec.code == "lut4":
        return lut.quantize(weight, spec)
    if is_block(spec.code):
        return blocks.result(weight, spec)
    amax = absmax(weight, spec, ceiling)
    second = tensor_scales(amax, spec, parts, ceiling)
    if spec.zero_point:
        scale, zero = affine_scales(*extremes(weight, spec), spec)
    else:
        scale, zero = first_scales(amax, spec, second), None
    return QuantizedTensor(
        spec, encode(weight, scale, second, spec, zero), scale, second, zero=zero
    )


def dequantize(q: QuantizedTensor) -> Tensor:
    """The weight that the codes and scales stand for: [N, K] fp32, in the basis of the codes."""
    if q.spec.code == "lut4":
        return lut.dequantize(q)
    if is_block(q.spec.code):
        return blocks.dequantize(q.codes, q.spec.code)
    tiles = tiled(decode(q.codes, q.spec.code), q.spec)
    if q.zero is not None:
        tiles = tiles.sub_(_spread(q.zero.float()))
    if not q.spec.unit:
        tiles = tiles.mul_(_spread(effective_scale(q.scale, q.tensor_scale)))
    return _untiled(tiles, q.codes.shape)


def absmax(weight: Tensor, spec: QuantSpec, ceiling: Tensor | None = None) -> Tensor:
    """Largest magnitude of each tile: spec.grid([N, K]) fp32. DataError if one is not finite.

    ceiling: [] magnitude that counts as part of a tile which covers the whole weight.
    """
    tops = [
        _top(tiled(weight[start:stop].to(torch.float32, copy=True).abs_(), spec))
        for start, stop in _blocks(weight, spec)
    ]
    amax = torch.cat(tops) if tops else _no_tiles(weight, spec)
    if spec.tile[0] == ALL and len(tops) > 1:
        amax = amax.amax(0, keepdim=True)
    if not bool(torch.isfinite(amax).all()):
        raise DataError("holds NaN or infinity")
    if ceiling is not None and spec.tile == (ALL, ALL):
        amax = amax.clamp_(min=ceiling.to(amax))
    return amax


def _top(tiles: Tensor) -> Tensor:
    """The largest value of each tile."""
    return tiles[:, 0].amax(2) if tiles.shape[1] == 1 else tiles.amax((1, 3))


def extremes(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The range of each tile, (low <= 0, high >= 0): spec.grid([N, K]) fp32, of finite weights."""
    tiles = (tiled(weight[cut].float(), spec) for cut in starmap(slice, _blocks(weight, spec)))
    ends = [(block.amin((1, 3)), block.amax((1, 3))) for block in tiles]
    if not ends:
        return _no_tiles(weight, spec), _no_tiles(weight, spec)
    low, high = (torch.cat(end) for end in zip(*ends, strict=True))
    if spec.tile[0] == ALL:
        low, high = low.amin(0, keepdim=True), high.amax(0, keepdim=True)
    return low.clamp_(max=0), high.clamp_(min=0)


def tensor_scales(
    amax: Tensor,
    spec: QuantSpec,
    parts: tuple[int, ...] = (),
    ceiling: Tensor | None = None,
    top: float | None = None,
) -> Tensor | None:
    """Second-level scales for the tile maxima of a weight, or None.

    Maps the largest first-level scale to top, which is the largest value of its own dtype where
    it is not given. [1]; [N], constant within each part, where linears are stacked (tile rows must
    be 1 then).
    """
    if spec.tensor_scale is None:
        return None
    dtype = TORCH_DTYPES[spec.tensor_scale]
    limit = spec.maximum * (top or torch.finfo(TORCH_DTYPES[spec.scale]).max)
    if not amax.numel():
        return torch.ones(1, dtype=dtype, device=amax.device)
    sizes = list(parts) if len(parts) > 1 else [amax.shape[0]]
    tops = torch.stack([part.amax() for part in torch.split(amax, sizes)])
    if ceiling is not None:
        tops = tops.clamp_(min=ceiling.to(tops))
    scales = _positive((tops / limit).to(dtype))
    if len(sizes) == 1:
        return scales
    return scales.repeat_interleave(torch.tensor(sizes, device=amax.device))


def first_scales(amax: Tensor, spec: QuantSpec, second: Tensor | None) -> Tensor:
    """First-level scales [grid] in spec.scale's dtype, from the maxima of the tiles."""
    dtype = TORCH_DTYPES[spec.scale]
    if spec.unit:
        return torch.ones_like(amax, dtype=dtype)
    scale = amax / spec.maximum
    if dtype == torch.float8_e8m0fnu:
        return _power_of_two(scale)
    if second is not None:
        scale = scale / second.float()[:, None]
    if dtype.itemsize == 1:  # float8 has no infinity to saturate to
        return scale.clamp_(max=torch.finfo(dtype).max).to(dtype)
    if spec.floor:
        return scale.clamp_(min=spec.floor).to(dtype)
    return _positive(scale.to(dtype))


def affine_scales(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """(scale, zero) [grid] for ranges low <= 0 <= high: the codes 0 .. maximum span the range.

    zero: fp32, whole numbers among the codes.
    """
    scale = (high / spec.maximum - low / spec.maximum).to(TORCH_DTYPES[spec.scale])
    scale = _positive(scale)
    zero = (-low / scale.float()).round_().clamp_(0, spec.maximum)
    return scale, zero


def effective_scale(scale: Tensor, second: Tensor | None) -> Tensor:
    """First times second level, fp32, in grid shape."""
    return scale.float() if second is None else scale.float() * second.float()[:, None]


def encode(
    weight: Tensor,
    scale: Tensor,
    second: Tensor | None,
    spec: QuantSpec,
    zero: Tensor | None = None,
) -> Tensor:
    """Nearest codes of a weight under given scales: [N, K]; see QuantizedTensor.codes.

    Works in row blocks, so that a 16-bit weight is never held in fp32 as a whole.
    """
    shape = (weight.shape[0], weight.shape[1])
    step = effective_scale(scale, second)
    codes = torch.empty(shape, dtype=dtype_of(spec.code), device=weight.device)
    for start, stop in spec.row_blocks(shape):
        cut = tile_rows(spec, shape, start, stop)
        block = weight[start:stop].to(torch.float32, copy=True)
        tiles = _scaled(tiled(block, spec), step[cut], spec)
        if zero is not None:
            tiles = tiles.add_(_spread(zero[cut]))
        values = _untiled(tiles, (stop - start, shape[1]))
        codes[start:stop] = round_to(values, spec.code, spec.full_range)
    return codes


def tile_rows(spec: QuantSpec, shape: tuple[int, int], start: int, stop: int) -> slice:
    """The rows of the scale grid that belong to rows start .. stop of an [N, K] weight."""
    rows = spec.tile_of(shape)[0]
    return slice(start // rows, -(-stop // rows))


def tiled(block: Tensor, spec: QuantSpec) -> Tensor:
    """[rows, K] as [grid rows, tile rows, grid cols, tile cols].

    Where the last tiles are smaller, a copy that is filled up with zeros.
    """
    shape = (block.shape[0], block.shape[1])
    (rows, cols), tile = spec.grid(shape), spec.tile_of(shape)
    missing = rows * tile[0] - shape[0], cols * tile[1] - shape[1]
    if any(missing) and block.numel():
        block = torch.nn.functional.pad(block, (0, missing[1], 0, missing[0]))
    return block.reshape(rows, tile[0], cols, tile[1])


def _untiled(tiles: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[grid rows, tile rows, grid cols, tile cols] as [rows, K], without the filling."""
    whole = tiles.view(tiles.shape[0] * tiles.shape[1], -1) if tiles.numel() else tiles.view(shape)
    return whole[: shape[0], : shape[1]].contiguous()


def _blocks(weight: Tensor, spec: QuantSpec) -> list[tuple[int, int]]:
    """Row blocks of a weight, none where it is empty."""
    return list(spec.row_blocks((weight.shape[0], weight.shape[1]))) if weight.numel() else []


def _no_tiles(weight: Tensor, spec: QuantSpec) -> Tensor:
    """What an empty weight has for a maximum: [grid] zeros, fp32."""
    grid = spec.grid((weight.shape[0], weight.shape[1]))
    return torch.zeros(grid, dtype=torch.float32, device=weight.device)


def _scaled(tiles: Tensor, step: Tensor, spec: QuantSpec) -> Tensor:
    """Divide tiles by their scales, in place."""
    if spec.unit:
        return tiles
    step = _spread(step)
    if spec.reciprocal:
        largest = torch.finfo(step.dtype).max  # the reciprocal of a subnormal scale is infinite
        return tiles.mul_((1.0 / step).clamp_(max=largest))
    tiles = tiles.div_(step)
    if bool((step == 0).any()):  # such a scale belongs to weights too small to matter
        tiles = tiles.nan_to_num_(0.0, 0.0, 0.0)
    return tiles


def _power_of_two(scale: Tensor) -> Tensor:
    """The next power of two, e8m0; what is below 2^-127, zero too, becomes that."""
    bits = scale.contiguous().view(torch.int32)
    exponent = (bits + 0x7FFFFF) >> 23
    return torch.where(scale <= 2.0**-127, 0, exponent).to(torch.uint8).view(torch.float8_e8m0fnu)


def _spread(grid: Tensor) -> Tensor:
    """A value of each tile, against tiles."""
    return grid[:, None, :, None]


def _positive(scale: Tensor) -> Tensor:
    """A scale of zero stands for zeros only: make it one."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)
