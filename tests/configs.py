"""Configs of models to try for each family, besides FLUX: small ones, then real ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def qwen_image_config(**changes: Any) -> dict[str, Any]:
    """The config of Qwen-Image, with changes."""
    return {
        "_class_name": "QwenImageTransformer2DModel",
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 60,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "axes_dims_rope": (16, 56, 56),
        "use_additional_t_cond": False,
        "use_layer3d_rope": False,
    } | changes


def wan_config(**changes: Any) -> dict[str, Any]:
    """The config of Wan 2.1 T2V 14B, with changes."""
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": (1, 2, 2),
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 13824,
        "num_layers": 40,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "pos_embed_seq_len": None,
    } | changes


def z_image_config(**changes: Any) -> dict[str, Any]:
    """The config of Z-Image-Turbo, with changes."""
    return {
        "_class_name": "ZImageTransformer2DModel",
        "all_patch_size": (2,),
        "all_f_patch_size": (1,),
        "in_channels": 16,
        "dim": 3840,
        "n_layers": 30,
        "n_refiner_layers": 2,
        "n_heads": 30,
        "n_kv_heads": 30,
        "norm_eps": 1e-5,
        "qk_norm": True,
        "cap_feat_dim": 2560,
        "siglip_feat_dim": None,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1024, 512, 512],
    } | changes


def sd3_config(**changes: Any) -> dict[str, Any]:
    """The config of Stable Diffusion 3.5 large, with changes."""
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": 38,
        "attention_head_dim": 64,
        "num_attention_heads": 38,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 2432,
        "pooled_projection_dim": 2048,
        "out_channels": 16,
        "pos_embed_max_size": 192,
        "dual_attention_layers": (),
        "qk_norm": "rms_norm",
    } | changes


def umt5_config(**changes: Any) -> dict[str, Any]:
    """The config of Wan's text encoder, with changes."""
    return {
        "_class_name": "UMT5EncoderModel",
        "vocab_size": 256384,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "relative_attention_num_buckets": 32,
    } | changes


def clip_config(**changes: Any) -> dict[str, Any]:
    """The config of Wan's image encoder, with changes."""
    return {
        "_class_name": "CLIPVisionModel",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "projection_dim": 1024,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
    } | changes


def encoder_tensors(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of the meta device of an encoder: transformers' own UMT5, or Wan's CLIP as it is."""
    if config["_class_name"] == "CLIPVisionModel":
        return {name: torch.empty(shape, device="meta") for name, shape in _clip(config).items()}
    from transformers import UMT5Config, UMT5EncoderModel

    said = {key: value for key, value in config.items() if key != "_class_name"}
    with torch.device("meta"):
        state = UMT5EncoderModel(UMT5Config(**said)).state_dict()
    return {name: state[name] for name in state if name != "encoder.embed_tokens.weight"}


def _clip(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    dim, wide, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    places = (config["image_size"] // patch) ** 2 + 1
    found: dict[str, tuple[int, ...]] = {
        "log_scale": (),
        "visual.cls_embedding": (1, 1, dim),
        "visual.pos_embedding": (1, places, dim),
        "visual.patch_embedding.weight": (dim, config["num_channels"], patch, patch),
        "visual.head": (dim, config["projection_dim"]),
    }
    norms = ["visual.pre_norm", "visual.post_norm"]
    for i in range(config["num_hidden_layers"]):
        block = f"visual.transformer.{i}"
        norms += [f"{block}.norm1", f"{block}.norm2"]
        for name, rows, columns in (
            ("attn.to_qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.0", wide, dim),
            ("mlp.2", dim, wide),
        ):
            found[f"{block}.{name}.weight"], found[f"{block}.{name}.bias"] = (
                (rows, columns),
                (rows,),
            )
    return found | {f"{norm}.{leaf}": (dim,) for norm in norms for leaf in ("weight", "bias")}


QWEN_SMALL = {"num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 96}
LAYERED = {"use_additional_t_cond": True, "use_layer3d_rope": True}
WAN_SMALL = {"num_layers": 2, "num_attention_heads": 2, "text_dim": 96, "ffn_dim": 384}
I2V = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
TI2V = {
    "in_channels": 48,
    "out_channels": 48,
    "num_attention_heads": 24,
    "num_layers": 30,
    "ffn_dim": 14336,
}
SD3_SMALL = {
    "num_layers": 3,
    "num_attention_heads": 2,
    "caption_projection_dim": 128,
    "joint_attention_dim": 96,
    "pooled_projection_dim": 48,
    "pos_embed_max_size": 6,
}
SD3_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
DUAL = {"dual_attention_layers": tuple(range(13)), "pos_embed_max_size": 384}
Z_SMALL = {"dim": 256, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 48}
UMT5_SMALL = {"vocab_size": 64, "d_model": 96, "d_kv": 32, "d_ff": 160, "num_heads": 4}
CLIP_SMALL = {"hidden_size": 160, "intermediate_size": 320, "projection_dim": 64}
CONFIGS = {
    "clip_vision": (
        clip_config(**CLIP_SMALL, num_hidden_layers=2, num_attention_heads=2),
        clip_config(),
    ),
    "qwen_image": (
        qwen_image_config(**QWEN_SMALL),
        qwen_image_config(**QWEN_SMALL, **LAYERED),
        qwen_image_config(**QWEN_SMALL | {"attention_head_dim": 64, "axes_dims_rope": (8, 28, 28)}),
        qwen_image_config(),
    ),
    "sd3": (
        sd3_config(**SD3_SMALL),
        sd3_config(**SD3_SMALL, dual_attention_layers=(0, 1)),
        sd3_config(**SD3_SMALL, qk_norm=None),
        sd3_config(**SD3_SMALL, qk_norm=None, dual_attention_layers=(1,)),
        sd3_config(),
        sd3_config(**SD3_MEDIUM, qk_norm=None),
        sd3_config(**SD3_MEDIUM, **DUAL),
    ),
    "umt5": (
        umt5_config(**UMT5_SMALL, num_layers=2),
        umt5_config(),
    ),
    "wan": (
        wan_config(**WAN_SMALL),
        wan_config(**WAN_SMALL, **I2V | {"added_kv_proj_dim": 256}),
        wan_config(**WAN_SMALL, **I2V | {"added_kv_proj_dim": 256, "pos_embed_seq_len": 6}),
        wan_config(),
        wan_config(**I2V),
        wan_config(in_channels=36),
        wan_config(**TI2V),
    ),
    "z_image": (
        z_image_config(**Z_SMALL),
        z_image_config(**Z_SMALL, siglip_feat_dim=24),
        z_image_config(),
    ),
}
