"""Chroma (1 Base, HD, Flash), of any width and depth: FLUX.1 without modulation in its blocks.

One approximator, distilled_guidance_layer, makes all shifts, scales and gates at once. Names:
diffusers/models/transformers/transformer_chroma.py; original: ComfyUI comfy/ldm/chroma/model.py,
whose blocks are FLUX.1's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.families import flux
from dqconvert.converter.family import Entry, Family, Infos, depth

_APPROXIMATOR = "distilled_guidance_layer"
_LAYERS, _NORMS = f"{_APPROXIMATOR}.layers", f"{_APPROXIMATOR}.norms"
_LACKING = ("_mod.lin.", "modulation", "time_in.", "vector_in.", "guidance_in.")
"""Parts of FLUX.1's names that Chroma has no modules for."""

_LINEARS = tuple(row for row in flux.LINEARS if row.role != "modulation")

_ORIGINAL = (
    *(row for row in flux.ORIGINAL if not any(part in row.theirs for part in _LACKING)),
    *(
        Entry(f"{_APPROXIMATOR}.{name}.*", (f"{_APPROXIMATOR}.{name}.*",))
        for name in ("in_proj", "out_proj")
    ),
    Entry(f"{_LAYERS}.{{i}}.in_layer.*", (f"{_LAYERS}.{{i}}.linear_1.*",)),
    Entry(f"{_LAYERS}.{{i}}.out_layer.*", (f"{_LAYERS}.{{i}}.linear_2.*",)),
    Entry(f"{_NORMS}.{{i}}.scale", (f"{_NORMS}.{{i}}.weight",)),
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The ChromaTransformer2DModel config that the shapes imply."""
    hidden, channels = infos["x_embedder.weight"].shape
    head = infos["single_transformer_blocks.0.attn.norm_q.weight"].shape[0]
    out_channels = infos["proj_out.weight"].shape[0]
    width, number = infos[f"{_APPROXIMATOR}.in_proj.weight"].shape
    return {
        "_class_name": "ChromaTransformer2DModel",
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": out_channels if out_channels != channels else None,
        "num_layers": depth(infos, "transformer_blocks"),
        "num_single_layers": depth(infos, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": infos["context_embedder.weight"].shape[1],
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],
        "approximator_num_channels": number,
        "approximator_hidden_dim": width,
        "approximator_layers": depth(infos, _LAYERS),
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


FAMILY = Family(
    name="chroma",
    title="Chroma",
    aliases={
        "chroma1-hd": "lodestones/Chroma1-HD",
        "chroma1-base": "lodestones/Chroma1-Base",
        "chroma1-flash": "lodestones/Chroma1-Flash",
    },
    licenses=dict.fromkeys(("chroma1-hd", "chroma1-base", "chroma1-flash"), "apache-2.0"),
    architecture="flux",  # ComfyUI-GGUF's tools tell it by FLUX.1's blocks
    classes=("ChromaTransformer2DModel",),
    signature=(
        "x_embedder.weight",
        "context_embedder.weight",
        f"{_APPROXIMATOR}.in_proj.weight",
        f"{_LAYERS}.0.linear_1.weight",
        "transformer_blocks.0.attn.add_q_proj.weight",
        "single_transformer_blocks.0.proj_mlp.weight",
    ),
    hidden="x_embedder.weight",
    blocks=("transformer_blocks", "single_transformer_blocks", _LAYERS, _NORMS),
    linears=_LINEARS,
    dialects={"diffusers": (), "original": _ORIGINAL, "saved": flux.saved(_ORIGINAL)},
    sources=("original", "saved", "diffusers"),
    config_of=_config_of,
    facts=_facts,
    unrun=("sglang", "vllm"),
    policies=flux.BITSANDBYTES,
    sensitive=flux.FAMILY.sensitive,
    # Only behind attention: shifts and scales come from no linear that a fold could change.
    folds=tuple(fold for fold in flux.FOLDS if not fold.modulation),
    outside=(flux.PROJ_OUT,),
    pipelines={"": "ChromaPipeline"},
    encoders={"text_encoder": "t5"},
)
