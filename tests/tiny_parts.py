"""Parts of tiny pipelines: encoders of few layers, tokenizers of single letters, and VAEs."""

from __future__ import annotations

import runpy
import string
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_BASE = runpy.run_path(str(HERE / "tiny_pipelines.py"))
WIDTH, VIDEO_VAE = _BASE["WIDTH"], _BASE["VIDEO_VAE"]
transformer, layers = _BASE["_transformer"], _BASE["_layers"]
CONFIGS = _BASE["CONFIGS"]
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CHAT = (
    "{% for message in messages %}<|im_start|>{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<|image_pad|>' }}{% endfor %}{% endif %}"
    "<|im_end|>{% endfor %}"
)


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """The first small config of tests/models, with changes."""
    known = runpy.run_path(str(HERE / "models" / f"{family}.py"))
    found: dict[str, Any] = known["CONFIGS"][0] | changes
    return found


def letters(length: int | None = None) -> Any:
    """Qwen's tokenizer without merges, which also has the signs of pictures."""
    tokenizer = _BASE["_bytes"]()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *VISION]}
    )
    tokenizer.chat_template = CHAT
    tokenizer.pad_token = "<|endoftext|>"
    if length:
        tokenizer.model_max_length = length
    return tokenizer


def flow(**changes: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | changes)


def kl(channels: int = 16, **changes: Any) -> Any:
    """A VAE of still pictures, an eighth as wide, made for 32 pixels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**_kl(channels) | {"shift_factor": 0.0} | changes)


def kl_flux2() -> Any:
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(**_kl(32))


def _kl(channels: int) -> dict[str, Any]:
    return {
        "block_out_channels": (4, 4, 4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
        "latent_channels": channels,
        "norm_num_groups": 2,
        "sample_size": 32,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def clip(projected: bool = False, width: int = 64, places: int = 77) -> tuple[Any, Any]:
    """A CLIP text encoder and its tokenizer."""
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    specials = ["<|startoftext|>", "<|endoftext|>"]
    pieces = [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase]
    vocab = {piece: place for place, piece in enumerate([*pieces, *specials])}
    config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=places,
        bos_token_id=vocab[specials[0]],
        eos_token_id=vocab[specials[1]],
        pad_token_id=vocab[specials[1]],
    )
    model = CLIPTextModelWithProjection if projected else CLIPTextModel
    return model(config), CLIPTokenizer(vocab=vocab, merges=[], model_max_length=places)


def t5(length: int | None = None, umt5: bool = False, width: int = WIDTH) -> tuple[Any, Any]:
    """A T5 encoder and its tokenizer."""
    import transformers

    signs = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    kind = "UMT5" if umt5 else "T5"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(signs), d_model=width, d_kv=32, d_ff=width, num_layers=1, num_heads=2
    )
    tokenizer = transformers.T5TokenizerFast(vocab=[(sign, -1.0) for sign in signs], extra_ids=0)
    if length:
        tokenizer.model_max_length = length
    return getattr(transformers, f"{kind}EncoderModel")(config), tokenizer


def byt5(width: int) -> tuple[Any, Any]:
    """The encoder of what is written in the picture: a token for every byte."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    config = T5Config(vocab_size=384, d_model=width, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config), ByT5Tokenizer()


def decoder(kind: str, tokenizer: Any, count: int = 1, **changes: Any) -> Any:
    """A language model of transformers: Llama, Qwen3, Gemma2 and others."""
    import transformers

    said = layers(tokenizer) | {"num_hidden_layers": count, "head_dim": 64} | changes
    name = kind.removesuffix("ForCausalLM").removesuffix("Model")
    return getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**said))


def qwen25_vl(tokenizer: Any, kind: str = "Qwen2_5_VLForConditionalGeneration") -> Any:
    """Qwen2.5-VL with a vision tower of one block."""
    import transformers

    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12]}}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    config = transformers.Qwen2_5_VLConfig(
        text_config=layers(tokenizer) | rope | {"num_hidden_layers": 3},
        vision_config=vision | {"out_hidden_size": WIDTH, "fullatt_block_indexes": [0]},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    if kind == "Qwen2_5_VLTextModel":
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

        return Qwen2_5_VLTextModel(config.text_config)
    return getattr(transformers, kind)(config)


def qwen3_vl(tokenizer: Any, kind: str, count: int = 3) -> Any:
    """Qwen3-VL with a vision tower of one block."""
    import transformers

    rope = {"rope_type": "default", "mrope_section": [12, 10, 10], "mrope_interleaved": True}
    text = layers(tokenizer) | {"num_hidden_layers": count, "head_dim": 64}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    config = transformers.Qwen3VLConfig(
        text_config=text | {"rope_parameters": rope},
        vision_config=vision | {"out_hidden_size": WIDTH, "deepstack_visual_indexes": [0]},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return getattr(transformers, kind)(config)


def processor(tokenizer: Any) -> Any:
    """What prepares pictures and text for Qwen's encoders, at few tokens a picture."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    limits = {"min_pixels": 28 * 28, "max_pixels": 56 * 56}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**limits),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**limits),
        chat_template=CHAT,
    )
