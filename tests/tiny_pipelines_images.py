"""Random pipelines of still pictures: SD3, FLUX.2, Chroma, FLUX's and Qwen's editors, SDXL."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

parts = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_parts.py"))))
WIDTH, transformer, config_of = parts.WIDTH, parts.transformer, parts.config_of
FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": 64,
    "guidance_embeds": True,
    "axes_dims_rope": (8, 28, 28),
}


def sd3() -> Any:
    from diffusers import StableDiffusion3Pipeline

    one, two = parts.clip(projected=True), parts.clip(projected=True)
    text, tokenizer = parts.t5()
    small = {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128}
    config = parts.CONFIGS["sd3_config"](
        **small, joint_attention_dim=WIDTH, pooled_projection_dim=128, pos_embed_max_size=6
    )
    return StableDiffusion3Pipeline(
        transformer=transformer(config),
        scheduler=parts.flow(),
        vae=parts.kl(),
        text_encoder=one[0],
        tokenizer=one[1],
        text_encoder_2=two[0],
        tokenizer_2=two[1],
        text_encoder_3=text,
        tokenizer_3=tokenizer,
    )


def flux2() -> Any:
    """Its text is read at layers 10, 20 and 30 of Mistral."""
    from diffusers import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    tokenizer = parts.letters()
    text = parts.layers(tokenizer) | {"num_hidden_layers": 31, "head_dim": 32}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    encoder = Mistral3Config(
        text_config=text | {"model_type": "mistral"},
        vision_config=vision | {"num_attention_heads": 2, "model_type": "pixtral"},
    )
    return Flux2Pipeline(
        scheduler=parts.flow(use_dynamic_shifting=True),
        vae=parts.kl_flux2(),
        text_encoder=Mistral3ForConditionalGeneration(encoder),
        tokenizer=tokenizer,
        transformer=transformer(
            config_of("flux2", num_layers=1, num_single_layers=1, joint_attention_dim=3 * WIDTH)
        ),
    )


def flux2_klein() -> Any:
    """Its text is read at layers 9, 18 and 27 of Qwen3."""
    from diffusers import Flux2KleinPipeline

    tokenizer = parts.letters()
    tiny = {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": False}
    return Flux2KleinPipeline(
        scheduler=parts.flow(use_dynamic_shifting=True),
        vae=parts.kl_flux2(),
        text_encoder=parts.decoder("Qwen3ForCausalLM", tokenizer, 28),
        tokenizer=tokenizer,
        transformer=transformer(config_of("flux2", **tiny, joint_attention_dim=3 * WIDTH)),
    )


def chroma() -> Any:
    from diffusers import ChromaPipeline

    encoder, tokenizer = parts.t5()
    return ChromaPipeline(
        scheduler=parts.flow(),
        vae=parts.kl(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer(config_of("chroma", num_layers=1, num_single_layers=1)),
    )


def flux(kind: str, **changes: Any) -> Any:
    """FLUX.1 under another pipeline: Kontext, Fill."""
    import diffusers

    encoder, tokenizer = parts.clip()
    second, other = parts.t5()
    return getattr(diffusers, f"Flux{kind}Pipeline")(
        scheduler=parts.flow(use_dynamic_shifting=True),
        vae=parts.kl(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=other,
        transformer=transformer(FLUX, **changes),
    )


def qwen_image_edit(kind: str = "") -> Any:
    import diffusers

    tokenizer = parts.letters()
    small = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 64}
    config = parts.CONFIGS["qwen_image_config"](
        **small, joint_attention_dim=WIDTH, axes_dims_rope=(8, 28, 28)
    )
    return getattr(diffusers, f"QwenImageEdit{kind}Pipeline")(
        scheduler=parts.flow(use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKLQwenImage(**parts.VIDEO_VAE),
        text_encoder=parts.qwen25_vl(tokenizer),
        tokenizer=tokenizer,
        processor=parts.processor(tokenizer),
        transformer=transformer(config),
    )


def sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    one, two = parts.clip(), parts.clip(projected=True)
    return StableDiffusionXLPipeline(
        vae=parts.kl(4),
        text_encoder=one[0],
        tokenizer=one[1],
        text_encoder_2=two[0],
        tokenizer_2=two[1],
        unet=transformer(config_of("sdxl", sample_size=4)),
        scheduler=EulerDiscreteScheduler(),
    )


BUILDERS = {
    "sd3": sd3,
    "flux2": flux2,
    "flux2_klein": flux2_klein,
    "chroma": chroma,
    "flux_kontext": lambda: flux("Kontext"),
    "flux_fill": lambda: flux("Fill", in_channels=384, out_channels=64),
    "qwen_image_edit": qwen_image_edit,
    "qwen_image_edit_plus": lambda: qwen_image_edit("Plus"),
    "sdxl": sdxl,
}
