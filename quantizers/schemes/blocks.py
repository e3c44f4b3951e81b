"""Small blocks with scales of their own: the OCP microscaling formats, and NVFP4.

Sources: OCP Microscaling Formats 1.0; the scale is rounded up, as LightX2V's kernels,
comfy-kitchen and torchao's RCEIL do. NVFP4: two levels of scales, e4m3 for each 16 weights and
fp32 for the tensor, amax / (448 · 6).
"""

from dqconvert.quantizers.spec import QuantSpec, Scheme

MXFP8 = QuantSpec("e4m3", (1, 32), scale="F8_E8M0")
MXFP6 = QuantSpec("e3m2", (1, 32), scale="F8_E8M0")
MXFP4 = QuantSpec("e2m1", (1, 32), scale="F8_E8M0")
NVFP4 = QuantSpec("e2m1", (1, 16), scale="F8_E4M3", tensor_scale="F32")

SCHEMES = (
    Scheme(
        name="mxfp8",
        summary="e4m3 with a power of two per 32, activations the same",
        weight=MXFP8,
        activation=MXFP8,
        rounding="gptq",
        targets=("comfyui", "lightx2v", "sglang", "vllm"),
    ),
    Scheme(
        name="mxfp6",
        summary="e3m2 with a power of two per 32, activations mxfp8",
        weight=MXFP6,
        activation=MXFP8,
        rounding="gptq",
        targets=("lightx2v",),
    ),
    Scheme(
        name="mxfp4",
        summary="e2m1 with a power of two per 32, activations the same",
        weight=MXFP4,
        activation=MXFP4,
        rounding="gptq",
        targets=("lightx2v", "vllm"),
    ),
    Scheme(
        name="nvfp4",
        summary="e2m1 with an e4m3 scale per 16 and one of the tensor, activations the same",
        weight=NVFP4,
        activation=NVFP4,
        rounding="gptq",
        targets=("comfyui", "sglang", "vllm", "lightx2v", "diffusers"),
    ),
)
