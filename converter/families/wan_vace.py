"""Wan VACE: Wan with blocks that read reference videos, masks and pictures.

Names: diffusers/models/transformers/transformer_wan_vace.py; original: ali-vilab/VACE
vace/models/wan/wan_vace.py, which ComfyUI and LightX2V share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.families import wan
from dqconvert.converter.family import Entry, Family, Fold, Infos, depth

_BLOCK, _VACE = "blocks.{i}", "vace_blocks.{i}"

_ORIGINAL = (
    *wan.ENTRIES,
    Entry("vace_patch_embedding.*", ("vace_patch_embedding.*",)),
    *wan.block_entries("vace_blocks"),
    Entry(f"{_VACE}.before_proj.*", (f"{_VACE}.proj_in.*",)),
    Entry(f"{_VACE}.after_proj.*", (f"{_VACE}.proj_out.*",)),
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The WanVACETransformer3DModel config that the shapes imply.

    Which blocks are followed by one of VACE's is not to be seen: they are spread evenly in all
    released models.
    """
    found = wan.shared_config(infos)
    layers, own = found["num_layers"], depth(infos, "vace_blocks")
    return found | {
        "_class_name": "WanVACETransformer3DModel",
        "vace_layers": list(range(0, layers, max(layers // own, 1)))[:own],
        "vace_in_channels": infos[wan.VACE].shape[1],
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


_ALIASES = {
    "wan2.1-vace-1.3b": "Wan-AI/Wan2.1-VACE-1.3B-diffusers",
    "wan2.1-vace-14b": "Wan-AI/Wan2.1-VACE-14B-diffusers",
}

FAMILY = Family(
    name="wan_vace",
    title="Wan VACE",
    task="text-to-video",
    aliases=_ALIASES,
    licenses=dict.fromkeys(_ALIASES, "apache-2.0"),
    architecture="wan",
    classes=("WanVACETransformer3DModel",),
    signature=(
        wan.VACE,
        "patch_embedding.weight",
        "condition_embedder.time_proj.weight",
        "vace_blocks.0.proj_in.weight",
        "vace_blocks.0.attn1.to_q.weight",
        "blocks.0.attn1.to_q.weight",
    ),
    hidden="patch_embedding.weight",
    optional=(
        *wan.IMAGE_MODULES,
        f"{_VACE}.attn2.add_k_proj",
        f"{_VACE}.attn2.add_v_proj",
        f"{_VACE}.attn2.norm_added_k",
    ),
    scattered=(f"{_VACE}.proj_in",),
    blocks=("blocks", "vace_blocks"),
    # The projections between the two lists of blocks stay: LightX2V builds them unquantized.
    linears=(*wan.block_linears("blocks"), *wan.block_linears("vace_blocks")),
    dialects={"diffusers": (), "original": _ORIGINAL, "lightx2v": _ORIGINAL},
    config_of=_config_of,
    assumed=("num_attention_heads", "attention_head_dim", "vace_layers"),
    facts=_facts,
    # SGLang has no code for it (its folder dits, 2026).
    unrun=("sglang",),
    video=True,
    sensitive=(
        f"{_BLOCK}.attn1.to_out.0",
        f"{_BLOCK}.attn2.to_out.0",
        f"{_VACE}.attn1.to_out.0",
        f"{_VACE}.attn2.to_out.0",
    ),
    # As in Wan: only what self attention averages.
    folds=(Fold((f"{_BLOCK}.attn1.to_out.0",), values=(f"{_BLOCK}.attn1.to_v",)),),
    pipelines={"": "WanVACEPipeline"},
    encoders={"text_encoder": "umt5"},
)
