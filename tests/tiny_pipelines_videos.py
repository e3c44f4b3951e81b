"""Random pipelines of videos: Wan from pictures, HunyuanVideo 1 and 1.5, LTX-Video and LTX-2."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

parts = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_parts.py"))))
WIDTH, transformer, config_of = parts.WIDTH, parts.transformer, parts.config_of
LTX_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "timestep_conditioning": False,
    "patch_size": 1,
    "patch_size_t": 1,
}


def wan_i2v(**changes: Any) -> Any:
    """Wan 2.1, which sees the picture through CLIP as well."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    encoder, tokenizer = parts.t5(umt5=True)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    small = {"num_layers": 1, "num_attention_heads": 1, "ffn_dim": 2 * WIDTH, "text_dim": WIDTH}
    picture = {"in_channels": 36, "image_dim": 64, "added_kv_proj_dim": 128} | changes
    return WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=AutoencoderKLWan(**parts.VIDEO_VAE),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        image_processor=CLIPImageProcessor(
            size={"height": 28, "width": 28}, crop_size={"height": 28, "width": 28}
        ),
        image_encoder=CLIPVisionModel(vision),
        transformer=transformer(parts.CONFIGS["wan_config"](**small, **picture)),
    )


def _hunyuan_vae() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )


def hunyuan_video() -> Any:
    from diffusers import HunyuanVideoPipeline

    tokenizer = parts.letters()
    second, other = parts.clip()
    config = config_of(
        "hunyuan_video",
        num_layers=1,
        num_single_layers=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=64,
    )
    return HunyuanVideoPipeline(
        text_encoder=parts.decoder("LlamaModel", tokenizer, 3),
        tokenizer=tokenizer,
        transformer=transformer(config),
        vae=_hunyuan_vae(),
        scheduler=parts.flow(),
        text_encoder_2=second,
        tokenizer_2=other,
    )


def hunyuan_video15() -> Any:
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        HunyuanVideo15Pipeline,
    )

    tokenizer = parts.letters()
    second, other = parts.byt5(48)
    return HunyuanVideo15Pipeline(
        text_encoder=parts.qwen25_vl(tokenizer, "Qwen2_5_VLTextModel"),
        tokenizer=tokenizer,
        transformer=transformer(
            config_of("hunyuan_video15", num_layers=1, text_embed_dim=WIDTH, text_embed_2_dim=48)
        ),
        vae=AutoencoderKLHunyuanVideo15(
            block_out_channels=(4, 4, 4, 4, 4), layers_per_block=1, latent_channels=32
        ),
        scheduler=parts.flow(),
        text_encoder_2=second,
        tokenizer_2=other,
        guider=ClassifierFreeGuidance(),
    )


def ltx() -> Any:
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline

    encoder, tokenizer = parts.t5()
    flags, ones = (True, True, False, False), (1, 1, 1, 1, 1)
    vae = AutoencoderKLLTXVideo(
        **LTX_VAE,
        latent_channels=32,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=ones,
        decoder_layers_per_block=ones,
        spatio_temporal_scaling=flags,
        decoder_spatio_temporal_scaling=flags,
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
    )
    config = config_of("ltx", in_channels=32, out_channels=32, num_layers=2, caption_channels=WIDTH)
    return LTXPipeline(
        scheduler=parts.flow(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer(config),
    )


def _ltx2_audio() -> tuple[Any, Any]:
    """The VAE of sound, and what makes waves of it."""
    from diffusers import AutoencoderKLLTX2Audio
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    vae = AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        norm_type="pixel",
        causality_axis="height",
        dropout=0.0,
        mid_block_add_attention=False,
        sample_rate=16000,
        mel_hop_length=160,
        is_causal=True,
        mel_bins=8,
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=32,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        leaky_relu_negative_slope=0.1,
        output_sampling_rate=16000,
    )
    return vae, vocoder


def _ltx2_vae() -> Any:
    from diffusers import AutoencoderKLLTX2Video

    return AutoencoderKLLTX2Video(
        **LTX_VAE,
        latent_channels=24,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        encoder_causal=True,
        decoder_causal=False,
    )


def _ltx2_connectors(layers: int) -> Any:
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    return LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=layers + 1,
        video_connector_num_attention_heads=4,
        video_connector_attention_head_dim=32,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=4,
        audio_connector_attention_head_dim=32,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
    )


def ltx2() -> Any:
    """Video and sound at once."""
    from diffusers import LTX2Pipeline
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tokenizer = parts.letters()
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    encoder = Gemma3Config(
        text_config=parts.layers(tokenizer) | {"head_dim": 64},
        vision_config=vision | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    audio, vocoder = _ltx2_audio()
    config = config_of(
        "ltx2",
        num_layers=1,
        caption_channels=WIDTH,
        audio_in_channels=4,
        audio_out_channels=4,
    )
    return LTX2Pipeline(
        scheduler=parts.flow(),
        vae=_ltx2_vae(),
        audio_vae=audio,
        text_encoder=Gemma3ForConditionalGeneration(encoder),
        tokenizer=tokenizer,
        connectors=_ltx2_connectors(1),
        transformer=transformer(config),
        vocoder=vocoder,
    )


BUILDERS = {
    "wan_i2v": wan_i2v,
    "wan_flf2v": lambda: wan_i2v(pos_embed_seq_len=2 * 5),
    "hunyuan_video": hunyuan_video,
    "hunyuan_video15": hunyuan_video15,
    "ltx": ltx,
    "ltx2": ltx2,
}
