"""The text encoders CLIP-L and CLIP-G of FLUX, Stable Diffusion 3 and XL, as components.

Names: transformers models/clip/modeling_clip.py, as its checkpoints have them. llama.cpp does not
run this model, so there are no names of its own, and the readers of a GGUF want these:
stable-diffusion.cpp (name_conversion.cpp) puts "text_encoders.clip_l.transformer." before them,
and ComfyUI-GGUF (loader.py) hands them to ComfyUI unchanged, which tells CLIP-L from CLIP-G by the
number of blocks. Of text encoders ComfyUI-GGUF lets in the architectures that it renames, and none
of them is this; besides, files whose general.type is "clip-vision" or "mmproj", whatever is in
them. So the file says clip-vision, which changes nothing for the other reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.family import Entry, Family, Infos, Linear, depth

_EMBEDDINGS = "text_model.embeddings"
_BLOCK = "text_model.encoder.layers.{i}"
_ATTENTION = f"{_BLOCK}.self_attn"
_HEAD = 64
"""Width of an attention head of both; the shapes do not tell."""

_LINEARS = (
    *(
        Linear(f"{_ATTENTION}.{name}", "attention", "qkv", f"{_ATTENTION}.q_proj")
        for name in ("q_proj", "k_proj", "v_proj")
    ),
    Linear(f"{_ATTENTION}.out_proj", "attention", "attention_out"),
    Linear(f"{_BLOCK}.mlp.fc1", "mlp", "mlp_in"),
    Linear(f"{_BLOCK}.mlp.fc2", "mlp", "mlp_out", gelu=0),
)
_NAMES = (
    f"{_EMBEDDINGS}.token_embedding.weight",
    f"{_EMBEDDINGS}.position_embedding.weight",
    *(f"{linear.name}.*" for linear in _LINEARS),
    f"{_BLOCK}.layer_norm1.*",
    f"{_BLOCK}.layer_norm2.*",
    "text_model.final_layer_norm.*",
)
_WHOLE = "text_model."
_PROJECTION = Entry("text_projection.*", ("text_projection.*",), bias=False)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The CLIPTextModel config that the shapes imply."""
    vocabulary, hidden = infos[f"{_EMBEDDINGS}.token_embedding.weight"].shape
    projection = infos.get("text_projection.weight")
    return {
        "_class_name": "CLIPTextModelWithProjection" if projection else "CLIPTextModel",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": infos[f"{_BLOCK.replace('{i}', '0')}.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": depth(infos, "text_model.encoder.layers"),
        "num_attention_heads": hidden // _HEAD,
        "max_position_embeddings": infos[f"{_EMBEDDINGS}.position_embedding.weight"].shape[0],
        "projection_dim": projection.shape[0] if projection else hidden,
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The word that ComfyUI-GGUF lets the file in for."""
    return {"general.type": "clip-vision"} if dialect == "gguf" else {}


FAMILY = Family(
    name="clip_text",
    title="CLIP text encoder",
    task="",
    aliases={},
    licenses={},
    signature=(
        f"{_EMBEDDINGS}.token_embedding.weight",
        f"{_EMBEDDINGS}.position_embedding.weight",
        "text_model.encoder.layers.0.self_attn.q_proj.weight",
        "text_model.encoder.layers.0.mlp.fc1.weight",
        "text_model.final_layer_norm.weight",
    ),
    hidden="text_model.final_layer_norm.weight",
    optional=("text_projection",),
    blocks=("text_model.encoder.layers",),
    linears=_LINEARS,
    dialects={
        "transformers": (*(Entry(name, (name,)) for name in _NAMES), _PROJECTION),
        # CLIPTextModel as version 5 saves it.
        "bare": (*(Entry(name.removeprefix(_WHOLE), (name,)) for name in _NAMES), _PROJECTION),
        "gguf": (),
        "comfyui": (),
    },
    sources=("transformers", "bare"),
    prefixes=(),
    unread=(
        f"{_EMBEDDINGS}.position_ids",  # numbers from 0, of older versions of transformers
        "logit_scale",
        "vision_model.",
        "visual_projection.",
    ),
    config_of=_config_of,
    assumed=("num_attention_heads", "projection_dim"),
    facts=_facts,
    architecture="clip",
    spellings={"diffusers": ("transformers", "bare")},
    spelling=lambda name: "bare" if name == "CLIPTextModel" else "transformers",
)
