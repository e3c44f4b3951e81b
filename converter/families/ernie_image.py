"""ERNIE-Image (base, Turbo), of any width and depth.

Names: diffusers/models/transformers/transformer_ernie_image.py; ComfyUI and LightX2V share them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.family import Entry, Family, Infos, Linear, depth

_LAYER = "layers.{i}"
_QKV = tuple(f"{_LAYER}.self_attention.{name}" for name in ("to_q", "to_k", "to_v"))
_MLP = tuple(f"{_LAYER}.mlp.{name}" for name in ("gate_proj", "up_proj"))
_OUT = f"{_LAYER}.self_attention.to_out.0"

_LINEARS = (
    *(Linear(name, "attention", "qkv", _QKV[0]) for name in _QKV),
    Linear(_OUT, "attention", "attention_out"),
    *(Linear(name, "mlp", "mlp_in", _MLP[0]) for name in _MLP),
    Linear(f"{_LAYER}.mlp.linear_fc2", "mlp", "mlp_out"),
    Linear("adaLN_modulation.1", "modulation", splits=6),
    *(
        Linear(name, "embedder")
        for name in ("text_proj", "time_embedding.linear_1", "time_embedding.linear_2")
    ),
    Linear("final_norm.linear", "final", splits=2),
    Linear("final_linear", "final"),
)
_NORMS = ("adaLN_sa_ln", "self_attention.norm_q", "self_attention.norm_k", "adaLN_mlp_ln")


def _entry(linear: Linear) -> Entry:
    """Linears of blocks and text_proj have no bias."""
    name = f"{linear.name}.*"
    bias = linear.name != "text_proj" and "{i}" not in linear.name
    return Entry(name, (name,), bias=bias)


_ENTRIES = (
    Entry("x_embedder.proj.*", ("x_embedder.proj.*",)),
    *(_entry(linear) for linear in _LINEARS),
    *(Entry(f"{_LAYER}.{name}.weight", (f"{_LAYER}.{name}.weight",)) for name in _NORMS),
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The ErnieImageTransformer2DModel config that the shapes imply."""
    hidden, channels, patch, _ = infos["x_embedder.proj.weight"].shape
    head = infos["layers.0.self_attention.norm_q.weight"].shape[0]
    text = infos.get("text_proj.weight")
    return {
        "_class_name": "ErnieImageTransformer2DModel",
        "hidden_size": hidden,
        "num_attention_heads": hidden // head,
        "num_layers": depth(infos, "layers"),
        "ffn_hidden_size": infos["layers.0.mlp.up_proj.weight"].shape[0],
        "in_channels": channels,
        "out_channels": infos["final_linear.weight"].shape[0] // patch**2,
        "patch_size": patch,
        "text_in_dim": text.shape[1] if text else hidden,
        "rope_theta": 256,
        "rope_axes_dim": [head // 4, head * 3 // 8, head * 3 // 8],
        "eps": 1e-6,
        "qk_layernorm": True,
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


# One modulation for all layers, which sees one row per image.
_KEPT = {"modulation": None}

FAMILY = Family(
    name="ernie_image",
    title="ERNIE-Image",
    aliases={
        "ernie-image": "baidu/ERNIE-Image",
        "ernie-image-turbo": "baidu/ERNIE-Image-Turbo",
    },
    licenses=dict.fromkeys(("ernie-image", "ernie-image-turbo"), "apache-2.0"),
    # ComfyUI-GGUF has no word for it and takes this one in Unsloth's files; ComfyUI tells the
    # model by its names.
    architecture="wan",
    classes=("ErnieImageTransformer2DModel",),
    signature=(
        "x_embedder.proj.weight",
        "adaLN_modulation.1.weight",
        "layers.0.adaLN_sa_ln.weight",
        "layers.0.self_attention.to_q.weight",
        "layers.0.mlp.linear_fc2.weight",
        "final_norm.linear.weight",
    ),
    hidden="x_embedder.proj.weight",
    optional=("text_proj",),
    blocks=("layers",),
    linears=_LINEARS,
    dialects={"diffusers": _ENTRIES, "original": (), "lightx2v": ()},
    sources=("diffusers",),
    config_of=_config_of,
    facts=_facts,
    unrun=("sglang",),  # builds its linears unquantized, whatever the config says
    policies={
        "comfyui": _KEPT,
        "diffusers": _KEPT,
        # LightX2V builds every linear with the one scheme, those around the layers as well.
        "lightx2v": {"embedder": "weight", "final": "weight"},
    },
    sensitive=(_OUT,),
    unguided=("turbo",),
    # No folds: norms have a scale without a shift, and linears of layers have no bias.
    pipelines={"": "ErnieImagePipeline"},
    encoders={"text_encoder": "mistral3"},
)
