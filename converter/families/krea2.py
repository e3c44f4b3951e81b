"""Krea 2 (Raw, Turbo), of any width and depth.

A table in each block is added to one modulation; attention is grouped and gated. Names:
diffusers/models/transformers/transformer_krea2.py; original: krea-ai/krea-2, which ComfyUI shares
(comfy/ldm/krea2/model.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.family import Entry, Family, Infos, Linear, depth

_FUSION = "text_fusion"
_BLOCKS = {
    "blocks": "transformer_blocks",
    "txtfusion.layerwise_blocks": f"{_FUSION}.layerwise_blocks",
    "txtfusion.refiner_blocks": f"{_FUSION}.refiner_blocks",
}
_ATTENTION = {"wq": "to_q", "wk": "to_k", "wv": "to_v", "gate": "to_gate"}
_AROUND = {
    "first": "img_in",
    "tmlp.0": "time_embed.linear_1",
    "tmlp.2": "time_embed.linear_2",
    "tproj.1": "time_mod_proj",
    "txtmlp.1": "txt_in.linear_1",
    "txtmlp.3": "txt_in.linear_2",
    "last.linear": "final_layer.linear",
}


def _linears(blocks: str) -> tuple[Linear, ...]:
    block = f"{blocks}.{{i}}"
    attention, mlp = f"{block}.attn", f"{block}.ff"
    return (
        *(
            Linear(f"{attention}.{name}", "attention", "qkv", f"{attention}.to_q")
            for name in _ATTENTION.values()
        ),
        Linear(f"{attention}.to_out.0", "attention", "attention_out"),
        *(Linear(f"{mlp}.{name}", "mlp", "mlp_in", f"{mlp}.gate") for name in ("gate", "up")),
        Linear(f"{mlp}.down", "mlp", "mlp_out"),
    )


def _matrix(theirs: str, ours: str) -> Entry:
    return Entry(f"{theirs}.*", (f"{ours}.*",), bias=False)


def _block(theirs: str, ours: str) -> tuple[Entry, ...]:
    theirs, ours = f"{theirs}.{{i}}", f"{ours}.{{i}}"
    return (
        *(_matrix(f"{theirs}.attn.{k}", f"{ours}.attn.{v}") for k, v in _ATTENTION.items()),
        _matrix(f"{theirs}.attn.wo", f"{ours}.attn.to_out.0"),
        Entry(f"{theirs}.attn.qknorm.qnorm.scale", (f"{ours}.attn.norm_q.weight",)),
        Entry(f"{theirs}.attn.qknorm.knorm.scale", (f"{ours}.attn.norm_k.weight",)),
        *(_matrix(f"{theirs}.mlp.{x}", f"{ours}.ff.{x}") for x in ("gate", "up", "down")),
        Entry(f"{theirs}.prenorm.scale", (f"{ours}.norm1.weight",)),
        Entry(f"{theirs}.postnorm.scale", (f"{ours}.norm2.weight",)),
    )


_ORIGINAL = (
    *(Entry(f"{theirs}.*", (f"{ours}.*",)) for theirs, ours in _AROUND.items()),
    Entry("txtmlp.0.scale", ("txt_in.norm.weight",)),
    Entry("txtfusion.projector.weight", (f"{_FUSION}.projector.weight",)),
    *(entry for theirs, ours in _BLOCKS.items() for entry in _block(theirs, ours)),
    Entry(
        "blocks.{i}.mod.lin",
        ("transformer_blocks.{i}.scale_shift_table",),
        view=((-1,), (6, -1)),
    ),
    Entry("last.norm.scale", ("final_layer.norm.weight",)),
    Entry("last.modulation.lin", ("final_layer.scale_shift_table",)),
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The Krea2Transformer2DModel config that the shapes imply."""
    hidden, channels = infos["img_in.weight"].shape
    text, block = f"{_FUSION}.layerwise_blocks.0", "transformer_blocks.0"
    head = infos[f"{block}.attn.norm_q.weight"].shape[0]
    text_head = infos[f"{text}.attn.norm_q.weight"].shape[0]
    text_dim = infos[f"{text}.norm1.weight"].shape[0]
    return {
        "_class_name": "Krea2Transformer2DModel",
        "in_channels": channels,
        "num_layers": depth(infos, "transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "num_key_value_heads": infos[f"{block}.attn.to_k.weight"].shape[0] // head,
        "intermediate_size": infos[f"{block}.ff.up.weight"].shape[0],
        "timestep_embed_dim": infos["time_embed.linear_1.weight"].shape[1],
        "text_hidden_dim": text_dim,
        "num_text_layers": infos[f"{_FUSION}.projector.weight"].shape[1],
        "text_num_attention_heads": text_dim // text_head,
        "text_num_key_value_heads": infos[f"{text}.attn.to_k.weight"].shape[0] // text_head,
        "text_intermediate_size": infos[f"{text}.ff.up.weight"].shape[0],
        "num_layerwise_text_blocks": depth(infos, f"{_FUSION}.layerwise_blocks"),
        "num_refiner_text_blocks": depth(infos, f"{_FUSION}.refiner_blocks"),
        "axes_dims_rope": [head // 4, head * 3 // 8, head * 3 // 8],
        "rope_theta": 1000.0,
        "norm_eps": 1e-5,
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


FAMILY = Family(
    name="krea2",
    title="Krea 2",
    aliases={"krea2-raw": "krea/Krea-2-Raw", "krea2-turbo": "krea/Krea-2-Turbo"},
    licenses=dict.fromkeys(("krea2-raw", "krea2-turbo"), "krea-2-community-license"),
    architecture="krea2",
    classes=("Krea2Transformer2DModel",),
    signature=(
        "img_in.weight",
        "time_mod_proj.weight",
        f"{_FUSION}.projector.weight",
        f"{_FUSION}.layerwise_blocks.0.attn.to_gate.weight",
        "transformer_blocks.0.scale_shift_table",
        "transformer_blocks.0.attn.to_gate.weight",
        "transformer_blocks.0.ff.gate.weight",
    ),
    hidden="img_in.weight",
    blocks=tuple(_BLOCKS.values()),
    # Comfy-Org's files quantize the text fusion's blocks as well, and nothing outside blocks.
    linears=tuple(linear for blocks in _BLOCKS.values() for linear in _linears(blocks)),
    dialects={"diffusers": (), "original": _ORIGINAL},
    unread=("last.down.", "last.up."),  # of early files; no runtime has such modules
    config_of=_config_of,
    facts=_facts,
    unrun=("sglang", "vllm"),  # both build its linears unquantized, whatever the config says
    sensitive=tuple(f"{blocks}.{{i}}.attn.to_out.0" for blocks in _BLOCKS.values()),
    unguided=("turbo",),
    # No folds: a modulation serves all blocks, and linears have no bias.
    pipelines={"": "Krea2Pipeline"},
    encoders={"text_encoder": "qwen3_vl"},
)
