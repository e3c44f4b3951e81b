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


def t5_config(**changes: Any) -> dict[str, Any]:
    """The config of FLUX's text encoder, with changes."""
    small = {
        "_class_name": "T5EncoderModel",
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    }
    return umt5_config(**small) | changes


def clip_text_config(**changes: Any) -> dict[str, Any]:
    """The config of CLIP-G, with changes."""
    return {
        "_class_name": "CLIPTextModelWithProjection",
        "vocab_size": 49408,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "max_position_embeddings": 77,
        "projection_dim": 1280,
    } | changes


def qwen25_vl_config(**changes: Any) -> dict[str, Any]:
    """The config of Qwen-Image's text encoder, with changes."""
    return {
        "_class_name": "Qwen2_5_VLForConditionalGeneration",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    } | changes


def qwen25_vl_vision_config(**changes: Any) -> dict[str, Any]:
    """The config of the vision tower of Qwen-Image-Edit's text encoder, with changes."""
    return {
        "_class_name": "Qwen2_5_VLVisionModel",
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "out_hidden_size": 3584,
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
    """Tensors of the meta device of an encoder: transformers' own, or Wan's CLIP as it is.

    Under canonical names, of which transformers' checkpoints have all but two.
    """
    kind = config["_class_name"]
    if kind == "CLIPVisionModel":
        return {name: torch.empty(shape, device="meta") for name, shape in _clip(config).items()}
    with torch.device("meta"):
        state: dict[str, Tensor] = _encoder(config).state_dict()
    if kind == "Qwen2_5_VLVisionModel":
        return dict(pair for name in state for pair in _apart(f"visual.{name}", state[name]))
    if kind == "CLIPTextModel":
        return {f"text_model.{name}": state[name] for name in state}
    renamed = {name.replace("model.language_model.", "model."): name for name in state}
    return {
        new: state[old]
        for new, old in renamed.items()
        if new != "encoder.embed_tokens.weight" and not new.startswith("model.visual.")
    }


def _encoder(config: Mapping[str, Any]) -> Any:
    import transformers
    from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl, modeling_qwen2_5_vl

    said = {key: value for key, value in config.items() if key != "_class_name"}
    kind = config["_class_name"]
    if kind == "Qwen2_5_VLVisionModel":
        whole = configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig(**said)
        return modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel(whole)
    if kind == "Qwen2_5_VLForConditionalGeneration":
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1}
        tied = said.pop("tie_word_embeddings")
        both = {"text_config": said, "vision_config": vision, "tie_word_embeddings": tied}
        model = getattr(transformers, kind)(transformers.Qwen2_5_VLConfig(**both))
        if tied:
            del model.lm_head
        return model
    family = "CLIPText" if kind.startswith("CLIP") else kind.removesuffix("EncoderModel")
    return getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**said))


def _apart(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """What canonical names have apart: q, k and v, and the frames of a patch."""
    if ".qkv." in name:
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return [(name.replace(".qkv.", f".{x}."), part) for x, part in parts]
    if name == "visual.patch_embed.proj.weight":
        return [(f"visual.patch_embed.proj.{i}.weight", tensor[:, :, i]) for i in (0, 1)]
    return [(name, tensor)]


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


ENCODERS = (
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPVisionModel",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen2_5_VLVisionModel",
    "T5EncoderModel",
    "UMT5EncoderModel",
)
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
CLIP_TEXT_SMALL = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 160}
QWEN25_SMALL = {
    "vocab_size": 80,
    "hidden_size": 256,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
VISION_SMALL = {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 48}
CONFIGS = {
    "clip_text": (
        clip_text_config(
            **CLIP_TEXT_SMALL, num_hidden_layers=2, num_attention_heads=2, projection_dim=48
        ),
        clip_text_config(
            **CLIP_TEXT_SMALL,
            _class_name="CLIPTextModel",
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=128,
        ),
        clip_text_config(),
    ),
    "clip_vision": (
        clip_config(**CLIP_SMALL, num_hidden_layers=2, num_attention_heads=2),
        clip_config(),
    ),
    "qwen25_vl": (
        qwen25_vl_config(**QWEN25_SMALL),
        qwen25_vl_config(**QWEN25_SMALL, tie_word_embeddings=True),
        qwen25_vl_config(),
    ),
    "qwen25_vl_vision": (
        qwen25_vl_vision_config(**VISION_SMALL),
        qwen25_vl_vision_config(),
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
    "t5": (
        t5_config(**UMT5_SMALL, num_layers=2),
        t5_config(),
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
