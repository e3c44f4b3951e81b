"""Gemma 2, the text encoder of SANA and Lumina 2, as a component of its own.

Names: transformers models/gemma2/modeling_gemma2.py. ComfyUI-GGUF lets in no GGUF file of it.
"""

from __future__ import annotations

from dqconvert.converter import language
from dqconvert.converter.family import Family

FAMILY = Family(
    name="gemma2",
    title="Gemma 2",
    signature=(*language.SIGNATURE, language.FOUR_NORMS),
    foreign=(language.QK_NORM, language.QKV_BIAS),
    optional=(language.HEAD, *language.strange(language.GEMMA_NORMS)),
    dialects=language.dialects(language.GEMMA_NORMS),
    sources=language.SPELLINGS,
    config_of=language.sizes("Gemma2ForCausalLM", 256),
    facts=language.no_facts,
    vocabulary="spiece_model",
    **language.SHARED,
)
