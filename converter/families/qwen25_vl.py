"""The language model of Qwen2.5-VL, the text encoder of Qwen-Image, as a component of its own.

Names: transformers models/qwen2_5_vl/modeling_qwen2_5_vl.py, as its checkpoints have them; gguf:
llama.cpp's qwen2vl, which ComfyUI-GGUF (loader.py) and stable-diffusion.cpp (name_conversion.cpp)
rename; both decode token_embd where they load or look up. Images go through the vision tower, a
file of its own: qwen25_vl_vision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.family import Entry, Family, Infos, Linear, depth, single

_BLOCK = "model.layers.{i}"
_HEAD = 128
"""Width of an attention head of all sizes; the shapes do not tell."""

_QKV = tuple(f"{_BLOCK}.self_attn.{name}_proj" for name in "qkv")
_GATE, _UP = f"{_BLOCK}.mlp.gate_proj", f"{_BLOCK}.mlp.up_proj"
_LINEARS = (
    *(Linear(name, "attention", "qkv", _QKV[0]) for name in _QKV),
    Linear(f"{_BLOCK}.self_attn.o_proj", "attention", "attention_out"),
    Linear(_GATE, "mlp", "mlp_in", _GATE),
    Linear(_UP, "mlp", "mlp_in", _GATE),
    Linear(f"{_BLOCK}.mlp.down_proj", "mlp", "mlp_out"),
    Linear("lm_head", "final"),
)
_GGUF = (
    Entry("token_embd.weight", ("model.embed_tokens.weight",)),
    *(Entry(f"blk.{{i}}.attn_{x}.*", (f"{name}.*",)) for x, name in zip("qkv", _QKV, strict=True)),
    Entry("blk.{i}.attn_output.*", (f"{_BLOCK}.self_attn.o_proj.*",), bias=False),
    Entry("blk.{i}.attn_norm.weight", (f"{_BLOCK}.input_layernorm.weight",)),
    Entry("blk.{i}.ffn_gate.*", (f"{_GATE}.*",), bias=False),
    Entry("blk.{i}.ffn_up.*", (f"{_UP}.*",), bias=False),
    Entry("blk.{i}.ffn_down.*", (f"{_BLOCK}.mlp.down_proj.*",), bias=False),
    Entry("blk.{i}.ffn_norm.weight", (f"{_BLOCK}.post_attention_layernorm.weight",)),
    Entry("output_norm.weight", ("model.norm.weight",)),
    Entry("output.*", ("lm_head.*",), bias=False),
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The sizes that the shapes imply, in the words of Qwen2_5_VLTextConfig."""
    first = _BLOCK.replace("{i}", "0")
    vocabulary, hidden = infos["model.embed_tokens.weight"].shape
    return {
        "_class_name": "Qwen2_5_VLForConditionalGeneration",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": infos[f"{first}.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": depth(infos, "model.layers"),
        "num_attention_heads": infos[f"{first}.self_attn.q_proj.weight"].shape[0] // _HEAD,
        "num_key_value_heads": infos[f"{first}.self_attn.k_proj.weight"].shape[0] // _HEAD,
        "tie_word_embeddings": "lm_head.weight" not in infos,
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes under llama.cpp's keys."""
    if dialect != "gguf":
        return {}
    sizes = {
        "context_length": 128000,
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "block_count": config["num_hidden_layers"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": single(1e-6),
        "rope.freq_base": 1e6,
        "rope.dimension_sections": [_HEAD // 8, _HEAD * 3 // 16, _HEAD * 3 // 16, 0],
    }
    return {f"qwen2vl.{key}": value for key, value in sizes.items()}


FAMILY = Family(
    name="qwen25_vl",
    title="Qwen2.5-VL",
    task="",
    aliases={},
    licenses={},
    signature=(
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
    ),
    hidden="model.norm.weight",
    optional=("lm_head",),
    blocks=("model.layers",),
    linears=_LINEARS,
    dialects={"gguf": _GGUF, "transformers": ()},
    sources=("gguf", "transformers"),
    prefixes=(),
    unread=("visual.",),
    config_of=_config_of,
    assumed=("num_attention_heads", "num_key_value_heads"),
    facts=_facts,
    policies={"gguf": {"lm_head": "weight"}},
    architecture="qwen2vl",
)
