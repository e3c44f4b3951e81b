"""transformers' own language models on the meta device, under the names of our families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

VISION = {
    "Gemma3": {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14},
    "Mistral3": {"model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 8},
    "Qwen3VL": {
        "depth": 1,
        "num_heads": 2,
        "patch_size": 14,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 4,
    },
    "Qwen2_5_VL": {"depth": 1, "num_heads": 2, "patch_size": 14},
}
"""What the other half of a model is made of, small, besides its widths."""

ROPE = {
    "Qwen3VL": {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True},
    "Qwen2_5_VL": {"rope_type": "default", "mrope_section": [8, 12, 12]},
}
KEPT = ("visual.pos_embed.", "multi_modal_projector.patch_merger.merging_layer.")
"""Of the other half, what tells the family."""


def build(config: Mapping[str, Any], class_name: str = "") -> Any:
    """transformers' model of a text config with _class_name; class_name: another class of it."""
    import transformers

    said = {key: value for key, value in config.items() if key != "_class_name"}
    name = str(config["_class_name"])
    kind = name.removesuffix("ForConditionalGeneration").removesuffix("ForCausalLM")
    tied = said.pop("tie_word_embeddings")
    if kind in VISION:
        wide = {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": said["hidden_size"]}
        layers = {} if "depth" in VISION[kind] else {"num_hidden_layers": 1}
        heads = {} if "depth" in VISION[kind] else {"num_attention_heads": 2}
        if kind in ROPE:
            said["rope_parameters"] = ROPE[kind]
        if kind == "Mistral3":
            said["model_type"] = "mistral"
        both = {"text_config": said, "vision_config": VISION[kind] | wide | layers | heads}
        settings = getattr(transformers, f"{kind}Config")(**both, tie_word_embeddings=tied)
    else:
        settings = getattr(transformers, f"{kind}Config")(**said, tie_word_embeddings=tied)
    return getattr(transformers, class_name or name)(settings)


def tensors(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the language model, and what tells the family of the other half."""
    with torch.device("meta"):
        state: dict[str, Tensor] = build(config).state_dict()
    found = {}
    for name, tensor in state.items():
        short = name.replace("model.language_model.", "model.")
        short = (
            short.removeprefix("model.") if short.removeprefix("model.").startswith(KEPT) else short
        )
        other = short.startswith(("model.visual.", "model.vision_tower.", "model.multi_modal"))
        if not other and not (short == "lm_head.weight" and config["tie_word_embeddings"]):
            found[short] = tensor
    return found


def text_config(class_name: str, head: int, **changes: Any) -> dict[str, Any]:
    """A small config of a class, with changes."""
    return {
        "_class_name": class_name,
        "vocab_size": 80,
        "hidden_size": 128,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": head,
        "tie_word_embeddings": True,
    } | changes
