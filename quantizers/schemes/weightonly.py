"""Weights alone are quantized; the runtime multiplies in 16 bit.

GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978) learn from the inputs; NF4 (QLoRA arXiv
2305.14314) and the rows of LLM.int8 (arXiv 2208.07339) do not.
"""

from dqconvert.quantizers.schemes.plain8 import INT8_ROW
from dqconvert.quantizers.spec import QuantSpec, Scheme

INT4_GROUP128 = QuantSpec("int4", (1, 128), full_range=True)

SCHEMES = (
    Scheme(
        name="gptq-w4a16",
        summary="int4 groups by GPTQ, activations in 16 bit",
        weight=INT4_GROUP128,
        activation=None,
        rounding="gptq",
        calibrated=True,
        targets=("diffusers", "vllm", "comfyui"),
    ),
    Scheme(
        name="awq-w4a16",
        summary="int4 groups by AWQ and GPTQ, activations in 16 bit",
        weight=INT4_GROUP128,
        activation=None,
        steps=("fold", "clip"),
        rounding="gptq",
        calibrated=True,
        targets=("diffusers", "vllm", "comfyui"),
    ),
    Scheme(
        name="bnb-nf4",
        summary="NF4 blocks of 64, activations in 16 bit",
        weight=QuantSpec("nf4", (1, 64), reciprocal=True),
        activation=None,
        targets=("diffusers",),
    ),
    Scheme(
        name="bnb-int8",
        summary="LLM.int8 rows, outlier channels of the activations in 16 bit",
        weight=INT8_ROW,
        activation=None,
        targets=("diffusers",),
    ),
)
