"""What a runtime computes with a quantized linear, in fp32.

    y = Q((x + shift) / smooth H) dequantize(codes)ᵀ + (x downᵀ) upᵀ + bias

with H the rotation of channel groups. Follows nunchaku/src/kernels/zgemm/gemm_w4a4.cuh (activation
scales, the shift behind a GELU and its unsigned codes) and comfy_kitchen's eager linears (int8 per
token, fp8 static, NVFP4 with one scale for all tokens). The kernels' own rounding of accumulators
is not imitated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dqconvert.quantizers import rtn
from dqconvert.quantizers.hadamard import rotate
from dqconvert.quantizers.lowrank import product
from dqconvert.quantizers.spec import ALL, QuantSpec
from dqconvert.quantizers.tensors import QuantizedTensor


def quantize_activation(
    x: Tensor, spec: QuantSpec | None, unsigned: bool = False, static: Tensor | None = None
) -> Tensor:
    """Inputs [T, K] as the runtime's kernel sees them, fp32.

    unsigned: all codes serve non-negative values. static: [] scale of per-tensor formats, where
    without one the runtime takes 1; or the second level of those with two, where without one it
    measures it.
    """
    if spec is None:
        return x.float()
    if unsigned:
        spec = replace(spec, code=f"u{spec.code}")
    second = None
    if spec.tile == (ALL, ALL):
        scale = torch.ones(1, 1) if static is None else static.float().view(1, 1)
    elif spec.tensor_scale is not None and static is not None:
        second = static.view(1)
        scale = rtn.first_scales(rtn.absmax(x, spec), spec, second)
    else:
        return rtn.dequantize(rtn.quantize(x, spec))
    codes = rtn.encode(x, scale, second, spec)
    return rtn.dequantize(QuantizedTensor(spec, codes, scale, second))


def apply(q: QuantizedTensor, x: Tensor, activation: QuantSpec | None) -> Tensor:
    """The runtime's output [T, N] for raw inputs x [T, K]."""
    x = x.float()
    seen = entering(x + q.shift if q.shift else x, q)
    seen = quantize_activation(seen, activation, bool(q.shift), q.input_scale)
    y = seen @ rtn.dequantize(q).T
    if q.lowrank is not None:
        y += (x @ q.lowrank.down.float().T) @ q.lowrank.up.float().T
    return y if q.bias is None else y + q.bias.float()


def shift_surplus(q: QuantizedTensor) -> Tensor | None:
    """What the shift of the input adds to the output [N], None where nothing is shifted.

    The main path sees (x + shift) / smooth, rotated, so it adds R of what becomes of the shift
    alone, with R as it was rounded. The low-rank branch never sees the shift.
    """
    if not q.shift:
        return None
    shift = q.codes.new_full(q.codes.shape[1:], q.shift, dtype=torch.float32)
    return rtn.dequantize(q) @ entering(shift, q)


def take_rows(q: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """The layer that gives output channels start .. stop alone, on the borders of its tiles."""
    cut = slice(start, stop)
    grid = rtn.tile_rows(q.spec, (q.codes.shape[0], q.codes.shape[1]), start, stop)
    second = q.tensor_scale
    return replace(
        q,
        codes=q.codes[cut],
        scale=q.scale[grid],
        zero=None if q.zero is None else q.zero[grid],
        tensor_scale=second if second is None or second.numel() == 1 else second[cut],
        bias=None if q.bias is None else q.bias[cut],
        lowrank=None if q.lowrank is None else replace(q.lowrank, up=q.lowrank.up[cut]),
    )


def row_blocks(q: QuantizedTensor) -> Iterator[tuple[int, QuantizedTensor]]:
    """A layer as layers of fewer rows, each with its first row: what fits the processor's cache."""
    for start, stop in q.spec.row_blocks((q.codes.shape[0], q.codes.shape[1])):
        yield start, take_rows(q, start, stop)


def effective_weight(q: QuantizedTensor) -> Tensor:
    """The weight [N, K] fp32 that the whole layer stands for, in the basis of the raw input."""
    weight = rotate(rtn.dequantize(q), q.rotation)
    if q.smooth is not None:
        weight /= q.smooth.float()
    return weight if q.lowrank is None else weight + product(q.lowrank)


def entering(x: Tensor, q: QuantizedTensor) -> Tensor:
    """An input [..., K] fp32 as it enters the main path: divided by smooth, then rotated."""
    return rotate(x if q.smooth is None else x / q.smooth.float(), q.rotation)
