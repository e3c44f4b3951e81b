"""The values that travel between the layers: a linear to quantize, what calibration learned of
its input, and the logical result.

Everything is in natural row-major layout: weights are [N, K] = [out_features, in_features].
No packing, no key names, no files.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dqconvert.quantizers.spec import QuantSpec

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, slots=True, eq=False)
class LayerStats:
    """What calibration learned of one linear's input, over all prompts and steps.

    count: rows seen; absmax, mean, mean_square: [K] fp32; second_moment: [K, K] fp32, XᵀX
    divided by its own row count, or None; rows: [R, K] held rows, a uniform sample that is
    not part of second_moment, so that errors measured on it are honest.
    """

    count: int
    absmax: Tensor
    mean: Tensor
    mean_square: Tensor
    second_moment: Tensor | None
    rows: Tensor

    def columns(self, start: int, stop: int) -> LayerStats:
        """Statistics of input channels start .. stop."""
        cut = slice(start, stop)
        moment = None if self.second_moment is None else self.second_moment[cut, cut]
        return replace(
            self,
            absmax=self.absmax[cut],
            mean=self.mean[cut],
            mean_square=self.mean_square[cut],
            second_moment=moment,
            rows=self.rows[:, cut],
        )

    def to(self, device: str) -> LayerStats:
        """The same on a torch device."""
        moment = None if self.second_moment is None else self.second_moment.to(device)
        return replace(
            self,
            absmax=self.absmax.to(device),
            mean=self.mean.to(device),
            mean_square=self.mean_square.to(device),
            second_moment=moment,
            rows=self.rows.to(device),
        )


@dataclass(frozen=True, slots=True, eq=False)
class LinearProblem:
    """One linear to quantize: y = x Wᵀ + b.

    weight: [N, K], any float dtype; bias: [N] or None; parts: rows of each source linear that
    is stacked in weight (they share a low-rank branch and keep their own tensor scales);
    shift: constant that the runtime adds to x before it quantizes (0: none), which also makes
    its activation codes unsigned; rotation: group of channels that the runtime rotates by a
    regular Hadamard matrix before it quantizes (0: none); ceiling: [] magnitude that tensor-wide
    scales must cover where linears share them; stats: None without calibration.
    """

    weight: Tensor
    bias: Tensor | None = None
    parts: tuple[int, ...] = ()
    shift: float = 0.0
    rotation: int = 0
    ceiling: Tensor | None = None
    stats: LayerStats | None = None

    def to(self, device: str) -> LinearProblem:
        """The same on a torch device."""
        return replace(
            self,
            weight=self.weight.to(device),
            bias=None if self.bias is None else self.bias.to(device),
            stats=None if self.stats is None else self.stats.to(device),
        )


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """A 16-bit side branch (x downᵀ) upᵀ on the raw input. down: [r, K]; up: [N, r]."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedTensor:
    """A quantized linear in natural layout.

    codes: [N, K]; int8 for integer codes, float8 for e4m3 and e5m2, uint8 sign and magnitude bits
    for e2m1 and e3m2, uint8 index for codebooks. scale: shape spec.grid([N, K]). tensor_scale:
    [1], or [N] where rows have their own. zero: shape of scale, fp32, where the spec has zero
    points. smooth: [K], the runtime divides x by it; the codes are of W diag(smooth) minus the
    low-rank branch. rotation: channels of a group that the runtime rotates after that; the codes
    are of the rotated weight. codebook: [levels] fp32, where a layer has one of its own. bias: as
    the runtime adds it, so with a shift it already holds the correction. input_scale: [] static
    activation scale (second-level, where activations have two).
    """

    spec: QuantSpec
    codes: Tensor
    scale: Tensor
    tensor_scale: Tensor | None = None
    bias: Tensor | None = None
    smooth: Tensor | None = None
    lowrank: LowRank | None = field(default=None)
    shift: float = 0.0
    input_scale: Tensor | None = None
    zero: Tensor | None = None
    rotation: int = 0
    codebook: Tensor | None = None
