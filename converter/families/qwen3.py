"""Qwen3, the text encoder of Z-Image and FLUX.2 klein, as a component of its own.

Names: transformers models/qwen3/modeling_qwen3.py; gguf: llama.cpp's qwen3, which ComfyUI-GGUF
(loader.py) renames.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter import language
from dqconvert.converter.family import Family

_NORMS = (*language.LLAMA_NORMS, *language.QK_NORMS)


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes under llama.cpp's keys."""
    if dialect != "gguf":
        return {}
    return language.facts(config, "qwen3", 40960, 1e6)


FAMILY = Family(
    name="qwen3",
    title="Qwen3",
    signature=(*language.SIGNATURE, language.QK_NORM),
    foreign=(language.QKV_BIAS, language.FOUR_NORMS, f"{language.VISUAL_POSITIONS}.weight"),
    optional=(language.HEAD, language.VISUAL_POSITIONS, *language.strange(_NORMS)),
    dialects={
        **language.dialects(_NORMS, others=(language.VISUAL_POSITIONS,)),
        "gguf": language.gguf(language.GGUF_NORMS | language.GGUF_QK_NORMS),
    },
    sources=(*language.SPELLINGS, "gguf"),
    config_of=language.sizes("Qwen3ForCausalLM", 128),
    facts=_facts,
    policies={"gguf": {language.HEAD: "weight"}},
    architecture="qwen3",
    **language.SHARED,
)
