"""Mistral Small 3, the text encoder of FLUX.2, and Ministral 3, that of ERNIE-Image.

Names: transformers models/mistral3/modeling_mistral3.py. The vision tower and what joins it stay
as they are. GGUF: see llama.py.
"""

from __future__ import annotations

from typing import Any

from dqconvert.converter import language
from dqconvert.converter.family import Family, Infos


def _config_of(infos: Infos) -> dict[str, Any]:
    """The sizes that the shapes imply, in the words of transformers."""
    return language.config_of(infos, "Mistral3ForConditionalGeneration", 128)


FAMILY = Family(
    name="mistral3",
    title="Mistral 3",
    task="",
    aliases={},
    licenses={},
    signature=(*language.SIGNATURE, f"{language.PATCH_MERGER}.weight"),
    foreign=(language.QK_NORM, language.QKV_BIAS, language.FOUR_NORMS),
    hidden=language.NORM,
    optional=(language.HEAD, language.PATCH_MERGER, *language.strange(language.LLAMA_NORMS)),
    blocks=(language.BLOCKS,),
    linears=language.LINEARS,
    dialects=language.dialects(language.LLAMA_NORMS, others=(language.PATCH_MERGER,)),
    sources=language.SPELLINGS,
    prefixes=(),
    config_of=_config_of,
    assumed=language.ASSUMED,
    facts=language.no_facts,
    spellings={"diffusers": language.SPELLINGS},
    spelling=language.spelling,
    passengers=language.PASSENGERS,
    vocabulary="tekken_model",
)
