"""FLUX.1 (dev, schnell, Krea, Kontext, Fill, Canny, Depth), of any width and depth.

Names: diffusers/models/transformers/transformer_flux.py; original: black-forest-labs/flux
src/flux/model.py, which ComfyUI shares; nunchaku: FluxModel.cpp (version 1 names) and
nunchaku/models/transformers/transformer_flux_v2.py (what its Python class calls them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dqconvert.converter.family import Entry, Family, Fold, Infos, Linear, depth
from dqconvert.quantizers.errors import SourceError

_DOUBLE, _SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"

LINEARS = (
    Linear(f"{_DOUBLE}.norm1.linear", "modulation", splits=6),
    Linear(f"{_DOUBLE}.norm1_context.linear", "modulation", splits=6),
    *(
        Linear(f"{_DOUBLE}.attn.{name}", "attention", "image_qkv", f"{_DOUBLE}.attn.to_q")
        for name in ("to_q", "to_k", "to_v")
    ),
    *(
        Linear(f"{_DOUBLE}.attn.{name}", "attention", "text_qkv", f"{_DOUBLE}.attn.add_q_proj")
        for name in ("add_q_proj", "add_k_proj", "add_v_proj")
    ),
    Linear(f"{_DOUBLE}.attn.to_out.0", "attention", "attention_out"),
    Linear(f"{_DOUBLE}.attn.to_add_out", "attention", "attention_out"),
    Linear(f"{_DOUBLE}.ff.net.0.proj", "mlp", "image_mlp_in"),
    Linear(f"{_DOUBLE}.ff.net.2", "mlp", "image_mlp_out", gelu=0),
    Linear(f"{_DOUBLE}.ff_context.net.0.proj", "mlp", "text_mlp_in"),
    Linear(f"{_DOUBLE}.ff_context.net.2", "mlp", "text_mlp_out", gelu=0),
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

_DOUBLE_LINEARS = tuple(row.name for row in LINEARS if row.name.startswith(f"{_DOUBLE}."))
_DOUBLE_MLP = tuple(name for name in _DOUBLE_LINEARS if ".ff" in name)

FOLDS = (
    Fold(tuple(f"{_DOUBLE}.attn.to_{x}" for x in "qkv"), f"{_DOUBLE}.norm1.linear"),
    Fold(
        tuple(f"{_DOUBLE}.attn.add_{x}_proj" for x in "qkv"),
        f"{_DOUBLE}.norm1_context.linear",
    ),
    Fold((f"{_DOUBLE}.ff.net.0.proj",), f"{_DOUBLE}.norm1.linear", 3, 4),
    Fold((f"{_DOUBLE}.ff_context.net.0.proj",), f"{_DOUBLE}.norm1_context.linear", 3, 4),
    Fold(
        (f"{_DOUBLE}.attn.to_out.0", f"{_DOUBLE}.attn.to_add_out"),
        values=(f"{_DOUBLE}.attn.to_v", f"{_DOUBLE}.attn.add_v_proj"),
    ),
    Fold(
        (*(f"{_SINGLE}.attn.to_{x}" for x in "qkv"), f"{_SINGLE}.proj_mlp"),
        f"{_SINGLE}.norm.linear",
    ),
    Fold((f"{_SINGLE}.proj_out",), values=(f"{_SINGLE}.attn.to_v",), columns=(0, "hidden")),
)


def _qkv(prefix: str, names: tuple[str, str, str]) -> tuple[str, ...]:
    return tuple(f"{prefix}.attn.{name}.*" for name in names)


_IMAGE, _TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


def _mlp_embedder(theirs: str, ours: str) -> tuple[Entry, Entry]:
    ours = f"time_text_embed.{ours}"
    return (
        Entry(f"{theirs}.in_layer.*", (f"{ours}.linear_1.*",)),
        Entry(f"{theirs}.out_layer.*", (f"{ours}.linear_2.*",)),
    )


def _stream(theirs: str, ours: Mapping[str, str], qkv: tuple[str, str, str]) -> tuple[Entry, ...]:
    """One of the two streams, image and text, of a double block."""
    prefix = f"double_blocks.{{i}}.{theirs}"
    return (
        Entry(f"{prefix}_mod.lin.*", (f"{_DOUBLE}.{ours['mod']}.linear.*",)),
        Entry(f"{prefix}_attn.qkv.*", _qkv(_DOUBLE, qkv)),
        Entry(f"{prefix}_attn.norm.query_norm.scale", (f"{_DOUBLE}.attn.{ours['q']}.weight",)),
        Entry(f"{prefix}_attn.norm.key_norm.scale", (f"{_DOUBLE}.attn.{ours['k']}.weight",)),
        Entry(f"{prefix}_attn.proj.*", (f"{_DOUBLE}.attn.{ours['out']}.*",)),
        Entry(f"{prefix}_mlp.0.*", (f"{_DOUBLE}.{ours['mlp']}.net.0.proj.*",)),
        Entry(f"{prefix}_mlp.2.*", (f"{_DOUBLE}.{ours['mlp']}.net.2.*",)),
    )


ORIGINAL = (
    Entry("img_in.*", ("x_embedder.*",)),
    Entry("txt_in.*", ("context_embedder.*",)),
    *_mlp_embedder("time_in", "timestep_embedder"),
    *_mlp_embedder("vector_in", "text_embedder"),
    *_mlp_embedder("guidance_in", "guidance_embedder"),
    *_stream(
        "img",
        {"mod": "norm1", "q": "norm_q", "k": "norm_k", "out": "to_out.0", "mlp": "ff"},
        _IMAGE,
    ),
    *_stream(
        "txt",
        {
            "mod": "norm1_context",
            "q": "norm_added_q",
            "k": "norm_added_k",
            "out": "to_add_out",
            "mlp": "ff_context",
        },
        _TEXT,
    ),
    Entry("single_blocks.{i}.modulation.lin.*", (f"{_SINGLE}.norm.linear.*",)),
    Entry("single_blocks.{i}.linear1.*", (*_qkv(_SINGLE, _IMAGE), f"{_SINGLE}.proj_mlp.*")),
    Entry("single_blocks.{i}.norm.query_norm.scale", (f"{_SINGLE}.attn.norm_q.weight",)),
    Entry("single_blocks.{i}.norm.key_norm.scale", (f"{_SINGLE}.attn.norm_k.weight",)),
    Entry("single_blocks.{i}.linear2.*", (f"{_SINGLE}.proj_out.*",)),
    # BFL's final layer takes (shift, scale), diffusers' AdaLayerNormContinuous (scale, shift).
    Entry("final_layer.adaLN_modulation.1.*", ("norm_out.linear.*",), swap=True),
    Entry("final_layer.linear.*", ("proj_out.*",)),
)


def saved(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """The names in files that ComfyUI of 2026 saves, where scales of norms are weights."""
    return tuple(
        replace(entry, theirs=f"{entry.theirs.removesuffix('.scale')}.weight")
        if entry.theirs.endswith(".scale")
        else entry
        for entry in entries
    )


SAVED = saved(ORIGINAL)

_NUNCHAKU = (
    Entry(f"{_DOUBLE}.qkv_proj.*", _qkv(_DOUBLE, _IMAGE)),
    Entry(f"{_DOUBLE}.qkv_proj_context.*", _qkv(_DOUBLE, _TEXT)),
    Entry(f"{_DOUBLE}.norm_q.weight", (f"{_DOUBLE}.attn.norm_q.weight",)),
    Entry(f"{_DOUBLE}.norm_k.weight", (f"{_DOUBLE}.attn.norm_k.weight",)),
    Entry(f"{_DOUBLE}.norm_added_q.weight", (f"{_DOUBLE}.attn.norm_added_q.weight",)),
    Entry(f"{_DOUBLE}.norm_added_k.weight", (f"{_DOUBLE}.attn.norm_added_k.weight",)),
    Entry(f"{_DOUBLE}.out_proj.*", (f"{_DOUBLE}.attn.to_out.0.*",)),
    Entry(f"{_DOUBLE}.out_proj_context.*", (f"{_DOUBLE}.attn.to_add_out.*",)),
    Entry(f"{_DOUBLE}.mlp_fc1.*", (f"{_DOUBLE}.ff.net.0.proj.*",)),
    Entry(f"{_DOUBLE}.mlp_fc2.*", (f"{_DOUBLE}.ff.net.2.*",)),
    Entry(f"{_DOUBLE}.mlp_context_fc1.*", (f"{_DOUBLE}.ff_context.net.0.proj.*",)),
    Entry(f"{_DOUBLE}.mlp_context_fc2.*", (f"{_DOUBLE}.ff_context.net.2.*",)),
    Entry(f"{_SINGLE}.qkv_proj.*", _qkv(_SINGLE, _IMAGE)),
    Entry(f"{_SINGLE}.norm_q.weight", (f"{_SINGLE}.attn.norm_q.weight",)),
    Entry(f"{_SINGLE}.norm_k.weight", (f"{_SINGLE}.attn.norm_k.weight",)),
    Entry(f"{_SINGLE}.mlp_fc1.*", (f"{_SINGLE}.proj_mlp.*",)),
    Entry(f"{_SINGLE}.out_proj.*", (f"{_SINGLE}.proj_out.*",), columns=(0, "hidden")),
    Entry(f"{_SINGLE}.mlp_fc2.*", (f"{_SINGLE}.proj_out.*",), columns=("hidden", None)),
)

_NUNCHAKU_V2 = (
    Entry(f"{_DOUBLE}.attn.to_qkv.*", _qkv(_DOUBLE, _IMAGE)),
    Entry(f"{_DOUBLE}.attn.add_qkv_proj.*", _qkv(_DOUBLE, _TEXT)),
    Entry(f"{_SINGLE}.attn.to_qkv.*", _qkv(_SINGLE, _IMAGE)),
    Entry(f"{_SINGLE}.attn.to_out.*", (f"{_SINGLE}.proj_out.*",), columns=(0, "hidden")),
    Entry(f"{_SINGLE}.mlp_fc1.*", (f"{_SINGLE}.proj_mlp.*",)),
    Entry(f"{_SINGLE}.mlp_fc2.*", (f"{_SINGLE}.proj_out.*",), columns=("hidden", None)),
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The FluxTransformer2DModel config that the shapes imply."""
    hidden, channels = infos["x_embedder.weight"].shape
    head = infos["single_transformer_blocks.0.attn.norm_q.weight"].shape[0]

    out_channels = infos["proj_out.weight"].shape[0]
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": out_channels if out_channels != channels else None,
        "num_layers": depth(infos, "transformer_blocks"),
        "num_single_layers": depth(infos, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": infos["context_embedder.weight"].shape[1],
        "pooled_projection_dim": infos["time_text_embed.text_embedder.linear_1.weight"].shape[1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in infos,
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """nunchaku's class name and the model that ComfyUI-nunchaku builds around it."""
    _check(config)
    if dialect == "nunchaku-v2-flux":
        return {"model_class": "NunchakuFluxTransformer2DModelV2"}
    if dialect != "nunchaku":
        return {}
    guidance = bool(config["guidance_embeds"])
    in_channels = config["in_channels"]
    heads = config["num_attention_heads"]
    comfy = {
        "axes_dim": list(config["axes_dims_rope"]),
        "context_in_dim": config["joint_attention_dim"],
        "depth": config["num_layers"],
        "depth_single_blocks": config["num_single_layers"],
        "disable_unet_model_creation": True,
        "guidance_embed": guidance,
        "hidden_size": heads * config["attention_head_dim"],
        "image_model": "flux",
        "in_channels": in_channels // 4,
        "mlp_ratio": 4.0,
        "num_heads": heads,
        "out_channels": (config.get("out_channels") or in_channels) // 4,
        "patch_size": 2,
        "qkv_bias": True,
        "theta": 10000,
        "vec_in_dim": config["pooled_projection_dim"],
    }
    return {
        "model_class": "NunchakuFluxTransformer2dModel",
        "comfy_config": {
            "model_class": "Flux" if guidance else "FluxSchnell",
            "model_config": comfy,
        },
    }


def _variant(infos: Infos, config: Mapping[str, Any]) -> str:
    """How many channels of conditions lie beside the latents; Kontext has none and is not told."""
    channels, latents = infos["x_embedder.weight"].shape[1], infos["proj_out.weight"].shape[0]
    if channels == 2 * latents:
        return "control"
    if channels > 2 * latents:
        return "fill"
    guidance = "time_text_embed.guidance_embedder.linear_1.weight" in infos
    return "guidance" if guidance else "schnell"


def _check(config: Mapping[str, Any]) -> None:
    """What shapes do not imply as numbers must be of the right kind in config.json."""
    axes, head = config["axes_dims_rope"], config["attention_head_dim"]
    whole = isinstance(axes, list | tuple) and all(type(axis) is int for axis in axes)
    if not whole or sum(axes) != head:
        raise SourceError(
            f"config.json: axes_dims_rope is {axes!r}; needed are whole numbers that sum to "
            f"{head}, the attention_head_dim"
        )
    channels = config.get("out_channels")
    if channels is not None and type(channels) is not int:
        raise SourceError(f"config.json: out_channels is {channels!r}; needed is a number or null")


PROJ_OUT = Linear("proj_out", "output")
BITSANDBYTES = {
    layout: {PROJ_OUT.name: "weight"} for layout in ("bitsandbytes", "bitsandbytes-double")
}
"""Policies of layouts whose loader in diffusers cannot tell this linear from those of the blocks,
which have the same last name in models shaped like this one."""

_HUB = "black-forest-labs/FLUX.1-"
_DEV = ("dev", "Krea-dev", "Kontext-dev", "Fill-dev", "Canny-dev", "Depth-dev")

FAMILY = Family(
    name="flux",
    title="FLUX.1",
    aliases={f"flux1-{name.lower()}": f"{_HUB}{name}" for name in (*_DEV, "schnell")},
    licenses={
        "flux1-schnell": "apache-2.0",
        **{f"flux1-{name.lower()}": "flux-1-dev-non-commercial-license" for name in _DEV},
    },
    architecture="flux",
    classes=("FluxTransformer2DModel",),
    signature=(
        "x_embedder.weight",
        "context_embedder.weight",
        "time_text_embed.text_embedder.linear_1.weight",
        "transformer_blocks.0.norm1_context.linear.weight",
        "single_transformer_blocks.0.norm.linear.weight",
        "single_transformer_blocks.0.proj_mlp.weight",
    ),
    hidden="x_embedder.weight",
    optional=("time_text_embed.guidance_embedder",),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    linears=LINEARS,
    dialects={
        "diffusers": (),
        "original": ORIGINAL,
        "saved": SAVED,
        "nunchaku": _NUNCHAKU,
        "nunchaku-v2-flux": _NUNCHAKU_V2,
    },
    sources=("original", "saved", "diffusers"),
    layouts={"nunchaku": ("v1", "v2-flux")},
    config_of=_config_of,
    facts=_facts,
    policies={
        # What these build unquantized whatever the config says: SGLang the feed-forwards of
        # double blocks, vLLM-Omni all of them (safe_quant_config).
        "sglang": dict.fromkeys(("modulation", *_DOUBLE_MLP)),
        "vllm": dict.fromkeys(("modulation", *_DOUBLE_LINEARS)),
        **BITSANDBYTES,
    },
    # The 8 bit layers of ConvRot's mix (2512.03673, table 8).
    sensitive=(f"{_DOUBLE}.attn.to_out.0", f"{_SINGLE}.attn.to_v"),
    folds=FOLDS,
    outside=(PROJ_OUT,),
    variant=_variant,
    pipelines={
        "": "FluxPipeline",
        "fill": "FluxFillPipeline",
        "control": "FluxControlPipeline",
        "kontext": "FluxKontextPipeline",
    },
    fields=("prompt", "negative_prompt", "image"),
    encoders={"text_encoder": "clip_text", "text_encoder_2": "t5"},
)
