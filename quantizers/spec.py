"""What a number is: element codes, the tile that shares a scale, and what a header says.

Torch-free, so that a plan can be made, printed and refused in a fraction of a second.
Limits are derived from bits, never typed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

ALL = -1
"""A tile extent that covers the whole axis."""

BLOCK = 1 << 20
"""Weights in a block of rows: its fp32 copy stays in the processor's cache."""

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip
"""Bits of each dtype, by the names that a safetensors header uses."""

FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of a tensor.

    dtype: a key of DTYPE_BITS; shape: extents, () for a scalar.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.numel * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Code:
    """An element code: an integer, or a float with exponent and mantissa bits.

    Signed integers are symmetric, -maximum .. maximum; unsigned ones begin at 0. Floats follow
    the OCP formats: e4m3 gives its last code to NaN, e2m1 has no special values, e5m2 is IEEE.
    """

    name: str
    bits: int
    exponent: int = 0
    mantissa: int = 0
    specials: int = 0
    signed: bool = True

    @property
    def is_float(self) -> bool:
        """Whether codes are floating point."""
        return self.exponent > 0

    @property
    def maximum(self) -> float:
        """The largest value a code stands for."""
        if not self.is_float:
            return float(2 ** (self.bits - self.signed) - 1)
        steps = 2 ** (self.exponent + self.mantissa) - 1 - self.specials
        exponent, mantissa = divmod(steps, 2**self.mantissa)
        bias = 2 ** (self.exponent - 1) - 1
        return math.ldexp(1 + mantissa / 2**self.mantissa, exponent - bias)


CODES = {
    code.name: code
    for code in (
        Code("int4", bits=4),
        Code("uint4", bits=4, signed=False),
        Code("int8", bits=8),
        Code("e2m1", bits=4, exponent=2, mantissa=1),
        Code("e4m3", bits=8, exponent=4, mantissa=3, specials=1),
        Code("e5m2", bits=8, exponent=5, mantissa=2, specials=4),
    )
}


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """A weight format: its code, and the (rows, cols) tile that shares a scale.

    (1, ALL) per row | (1, 64) groups | (128, 128) blocks | (ALL, ALL) per tensor.

    scale: dtype of the scales; tensor_scale: dtype of a second-level scale, if any, which
    divides the first so that it fits its own dtype (NVFP4). floor: smallest scale; where it
    is 0, the scale of an all-zero tile is 1. reciprocal: the runtime's own quantizer
    multiplies by 1/scale instead of dividing, which decides ties of equal bytes.
    """

    code: str
    tile: tuple[int, int]
    scale: str = "F32"
    tensor_scale: str | None = None
    floor: float = 0.0
    reciprocal: bool = False

    @property
    def maximum(self) -> float:
        """The largest value a code stands for."""
        return CODES[self.code].maximum

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return CODES[self.code].bits

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scales of an [N, K] weight.

        Raises ValueError, with the reason, where the tile does not divide the shape.
        """
        tile = self.tile_of(shape)
        if any(extent % side for extent, side in zip(shape, tile, strict=True)):
            raise ValueError(f"{self.code} needs tiles of {tile}; {shape} does not divide")
        return shape[0] // tile[0], shape[1] // tile[1]

    def row_blocks(self, shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
        """Rows start .. stop of an [N, K] weight in blocks of about BLOCK weights.

        Cut at the borders of tiles, or anywhere where one tile covers all rows.
        """
        tile = 1 if self.tile[0] == ALL else self.tile[0]
        step = tile * max(1, BLOCK // (tile * max(shape[1], 1)))
        for start in range(0, shape[0], step):
            yield start, min(start + step, shape[0])

    def tile_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The tile with ALL replaced by the extents of an [N, K] weight."""
        rows, cols = (e if t == ALL else t for t, e in zip(self.tile, shape, strict=True))
        return max(rows, 1), max(cols, 1)


@dataclass(frozen=True, slots=True)
class Scheme:
    """A named recipe.

    weight: format of the linears; activation: what the runtime makes of their inputs (None:
    nothing); modulation: format of the adaLN linears, None where they are treated like all
    others. steps: subset of ("smooth", "lowrank"), in that order. rank: of the low-rank
    branch. rounding: the default where calibration statistics exist. targets: names, the
    default first.
    """

    name: str
    summary: str
    weight: QuantSpec
    activation: QuantSpec | None
    targets: tuple[str, ...]
    modulation: QuantSpec | None = None
    steps: tuple[str, ...] = ()
    rank: int = 0
    rounding: str = "rtn"
