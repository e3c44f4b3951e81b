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

BLOCKS = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176),
    "Q6_K": (256, 210), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136), "IQ3_S": (256, 110),
    "IQ3_XXS": (256, 98), "IQ2_S": (256, 82), "IQ2_XS": (256, 74), "IQ2_XXS": (256, 66),
    "IQ1_S": (256, 50), "IQ1_M": (256, 56), "TQ1_0": (256, 54), "TQ2_0": (256, 66),
    "MXFP4": (32, 17),
}  # fmt: skip
"""ggml's block types: weights and bytes of a block, which lies within a row (ggml-common.h)."""

NEEDS_IMPORTANCE = frozenset({"iq2_xs", "iq2_xxs", "iq1_s"})
"""Codes of block types that ggml refuses to quantize without an importance matrix."""

FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of a tensor.

    dtype: a key of DTYPE_BITS, or of BLOCKS; shape: extents, () for a scalar.
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
        if self.dtype in BLOCKS:
            weights, size = BLOCKS[self.dtype]
            return self.numel // weights * size
        return self.numel * DTYPE_BITS[self.dtype] // 8

    @property
    def stored(self) -> TensorInfo:
        """What holds it in memory: rows of blocks as bytes [..., bytes], others as they are."""
        if self.dtype not in BLOCKS:
            return self
        weights, size = BLOCKS[self.dtype]
        return TensorInfo("U8", (*self.shape[:-1], self.shape[-1] // weights * size))


@dataclass(frozen=True, slots=True)
class Code:
    """An element code: an integer, or a float with exponent and mantissa bits.

    Signed integers are symmetric, -maximum .. maximum; unsigned ones begin at 0. Floats follow
    the OCP formats: e4m3 gives its last code to NaN, e2m1 and e3m2 have no special values, e5m2 is
    IEEE. levels: what the codes 0, 1, ... of a codebook stand for, in rising order. block: weights
    of a ggml block, which holds its scales itself: such codes are whole blocks, in bytes.
    """

    name: str
    bits: int
    exponent: int = 0
    mantissa: int = 0
    specials: int = 0
    signed: bool = True
    levels: tuple[float, ...] = ()
    block: int = 0

    @property
    def is_float(self) -> bool:
        """Whether codes are floating point."""
        return self.exponent > 0

    @property
    def maximum(self) -> float:
        """The largest value a code stands for."""
        if self.levels:
            return max(abs(level) for level in self.levels)
        if not self.is_float:
            return float(2 ** (self.bits - self.signed) - 1)
        steps = 2 ** (self.exponent + self.mantissa) - 1 - self.specials
        exponent, mantissa = divmod(steps, 2**self.mantissa)
        bias = 2 ** (self.exponent - 1) - 1
        return math.ldexp(1 + mantissa / 2**self.mantissa, exponent - bias)


NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a Gaussian (QLoRA arXiv 2305.14314, appendix E), as bitsandbytes has them."""

FP4_LEVELS = (
    -1.0, -2 / 3, -1 / 2, -1 / 3, -1 / 4, -1 / 6, -1 / 192, 0.0,
    1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1.0,
)  # fmt: skip
"""bitsandbytes' fp4 (functional.py, get_4bit_type): e2m1 over 12, but for its smallest value."""

LUT4_LEVELS = (
    -0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720,
    0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671,
)  # fmt: skip
"""Lloyd-Max levels of a Gaussian, as comfy_kitchen/tensor/w4a8_packed.py has them."""

CODES = {
    code.name: code
    for code in (
        Code("int4", bits=4),
        Code("uint4", bits=4, signed=False),
        Code("int8", bits=8),
        Code("e2m1", bits=4, exponent=2, mantissa=1),
        Code("e3m2", bits=6, exponent=3, mantissa=2),
        Code("nf4", bits=4, levels=NF4_LEVELS),
        Code("fp4", bits=4, levels=FP4_LEVELS),
        Code("lut4", bits=4, levels=LUT4_LEVELS),
        Code("e4m3", bits=8, exponent=4, mantissa=3, specials=1),
        Code("e5m2", bits=8, exponent=5, mantissa=2, specials=4),
        Code("f16", bits=16, exponent=5, mantissa=10, specials=1024),
        Code("bf16", bits=16, exponent=8, mantissa=7, specials=128),
        *(
            Code(dtype.lower(), bits=8 * size // weights, block=weights)
            for dtype, (weights, size) in BLOCKS.items()
        ),
    )
}


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """A weight format: its code, and the (rows, cols) tile that shares a scale.

    (1, ALL) per row | (1, 64) groups | (128, 128) blocks | (ALL, ALL) per tensor.

    scale: dtype of the scales, F8_E8M0 for powers of two (rounded up); tensor_scale: dtype of a
    second-level scale, if any, which divides the first so that it fits its own dtype (NVFP4).
    floor: smallest scale; where it is 0, the scale of an all-zero tile is 1. reciprocal: the
    runtime's own quantizer multiplies by 1/scale instead of dividing, which decides ties of equal
    bytes. zero_point: each tile has a zero point of its own, w = (code - zero) scale. ragged: the
    last tile of an axis may be smaller than the others. full_range: integer codes may reach one
    further down than up, and scales may be negative. unit: no scale is stored, all are 1.
    """

    code: str
    tile: tuple[int, int]
    scale: str = "F32"
    tensor_scale: str | None = None
    floor: float = 0.0
    reciprocal: bool = False
    zero_point: bool = False
    ragged: bool = False
    full_range: bool = False
    unit: bool = False

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
        if not self.ragged and any(e % side for e, side in zip(shape, tile, strict=True)):
            raise ValueError(f"{self.code} needs tiles of {tile}; {shape} does not divide")
        return -(-shape[0] // tile[0]), -(-shape[1] // tile[1])

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
class Mix:
    """Layers to which a scheme gives another one.

    parts: of the layer's weight's name in the file, any of which makes it one of them; scheme:
    its name; first: so many of them, in the file's order, None for all.
    """

    parts: tuple[str, ...]
    scheme: str
    first: int | None = None


@dataclass(frozen=True, slots=True)
class Scheme:
    """A named recipe.

    weight: format of the linears; activation: what the runtime makes of their inputs (None:
    nothing); modulation: format of the adaLN linears, None where they are treated like all
    others. targets: names, the default first.

    steps: subset of STEPS, in that order. rank: of the low-rank branch. rotation: the widest
    group of channels that a regular Hadamard matrix rotates. rounding: the default where
    calibration statistics exist. shared: linears that read one input share tensor-wide scales.
    better, share: the scheme that the most sensitive layers get instead, and their share of all
    weights. calibrated: makes no sense without activations. data_free: the rounding where nothing
    is known of the inputs. mixes: the first that a layer's name fits decides. menu: schemes of
    which each layer gets one, so that they err least in all at a given size.
    """

    name: str
    summary: str
    weight: QuantSpec
    activation: QuantSpec | None
    targets: tuple[str, ...]
    modulation: QuantSpec | None = None
    steps: tuple[str, ...] = ()
    rank: int = 0
    rotation: int = 0
    rounding: str = "rtn"
    shared: bool = False
    better: str | None = None
    share: float = 0.0
    calibrated: bool = False
    data_free: str = "rtn"
    mixes: tuple[Mix, ...] = ()
    menu: tuple[str, ...] = ()


STEPS = ("fold", "rotate", "smooth", "lowrank", "clip")
"""fold: smoothing that goes into the layers before (AWQ); rotate: regular Hadamard of channel
groups (ConvRot); smooth: a vector that the runtime divides by; lowrank: a 16-bit branch beside the
codes; clip: a search for the range of each group by its output error (AWQ)."""
