"""ConvRot (arXiv 2512.03673): groups of channels rotated by a regular Hadamard matrix.

The runtime rotates the input online; the weight is stored rotated.
"""

from dqconvert.quantizers.schemes.plain8 import INT8_ROW
from dqconvert.quantizers.spec import ALL, QuantSpec, Scheme

GROUP = 256
INT4_ROW = QuantSpec("int4", (1, ALL), full_range=True, floor=1e-10 / 7)
LUT4_GROUP16 = QuantSpec("lut4", (1, 16), scale="F8_E4M3", tensor_scale="F32")

SCHEMES = (
    Scheme(
        name="convrot-int8",
        summary="rotated, int8 per output channel, activations per token",
        weight=INT8_ROW,
        activation=INT8_ROW,
        steps=("rotate",),
        rotation=GROUP,
        rounding="gptq",
        targets=("comfyui",),
    ),
    Scheme(
        name="convrot-w4a4",
        summary="rotated, int4 per output channel, activations int4 per token",
        weight=INT4_ROW,
        activation=QuantSpec("int4", (1, ALL)),
        steps=("rotate",),
        rotation=GROUP,
        rounding="gptq",
        targets=("comfyui",),
    ),
    Scheme(
        name="convrot-w4a8",
        summary="rotated, 4-bit codebook over an int8 grid, activations int8 per token",
        weight=LUT4_GROUP16,
        activation=INT8_ROW,
        steps=("rotate",),
        rotation=GROUP,
        rounding="gptq",
        targets=("comfyui",),
    ),
    Scheme(
        name="convrot-mixed",
        summary="convrot-w4a4, its most sensitive layers at convrot-int8",
        weight=INT4_ROW,
        activation=QuantSpec("int4", (1, ALL)),
        steps=("rotate",),
        rotation=GROUP,
        rounding="gptq",
        better="convrot-int8",
        share=0.2,
        targets=("comfyui",),
    ),
)
