"""Random pipelines of families that fewer people convert."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

parts = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_parts.py"))))
WIDTH, transformer, config_of = parts.WIDTH, parts.transformer, parts.config_of


def krea2() -> Any:
    """Its text is read at chosen layers of Qwen3-VL."""
    from diffusers import AutoencoderKLQwenImage, Krea2Pipeline

    tokenizer = parts.letters()
    config = config_of("krea2", num_layers=1, text_hidden_dim=WIDTH, text_num_attention_heads=1)
    config |= {"text_num_key_value_heads": 1}
    return Krea2Pipeline(
        scheduler=parts.flow(use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(**parts.VIDEO_VAE),
        text_encoder=parts.qwen3_vl(tokenizer, "Qwen3VLModel"),
        tokenizer=tokenizer,
        transformer=transformer(config),
        text_encoder_select_layers=(1, 2, 3),
    )


def lumina2() -> Any:
    from diffusers import Lumina2Pipeline

    tokenizer = parts.letters()
    return Lumina2Pipeline(
        transformer=transformer(config_of("lumina2", cap_feat_dim=WIDTH)),
        scheduler=parts.flow(),
        vae=parts.kl(),
        text_encoder=parts.decoder("Gemma2Model", tokenizer, 2),
        tokenizer=tokenizer,
    )


def sana() -> Any:
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline

    tokenizer = parts.letters()
    vae = AutoencoderDC(
        latent_channels=32,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=parts.decoder("Gemma2Model", tokenizer, 2),
        vae=vae,
        transformer=transformer(config_of("sana", caption_channels=WIDTH, num_layers=1)),
        scheduler=scheduler,
    )


def pixart() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

    encoder, tokenizer = parts.t5()
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=parts.kl(4),
        transformer=transformer(config_of("pixart", caption_channels=WIDTH, num_layers=1)),
        scheduler=DPMSolverMultistepScheduler(),
    )


def auraflow() -> Any:
    from diffusers import AuraFlowPipeline

    encoder, tokenizer = parts.t5(umt5=True)
    return AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=parts.kl(4),
        transformer=transformer(
            config_of("auraflow", num_mmdit_layers=1, joint_attention_dim=WIDTH)
        ),
        scheduler=parts.flow(),
    )


def hidream() -> Any:
    from diffusers import HiDreamImagePipeline

    one, two = (parts.clip(projected=True, places=128) for _ in range(2))
    third, other = parts.t5()
    tokenizer = parts.letters()
    config = config_of("hidream", caption_channels=[WIDTH, WIDTH], text_emb_dim=128)
    config |= {"llama_layers": [0, 1, 1], "num_layers": 2, "num_single_layers": 1}
    return HiDreamImagePipeline(
        scheduler=parts.flow(),
        vae=parts.kl(),
        text_encoder=one[0],
        tokenizer=one[1],
        text_encoder_2=two[0],
        tokenizer_2=two[1],
        text_encoder_3=third,
        tokenizer_3=other,
        text_encoder_4=parts.decoder("LlamaForCausalLM", tokenizer, 2),
        tokenizer_4=tokenizer,
        transformer=transformer(config),
    )


def ernie_image() -> Any:
    from diffusers import ErnieImagePipeline
    from transformers import Mistral3Config, Mistral3Model

    tokenizer = parts.letters()
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    encoder = Mistral3Config(
        text_config=parts.layers(tokenizer) | {"head_dim": 64, "model_type": "mistral"},
        vision_config=vision | {"num_attention_heads": 2, "model_type": "pixtral"},
    )
    return ErnieImagePipeline(
        transformer=transformer(config_of("ernie_image", num_layers=1, text_in_dim=WIDTH)),
        vae=parts.kl_flux2(),
        text_encoder=Mistral3Model(encoder),
        tokenizer=tokenizer,
        scheduler=parts.flow(),
    )


def cogview4() -> Any:
    from diffusers import CogView4Pipeline

    _, tokenizer = parts.t5()  # which ends every text, also an empty one
    return CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=parts.decoder("GlmModel", tokenizer, 2, pad_token_id=0),
        vae=parts.kl(),
        transformer=transformer(config_of("cogview4", text_embed_dim=WIDTH)),
        scheduler=parts.flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True),
    )


def kandinsky5(kind: str = "T2V", **changes: Any) -> Any:
    import diffusers

    tokenizer = parts.letters()
    second, other = parts.clip()
    return getattr(diffusers, f"Kandinsky5{kind}Pipeline")(
        transformer=transformer(
            config_of("kandinsky5", in_text_dim=WIDTH, in_text_dim2=64, **changes)
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
        ),
        text_encoder=parts.qwen25_vl(tokenizer),
        tokenizer=parts.processor(tokenizer),
        text_encoder_2=second,
        tokenizer_2=other,
        scheduler=parts.flow(),
    )


def ovis_image() -> Any:
    from diffusers import OvisImagePipeline

    tokenizer = parts.letters()
    return OvisImagePipeline(
        scheduler=parts.flow(use_dynamic_shifting=True),
        vae=parts.kl(),
        text_encoder=parts.decoder("Qwen3Model", tokenizer, 1),
        tokenizer=tokenizer,
        transformer=transformer(config_of("ovis_image", joint_attention_dim=WIDTH)),
    )


def longcat_image() -> Any:
    from diffusers import LongCatImagePipeline

    tokenizer = parts.letters()
    return LongCatImagePipeline(
        scheduler=parts.flow(use_dynamic_shifting=True),
        vae=parts.kl(),
        text_encoder=parts.qwen25_vl(tokenizer),
        tokenizer=tokenizer,
        text_processor=parts.processor(tokenizer),
        transformer=transformer(config_of("longcat_image", joint_attention_dim=WIDTH)),
    )


BUILDERS = {
    "krea2": krea2,
    "lumina2": lumina2,
    "sana": sana,
    "pixart": pixart,
    "auraflow": auraflow,
    "hidream": hidream,
    "ernie_image": ernie_image,
    "cogview4": cogview4,
    "kandinsky5": kandinsky5,
    "kandinsky5_image": lambda: kandinsky5("T2I", visual_cond=False),
    "ovis_image": ovis_image,
    "longcat_image": longcat_image,
}
