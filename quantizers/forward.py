"""What a runtime computes with a quantized linear, in fp32.

    y = Q(x / smooth + ...) dequantize(codes)ᵀ + (x downᵀ) upᵀ + bias

Follows nunchaku/src/kernels/zgemm/gemm_w4a4.cuh (activation scales, the shift behind a GELU and
its unsigned codes) and comfy_kitchen's eager linears (int8 per token, fp8 static). The kernels'
own rounding of accumulators is not imitated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dqconvert.quantizers import rtn
from dqconvert.quantizers.lowrank import product
from dqconvert.quantizers.spec import ALL, QuantSpec
from dqconvert.quantizers.tensors import QuantizedTensor

BLOCK = 1 << 19
"""Weights in a block of rows."""


def quantize_activation(
    x: Tensor, spec: QuantSpec | None, unsigned: bool = False, static: Tensor | None = None
) -> Tensor:
    """Inputs [T, K] as the runtime's kernel sees them, fp32.

    unsigned: all codes serve non-negative values. static: [] scale of per-tensor formats;
    without one the runtime takes 1.
    """
    if spec is None:
        return x.float()
    if unsigned:
        spec = replace(spec, code=f"u{spec.code}")
    if spec.tile != (ALL, ALL):
        return rtn.dequantize(rtn.quantize(x, spec))
    scale = torch.ones(1, 1) if static is None else static.float().view(1, 1)
    return rtn.dequantize(QuantizedTensor(spec, rtn.encode(x, scale, None, spec), scale))


def apply(q: QuantizedTensor, x: Tensor, activation: QuantSpec | None) -> Tensor:
    """The runtime's output [T, N] for raw inputs x [T, K]."""
    x = x.float()
    shifted = x + q.shift if q.shift else x
    smoothed = shifted if q.smooth is None else shifted / q.smooth.float()
    seen = quantize_activation(smoothed, activation, bool(q.shift), q.input_scale)
    y = seen @ rtn.dequantize(q).T
    if q.lowrank is not None:
        y += (x @ q.lowrank.down.float().T) @ q.lowrank.up.float().T
    return y if q.bias is None else y + q.bias.float()


def row_blocks(q: QuantizedTensor) -> Iterator[tuple[int, QuantizedTensor]]:
    """A layer as layers of fewer rows, each with its first row: what fits the processor's cache."""
    rows, columns = q.codes.shape
    tile = max(rows, 1) // max(q.scale.shape[0], 1)
    step = max(tile, BLOCK // max(columns, 1) // tile * tile) if q.scale.shape[0] > 1 else 0
    step = step or max(1, BLOCK // max(columns, 1))
    for start in range(0, rows, step):
        cut = slice(start, start + step)
        grid = slice(start // tile, (start + step) // tile)
        second = q.tensor_scale
        yield (
            start,
            replace(
                q,
                codes=q.codes[cut],
                scale=q.scale if q.scale.shape[0] == 1 else q.scale[grid],
                tensor_scale=second if second is None or second.numel() == 1 else second[cut],
                bias=None if q.bias is None else q.bias[cut],
                lowrank=None if q.lowrank is None else replace(q.lowrank, up=q.lowrank.up[cut]),
            ),
        )


def effective_weight(q: QuantizedTensor) -> Tensor:
    """The weight [N, K] fp32 that the whole layer stands for, in the basis of the raw input."""
    weight = rtn.dequantize(q)
    if q.smooth is not None:
        weight /= q.smooth.float()
    return weight if q.lowrank is None else weight + product(q.lowrank)
