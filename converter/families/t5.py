"""The T5 encoder (XXL, version 1.1) of FLUX, Stable Diffusion 3 and others, as a component.

Names: transformers models/t5/modeling_t5.py; gguf: llama.cpp's T5 encoder, as for UMT5, of which
it differs in one thing: only the first block knows positions. Readers of its GGUF have the
tokenizer themselves.
"""

from __future__ import annotations

from typing import Any

from dqconvert.converter.families import umt5
from dqconvert.converter.family import Family, Infos

_POSITIONS = f"encoder.block.{{i}}.layer.0.SelfAttention.{umt5.POSITIONS}"


def _config_of(infos: Infos) -> dict[str, Any]:
    """The T5EncoderModel config that the shapes imply."""
    return umt5.config_of(infos) | {
        "_class_name": "T5EncoderModel",
        "feed_forward_proj": "gated-gelu",
    }


FAMILY = Family(
    name="t5",
    title="T5 encoder",
    task="",
    aliases={},
    licenses={},
    signature=(
        "shared.weight",
        "encoder.final_layer_norm.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "encoder.block.0.layer.1.DenseReluDense.wi_1.weight",
        _POSITIONS.replace("{i}", "0"),
    ),
    foreign=(_POSITIONS.replace("{i}", "1"),),
    hidden="encoder.final_layer_norm.weight",
    scattered=(_POSITIONS,),
    blocks=("encoder.block",),
    linears=umt5.LINEARS,
    dialects={"gguf": umt5.GGUF, "transformers": (), "comfyui": ()},
    sources=("gguf", "transformers"),
    prefixes=(),
    unread=("encoder.embed_tokens.weight",),  # the same as shared.weight
    config_of=_config_of,
    facts=umt5.facts,
    policies=umt5.POLICIES,
    architecture=umt5.ARCHITECTURE,
    spellings={"diffusers": ("transformers",)},
)
