"""Who can read a GGUF file of a diffusion model, and why not. Torch-free.

Facts of ComfyUI-GGUF (loader.py, dequant.py, nodes.py), of diffusers (quantizers/gguf/utils.py,
loaders/single_file_model.py, single_file_utils.py) and of stable-diffusion.cpp (model_loader.cpp,
gguf_io.cpp).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dqconvert.quantizers.spec import BLOCKS, TensorInfo

Infos = Mapping[str, TensorInfo]

NAME_LIMIT = 127
"""Characters of a name; stock ggml stops at 63, which no reader of diffusion models uses."""

CPP_NAME, CPP_RANK = 160, 4
"""stable-diffusion.cpp's GGML_MAX_NAME and GGML_MAX_DIMS, beyond which it has a second reader."""

FAST = (
    "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
    "IQ4_XS",
)  # fmt: skip
"""Types that torch decodes in ComfyUI-GGUF and diffusers; diffusers has no others."""

IMAGE = {
    "flux", "sd1", "sdxl", "sd3", "aura", "hidream", "cosmos", "ltxv", "hyvid", "wan", "lumina2",
    "qwen_image",
}  # fmt: skip
TEXT = {"t5", "t5encoder", "llama", "qwen2vl", "qwen3", "qwen3vl"}
VISION = {"clip-vision", "mmproj"}

FLUX_WIDTH = 3072
"""Hidden size that diffusers' converter of FLUX.1's names takes for granted."""


def readers(infos: Infos, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Each reader's verdict in a line: "yes", "yes, but ..." or "no: ..."."""
    found = {
        "ComfyUI-GGUF": (_comfyui, _comfyui_slow),
        "diffusers": (_diffusers, _nothing),
        "stable-diffusion.cpp": (_cpp, _nothing),
    }
    return {
        name: _verdict(list(against(infos, metadata)), list(but(infos, metadata)))
        for name, (against, but) in found.items()
    }


def _verdict(against: list[str], but: list[str]) -> str:
    if against:
        more = f" (and {len(against) - 1} more)" if len(against) > 1 else ""
        return f"no: {against[0]}{more}"
    return f"yes, but {but[0]}" if but else "yes"


def _nothing(infos: Infos, metadata: Mapping[str, Any]) -> Iterator[str]:
    yield from ()


def _comfyui(infos: Infos, metadata: Mapping[str, Any]) -> Iterator[str]:
    name, kind = metadata.get("general.architecture"), metadata.get("general.type")
    if name is not None and name not in IMAGE | TEXT and kind not in VISION:
        yield f"it does not know the architecture '{name}'"
    yield from _bare(infos, ("F32", "F16"))


def _comfyui_slow(infos: Infos, metadata: Mapping[str, Any]) -> Iterator[str]:
    if "general.architecture" not in metadata:
        yield "it has to guess the architecture, which the file does not say"
    slow = sorted({info.dtype for info in infos.values()} & BLOCKS.keys() - set(FAST))
    if slow:
        yield f"it decodes {', '.join(slow)} in numpy at every step, which is very slow"


def _diffusers(infos: Infos, metadata: Mapping[str, Any]) -> Iterator[str]:
    name = metadata.get("general.architecture")
    if name in TEXT or metadata.get("general.type") in VISION:
        yield "it reads transformers alone"
    unknown = sorted({info.dtype for info in infos.values()} & BLOCKS.keys() - set(FAST))
    if unknown:
        yield f"it does not know {', '.join(unknown)}"
    yield from _bare(infos, ("F32", "F16"))
    width = infos.get("img_in.weight")
    flux = "double_blocks.0.img_mod.lin.weight" in infos
    if flux and width is not None and width.shape[0] != FLUX_WIDTH:
        yield f"its converter takes FLUX.1 to be {FLUX_WIDTH} wide; this is {width.shape[0]}"


def _cpp(infos: Infos, metadata: Mapping[str, Any]) -> Iterator[str]:
    """It has llama.cpp's names too, and all types; but see gguf_header."""
    key = next((key for key, value in metadata.items() if isinstance(value, list)), None)
    for name, info in infos.items():
        if key is not None and (len(info.shape) > CPP_RANK or len(name.encode()) >= CPP_NAME):
            yield f"beside {name} {list(info.shape)} it cannot get past the list {key}"


def _bare(infos: Infos, allowed: tuple[str, ...]) -> Iterator[str]:
    """Tensors of no linear in a dtype that is only decoded in linears."""
    for name, info in infos.items():
        linear = name.endswith(".weight") and len(info.shape) == 2
        if (
            not linear
            and info.dtype not in allowed
            and (info.dtype in BLOCKS or info.dtype == "BF16")
        ):
            yield f"{name} is {info.dtype}, and only linears are decoded"
