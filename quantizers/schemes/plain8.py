"""Plain 8-bit formats: a scale and a rounding, nothing learned."""

from dqconvert.quantizers.spec import ALL, QuantSpec, Scheme

INT8_ROW = QuantSpec("int8", (1, ALL), floor=1e-30)
FP8_ROW = QuantSpec("e4m3", (1, ALL))
FP8_TENSOR = QuantSpec("e4m3", (ALL, ALL), reciprocal=True)
E5M2_TENSOR = QuantSpec("e5m2", (ALL, ALL), reciprocal=True)
FP8_BLOCK = QuantSpec("e4m3", (128, 128), ragged=True)

SCHEMES = (
    Scheme(
        name="int8",
        summary="int8 per output channel, activations per token",
        weight=INT8_ROW,
        activation=INT8_ROW,
        rounding="gptq",
        targets=("comfyui", "lightx2v", "vllm", "diffusers"),
    ),
    Scheme(
        name="fp8",
        summary="e4m3 per output channel, activations per token",
        weight=FP8_ROW,
        activation=FP8_ROW,
        rounding="gptq",
        targets=("lightx2v", "vllm", "diffusers"),
    ),
    Scheme(
        name="fp8-tensor",
        summary="e4m3 per tensor, activations static",
        weight=FP8_TENSOR,
        activation=FP8_TENSOR,
        rounding="gptq",
        targets=("comfyui", "sglang", "vllm", "lightx2v"),
    ),
    Scheme(
        name="fp8-e5m2",
        summary="e5m2 per tensor, activations static",
        weight=E5M2_TENSOR,
        activation=E5M2_TENSOR,
        rounding="gptq",
        targets=("comfyui",),
    ),
    Scheme(
        name="fp8-block128",
        summary="e4m3 in blocks of 128x128, activations in groups of 128",
        weight=FP8_BLOCK,
        activation=QuantSpec("e4m3", (1, 128), ragged=True),
        rounding="gptq",
        targets=("sglang", "vllm", "lightx2v", "diffusers"),
    ),
    Scheme(
        name="fp8-cast",
        summary="e4m3 without scales: storage only, computed in 16 bit",
        weight=QuantSpec("e4m3", (ALL, ALL), unit=True),
        activation=None,
        targets=("diffusers",),
    ),
)
