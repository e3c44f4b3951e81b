"""Mistral Small 3, the text encoder of FLUX.2, and Ministral 3, that of ERNIE-Image.

Names: transformers models/mistral3/modeling_mistral3.py. The vision tower and what joins it stay
as they are. GGUF: see llama.py.
"""

from __future__ import annotations

from dqconvert.converter import language
from dqconvert.converter.family import Family

FAMILY = Family(
    name="mistral3",
    title="Mistral 3",
    signature=(*language.SIGNATURE, f"{language.PATCH_MERGER}.weight"),
    foreign=(language.QK_NORM, language.QKV_BIAS, language.FOUR_NORMS),
    optional=(language.HEAD, language.PATCH_MERGER, *language.strange(language.LLAMA_NORMS)),
    dialects=language.dialects(language.LLAMA_NORMS, others=(language.PATCH_MERGER,)),
    sources=language.SPELLINGS,
    config_of=language.sizes("Mistral3ForConditionalGeneration", 128),
    facts=language.no_facts,
    vocabulary="tekken_model",
    **language.SHARED,
)
