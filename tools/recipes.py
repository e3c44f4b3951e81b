"""The rows of the quality table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dqconvert.quantizers.spec import NEEDS_IMPORTANCE


@dataclass(frozen=True, slots=True)
class Row:
    """A recipe. rounding, target, steps, rank: None for the scheme's; more: words of the job.

    like: the scheme whose plan it borrows where no runtime of the scheme quantizes all of FLUX.1's
    layers; the result is then not packed.
    """

    title: str
    scheme: str
    rounding: str | None = None
    target: str | None = None
    calibrated: bool = True
    steps: tuple[str, ...] | None = None
    rank: int | None = None
    smooth: str = "auto"
    precondition: str = "off"
    like: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


INT4, NVFP4 = "svdquant-w4a4", "svdquant-nvfp4"
PLAIN = (
    "int8", "fp8", "fp8-tensor", "fp8-e5m2", "fp8-block128", "mxfp8", "mxfp6", "mxfp4", "nvfp4",
    "convrot-int8", "convrot-w4a4", "convrot-mixed", "convrot-w4a8",
)  # fmt: skip
TARGETS = {"fp8": "diffusers"}
LIKE = {"mxfp6": "mxfp8", "mxfp4": "mxfp8", "fp8-block128": "mxfp8"}


def _plain() -> list[Row]:
    """Each plain and rotated scheme under each rounding, and preconditioned."""
    found = []
    for name in PLAIN:
        target, like = TARGETS.get(name, "comfyui"), LIKE.get(name)
        for rounding in ("rtn", "mse", "gptq"):
            found.append(Row(f"{name}, {rounding}", name, rounding, target, like=like))
        if like is None:  # what is folded is judged under the scheme of the plan
            title = f"{name}, gptq, preconditioned"
            found.append(Row(title, name, "gptq", target, precondition="auto"))
    return found


UNIVERSAL = (
    "q8_0", "q6_k", "q5_1", "q5_k", "q5_0", "q4_1", "q4_k", "q4_0", "iq4_nl", "iq4_xs", "q3_k",
    "q2_k",
)  # fmt: skip
"""Block types that all readers of GGUF decode fast."""

RARE = (
    "mxfp4", "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "tq2_0", "iq2_xxs", "iq1_m", "tq1_0", "iq1_s",
)  # fmt: skip
MIXES = ("q2_k", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_m")
BITS = (2.7, 3.5, 4.5, 4.57, 5.5, 6.5)


def _gguf() -> list[Row]:
    """Block types without, with calibrated importance, and by GPTQ; mixes; mixes by error."""
    found = []
    for name in UNIVERSAL:
        for rounding in ("rtn", "mse", "gptq"):
            pure = {"layout": "pure"} if name in ("q2_k", "q4_0", "q5_0") else {}
            title = f"gguf-{name}, {rounding}"
            found.append(Row(title, f"gguf-{name}", rounding, "gguf", more=pure))
    for name in RARE:
        for rounding in ("mse",) if name in NEEDS_IMPORTANCE else ("rtn", "mse"):
            found.append(Row(f"gguf-{name}, {rounding}", f"gguf-{name}", rounding, "gguf"))
    found += [Row(f"gguf-{name}, mix", f"gguf-{name}", "gptq", "gguf") for name in MIXES]
    for bits in BITS:
        title = f"gguf-auto --bits {bits}"
        found.append(Row(title, "gguf-auto", "gptq", "gguf", more={"bits": bits}))
    return found


RECIPES = (
    *_plain(),
    *_gguf(),
    Row("bnb-nf4", "bnb-nf4"),
    Row("bnb-int8", "bnb-int8"),
    Row("gptq-w4a16 g128, rtn", "gptq-w4a16", "rtn"),
    Row("gptq-w4a16 g128", "gptq-w4a16"),
    Row("gptq-w4a16 g64", "gptq-w4a16", more={"group_size": 64}),
    Row("awq-w4a16 g128, no GPTQ", "awq-w4a16", "rtn"),
    Row("awq-w4a16 g128", "awq-w4a16"),
    Row("W4A4 g64, RTN", INT4, "rtn", steps=()),
    Row("W4A4 g64, smoothing", INT4, "rtn", steps=("smooth",)),
    Row("W4A4 g64, smoothing + GPTQ", INT4, "gptq", steps=("smooth",)),
    Row("svdquant-w4a4 r4, RTN", INT4, "rtn", rank=4),
    Row("svdquant-w4a4 r4, GPTQ", INT4, "gptq", rank=4),
    Row("svdquant-w4a4 r4, GPTQ, preconditioned", INT4, "gptq", rank=4, precondition="auto"),
    Row("svdquant-w4a4 r32, data-free", INT4, "rtn", calibrated=False),
    Row("svdquant-w4a4 r32, RTN, no smoothing", INT4, "rtn", smooth="off"),
    Row("svdquant-w4a4 r32, RTN", INT4, "rtn"),
    Row("svdquant-w4a4 r32, GPTQ (default)", INT4, "gptq"),
    Row("svdquant-w4a4 r32, GPTQ, preconditioned", INT4, "gptq", precondition="auto"),
    Row("NVFP4 bf16 scale, RTN", NVFP4, "rtn", steps=()),
    Row("svdquant-nvfp4 r4, RTN", NVFP4, "rtn", rank=4),
    Row("svdquant-nvfp4 r4, GPTQ", NVFP4, "gptq", rank=4),
    Row("svdquant-nvfp4 r32, data-free", NVFP4, "rtn", calibrated=False),
    Row("svdquant-nvfp4 r32, RTN", NVFP4, "rtn"),
    Row("svdquant-nvfp4 r32, GPTQ (default)", NVFP4, "gptq"),
)
