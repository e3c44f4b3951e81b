"""Gemma 2, the text encoder of SANA and Lumina 2, as a component of its own.

Names: transformers models/gemma2/modeling_gemma2.py. ComfyUI-GGUF lets in no GGUF file of it.
"""

from __future__ import annotations

from typing import Any

from dqconvert.converter import language
from dqconvert.converter.family import Family, Infos


def _config_of(infos: Infos) -> dict[str, Any]:
    """The sizes that the shapes imply, in the words of transformers."""
    return language.config_of(infos, "Gemma2ForCausalLM", 256)


FAMILY = Family(
    name="gemma2",
    title="Gemma 2",
    task="",
    aliases={},
    licenses={},
    signature=(*language.SIGNATURE, language.FOUR_NORMS),
    foreign=(language.QK_NORM, language.QKV_BIAS),
    hidden=language.NORM,
    optional=(language.HEAD, *language.strange(language.GEMMA_NORMS)),
    blocks=(language.BLOCKS,),
    linears=language.LINEARS,
    dialects=language.dialects(language.GEMMA_NORMS),
    sources=language.SPELLINGS,
    prefixes=(),
    config_of=_config_of,
    assumed=language.ASSUMED,
    facts=language.no_facts,
    spellings={"diffusers": language.SPELLINGS},
    spelling=language.spelling,
    passengers=language.PASSENGERS,
    vocabulary="spiece_model",
)
