"""A random FLUX pipeline of the real classes, small enough to run in a second.

It is a complete diffusers folder: T5, CLIP, their tokenizers, VAE, scheduler, and a transformer
with the real names, a guidance input and bfloat16 weights, as FLUX.1-dev has them.
"""

from __future__ import annotations

import string
from pathlib import Path

import torch

BLOCKS = ("transformer_blocks", "single_transformer_blocks")
WIDTH = 64  # of both text encoders
SIZE = 32  # pixels, four tokens


def build_tiny_pipeline(
    folder: Path,
    hidden_heads: int = 2,
    head_dim: int = 128,
    layers: int = 1,
    single_layers: int = 1,
    seed: int = 0,
) -> Path:
    """Write the pipeline into a folder and return it."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        time_axis = head_dim // 8
        transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=layers,
            num_single_layers=single_layers,
            attention_head_dim=head_dim,
            num_attention_heads=hidden_heads,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(time_axis, *[(head_dim - time_axis) // 2] * 2),
        ).to(torch.bfloat16)
        vae = AutoencoderKL(
            block_out_channels=(4, 4, 4, 4),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=2,
            sample_size=SIZE,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.0,
        )
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=vae,
            transformer=transformer,
            **_text_half(),
        )
    pipeline.save_pretrained(folder)
    return folder


def _text_half() -> dict[str, object]:
    """Encoders of one layer, and tokenizers of single characters."""
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5TokenizerFast,
    )

    specials = ["<|startoftext|>", "<|endoftext|>"]
    pieces = [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase]
    vocab = {piece: place for place, piece in enumerate([*pieces, *specials])}
    clip = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=vocab[specials[0]],
        eos_token_id=vocab[specials[1]],
        pad_token_id=vocab[specials[1]],
    )
    signs = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    t5 = T5Config(
        vocab_size=len(signs), d_model=WIDTH, d_kv=32, d_ff=WIDTH, num_layers=1, num_heads=2
    )
    return {
        "text_encoder": CLIPTextModel(clip),
        "tokenizer": CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16),
        "text_encoder_2": T5EncoderModel(t5),
        "tokenizer_2": T5TokenizerFast(
            vocab=[(sign, -1.0) for sign in signs], extra_ids=0, model_max_length=16
        ),
    }
