"""LLaMA 3, the text encoder of HunyuanVideo and HiDream, as a component of its own.

Names: transformers models/llama/modeling_llama.py. Mistral without its vision tower is the same
model with other sizes. GGUF files hold q and k with the rows of each head in another order, which
no table here can say, so there are none.
"""

from __future__ import annotations

from typing import Any

from dqconvert.converter import language
from dqconvert.converter.family import Family, Infos


def _config_of(infos: Infos) -> dict[str, Any]:
    """The sizes that the shapes imply, in the words of transformers."""
    return language.config_of(infos, "LlamaForCausalLM", 128)


FAMILY = Family(
    name="llama",
    title="LLaMA or Mistral",
    task="",
    aliases={},
    licenses={},
    signature=language.SIGNATURE,
    foreign=(
        language.QK_NORM,
        language.QKV_BIAS,
        language.FOUR_NORMS,
        f"{language.PATCH_MERGER}.weight",
    ),
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
)
