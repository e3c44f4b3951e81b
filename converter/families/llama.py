"""LLaMA 3, the text encoder of HunyuanVideo and HiDream, as a component of its own.

Names: transformers models/llama/modeling_llama.py. Mistral without its vision tower is the same
model with other sizes. GGUF files hold q and k with the rows of each head in another order, which
no table here can say, so there are none.
"""

from __future__ import annotations

from dqconvert.converter import language
from dqconvert.converter.family import Family

FAMILY = Family(
    name="llama",
    title="LLaMA or Mistral",
    signature=language.SIGNATURE,
    foreign=(
        language.QK_NORM,
        language.QKV_BIAS,
        language.FOUR_NORMS,
        f"{language.PATCH_MERGER}.weight",
    ),
    optional=(language.HEAD, language.PATCH_MERGER, *language.strange(language.LLAMA_NORMS)),
    dialects=language.dialects(language.LLAMA_NORMS, others=(language.PATCH_MERGER,)),
    sources=language.SPELLINGS,
    config_of=language.sizes("LlamaForCausalLM", 128),
    facts=language.no_facts,
    **language.SHARED,
)
