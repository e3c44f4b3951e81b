"""The language model of Qwen2.5-VL, the text encoder of Qwen-Image, as a component of its own.

Names: transformers models/qwen2_5_vl/modeling_qwen2_5_vl.py, as its checkpoints have them; gguf:
llama.cpp's qwen2vl, which ComfyUI-GGUF (loader.py) and stable-diffusion.cpp (name_conversion.cpp)
rename; both decode token_embd where they load or look up. Images go through the vision tower, a
file of its own: qwen25_vl_vision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter import language
from dqconvert.converter.family import Family, Infos

_HEAD = 128
"""Width of an attention head of all sizes; the shapes do not tell."""


def _config_of(infos: Infos) -> dict[str, Any]:
    """The sizes that the shapes imply, in the words of Qwen2_5_VLTextConfig."""
    found = language.config_of(infos, "Qwen2_5_VLForConditionalGeneration", _HEAD)
    return {key: value for key, value in found.items() if key != "head_dim"}


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes under llama.cpp's keys."""
    if dialect != "gguf":
        return {}
    said = language.facts({**config, "head_dim": _HEAD}, "qwen2vl", 128000, 1e6)
    sections = [_HEAD // 8, _HEAD * 3 // 16, _HEAD * 3 // 16, 0]
    return said | {"qwen2vl.rope.dimension_sections": sections}


FAMILY = Family(
    name="qwen25_vl",
    title="Qwen2.5-VL",
    signature=(*language.SIGNATURE, language.QKV_BIAS),
    foreign=(language.QK_NORM, language.FOUR_NORMS),
    optional=(language.HEAD, *language.strange(language.LLAMA_NORMS, bias=True)),
    dialects={
        **language.dialects(language.LLAMA_NORMS, bias=True),
        "gguf": language.gguf(language.GGUF_NORMS, bias=True),
    },
    sources=(*language.SPELLINGS, "gguf"),
    config_of=_config_of,
    facts=_facts,
    policies={"gguf": {language.HEAD: "weight"}},
    architecture="qwen2vl",
    **language.SHARED,
)
