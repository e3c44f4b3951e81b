"""Qwen-Image (also 2512, Edit, Edit-2509, Edit-2511, Layered), of any width and depth.

Names: diffusers/models/transformers/transformer_qwenimage.py; ComfyUI and LightX2V share them;
nunchaku: nunchaku/models/transformers/transformer_qwenimage.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.family import Entry, Family, Fold, Infos, Linear, depth

_BLOCK = "transformer_blocks.{i}"
_IMAGE, _TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
_OUT = (f"{_BLOCK}.attn.to_out.0", f"{_BLOCK}.attn.to_add_out")


def _qkv(names: tuple[str, str, str]) -> tuple[str, ...]:
    return tuple(f"{_BLOCK}.attn.{name}" for name in names)


_LINEARS = (
    Linear(f"{_BLOCK}.img_mod.1", "modulation", splits=6),
    Linear(f"{_BLOCK}.txt_mod.1", "modulation", splits=6),
    *(Linear(name, "attention", "image_qkv", _qkv(_IMAGE)[0]) for name in _qkv(_IMAGE)),
    *(Linear(name, "attention", "text_qkv", _qkv(_TEXT)[0]) for name in _qkv(_TEXT)),
    *(Linear(name, "attention", "attention_out") for name in _OUT),
    Linear(f"{_BLOCK}.img_mlp.net.0.proj", "mlp", "image_mlp_in"),
    Linear(f"{_BLOCK}.img_mlp.net.2", "mlp", "image_mlp_out", gelu=0),
    Linear(f"{_BLOCK}.txt_mlp.net.0.proj", "mlp", "text_mlp_in"),
    Linear(f"{_BLOCK}.txt_mlp.net.2", "mlp", "text_mlp_out", gelu=0),
)

# Rows of a modulation linear: shift, scale, gate before attention, then before the MLP.
_FOLDS = (
    Fold(_qkv(_IMAGE), f"{_BLOCK}.img_mod.1"),
    Fold(_qkv(_TEXT), f"{_BLOCK}.txt_mod.1"),
    Fold((f"{_BLOCK}.img_mlp.net.0.proj",), f"{_BLOCK}.img_mod.1", shift=3, scale=4),
    Fold((f"{_BLOCK}.txt_mlp.net.0.proj",), f"{_BLOCK}.txt_mod.1", shift=3, scale=4),
    Fold(_OUT, values=(f"{_BLOCK}.attn.to_v", f"{_BLOCK}.attn.add_v_proj")),
)

_NAMES = (
    "img_in.*",
    "txt_in.*",
    "txt_norm.weight",
    "time_text_embed.timestep_embedder.linear_1.*",
    "time_text_embed.timestep_embedder.linear_2.*",
    "time_text_embed.addition_t_embedding.weight",
    *(f"{linear.name}.*" for linear in _LINEARS),
    *(f"{_BLOCK}.attn.norm_{name}.weight" for name in ("q", "k", "added_q", "added_k")),
    "norm_out.linear.*",
    "proj_out.*",
)

_NUNCHAKU = (
    Entry(f"{_BLOCK}.attn.to_qkv.*", tuple(f"{name}.*" for name in _qkv(_IMAGE))),
    Entry(f"{_BLOCK}.attn.add_qkv_proj.*", tuple(f"{name}.*" for name in _qkv(_TEXT))),
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The QwenImageTransformer2DModel config that the shapes imply.

    They do not tell Edit-2511 from the others: its config.json says zero_cond_t.
    """
    hidden, channels = infos["img_in.weight"].shape
    head = infos["transformer_blocks.0.attn.norm_q.weight"].shape[0]
    layered = "time_text_embed.addition_t_embedding.weight" in infos
    return {
        "_class_name": "QwenImageTransformer2DModel",
        "patch_size": 2,
        "in_channels": channels,
        "out_channels": infos["proj_out.weight"].shape[0] // 4,
        "num_layers": depth(infos, "transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": infos["txt_in.weight"].shape[1],
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],
        "use_additional_t_cond": layered,
        "use_layer3d_rope": layered,
    }


_BUILT = {
    "num_layers": 60,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "in_channels": 64,
    "out_channels": 16,
    "joint_attention_dim": 3584,
    "zero_cond_t": False,
    "use_additional_t_cond": False,
}
"""What nunchaku's class and ComfyUI-nunchaku build whatever a file's config says."""


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """nunchaku's class name, and what its loaders will not make of this model."""
    if dialect != "nunchaku":
        return {}
    other = [
        f"{key} {config[key]} (not {usual})"
        for key, usual in _BUILT.items()
        if config.get(key, usual) != usual
    ]
    notes = (
        "nunchaku and ComfyUI-nunchaku build Qwen-Image with 60 blocks and its first config "
        f"whatever the file says; this model has {', '.join(other)}, so they will not run it"
    )
    return {
        "model_class": "NunchakuQwenImageTransformer2DModel",
        **({"notes": (notes,)} if other else {}),
    }


def _variant(infos: Infos, config: Mapping[str, Any]) -> str:
    """Edit and Edit-2509 have the tensors and the config of the base: nothing tells them."""
    if "time_text_embed.addition_t_embedding.weight" in infos:
        return "layered"
    return "edit-plus" if config.get("zero_cond_t") else ""


_KEPT = {"modulation": None}

FAMILY = Family(
    name="qwen_image",
    title="Qwen-Image",
    aliases={
        "qwen-image": "Qwen/Qwen-Image",
        "qwen-image-2512": "Qwen/Qwen-Image-2512",
        "qwen-image-edit": "Qwen/Qwen-Image-Edit",
        "qwen-image-edit-2509": "Qwen/Qwen-Image-Edit-2509",
        "qwen-image-edit-2511": "Qwen/Qwen-Image-Edit-2511",
        "qwen-image-layered": "Qwen/Qwen-Image-Layered",
    },
    licenses=dict.fromkeys(
        (
            "qwen-image",
            "qwen-image-2512",
            "qwen-image-edit",
            "qwen-image-edit-2509",
            "qwen-image-edit-2511",
            "qwen-image-layered",
        ),
        "apache-2.0",
    ),
    architecture="qwen_image",
    classes=("QwenImageTransformer2DModel",),
    signature=(
        "img_in.weight",
        "txt_in.weight",
        "txt_norm.weight",
        "transformer_blocks.0.img_mod.1.weight",
        "transformer_blocks.0.txt_mod.1.weight",
        "transformer_blocks.0.attn.add_q_proj.weight",
    ),
    hidden="img_in.weight",
    optional=("time_text_embed.addition_t_embedding",),
    blocks=("transformer_blocks",),
    linears=_LINEARS,
    dialects={
        "diffusers": tuple(Entry(name, (name,)) for name in _NAMES),
        "original": (),
        "lightx2v": (),
        "nunchaku": _NUNCHAKU,
    },
    layouts={"nunchaku": ("v2",)},
    sources=("diffusers",),
    unread=("__index_timestep_zero__",),  # ComfyUI's mark of Edit-2511
    config_of=_config_of,
    facts=_facts,
    policies={
        # Comfy-Org's own files keep the first, in which quantization shows most.
        "comfyui": {"transformer_blocks.0.img_mod.1": None},
        "lightx2v": {"modulation": "weight"},
        # SGLang was tried with the MLP's output in 16 bit; vLLM-Omni builds img_mod without.
        "sglang": _KEPT | {f"{_BLOCK}.img_mlp.net.2": None},
        "vllm": _KEPT,
    },
    sensitive=_OUT,
    folds=_FOLDS,
    variant=_variant,
    pipelines={
        "": "QwenImagePipeline",
        "edit": "QwenImageEditPipeline",
        "edit-plus": "QwenImageEditPlusPipeline",
        "layered": "QwenImageLayeredPipeline",
    },
    encoders={"text_encoder": "qwen25_vl"},
)
