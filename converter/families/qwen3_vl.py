"""Qwen3-VL, the text encoder of Qwen-Image 2.1 and Krea 2, as a component of its own.

Names: transformers models/qwen3_vl/modeling_qwen3_vl.py; gguf: llama.cpp's qwen3vl, whose tensors
are those of Qwen3: ComfyUI-GGUF (loader.py) renames them alike. The vision tower stays as it is,
and a GGUF file leaves it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter import language
from dqconvert.converter.family import Family

_DEEP = {"qwen3vl.n_deepstack_layers": 3, "qwen3vl.rope.dimension_sections": [24, 20, 20, 0]}
"""Where images go in, and how positions are split: alike in all sizes."""

_NORMS = (*language.LLAMA_NORMS, *language.QK_NORMS)


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes under llama.cpp's keys."""
    if dialect != "gguf":
        return {}
    return language.facts(config, "qwen3vl", 262144, 5e6) | _DEEP


FAMILY = Family(
    name="qwen3_vl",
    title="Qwen3-VL",
    signature=(*language.SIGNATURE, language.QK_NORM, f"{language.VISUAL_POSITIONS}.weight"),
    foreign=(language.QKV_BIAS, language.FOUR_NORMS),
    optional=(language.HEAD, language.VISUAL_POSITIONS, *language.strange(_NORMS)),
    dialects={
        **language.dialects(_NORMS, others=(language.VISUAL_POSITIONS,)),
        "gguf": language.gguf(language.GGUF_NORMS | language.GGUF_QK_NORMS),
    },
    sources=language.SPELLINGS,
    config_of=language.sizes("Qwen3VLForConditionalGeneration", 128),
    facts=_facts,
    policies={"gguf": {language.HEAD: "weight"}},
    architecture="qwen3vl",
    **language.SHARED,
)
