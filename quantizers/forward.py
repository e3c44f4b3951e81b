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


def shift_surplus(q: QuantizedTensor) -> Tensor | None:
    """What the shift of the input adds to the output [N], None where nothing is shifted.

    The main path sees (x + shift) / smooth, so it adds R(shift / smooth), with R as it was
    rounded. The low-rank branch never sees the shift.
    """
    if not q.shift:
        return None
    shift = q.codes.new_full(q.codes.shape[1:], q.shift, dtype=torch.float32)
    return rtn.dequantize(q) @ (shift if q.smooth is None else shift / q.smooth.float())


def take_rows(q: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """The layer that gives output channels start .. stop alone, on the borders of its tiles."""
    rows, tiles = q.codes.shape[0], q.scale.shape[0]
    cut = slice(start, stop)
    grid = slice(start * tiles // max(rows, 1), -(-stop * tiles // max(rows, 1)))
    second = q.tensor_scale
    return replace(
        q,
        codes=q.codes[cut],
        scale=q.scale[grid],
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
    weight = rtn.dequantize(q)
    if q.smooth is not None:
        weight /= q.smooth.float()
    return weight if q.lowrank is None else weight + product(q.lowrank)
