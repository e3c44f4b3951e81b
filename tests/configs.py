"""Configs of diffusers' models to try for each family, besides FLUX: small ones, then real ones."""

from __future__ import annotations

from typing import Any


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
        "guidance_embeds": False,
        "axes_dims_rope": (16, 56, 56),
        "zero_cond_t": False,
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
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
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
Z_SMALL = {"dim": 256, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 48}
CONFIGS = {
    "qwen_image": (
        qwen_image_config(**QWEN_SMALL),
        qwen_image_config(**QWEN_SMALL, **LAYERED),
        qwen_image_config(**QWEN_SMALL | {"attention_head_dim": 64, "axes_dims_rope": (8, 28, 28)}),
        qwen_image_config(),
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
