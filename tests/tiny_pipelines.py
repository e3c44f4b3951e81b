"""Random pipelines of the other families' real classes, small enough to run in a second.

Complete diffusers folders, as tiny_flux.py makes one: Qwen-Image, Wan (text to video, of one
expert or two) and Z-Image, with bfloat16 transformers, their own kinds of text encoders and VAEs,
and tokenizers of single bytes or letters.
"""

from __future__ import annotations

import runpy
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

WIDTH = 128  # of all text encoders
CONFIGS = runpy.run_path(str(Path(__file__).with_name("configs.py")))
HEADS = {"attention_head_dim": 64, "num_attention_heads": 2}
VIDEO_VAE = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
CHAT = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def build_tiny(name: str, folder: Path, seed: int = 0) -> Path:
    """Write the pipeline of that name into a folder and return it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BUILDERS[name]().save_pretrained(folder)
    return folder


def _transformer(config: Mapping[str, Any], **changes: Any) -> Any:
    """diffusers' model of a config with changes, in bfloat16, its zeros filled in."""
    import diffusers

    said = dict(config) | changes
    model = getattr(diffusers, said.pop("_class_name"))(**said)
    for tensor in model.parameters():
        tensor.data += 0.02 * torch.randn_like(tensor)
    return model.to(torch.bfloat16)


def _qwen_image() -> Any:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = _bytes()
    config = CONFIGS["qwen_image_config"](num_layers=1, joint_attention_dim=WIDTH)
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    encoder = Qwen2_5_VLConfig(
        text_config=_layers(tokenizer)
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12]}},
        vision_config=vision | {"out_hidden_size": WIDTH},
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(**VIDEO_VAE),
        text_encoder=Qwen2_5_VLForConditionalGeneration(encoder),
        tokenizer=tokenizer,
        transformer=_transformer(
            config, num_attention_heads=2, attention_head_dim=64, axes_dims_rope=(8, 28, 28)
        ),
    )


def _wan(experts: int = 1) -> Any:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
    from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

    signs = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    encoder = UMT5Config(
        vocab_size=len(signs), d_model=WIDTH, d_kv=32, d_ff=WIDTH, num_layers=1, num_heads=2
    )
    config = CONFIGS["wan_config"](
        num_layers=2, num_attention_heads=1, ffn_dim=2 * WIDTH, text_dim=WIDTH
    )
    return WanPipeline(
        tokenizer=T5TokenizerFast(vocab=[(sign, -1.0) for sign in signs], extra_ids=0),
        text_encoder=UMT5EncoderModel(encoder),
        vae=AutoencoderKLWan(**VIDEO_VAE),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=_transformer(config),
        transformer_2=_transformer(config) if experts == 2 else None,
        boundary_ratio=0.8 if experts == 2 else None,
    )


def _z_image() -> Any:
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        ZImagePipeline,
    )
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = _bytes()
    config = CONFIGS["z_image_config"](
        dim=384, n_layers=1, n_refiner_layers=1, n_heads=3, n_kv_heads=3, cap_feat_dim=WIDTH
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=Qwen3Model(Qwen3Config(**_layers(tokenizer), head_dim=64)),
        tokenizer=tokenizer,
        transformer=_transformer(config),
    )


def _layers(tokenizer: Any) -> dict[str, Any]:
    """The config of a small decoder for a tokenizer; hidden_states[-2] are its embeddings."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }


def _bytes() -> Any:
    """Qwen's tokenizer without merges: a token for every byte."""
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = [*bytes_to_unicode().values(), *specials]
    tokenizer = Qwen2Tokenizer(vocab={sign: i for i, sign in enumerate(letters)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": specials[1:]})
    tokenizer.chat_template = CHAT
    return tokenizer


BUILDERS = {
    "qwen_image": _qwen_image,
    "wan": _wan,
    "wan_two_experts": lambda: _wan(experts=2),
    "z_image": _z_image,
}
