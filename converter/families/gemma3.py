"""Gemma 3, the text encoder of LTX-2, as a component of its own.

Names: transformers models/gemma3/modeling_gemma3.py. ComfyUI-GGUF lets in no GGUF file of it. The
vision tower stays as it is.
"""

from __future__ import annotations

from dqconvert.converter import language
from dqconvert.converter.family import Family

_NORMS = (*language.GEMMA_NORMS, *language.QK_NORMS)


FAMILY = Family(
    name="gemma3",
    title="Gemma 3",
    signature=(*language.SIGNATURE, language.FOUR_NORMS, language.QK_NORM),
    foreign=(language.QKV_BIAS,),
    optional=(language.HEAD, *language.strange(_NORMS)),
    dialects=language.dialects(_NORMS),
    sources=language.SPELLINGS,
    config_of=language.sizes("Gemma3ForConditionalGeneration", 256),
    facts=language.no_facts,
    vocabulary="spiece_model",
    **language.SHARED,
)
