"""HunyuanVideo: text and image to video, FramePack, and what was trained from them.

Names: diffusers/models/transformers/transformer_hunyuan_video.py and its _framepack; original:
Tencent/HunyuanVideo hyvideo/modules/models.py, which ComfyUI reads. FramePack came in diffusers
names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.families import flux
from dqconvert.converter.family import Entry, Family, Fold, Infos, Linear, depth

BLOCK = "transformer_blocks.{i}"
REFINER = "context_embedder.token_refiner.refiner_blocks"
IMAGE, TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
_SINGLE = "single_transformer_blocks.{i}"

LINEARS = (
    Linear(f"{BLOCK}.norm1.linear", "modulation", splits=6),
    Linear(f"{BLOCK}.norm1_context.linear", "modulation", splits=6),
    *(
        Linear(f"{BLOCK}.attn.{name}", "attention", "image_qkv", f"{BLOCK}.attn.to_q")
        for name in IMAGE
    ),
    *(
        Linear(f"{BLOCK}.attn.{name}", "attention", "text_qkv", f"{BLOCK}.attn.add_q_proj")
        for name in TEXT
    ),
    Linear(f"{BLOCK}.attn.to_out.0", "attention", "attention_out"),
    Linear(f"{BLOCK}.attn.to_add_out", "attention", "attention_out"),
    Linear(f"{BLOCK}.ff.net.0.proj", "mlp", "image_mlp_in"),
    Linear(f"{BLOCK}.ff.net.2", "mlp", "image_mlp_out", gelu=0),
    Linear(f"{BLOCK}.ff_context.net.0.proj", "mlp", "text_mlp_in"),
    Linear(f"{BLOCK}.ff_context.net.2", "mlp", "text_mlp_out", gelu=0),
)
"""The linears of a double block, which HunyuanVideo 1.5 has as well."""

_SINGLE_LINEARS = (
    Linear(f"{_SINGLE}.norm.linear", "modulation", splits=3),
    *(
        Linear(f"{_SINGLE}.{name}", role, "qkv_mlp", f"{_SINGLE}.attn.to_q")
        for name, role in (
            ("attn.to_q", "attention"),
            ("attn.to_k", "attention"),
            ("attn.to_v", "attention"),
            ("proj_mlp", "mlp"),
        )
    ),
    Linear(f"{_SINGLE}.proj_out", "mlp", "out", gelu="hidden"),
)

FOLDS = (
    Fold(tuple(f"{BLOCK}.attn.{name}" for name in IMAGE), f"{BLOCK}.norm1.linear"),
    Fold(tuple(f"{BLOCK}.attn.{name}" for name in TEXT), f"{BLOCK}.norm1_context.linear"),
    Fold((f"{BLOCK}.ff.net.0.proj",), f"{BLOCK}.norm1.linear", 3, 4),
    Fold((f"{BLOCK}.ff_context.net.0.proj",), f"{BLOCK}.norm1_context.linear", 3, 4),
    Fold(
        (f"{BLOCK}.attn.to_out.0", f"{BLOCK}.attn.to_add_out"),
        values=(f"{BLOCK}.attn.to_v", f"{BLOCK}.attn.add_v_proj"),
    ),
)
"""What a double block can hold of a smooth vector."""

_SINGLE_FOLDS = (
    Fold(
        (*(f"{_SINGLE}.attn.{name}" for name in IMAGE), f"{_SINGLE}.proj_mlp"),
        f"{_SINGLE}.norm.linear",
    ),
    Fold((f"{_SINGLE}.proj_out",), values=(f"{_SINGLE}.attn.to_v",), columns=(0, "hidden")),
)


def qkv(prefix: str, names: tuple[str, ...] = IMAGE) -> tuple[str, ...]:
    """Three projections of one attention, in canonical names."""
    return tuple(f"{prefix}.attn.{name}.*" for name in names)


def mlp(theirs: str, ours: str) -> tuple[Entry, Entry]:
    """An embedding of a number in the original names."""
    return (
        Entry(f"{theirs}.mlp.0.*", (f"{ours}.linear_1.*",)),
        Entry(f"{theirs}.mlp.2.*", (f"{ours}.linear_2.*",)),
    )


def stream(theirs: str, ours: Mapping[str, str]) -> tuple[Entry, ...]:
    """One of the two streams of a double block, image and text, without q, k and v."""
    theirs = f"double_blocks.{{i}}.{theirs}"
    return (
        Entry(f"{theirs}_mod.linear.*", (f"{BLOCK}.{ours['mod']}.linear.*",)),
        Entry(f"{theirs}_attn_q_norm.weight", (f"{BLOCK}.attn.{ours['q']}.weight",)),
        Entry(f"{theirs}_attn_k_norm.weight", (f"{BLOCK}.attn.{ours['k']}.weight",)),
        Entry(f"{theirs}_attn_proj.*", (f"{BLOCK}.attn.{ours['out']}.*",)),
        Entry(f"{theirs}_mlp.fc1.*", (f"{BLOCK}.{ours['mlp']}.net.0.proj.*",)),
        Entry(f"{theirs}_mlp.fc2.*", (f"{BLOCK}.{ours['mlp']}.net.2.*",)),
    )


_TXT, _TXT_BLOCK = "txt_in", "txt_in.individual_token_refiner.blocks.{i}"

SHARED = (
    Entry("img_in.proj.*", ("x_embedder.proj.*",)),
    *mlp(f"{_TXT}.t_embedder", "context_embedder.time_text_embed.timestep_embedder"),
    Entry(
        f"{_TXT}.c_embedder.linear_1.*",
        ("context_embedder.time_text_embed.text_embedder.linear_1.*",),
    ),
    Entry(
        f"{_TXT}.c_embedder.linear_2.*",
        ("context_embedder.time_text_embed.text_embedder.linear_2.*",),
    ),
    Entry(f"{_TXT}.input_embedder.*", ("context_embedder.proj_in.*",)),
    Entry(f"{_TXT_BLOCK}.norm1.*", (f"{REFINER}.{{i}}.norm1.*",)),
    Entry(f"{_TXT_BLOCK}.self_attn_qkv.*", qkv(f"{REFINER}.{{i}}")),
    Entry(f"{_TXT_BLOCK}.self_attn_proj.*", (f"{REFINER}.{{i}}.attn.to_out.0.*",)),
    Entry(f"{_TXT_BLOCK}.norm2.*", (f"{REFINER}.{{i}}.norm2.*",)),
    Entry(f"{_TXT_BLOCK}.mlp.fc1.*", (f"{REFINER}.{{i}}.ff.net.0.proj.*",)),
    Entry(f"{_TXT_BLOCK}.mlp.fc2.*", (f"{REFINER}.{{i}}.ff.net.2.*",)),
    Entry(f"{_TXT_BLOCK}.adaLN_modulation.1.*", (f"{REFINER}.{{i}}.norm_out.linear.*",)),
    *stream("img", {"mod": "norm1", "q": "norm_q", "k": "norm_k", "out": "to_out.0", "mlp": "ff"}),
    *stream(
        "txt",
        {
            "mod": "norm1_context",
            "q": "norm_added_q",
            "k": "norm_added_k",
            "out": "to_add_out",
            "mlp": "ff_context",
        },
    ),
    # Tencent's final layer takes (shift, scale), diffusers' AdaLayerNormContinuous (scale, shift).
    Entry("final_layer.adaLN_modulation.1.*", ("norm_out.linear.*",), swap=True),
    Entry("final_layer.linear.*", ("proj_out.*",)),
)
"""What HunyuanVideo and HunyuanVideo 1.5 name alike."""

FUSED = (
    Entry("double_blocks.{i}.img_attn_qkv.*", qkv(BLOCK)),
    Entry("double_blocks.{i}.txt_attn_qkv.*", qkv(BLOCK, TEXT)),
)

SINGLE = (
    Entry("single_blocks.{i}.modulation.linear.*", (f"{_SINGLE}.norm.linear.*",)),
    Entry("single_blocks.{i}.linear1.*", (*qkv(_SINGLE), f"{_SINGLE}.proj_mlp.*")),
    Entry("single_blocks.{i}.linear2.*", (f"{_SINGLE}.proj_out.*",)),
    Entry("single_blocks.{i}.q_norm.weight", (f"{_SINGLE}.attn.norm_q.weight",)),
    Entry("single_blocks.{i}.k_norm.weight", (f"{_SINGLE}.attn.norm_k.weight",)),
)

_EMBEDDER = "time_text_embed"

_ORIGINAL = (
    *SHARED,
    *FUSED,
    *mlp("time_in", f"{_EMBEDDER}.timestep_embedder"),
    Entry("vector_in.in_layer.*", (f"{_EMBEDDER}.text_embedder.linear_1.*",)),
    Entry("vector_in.out_layer.*", (f"{_EMBEDDER}.text_embedder.linear_2.*",)),
    *mlp("guidance_in", f"{_EMBEDDER}.guidance_embedder"),
    *SINGLE,
    *(
        Entry(f"{name}.*", (f"{name}.*",))
        for name in (
            "clean_x_embedder.proj",
            "clean_x_embedder.proj_2x",
            "clean_x_embedder.proj_4x",
            "image_projection.up",
            "image_projection.down",
        )
    ),
)


def shared_config(infos: Infos) -> dict[str, Any]:
    """What the shapes imply of any HunyuanVideo's config."""
    hidden, channels, frames, patch, _ = infos["x_embedder.proj.weight"].shape
    head = infos["transformer_blocks.0.attn.norm_q.weight"].shape[0]
    mlp_width = infos["transformer_blocks.0.ff.net.0.proj.weight"].shape[0]
    return {
        "in_channels": channels,
        "out_channels": infos["proj_out.weight"].shape[0] // (frames * patch * patch),
        "num_attention_heads": hidden // head,
        "attention_head_dim": head,
        "num_layers": depth(infos, "transformer_blocks"),
        "num_refiner_layers": depth(infos, REFINER),
        "mlp_ratio": mlp_width / hidden,
        "patch_size": patch,
        "patch_size_t": frames,
        "text_embed_dim": infos["context_embedder.proj_in.weight"].shape[1],
    }


def _config_of(infos: Infos) -> dict[str, Any]:
    """The HunyuanVideoTransformer3DModel config that the shapes imply, or FramePack's."""
    found = shared_config(infos) | {
        "_class_name": "HunyuanVideoTransformer3DModel",
        "num_single_layers": depth(infos, "single_transformer_blocks"),
        "guidance_embeds": f"{_EMBEDDER}.guidance_embedder.linear_1.weight" in infos,
        "pooled_projection_dim": infos[f"{_EMBEDDER}.text_embedder.linear_1.weight"].shape[1],
    }
    # The first image to video model gets latents, the image's latents and a mask; the second has
    # the tensors of text to video.
    joined = found["in_channels"] == 2 * found["out_channels"] + 1
    found["image_condition_type"] = "latent_concat" if joined else None
    image = infos.get("image_projection.up.weight")
    clean = "clean_x_embedder.proj.weight" in infos
    if image is None and not clean:
        return found
    return found | {
        "_class_name": "HunyuanVideoFramepackTransformer3DModel",
        "has_image_proj": image is not None,
        "image_proj_dim": image.shape[1] if image else 1152,
        "has_clean_x_embedder": clean,
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _variant(infos: Infos, config: Mapping[str, Any]) -> str:
    """What it makes videos of; the second image to video model is told by config.json alone."""
    if "clean_x_embedder.proj.weight" in infos:
        return "framepack"
    channels = infos["x_embedder.proj.weight"].shape[1]
    if channels > 16 and channels % 2 == 0:
        return "skyreels-i2v"
    return "i2v" if channels > 16 or config.get("image_condition_type") else "t2v"


_ALIASES = {
    "hunyuanvideo": "hunyuanvideo-community/HunyuanVideo",
    "hunyuanvideo-i2v": "hunyuanvideo-community/HunyuanVideo-I2V",
    "framepack-i2v": "lllyasviel/FramePackI2V_HY",
}

FAMILY = Family(
    name="hunyuan_video",
    title="HunyuanVideo",
    task="text-to-video",
    aliases=_ALIASES,
    licenses={
        "hunyuanvideo": "tencent-hunyuan-community",
        "hunyuanvideo-i2v": "tencent-hunyuan-community",
    },
    architecture="hyvid",
    classes=(
        "HunyuanVideoTransformer3DModel",
        "HunyuanVideoFramepackTransformer3DModel",
        "HunyuanVideoTransformer3DModelPacked",
    ),
    signature=(
        "x_embedder.proj.weight",
        f"{_EMBEDDER}.text_embedder.linear_1.weight",
        "context_embedder.proj_in.weight",
        f"{REFINER}.0.norm_out.linear.weight",
        "transformer_blocks.0.attn.add_q_proj.weight",
        "single_transformer_blocks.0.proj_mlp.weight",
    ),
    hidden="x_embedder.proj.weight",
    optional=(f"{_EMBEDDER}.guidance_embedder", "clean_x_embedder", "image_projection"),
    blocks=("transformer_blocks", "single_transformer_blocks", REFINER),
    # The refiner of the prompt stays: two small blocks outside of the two lists, which LightX2V
    # builds unquantized in HunyuanVideo 1.5.
    linears=(*LINEARS, *_SINGLE_LINEARS),
    prefixes=("model.diffusion_model.", "model.model."),
    dialects={"diffusers": (), "original": _ORIGINAL},
    config_of=_config_of,
    assumed=("image_condition_type",),
    facts=_facts,
    # vLLM-Omni has code for HunyuanVideo 1.5 alone (2026).
    unrun=("vllm",),
    policies=flux.BITSANDBYTES,
    outside=(flux.PROJ_OUT,),
    video=True,
    sensitive=(f"{BLOCK}.attn.to_out.0", f"{_SINGLE}.attn.to_v"),
    folds=(*FOLDS, *_SINGLE_FOLDS),
    variant=_variant,
    pipelines={
        "t2v": "HunyuanVideoPipeline",
        "i2v": "HunyuanVideoImageToVideoPipeline",
        "skyreels-i2v": "HunyuanSkyreelsImageToVideoPipeline",
        "framepack": "HunyuanVideoFramepackPipeline",
    },
    fields=("prompt", "negative_prompt", "image"),
    encoders={"text_encoder": "llama", "text_encoder_2": "clip_text"},
)
