"""Gemma 3, the text encoder of LTX-2, as a component of its own.

Names: transformers models/gemma3/modeling_gemma3.py. ComfyUI-GGUF lets in no GGUF file of it. The
vision tower stays as it is.
"""

from __future__ import annotations

from typing import Any

from dqconvert.converter import language
from dqconvert.converter.family import Family, Infos

_NORMS = (*language.GEMMA_NORMS, *language.QK_NORMS)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The sizes that the shapes imply, in the words of transformers."""
    return language.config_of(infos, "Gemma3ForConditionalGeneration", 256)


FAMILY = Family(
    name="gemma3",
    title="Gemma 3",
    task="",
    aliases={},
    licenses={},
    signature=(*language.SIGNATURE, language.FOUR_NORMS, language.QK_NORM),
    foreign=(language.QKV_BIAS,),
    hidden=language.NORM,
    optional=(language.HEAD, *language.strange(_NORMS)),
    blocks=(language.BLOCKS,),
    linears=language.LINEARS,
    dialects=language.dialects(_NORMS),
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
