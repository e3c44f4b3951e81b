"""The UMT5 text encoder of Wan, as a component of its own.

Names: transformers models/umt5/modeling_umt5.py; native: Wan-Video wan/modules/t5.py, which
LightX2V shares; gguf: llama.cpp's T5 encoder, which ComfyUI-GGUF (loader.py) and
stable-diffusion.cpp (name_conversion.cpp) rename. ComfyUI-GGUF takes a token embedding of 256384 x
4096 for this model and makes the tokenizer from the file's metadata; it decodes that tensor to F16
while it loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.family import Entry, Family, Infos, Linear, depth, single

_BLOCK = "encoder.block.{i}"
_ATTENTION, _MLP = f"{_BLOCK}.layer.0.SelfAttention", f"{_BLOCK}.layer.1.DenseReluDense"
POSITIONS = "relative_attention_bias.weight"

LINEARS = (
    *(Linear(f"{_ATTENTION}.{name}", "attention", "qkv", f"{_ATTENTION}.q") for name in "qkv"),
    Linear(f"{_ATTENTION}.o", "attention", "attention_out"),
    Linear(f"{_MLP}.wi_0", "mlp", "mlp_in", f"{_MLP}.wi_0"),
    Linear(f"{_MLP}.wi_1", "mlp", "mlp_in", f"{_MLP}.wi_0"),
    Linear(f"{_MLP}.wo", "mlp", "mlp_out"),
)

POLICIES = {"diffusers": {f"{_MLP}.wo": None}}
"""transformers keeps it in fp32 (_keep_in_fp32_modules) whatever quantizes the rest."""


def _linear(theirs: str, ours: str) -> Entry:
    return Entry(f"blocks.{{i}}.{theirs}.*", (f"{ours}.*",), bias=False)


_NATIVE = (
    Entry("token_embedding.weight", ("shared.weight",)),
    *(_linear(f"attn.{name}", f"{_ATTENTION}.{name}") for name in "qkvo"),
    Entry("blocks.{i}.pos_embedding.embedding.weight", (f"{_ATTENTION}.{POSITIONS}",)),
    Entry("blocks.{i}.norm1.weight", (f"{_BLOCK}.layer.0.layer_norm.weight",)),
    _linear("ffn.gate.0", f"{_MLP}.wi_0"),
    _linear("ffn.fc1", f"{_MLP}.wi_1"),
    _linear("ffn.fc2", f"{_MLP}.wo"),
    Entry("blocks.{i}.norm2.weight", (f"{_BLOCK}.layer.1.layer_norm.weight",)),
    Entry("norm.weight", ("encoder.final_layer_norm.weight",)),
)


def _gguf(theirs: str, ours: str) -> Entry:
    return Entry(f"enc.blk.{{i}}.{theirs}.*", (f"{ours}.*",), bias=False)


GGUF = (
    Entry("token_embd.weight", ("shared.weight",)),
    *(_gguf(f"attn_{name}", f"{_ATTENTION}.{name}") for name in "qkvo"),
    Entry("enc.blk.{i}.attn_rel_b.weight", (f"{_ATTENTION}.{POSITIONS}",)),
    Entry("enc.blk.{i}.attn_norm.weight", (f"{_BLOCK}.layer.0.layer_norm.weight",)),
    _gguf("ffn_gate", f"{_MLP}.wi_0"),
    _gguf("ffn_up", f"{_MLP}.wi_1"),
    _gguf("ffn_down", f"{_MLP}.wo"),
    Entry("enc.blk.{i}.ffn_norm.weight", (f"{_BLOCK}.layer.1.layer_norm.weight",)),
    Entry("enc.output_norm.weight", ("encoder.final_layer_norm.weight",)),
)
"""llama.cpp's names of a gated T5 encoder."""

ARCHITECTURE = "t5encoder"


def config_of(infos: Infos) -> dict[str, Any]:
    """The UMT5EncoderModel config that the shapes imply."""
    first = _ATTENTION.replace("{i}", "0")
    vocabulary, hidden = infos["shared.weight"].shape
    buckets, heads = infos[f"{first}.{POSITIONS}"].shape
    return {
        "_class_name": "UMT5EncoderModel",
        "vocab_size": vocabulary,
        "d_model": hidden,
        "d_kv": infos[f"{first}.q.weight"].shape[0] // heads,
        "d_ff": infos[f"{_MLP.replace('{i}', '0')}.wo.weight"].shape[1],
        "num_layers": depth(infos, "encoder.block"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The component as LightX2V calls it, or the sizes under llama.cpp's keys."""
    if dialect != "gguf":
        return {"component": "t5"}
    sizes = {
        "context_length": 512,
        "embedding_length": config["d_model"],
        "feed_forward_length": config["d_ff"],
        "block_count": config["num_layers"],
        "attention.head_count": config["num_heads"],
        "attention.key_length": config["d_kv"],
        "attention.value_length": config["d_kv"],
        "attention.layer_norm_epsilon": single(1e-6),
        "attention.layer_norm_rms_epsilon": single(1e-6),
        "attention.relative_buckets_count": config["relative_attention_num_buckets"],
    }
    return {f"{ARCHITECTURE}.{key}": value for key, value in sizes.items()}


FAMILY = Family(
    name="umt5",
    title="UMT5 encoder",
    task="",
    aliases={},
    licenses={},
    signature=(
        "shared.weight",
        "encoder.final_layer_norm.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "encoder.block.0.layer.1.DenseReluDense.wi_1.weight",
        # T5 has it in the first block only.
        f"encoder.block.1.layer.0.SelfAttention.{POSITIONS}",
    ),
    hidden="encoder.final_layer_norm.weight",
    blocks=("encoder.block",),
    linears=LINEARS,
    dialects={
        "native": _NATIVE,
        "transformers": (),
        "lightx2v": _NATIVE,
        "gguf": GGUF,
        "comfyui": (),
    },
    sources=("native", "transformers", "gguf"),
    architecture=ARCHITECTURE,
    tokens="shared.weight",
    prefixes=(),
    unread=("encoder.embed_tokens.weight",),  # the same as shared.weight
    config_of=config_of,
    facts=facts,
    policies=POLICIES,
    spellings={"diffusers": ("transformers",)},
    passengers={"spiece_model": ("comfyui",)},
    vocabulary="spiece_model",
)
