"""Scales from absolute maxima, rounding to the nearest code, and back.

Laws (tests/test_rtn.py): the scale grid has the shape of spec.grid; without second-level
rounding every weight returns within half a step; quantizing a dequantized weight changes
nothing; codes and scales equal comfy-kitchen's for its formats.

Sources: int4 and NVFP4 as deepcompressor/quantizer/impl/scale.py (specs of nunchaku), int8 and
fp8 as comfy_kitchen/backends/eager/quantization.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqconvert.quantizers.errors import DataError
from dqconvert.quantizers.spec import ALL, CODES, QuantSpec
from dqconvert.quantizers.tensors import TORCH_DTYPES, QuantizedTensor

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the magnitude bits of e2m1 stand for."""


def quantize(weight: Tensor, spec: QuantSpec, parts: tuple[int, ...] = ()) -> QuantizedTensor:
    """Round a weight to its nearest codes.

    weight: [N, K], any float dtype; computed in fp32. parts: rows of each stacked linear, which
    then keep tensor scales of their own. Raises DataError on NaN or infinity, ValueError where
    the tile does not divide the shape.
    """
    amax = absmax(weight, spec)
    second = tensor_scales(amax, spec, parts)
    scale = first_scales(amax, spec, second)
    return QuantizedTensor(spec, encode(weight, scale, second, spec), scale, second)


def dequantize(q: QuantizedTensor) -> Tensor:
    """The weight that the codes and scales stand for: [N, K] fp32, in the smoothed basis."""
    shape = (q.codes.shape[0], q.codes.shape[1])
    step = effective_scale(q.scale, q.tensor_scale)
    return (
        _tiled(decode(q.codes, q.spec.code), q.spec, shape).mul_(step[:, None, :, None]).view(shape)
    )


def absmax(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Largest magnitude of each tile: spec.grid([N, K]) fp32. DataError if one is not finite."""
    shape = (weight.shape[0], weight.shape[1])
    grid, tile = spec.grid(shape), spec.tile_of(shape)
    if weight.numel() == 0:
        return torch.zeros(grid, dtype=torch.float32, device=weight.device)
    tops = []
    for start, stop in spec.row_blocks(shape):
        block = weight[start:stop].to(torch.float32, copy=True).abs_()
        rows = min(tile[0], block.shape[0])
        tops.append(block.view(-1, rows, grid[1], tile[1]).amax((1, 3)))
    amax = torch.cat(tops)
    if spec.tile[0] == ALL:
        amax = amax.amax(0, keepdim=True)
    if not bool(torch.isfinite(amax).all()):
        raise DataError("holds NaN or infinity")
    return amax


def tensor_scales(amax: Tensor, spec: QuantSpec, parts: tuple[int, ...] = ()) -> Tensor | None:
    """Second-level scales for the tile maxima of a weight, or None.

    Maps the largest first-level scale to the largest value of its own dtype. [1]; [N], constant
    within each part, where linears are stacked (tile rows must be 1 then).
    """
    if spec.tensor_scale is None:
        return None
    dtype = TORCH_DTYPES[spec.tensor_scale]
    limit = spec.maximum * torch.finfo(TORCH_DTYPES[spec.scale]).max
    if not amax.numel():
        return torch.ones(1, dtype=dtype, device=amax.device)
    if len(parts) <= 1:
        return _positive((amax.amax() / limit).to(dtype)).view(1)
    tops = torch.stack([part.amax() for part in torch.split(amax, list(parts))])
    rows = torch.tensor(parts, device=amax.device)
    return _positive((tops / limit).to(dtype)).repeat_interleave(rows)


def first_scales(amax: Tensor, spec: QuantSpec, second: Tensor | None) -> Tensor:
    """First-level scales [grid] in spec.scale's dtype, from the maxima of the tiles."""
    dtype = TORCH_DTYPES[spec.scale]
    scale = amax / spec.maximum
    if second is not None:
        scale = scale / second.float()[:, None]
    if dtype.itemsize == 1:  # float8 has no infinity to saturate to
        return scale.clamp_(max=torch.finfo(dtype).max).to(dtype)
    if spec.floor:
        return scale.clamp_(min=spec.floor).to(dtype)
    return _positive(scale.to(dtype))


def effective_scale(scale: Tensor, second: Tensor | None) -> Tensor:
    """First times second level, fp32, in grid shape."""
    return scale.float() if second is None else scale.float() * second.float()[:, None]


def encode(weight: Tensor, scale: Tensor, second: Tensor | None, spec: QuantSpec) -> Tensor:
    """Nearest codes of a weight under given scales: [N, K]; see QuantizedTensor.codes.

    Works in row blocks, so that a 16-bit weight is never held in fp32 as a whole.
    """
    shape = (weight.shape[0], weight.shape[1])
    step = effective_scale(scale, second)
    codes = torch.empty(shape, dtype=_code_dtype(spec.code), device=weight.device)
    tile = spec.tile_of(shape)[0]
    for start, stop in spec.row_blocks(shape):
        block = weight[start:stop].to(torch.float32, copy=True)
        grid_rows = step if step.shape[0] == 1 else step[start // tile : stop // tile]
        codes[start:stop] = round_to(_scaled(block, grid_rows, spec), spec.code)
    return codes


def round_to(values: Tensor, code: str) -> Tensor:
    """Round values that are already divided by their scale, in place, to codes."""
    kind = CODES[code]
    if code == "e2m1":
        return _round_e2m1(values)
    low = -kind.maximum if kind.signed else 0.0
    if not kind.is_float:
        values = values.round_()
    return values.clamp_(low, kind.maximum).to(_code_dtype(code))


def _round_e2m1(values: Tensor) -> Tensor:
    """Nearest e2m1 codes, ties to even.

    The magnitudes step by 1/2 up to 2, by 1 up to 4, by 2 up to 6; the code counts steps, and
    the smallest count of the three rulers is the right one.
    """
    m = values.abs().clamp_(max=6.0)
    code = torch.minimum((m * 2).round_(), m.round() + 2)
    code = torch.minimum(code, m.div_(2).round_() + 4).to(torch.uint8)
    return code.bitwise_or_(torch.signbit(values).to(torch.uint8) << 3)


def decode(codes: Tensor, code: str) -> Tensor:
    """What codes stand for, before any scale: fp32."""
    if code == "e2m1":
        table = torch.tensor(
            [*E2M1_VALUES, *(-value for value in E2M1_VALUES)], device=codes.device
        )
        return table[codes.int()]
    if code == "e4m3" and _all_numbers(codes):
        # Torch converts float8 one by one. The bits of e4m3, seven places up, are those of an
        # fp16 that is 2^-8 times as large; sign extension has left ones to clear.
        half = (codes.view(torch.int8).to(torch.int16) << 7) & ~(1 << 14)
        return half.view(torch.float16).float().mul_(256.0)
    return codes.float()


def _all_numbers(codes: Tensor) -> bool:
    """Whether no e4m3 code is NaN."""
    return codes.numel() == 0 or int((codes.view(torch.uint8) & 127).amax()) < 127


def _scaled(block: Tensor, step: Tensor, spec: QuantSpec) -> Tensor:
    """Divide a row block by its scales, in place."""
    view = block.view(step.shape[0], -1, step.shape[1], block.shape[1] // max(step.shape[1], 1))
    step = step[:, None, :, None]
    if spec.reciprocal:
        largest = torch.finfo(step.dtype).max  # the reciprocal of a subnormal scale is infinite
        return view.mul_((1.0 / step).clamp_(max=largest)).view(block.shape)
    view = view.div_(step)
    if spec.scale.startswith("F8"):  # a scale of zero belongs to weights too small to matter
        view = view.nan_to_num_(0.0, 0.0, 0.0)
    return view.view(block.shape)


def _tiled(weight: Tensor, spec: QuantSpec, shape: tuple[int, int]) -> Tensor:
    """[N, K] as [grid rows, tile rows, grid cols, tile cols]."""
    rows, cols = spec.grid(shape)
    tile = spec.tile_of(shape)
    return weight.reshape(rows, tile[0], cols, tile[1])


def _positive(scale: Tensor) -> Tensor:
    """A scale of zero stands for zeros only: make it one."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _code_dtype(code: str) -> torch.dtype:
    return {"e2m1": torch.uint8, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}.get(
        code, torch.int8
    )
