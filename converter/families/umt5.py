"""The UMT5 text encoder of Wan, as a component of its own.

Names: transformers models/umt5/modeling_umt5.py; native: Wan-Video wan/modules/t5.py, which
LightX2V shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.family import Entry, Family, Infos, Linear, depth

_BLOCK = "encoder.block.{i}"
_ATTENTION, _MLP = f"{_BLOCK}.layer.0.SelfAttention", f"{_BLOCK}.layer.1.DenseReluDense"
_POSITIONS = "relative_attention_bias.weight"

_LINEARS = (
    *(Linear(f"{_ATTENTION}.{name}", "attention", "qkv", f"{_ATTENTION}.q") for name in "qkv"),
    Linear(f"{_ATTENTION}.o", "attention", "attention_out"),
    Linear(f"{_MLP}.wi_0", "mlp", "mlp_in", f"{_MLP}.wi_0"),
    Linear(f"{_MLP}.wi_1", "mlp", "mlp_in", f"{_MLP}.wi_0"),
    Linear(f"{_MLP}.wo", "mlp", "mlp_out"),
)


def _linear(theirs: str, ours: str) -> Entry:
    return Entry(f"blocks.{{i}}.{theirs}.*", (f"{ours}.*",), bias=False)


_NATIVE = (
    Entry("token_embedding.weight", ("shared.weight",)),
    *(_linear(f"attn.{name}", f"{_ATTENTION}.{name}") for name in "qkvo"),
    Entry("blocks.{i}.pos_embedding.embedding.weight", (f"{_ATTENTION}.{_POSITIONS}",)),
    Entry("blocks.{i}.norm1.weight", (f"{_BLOCK}.layer.0.layer_norm.weight",)),
    _linear("ffn.gate.0", f"{_MLP}.wi_0"),
    _linear("ffn.fc1", f"{_MLP}.wi_1"),
    _linear("ffn.fc2", f"{_MLP}.wo"),
    Entry("blocks.{i}.norm2.weight", (f"{_BLOCK}.layer.1.layer_norm.weight",)),
    Entry("norm.weight", ("encoder.final_layer_norm.weight",)),
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The UMT5EncoderModel config that the shapes imply."""
    first = _ATTENTION.replace("{i}", "0")
    vocabulary, hidden = infos["shared.weight"].shape
    buckets, heads = infos[f"{first}.{_POSITIONS}"].shape
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


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"component": "t5"}


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
        f"encoder.block.1.layer.0.SelfAttention.{_POSITIONS}",
    ),
    hidden="encoder.final_layer_norm.weight",
    blocks=("encoder.block",),
    linears=_LINEARS,
    dialects={"native": _NATIVE, "transformers": (), "lightx2v": _NATIVE},
    sources=("native", "transformers"),
    prefixes=(),
    # The same as shared.weight; ComfyUI's files hold the tokenizer.
    unread=("encoder.embed_tokens.weight", "spiece_model"),
    config_of=_config_of,
    facts=_facts,
)
