"""Plain 8-bit formats: a scale and a rounding, nothing learned."""

from dqconvert.quantizers.spec import ALL, QuantSpec, Scheme

SCHEMES = (
    Scheme(
        name="int8",
        summary="int8 per output channel, activations per token",
        weight=QuantSpec("int8", (1, ALL), floor=1e-30),
        activation=QuantSpec("int8", (1, ALL), floor=1e-30),
        targets=("comfyui",),
    ),
    Scheme(
        name="fp8-tensor",
        summary="e4m3 per tensor, activations static",
        weight=QuantSpec("e4m3", (ALL, ALL), reciprocal=True),
        activation=QuantSpec("e4m3", (ALL, ALL), reciprocal=True),
        targets=("comfyui",),
    ),
)
