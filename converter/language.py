"""Language models as text encoders: what the tables of their families share. Torch-free.

Canonical names are those of a model with a head (LlamaForCausalLM and its like). Checkpoints spell
them in five ways, by what class was saved, and by which version of transformers:

    transformers    model.layers.0 ...                    lm_head        also ComfyUI's files
    bare            layers.0 ...                                         LlamaModel
    composite       model.language_model.layers.0 ...     lm_head        Qwen3VLForCond...
    submodel        language_model.layers.0 ...                          Qwen3VLModel
    llava           language_model.model.layers.0 ...     language_model.lm_head

Beside the language model such a checkpoint may hold a vision tower, which stays as it is where a
runtime loads both from one file.

Sources: transformers conversion_mapping.py and the models' modeling files; ComfyUI comfy/sd.py
(detect_te_model); gguf: llama.cpp's names, which ComfyUI-GGUF (loader.py) renames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from dqconvert.converter.family import Entry, Infos, Linear, depth, single

BLOCK = "model.layers.{i}"
BLOCKS = "model.layers"
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head"

QKV = tuple(f"{BLOCK}.self_attn.{name}_proj" for name in "qkv")
OUT = f"{BLOCK}.self_attn.o_proj"
GATE, UP, DOWN = (f"{BLOCK}.mlp.{name}_proj" for name in ("gate", "up", "down"))
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
GEMMA_NORMS = (*LLAMA_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")

SIGNATURE = (
    EMBEDDING,
    NORM,
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.post_attention_layernorm.weight",
)
"""What all of them have."""

QK_NORM = "model.layers.0.self_attn.q_norm.weight"
QKV_BIAS = "model.layers.0.self_attn.q_proj.bias"
FOUR_NORMS = "model.layers.0.pre_feedforward_layernorm.weight"
PATCH_MERGER = "multi_modal_projector.patch_merger.merging_layer"
VISUAL_POSITIONS = "visual.pos_embed"
"""What some of them have; the last two are modules of the other half of Mistral 3 and Qwen3-VL."""

LINEARS = (
    *(Linear(name, "attention", "qkv", QKV[0]) for name in QKV),
    Linear(OUT, "attention", "attention_out"),
    Linear(GATE, "mlp", "mlp_in", GATE),
    Linear(UP, "mlp", "mlp_in", GATE),
    Linear(DOWN, "mlp", "mlp_out"),
    Linear(HEAD, "final"),
)

ROOTS: Mapping[str, tuple[str, str, str]] = {
    "transformers": ("model.", "", ""),
    "bare": ("", "", ""),
    "composite": ("model.language_model.", "", "model."),
    "submodel": ("language_model.", "", ""),
    "llava": ("language_model.model.", "language_model.", ""),
}
"""{dialect: what stands before the layers, before the head, before the other half}."""

SPELLINGS = tuple(ROOTS)
HALVES = ("Qwen2_5_VL", "Qwen3VL", "Mistral3", "Gemma3", "Llava")
"""How the classes begin whose models have a vision tower as well."""


def spelling(name: str) -> str:
    """The dialect that a class of transformers (5 or later) has as the names of its modules."""
    halves = name.startswith(HALVES) and not name.endswith(("ForCausalLM", "TextModel"))
    if name.endswith("Model"):
        return "submodel" if halves else "bare"
    return "composite" if halves else "transformers"


WHOLE = ("comfyui", "diffusers")
"""Targets whose files hold both halves of a model."""

PASSENGERS: Mapping[str, tuple[str, ...]] = {
    **{
        f"{root}{name}.": WHOLE
        for root in ("", "model.")
        for name in ("visual", "multi_modal_projector", "vision_tower", "vision_model")
    },
    # Tokenizers that ComfyUI's files hold.
    "spiece_model": ("comfyui",),
    "tekken_model": ("comfyui",),
}


def dialects(
    norms: Sequence[str], bias: bool = False, others: Sequence[str] = ()
) -> dict[str, tuple[Entry, ...]]:
    """The five spellings, and ComfyUI's, which is the first.

    norms: within a block; bias: whether q, k and v have one; others: modules of the other half
    that tell one family from another.
    """
    return {name: _spelt(name, norms, bias, others) for name in ROOTS} | {"comfyui": ()}


def _spelt(
    dialect: str, norms: Sequence[str], bias: bool, others: Sequence[str]
) -> tuple[Entry, ...]:
    root, head, half = ROOTS[dialect]

    def own(name: str, bias: bool = False) -> Entry:
        return Entry(root + name.removeprefix("model."), (name,), bias=bias)

    return (
        own(EMBEDDING),
        *(own(f"{name}.*", bias) for name in QKV),
        *(own(f"{name}.*") for name in (OUT, GATE, UP, DOWN)),
        *(own(f"{BLOCK}.{name}.weight") for name in norms),
        *(own(name) for name in strange(norms, bias)),
        own(NORM),
        Entry(f"{head}{HEAD}.*", (f"{HEAD}.*",), bias=False),
        *(Entry(f"{half}{name}.weight", (f"{name}.weight",)) for name in others),
    )


def strange(norms: Sequence[str], bias: bool = False) -> tuple[str, ...]:
    """Tensors of a block by which families are told apart, of which this one has none."""
    found = [
        f"{BLOCK}.{name}.weight" for name in (QK_NORMS[0], GEMMA_NORMS[2]) if name not in norms
    ]
    return (*found, *(() if bias else (f"{QKV[0]}.bias",)))


def gguf(norms: Mapping[str, str], bias: bool = False) -> tuple[Entry, ...]:
    """llama.cpp's names; norms: theirs to ours, within a block."""
    return (
        Entry("token_embd.weight", (EMBEDDING,)),
        *(
            Entry(f"blk.{{i}}.attn_{x}.*", (f"{name}.*",), bias=bias)
            for x, name in zip("qkv", QKV, strict=True)
        ),
        Entry("blk.{i}.attn_output.*", (f"{OUT}.*",), bias=False),
        Entry("blk.{i}.ffn_gate.*", (f"{GATE}.*",), bias=False),
        Entry("blk.{i}.ffn_up.*", (f"{UP}.*",), bias=False),
        Entry("blk.{i}.ffn_down.*", (f"{DOWN}.*",), bias=False),
        *(
            Entry(f"blk.{{i}}.{theirs}.weight", (f"{BLOCK}.{ours}.weight",))
            for theirs, ours in norms.items()
        ),
        Entry("output_norm.weight", (NORM,)),
        Entry("output.*", (f"{HEAD}.*",), bias=False),
    )


GGUF_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
GGUF_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}

ASSUMED = ("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings")
"""What the shapes do not tell, or the head alone."""


def config_of(infos: Infos, class_name: str, head: int) -> dict[str, Any]:
    """The sizes that the shapes imply, in the words of a transformers text config.

    head: width of an attention head where no norm of q tells it.
    """
    first = BLOCK.replace("{i}", "0")
    vocabulary, hidden = infos[EMBEDDING].shape
    head = infos[QK_NORM].shape[0] if QK_NORM in infos else head
    return {
        "_class_name": class_name,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": infos[f"{first}.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": depth(infos, BLOCKS),
        "num_attention_heads": infos[f"{first}.self_attn.q_proj.weight"].shape[0] // head,
        "num_key_value_heads": infos[f"{first}.self_attn.k_proj.weight"].shape[0] // head,
        "head_dim": head,
        "tie_word_embeddings": f"{HEAD}.weight" not in infos,
    }


def facts(config: Mapping[str, Any], arch: str, context: int, base: float) -> dict[str, Any]:
    """The sizes under llama.cpp's keys; context: tokens; base: of the rotary frequencies."""
    sizes = {
        "context_length": context,
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "block_count": config["num_hidden_layers"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": single(1e-6),
        "rope.freq_base": base,
    }
    return {f"{arch}.{key}": value for key, value in sizes.items()}


def no_facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """For families of which no runtime that draws pictures reads GGUF files."""
    return {}


def sizes(class_name: str, head: int) -> Callable[[Infos], dict[str, Any]]:
    """config_of for a family; head: as there."""
    return partial(config_of, class_name=class_name, head=head)


SHARED: Mapping[str, Any] = {
    "task": "",
    "aliases": {},
    "licenses": {},
    "hidden": NORM,
    "blocks": (BLOCKS,),
    "linears": LINEARS,
    "prefixes": (),
    "assumed": ASSUMED,
    "spellings": {"diffusers": SPELLINGS},
    "spelling": spelling,
    "passengers": PASSENGERS,
}
"""What is the same in all these families."""
