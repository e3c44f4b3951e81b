"""Cosmos-Predict2 and 2.5, and Cosmos 1.0 in diffusers names.

Names: diffusers/models/transformers/transformer_cosmos.py; original: nvidia-cosmos/cosmos-predict2
text2image_dit.py, which ComfyUI shares (comfy/ldm/cosmos/predict2.py). Those of 1.0, which count
the blocks inside a name, are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.family import Entry, Family, Infos, Linear, depth

_BLOCK = "transformer_blocks.{i}"
_SELF, _CROSS = f"{_BLOCK}.attn1", f"{_BLOCK}.attn2"

_LINEARS = (
    *(
        Linear(f"{_SELF}.{name}", "attention", "qkv", f"{_SELF}.to_q")
        for name in ("to_q", "to_k", "to_v")
    ),
    Linear(f"{_SELF}.to_out.0", "attention", "attention_out"),
    Linear(f"{_CROSS}.to_q", "attention", "cross_q"),
    Linear(f"{_CROSS}.q_img", "attention", "cross_q", f"{_CROSS}.to_q"),
    *(
        Linear(f"{_CROSS}.{name}", "attention", "text_kv", f"{_CROSS}.to_k")
        for name in ("to_k", "to_v")
    ),
    *(
        Linear(f"{_CROSS}.{name}", "attention", "image_kv", f"{_CROSS}.k_img")
        for name in ("k_img", "v_img")
    ),
    Linear(f"{_CROSS}.to_out.0", "attention", "cross_out"),
    Linear(f"{_BLOCK}.ff.net.0.proj", "mlp", "mlp_in"),
    Linear(f"{_BLOCK}.ff.net.2", "mlp", "mlp_out", gelu=0),
)


def _weights(pairs: Mapping[str, str]) -> tuple[Entry, ...]:
    """Linears without a bias."""
    return tuple(Entry(f"{x}.*", (f"{y}.*",), bias=False) for x, y in pairs.items())


def _attention(theirs: str, ours: str) -> tuple[Entry, ...]:
    theirs = f"blocks.{{i}}.{theirs}"
    return (
        *_weights({f"{theirs}.{x}_proj": f"{ours}.to_{x}" for x in "qkv"}),
        *_weights({f"{theirs}.output_proj": f"{ours}.to_out.0"}),
        *(Entry(f"{theirs}.{x}_norm.weight", (f"{ours}.norm_{x}.weight",)) for x in "qk"),
    )


_IMAGE = tuple(f"{_CROSS}.{x}_img" for x in "qkv")
_LEARNT = tuple(f"learnable_pos_embed.pos_emb_{axis}" for axis in "thw")

_ORIGINAL = (
    *_weights(
        {
            "x_embedder.proj.1": "patch_embed.proj",
            "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
            "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
            "final_layer.adaln_modulation.1": "norm_out.linear_1",
            "final_layer.adaln_modulation.2": "norm_out.linear_2",
            "final_layer.linear": "proj_out",
        }
    ),
    Entry("t_embedding_norm.weight", ("time_embed.norm.weight",)),
    *(Entry(f"{name}.*", (f"{name}.*",)) for name in ("crossattn_proj.0", "img_context_proj.0")),
    *(Entry(name, (name,)) for name in _LEARNT),
    *(
        entry
        for number, name in enumerate(("self_attn", "cross_attn", "mlp"), start=1)
        for entry in _weights(
            {
                f"blocks.{{i}}.adaln_modulation_{name}.{i}": f"{_BLOCK}.norm{number}.linear_{i}"
                for i in (1, 2)
            }
        )
    ),
    *_attention("self_attn", _SELF),
    *_attention("cross_attn", _CROSS),
    *_weights({f"blocks.{{i}}.cross_attn.{x}_img": f"{_CROSS}.{x}_img" for x in "qkv"}),
    *(
        Entry(f"blocks.{{i}}.cross_attn.{x}_img_norm.weight", (f"{_CROSS}.{x}_img_norm.weight",))
        for x in "qk"
    ),
    *_weights(
        {
            "blocks.{i}.mlp.layer1": f"{_BLOCK}.ff.net.0.proj",
            "blocks.{i}.mlp.layer2": f"{_BLOCK}.ff.net.2",
        }
    ),
)


def _rope_scale(learnt: bool, channels: int) -> list[float]:
    """Of the models of 2 billion weights, which fit one head to 1.0, to pictures, and to videos."""
    if learnt:
        return [2.0, 1.0, 1.0]
    return [1.0, 3.0, 3.0] if channels > 16 else [1.0, 4.0, 4.0]


def _config_of(infos: Infos) -> dict[str, Any]:
    """The CosmosTransformer3DModel config that the shapes imply, with a mask beside the latents."""
    hidden, columns = infos["patch_embed.proj.weight"].shape
    head = infos["transformer_blocks.0.attn1.norm_q.weight"].shape[0]
    channels = columns // 4 - 1
    learnt = _LEARNT[0] in infos
    cross = infos.get("crossattn_proj.0.weight")
    image = infos.get("img_context_proj.0.weight")
    return {
        "_class_name": "CosmosTransformer3DModel",
        "in_channels": channels,
        "out_channels": infos["proj_out.weight"].shape[0] // 4,
        "num_attention_heads": hidden // head,
        "attention_head_dim": head,
        "num_layers": depth(infos, "transformer_blocks"),
        "mlp_ratio": infos["transformer_blocks.0.ff.net.0.proj.weight"].shape[0] / hidden,
        "text_embed_dim": infos["transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "adaln_lora_dim": infos["transformer_blocks.0.norm1.linear_1.weight"].shape[0],
        "patch_size": [1, 2, 2],
        "rope_scale": _rope_scale(learnt, channels),
        "concat_padding_mask": True,
        "extra_pos_embed_type": "learnable" if learnt else None,
        "use_crossattn_projection": cross is not None,
        "crossattn_proj_in_channels": cross.shape[1] if cross else 1024,
        "encoder_hidden_states_channels": cross.shape[0] if cross else 1024,
        "img_context_dim_in": image.shape[1] if image else None,
        "img_context_dim_out": image.shape[0] if image else 2048,
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _variant(infos: Infos, config: Mapping[str, Any]) -> str:
    """What it makes, and of which generation it is."""
    if _LEARNT[0] in infos:
        return "1.0"
    if "crossattn_proj.0.weight" in infos:
        return "2.5"
    return "i2v" if infos["patch_embed.proj.weight"].shape[1] > 17 * 4 else "t2i"


_ALIASES = {
    "cosmos-predict2-2b-t2i": "nvidia/Cosmos-Predict2-2B-Text2Image",
    "cosmos-predict2-14b-t2i": "nvidia/Cosmos-Predict2-14B-Text2Image",
    "cosmos-predict2-2b-i2v": "nvidia/Cosmos-Predict2-2B-Video2World",
    "cosmos-predict2-14b-i2v": "nvidia/Cosmos-Predict2-14B-Video2World",
}

FAMILY = Family(
    name="cosmos",
    title="Cosmos-Predict",
    task="text-to-video",
    aliases=_ALIASES,
    licenses=dict.fromkeys(_ALIASES, "nvidia-open-model-license"),
    architecture="cosmos",
    classes=("CosmosTransformer3DModel",),
    signature=(
        "patch_embed.proj.weight",
        "time_embed.t_embedder.linear_1.weight",
        "transformer_blocks.0.norm1.linear_2.weight",
        "transformer_blocks.0.norm3.linear_1.weight",
        "transformer_blocks.0.attn1.to_q.weight",
        "transformer_blocks.0.attn2.to_k.weight",
        "transformer_blocks.0.ff.net.0.proj.weight",
    ),
    hidden="patch_embed.proj.weight",
    optional=(
        "crossattn_proj",
        "img_context_proj",
        "learnable_pos_embed",
        *_IMAGE,
    ),
    blocks=("transformer_blocks",),
    # The modulation of rank 256 stays: a twentieth of the weights, which every token is scaled by.
    linears=_LINEARS,
    prefixes=("model.diffusion_model.", "net."),
    dialects={"diffusers": (), "original": _ORIGINAL},
    # Counters of the training, and positions, which are computed.
    unread=("accum_", "pos_embedder.", "logvar."),
    config_of=_config_of,
    assumed=("in_channels", "patch_size", "rope_scale", "concat_padding_mask"),
    facts=_facts,
    # Both have code for Cosmos 3 alone (2026).
    unrun=("sglang", "vllm"),
    video=True,
    sensitive=(f"{_SELF}.to_out.0", f"{_CROSS}.to_out.0"),
    # No folds: linears without a bias cannot take a shift back.
    variant=_variant,
    pipelines={
        "t2i": "Cosmos2TextToImagePipeline",
        "i2v": "Cosmos2VideoToWorldPipeline",
        "1.0": "CosmosTextToWorldPipeline",
        "2.5": "Cosmos2_5_PredictBasePipeline",
    },
    fields=("prompt", "negative_prompt", "image"),
    encoders={"text_encoder": "t5"},
)
