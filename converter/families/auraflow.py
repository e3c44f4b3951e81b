"""AuraFlow, of any width and depth.

Names: diffusers/models/transformers/auraflow_transformer_2d.py; original: cloneofsimo/minRF, which
ComfyUI shares (comfy/ldm/aura/mmdit.py). Linears of the blocks have no bias. The last norm's
(scale, shift) are the original's (shift, scale).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.family import Entry, Family, Infos, Linear, depth

_JOINT, _SINGLE = "joint_transformer_blocks.{i}", "single_transformer_blocks.{i}"
_HEAD = 256
"""Width of an attention head of every model so far; norms without weights do not tell."""

_IMAGE, _TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


def _qkv(block: str, names: tuple[str, ...], shares: str) -> tuple[Linear, ...]:
    site = f"{block}.attn.{names[0]}"
    return tuple(Linear(f"{block}.attn.{name}", "attention", shares, site) for name in names)


def _forward(name: str, label: str) -> tuple[Linear, ...]:
    return (
        *(
            Linear(f"{name}.{one}", "mlp", f"{label}_in", f"{name}.linear_1")
            for one in ("linear_1", "linear_2")
        ),
        Linear(f"{name}.out_projection", "mlp", f"{label}_out"),
    )


_LINEARS = (
    Linear(f"{_JOINT}.norm1.linear", "modulation", splits=6),
    Linear(f"{_JOINT}.norm1_context.linear", "modulation", splits=6),
    *_qkv(_JOINT, _IMAGE, "image_qkv"),
    *_qkv(_JOINT, _TEXT, "text_qkv"),
    Linear(f"{_JOINT}.attn.to_out.0", "attention", "attention_out"),
    Linear(f"{_JOINT}.attn.to_add_out", "attention", "attention_out"),
    *_forward(f"{_JOINT}.ff", "image_mlp"),
    *_forward(f"{_JOINT}.ff_context", "text_mlp"),
    Linear(f"{_SINGLE}.norm1.linear", "modulation", splits=6),
    *_qkv(_SINGLE, _IMAGE, "qkv"),
    Linear(f"{_SINGLE}.attn.to_out.0", "attention", "attention_out"),
    *_forward(f"{_SINGLE}.ff", "mlp"),
)


def _renamed(theirs: str, ours: str, names: Mapping[str, str]) -> tuple[Entry, ...]:
    """Linears without a bias."""
    return tuple(Entry(f"{theirs}.{k}.*", (f"{ours}.{v}.*",), bias=False) for k, v in names.items())


_MLP = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_ADDED = {"q": "add_q_proj", "k": "add_k_proj", "v": "add_v_proj", "o": "to_add_out"}


def _attention(stream: int, names: Mapping[str, str]) -> dict[str, str]:
    return {f"w{stream}{letter}": name for letter, name in names.items()}


_DOUBLE = "double_layers.{i}"
_LAYER = "single_layers.{i}"
_ORIGINAL = (
    Entry("positional_encoding", ("pos_embed.pos_embed",)),
    Entry("register_tokens", ("register_tokens",)),
    Entry("init_x_linear.*", ("pos_embed.proj.*",)),
    Entry("t_embedder.mlp.0.*", ("time_step_proj.linear_1.*",)),
    Entry("t_embedder.mlp.2.*", ("time_step_proj.linear_2.*",)),
    Entry("cond_seq_linear.*", ("context_embedder.*",), bias=False),
    *_renamed(_DOUBLE, _JOINT, {"modX.1": "norm1.linear", "modC.1": "norm1_context.linear"}),
    *_renamed(f"{_DOUBLE}.attn", f"{_JOINT}.attn", _attention(2, _ATTENTION)),
    *_renamed(f"{_DOUBLE}.attn", f"{_JOINT}.attn", _attention(1, _ADDED)),
    *_renamed(f"{_DOUBLE}.mlpX", f"{_JOINT}.ff", _MLP),
    *_renamed(f"{_DOUBLE}.mlpC", f"{_JOINT}.ff_context", _MLP),
    *_renamed(_LAYER, _SINGLE, {"modCX.1": "norm1.linear"}),
    *_renamed(f"{_LAYER}.attn", f"{_SINGLE}.attn", _attention(1, _ATTENTION)),
    *_renamed(f"{_LAYER}.mlp", f"{_SINGLE}.ff", _MLP),
    Entry("modF.1.*", ("norm_out.linear.*",), swap=True, bias=False),
    Entry("final_linear.*", ("proj_out.*",), bias=False),
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The AuraFlowTransformer2DModel config that the shapes imply."""
    hidden, joint = infos["context_embedder.weight"].shape
    return {
        "_class_name": "AuraFlowTransformer2DModel",
        "sample_size": 64,
        "patch_size": 2,
        "in_channels": infos["pos_embed.proj.weight"].shape[1] // 4,
        "num_mmdit_layers": depth(infos, "joint_transformer_blocks"),
        "num_single_dit_layers": depth(infos, "single_transformer_blocks"),
        "attention_head_dim": _HEAD,
        "num_attention_heads": hidden // _HEAD,
        "joint_attention_dim": joint,
        "caption_projection_dim": hidden,
        "out_channels": infos["proj_out.weight"].shape[0] // 4,
        "pos_embed_max_size": infos["pos_embed.pos_embed"].shape[1],
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


_ALIASES = {
    "auraflow": "fal/AuraFlow",
    "auraflow-v0.2": "fal/AuraFlow-v0.2",
    "auraflow-v0.3": "fal/AuraFlow-v0.3",
}

FAMILY = Family(
    name="auraflow",
    title="AuraFlow",
    aliases=_ALIASES,
    licenses=dict.fromkeys(_ALIASES, "apache-2.0"),
    architecture="aura",
    classes=("AuraFlowTransformer2DModel",),
    signature=(
        "register_tokens",
        "pos_embed.pos_embed",
        "context_embedder.weight",
        "time_step_proj.linear_1.weight",
        "joint_transformer_blocks.0.attn.add_q_proj.weight",
        "joint_transformer_blocks.0.ff.out_projection.weight",
        "single_transformer_blocks.0.ff.out_projection.weight",
    ),
    hidden="context_embedder.weight",
    blocks=("joint_transformer_blocks", "single_transformer_blocks"),
    prefixes=("model.diffusion_model.", "model."),
    linears=_LINEARS,
    dialects={"diffusers": (), "original": _ORIGINAL},
    config_of=_config_of,
    assumed=("sample_size", "patch_size", "attention_head_dim", "num_attention_heads"),
    facts=_facts,
    # Neither has code for it (vLLM-Omni's registry, SGLang's folder dits, 2026).
    unrun=("sglang", "vllm"),
    sensitive=(f"{_JOINT}.attn.to_out.0", f"{_JOINT}.attn.to_add_out", f"{_SINGLE}.attn.to_out.0"),
    pipelines={"": "AuraFlowPipeline"},
    # The encoder is Pile-T5-XL, which transformers loads as UMT5.
    encoders={"text_encoder": "umt5"},
    # No folds: linears of the blocks have no bias.
)
