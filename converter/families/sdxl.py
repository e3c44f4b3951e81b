"""Stable Diffusion XL: the U-Net of the base model, its Turbo, Lightning and inpainting variants.

Names: diffusers/models/unets/unet_2d_condition.py; original: Stability-AI generative-models
sgm/modules/diffusionmodules/openaimodel.py, which ComfyUI shares; nunchaku:
nunchaku/models/unets/unet_sdxl.py. Three levels of two residual blocks (three on the way up), with
transformers at the two lower ones; the refiner has four levels and is none of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.family import EQUAL, Entry, Family, Infos, Linear, depth

_LEVELS, _DOWN, _UP = range(3), range(2), range(3)
_DEEP = (1, 2)
"""The levels on the way down that have transformers; on the way up all but the last have them."""

_PLACES = {
    **{f"down_blocks.{b}.attentions.{r}": 1 + 3 * b + r for b in _DEEP for r in _DOWN},
    "mid_block.attentions.0": 0,
    **{f"up_blocks.{b}.attentions.{r}": 3 * b + r for b in (0, 1) for r in _UP},
}
"""Canonical transformers, with the number of their block in the original names."""

_THEIRS = {"d": "input_blocks.{}.1", "m": "middle_block.1", "u": "output_blocks.{}.1"}
_BLOCKS = tuple(f"{place}.transformer_blocks" for place in _PLACES)


def _linears(blocks: str) -> tuple[Linear, ...]:
    """Queries read the image; keys and values of the second attention the text."""
    block = f"{blocks}.{{i}}"
    own, cross = f"{block}.attn1", f"{block}.attn2"
    return (
        *(Linear(f"{own}.to_{x}", "attention", "qkv", f"{own}.to_q") for x in "qkv"),
        Linear(f"{own}.to_out.0", "attention"),
        Linear(f"{cross}.to_q", "attention"),
        *(Linear(f"{cross}.to_{x}", "attention", "text_kv", f"{cross}.to_k") for x in "kv"),
        Linear(f"{cross}.to_out.0", "attention"),
        Linear(f"{block}.ff.net.0.proj", "mlp"),
        Linear(f"{block}.ff.net.2", "mlp"),
    )


def _renamed(theirs: str, ours: str, names: Mapping[str, str]) -> tuple[Entry, ...]:
    return tuple(Entry(f"{theirs}.{k}.*", (f"{ours}.{name}.*",)) for k, name in names.items())


def _resnet(theirs: str, ours: str, shortcut: bool) -> tuple[Entry, ...]:
    names = {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
    }
    return _renamed(
        theirs, ours, names | ({"skip_connection": "conv_shortcut"} if shortcut else {})
    )


def _transformer(theirs: str, ours: str) -> tuple[Entry, ...]:
    """The original names are the same."""
    plain = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "attn2.to_k", "attn2.to_v")
    biased = ("norm1", "norm2", "norm3", "attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj")
    theirs_block, ours_block = (f"{one}.transformer_blocks.{{i}}" for one in (theirs, ours))
    return (
        *(
            Entry(f"{theirs_block}.{name}.*", (f"{ours_block}.{name}.*",), bias=False)
            for name in plain
        ),
        *(
            Entry(f"{theirs_block}.{name}.*", (f"{ours_block}.{name}.*",))
            for name in (*biased, "ff.net.2")
        ),
        *_renamed(theirs, ours, {name: name for name in ("norm", "proj_in", "proj_out")}),
    )


_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.6.0.op": "down_blocks.1.downsamplers.0.conv",
    "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_ORIGINAL = (
    *(Entry(f"{theirs}.*", (f"{ours}.*",)) for theirs, ours in _ENDS.items()),
    *(
        entry
        for b in _LEVELS
        for r in _DOWN
        for entry in _resnet(
            f"input_blocks.{1 + 3 * b + r}.0", f"down_blocks.{b}.resnets.{r}", b > 0 and r == 0
        )
    ),
    *(
        entry
        for r in (0, 1)
        for entry in _resnet(f"middle_block.{2 * r}", f"mid_block.resnets.{r}", False)
    ),
    *(
        entry
        for b in _LEVELS
        for r in _UP
        for entry in _resnet(f"output_blocks.{3 * b + r}.0", f"up_blocks.{b}.resnets.{r}", True)
    ),
    *(
        entry
        for place, number in _PLACES.items()
        for entry in _transformer(_THEIRS[place[0]].format(number), place)
    ),
)
_NUNCHAKU = tuple(
    Entry(
        f"{blocks}.{{i}}.attn1.to_qkv.*",
        tuple(f"{blocks}.{{i}}.attn1.to_{x}.*" for x in "qkv"),
        bias=False,
        share=EQUAL,
    )
    for blocks in _BLOCKS
)
_HEAD = 64


def _config_of(infos: Infos) -> dict[str, Any]:
    """The UNet2DConditionModel config that the shapes imply, as far as it differs from class's."""
    widths = [infos[f"down_blocks.{b}.resnets.0.conv1.weight"].shape[0] for b in _LEVELS]
    depths = [1, *(depth(infos, f"down_blocks.{b}.attentions.0.transformer_blocks") for b in _DEEP)]
    added = infos["add_embedding.linear_1.weight"].shape[1]
    text = infos[f"{_BLOCKS[0]}.0.attn2.to_k.weight"].shape[1]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 128,
        "in_channels": infos["conv_in.weight"].shape[1],
        "out_channels": infos["conv_out.weight"].shape[0],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": widths,
        "layers_per_block": len(_DOWN),
        "transformer_layers_per_block": depths,
        "attention_head_dim": [width // _HEAD for width in widths],
        "cross_attention_dim": text,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": added,
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_class": "NunchakuSDXLUNet2DConditionModel"} if dialect == "nunchaku" else {}


def _variant(infos: Infos, config: Mapping[str, Any]) -> str:
    """Inpainting reads a mask and a masked picture beside the latents, edits a picture."""
    return {9: "inpaint", 8: "edit"}.get(infos["conv_in.weight"].shape[1], "")


_TEXT = dict.fromkeys(f"{blocks}.{{i}}.attn2.to_{x}" for blocks in _BLOCKS for x in "kv")
_ALIASES = {
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sdxl-turbo": "stabilityai/sdxl-turbo",
    "sdxl-inpaint": "diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
}

FAMILY = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    aliases=_ALIASES,
    licenses={
        "sdxl": "openrail++",
        "sdxl-turbo": "sai-nc-community",
        "sdxl-inpaint": "openrail++",
    },
    architecture="sdxl",
    classes=("UNet2DConditionModel",),
    signature=(
        "conv_in.weight",
        "add_embedding.linear_1.weight",
        "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight",
        "up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_q.weight",
        "up_blocks.2.resnets.2.conv_shortcut.weight",
    ),
    foreign=("down_blocks.3.resnets.0.conv1.weight",),
    hidden="conv_in.weight",
    blocks=_BLOCKS,
    linears=tuple(linear for blocks in _BLOCKS for linear in _linears(blocks)),
    dialects={"diffusers": (), "original": _ORIGINAL, "nunchaku": _NUNCHAKU},
    layouts={"nunchaku": ("unet",)},
    config_of=_config_of,
    assumed=("attention_head_dim", "sample_size"),
    facts=_facts,
    policies={
        # Its class leaves them: the text is short, and they are computed once for all steps.
        "nunchaku": _TEXT,
        # Read by their shapes to tell the model (comfy/model_detection.py, model_config_from_unet).
        "comfyui": _TEXT,
    },
    unrun=("sglang", "vllm"),
    unguided=("turbo", "lightning", "lcm", "hyper"),
    variant=_variant,
    pipelines={
        "": "StableDiffusionXLPipeline",
        "inpaint": "StableDiffusionXLInpaintPipeline",
        "edit": "StableDiffusionXLInstructPix2PixPipeline",
    },
    encoders={"text_encoder": "clip_text", "text_encoder_2": "clip_text"},
    # No folds: norms have weights of their own, which no linear makes.
)
