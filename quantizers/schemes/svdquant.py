"""SVDQuant (arXiv 2411.05007): smoothing, a 16-bit low-rank branch, a 4-bit residual.

Modulation linears are W4A16 in groups of 64, as the nunchaku kernels read them.
"""

from dqconvert.quantizers.spec import QuantSpec, Scheme

INT4_GROUP64 = QuantSpec("int4", (1, 64), scale="BF16")
NVFP4_BF16 = QuantSpec("e2m1", (1, 16), scale="F8_E4M3", tensor_scale="BF16")

SCHEMES = (
    Scheme(
        name="svdquant-w4a4",
        summary="int4 groups of 64, weights and activations, with a low-rank branch",
        weight=INT4_GROUP64,
        activation=INT4_GROUP64,
        modulation=INT4_GROUP64,
        steps=("smooth", "lowrank"),
        rank=32,
        rounding="gptq",
        targets=("nunchaku", "diffusers"),
    ),
    Scheme(
        name="svdquant-nvfp4",
        summary="NVFP4 groups of 16, weights and activations, with a low-rank branch",
        weight=NVFP4_BF16,
        activation=QuantSpec("e2m1", (1, 16), scale="F8_E4M3"),
        modulation=INT4_GROUP64,
        steps=("smooth", "lowrank"),
        rank=32,
        rounding="gptq",
        targets=("nunchaku", "diffusers"),
    ),
)
