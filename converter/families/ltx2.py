"""LTX-2, 2.3 and 2.5: video and sound together.

Names: diffusers/models/transformers/transformer_ltx2.py and scripts/convert_ltx2_to_diffusers.py;
original: Lightricks/LTX-2 packages/ltx-core, which ComfyUI shares (comfy/ldm/lightricks/
av_model.py) and LightX2V with its prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dqconvert.converter.families import ltx
from dqconvert.converter.families.ltx import BLOCK
from dqconvert.converter.family import Entry, Family, Infos, Linear

_SELF = ("attn1", "audio_attn1")
_SOUND = ("audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
_ATTENTIONS = ("attn1", "attn2", *_SOUND)
_GATES = tuple(f"{BLOCK}.{name}.to_gate_logits" for name in _ATTENTIONS)
_CAPTIONS = ("caption_projection", "audio_caption_projection")
_PROMPTS = ("prompt_adaln", "audio_prompt_adaln")
_CONNECTORS = ("video_embeddings_connector.", "audio_embeddings_connector.")
"""What makes the prompt's tokens fit: beside the transformer in the same files."""

_PROMPT_TABLES = tuple(f"{BLOCK}.{kind}prompt_scale_shift_table" for kind in ("", "audio_"))


def _attention(name: str) -> tuple[Linear, ...]:
    """The linears of an attention, the gate of its heads among them, which reads what q reads."""
    block = f"{BLOCK}.{name}"
    known = ltx.itself(name) if name in _SELF else ltx.cross(name, f"{name}_q", f"{name}_kv")
    gate = Linear(f"{block}.to_gate_logits", "attention", known[0].shares, f"{block}.to_q")
    return (*known, gate)


_TABLES = {
    "audio_adaln_single": "audio_time_embed",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
}

_NAMED = {
    "audio_scale_shift_table": "audio_scale_shift_table",
    "keyframes_abs_pos_embedding": "keyframes_abs_pos_embedding",
    f"{BLOCK}.audio_scale_shift_table": f"{BLOCK}.audio_scale_shift_table",
    f"{BLOCK}.scale_shift_table_a2v_ca_video": f"{BLOCK}.video_a2v_cross_attn_scale_shift_table",
    f"{BLOCK}.scale_shift_table_a2v_ca_audio": f"{BLOCK}.audio_a2v_cross_attn_scale_shift_table",
    **{name: name for name in _PROMPT_TABLES},
}

_ORIGINAL = (
    *ltx.ENTRIES,
    Entry("audio_patchify_proj.*", ("audio_proj_in.*",)),
    *(entry for theirs, ours in _TABLES.items() for entry in ltx.table(theirs, ours)),
    *ltx.same(*(f"audio_caption_projection.linear_{i}" for i in (1, 2)), "audio_proj_out"),
    *(Entry(theirs, (ours,)) for theirs, ours in _NAMED.items()),
    *(entry for name in _SOUND for entry in ltx.attention_entries(name)),
    *ltx.same(*_GATES),
    *ltx.same(f"{BLOCK}.audio_ff.net.0.proj", f"{BLOCK}.audio_ff.net.2"),
)

_LIGHTX2V = tuple(
    replace(entry, theirs=f"model.diffusion_model.{entry.theirs}") for entry in _ORIGINAL
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The LTX2VideoTransformer3DModel config that the shapes imply, with 2.0's or 2.3's habits."""
    hidden, channels = infos[ltx.AUDIO].shape
    gated = "transformer_blocks.0.attn1.to_gate_logits.weight" in infos
    captions = infos.get("caption_projection.linear_1.weight")
    shifted = infos["transformer_blocks.0.scale_shift_table"].shape[0] > 6
    sound = infos["transformer_blocks.0.audio_scale_shift_table"].shape[0] > 6
    return ltx.shared_config(infos) | {
        "_class_name": "LTX2VideoTransformer3DModel",
        "gated_attn": gated,
        "cross_attn_mod": shifted,
        "audio_in_channels": channels,
        "audio_out_channels": infos["audio_proj_out.weight"].shape[0],
        "audio_num_attention_heads": ltx.HEADS,
        "audio_attention_head_dim": hidden // ltx.HEADS,
        "audio_cross_attention_dim": infos["transformer_blocks.0.audio_attn2.to_k.weight"].shape[1],
        "audio_gated_attn": "transformer_blocks.0.audio_attn1.to_gate_logits.weight" in infos,
        "audio_cross_attn_mod": sound,
        "caption_channels": captions.shape[1] if captions else 3840,
        "rope_type": "split",
        "use_prompt_embeddings": captions is not None,
        "perturbed_attn": gated,
        "ff_bias": "transformer_blocks.0.ff.net.2.bias" in infos,
        "audio_ff_bias": "transformer_blocks.0.audio_ff.net.2.bias" in infos,
        "use_prompt_adaln_single": not shifted or "prompt_adaln.linear.weight" in infos,
        "use_keyframes_abs_pos_embedding": "keyframes_abs_pos_embedding" in infos,
    }


_SAME = (
    "in_channels",
    "out_channels",
    "num_attention_heads",
    "attention_head_dim",
    "cross_attention_dim",
    "caption_channels",
    "num_layers",
    "audio_in_channels",
    "audio_out_channels",
    "audio_num_attention_heads",
    "audio_attention_head_dim",
    "audio_cross_attention_dim",
    "rope_type",
    "ff_bias",
    "audio_ff_bias",
    "use_prompt_adaln_single",
)
"""Keys that Lightricks' config and diffusers' share."""


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Lightricks' config, from diffusers': what its convert_ltx2_to_diffusers.py does, undone."""
    if dialect != "original":
        return {}
    late = not config["use_prompt_embeddings"]
    sides = (config.get("base_height", 2048), config.get("base_width", 2048))
    exact = config.get("rope_double_precision", True)
    return ltx.told(
        {name: config[name] for name in _SAME}
        | {
            "apply_gated_attention": config["gated_attn"],
            "cross_attention_adaln": config["cross_attn_mod"],
            "caption_proj_before_connector": late,
            "caption_projection_first_linear": not late,
            "positional_embedding_theta": config.get("rope_theta", 10000.0),
            "positional_embedding_max_pos": [config.get("pos_embed_max_pos", 20), *sides],
            "audio_positional_embedding_max_pos": [config.get("audio_pos_embed_max_pos", 20)],
            "causal_temporal_positioning": bool(config.get("causal_offset", 1)),
            "use_middle_indices_grid": True,
            "frequencies_precision": "float64" if exact else "float32",
            "timestep_scale_multiplier": config.get("timestep_scale_multiplier", 1000),
            "av_ca_timestep_scale_multiplier": config.get(
                "cross_attn_timestep_scale_multiplier", 1000
            ),
        }
    )


_ALIASES = {"ltx-2": "Lightricks/LTX-2", "ltx-2.5": "Lightricks/LTX-2.5-Diffusers"}

FAMILY = Family(
    name="ltx2",
    title="LTX-2",
    task="text-to-video",
    aliases=_ALIASES,
    licenses={},
    architecture="ltxv",
    classes=("LTX2VideoTransformer3DModel",),
    signature=(
        "proj_in.weight",
        ltx.AUDIO,
        "time_embed.emb.timestep_embedder.linear_1.weight",
        "av_cross_attn_video_a2v_gate.linear.weight",
        "transformer_blocks.0.audio_scale_shift_table",
        "transformer_blocks.0.audio_to_video_attn.to_q.weight",
        "transformer_blocks.0.attn1.norm_q.weight",
    ),
    hidden="proj_in.weight",
    optional=(
        *_CAPTIONS,
        *_PROMPTS,
        *_PROMPT_TABLES,
        *_GATES,
        *(f"{BLOCK}.{ff}.net.{i}.bias" for ff in ("ff", "audio_ff") for i in ("0.proj", "2")),
        "keyframes_abs_pos_embedding",
    ),
    blocks=("transformer_blocks",),
    linears=(
        *(linear for name in _ATTENTIONS for linear in _attention(name)),
        *ltx.feed_forward("ff"),
        *ltx.feed_forward("audio_ff"),
    ),
    dialects={"diffusers": (), "original": _ORIGINAL, "lightx2v": _LIGHTX2V},
    config_of=_config_of,
    assumed=(
        "num_attention_heads",
        "attention_head_dim",
        "audio_num_attention_heads",
        "audio_attention_head_dim",
        "caption_channels",
        "rope_type",
        "perturbed_attn",
    ),
    facts=_facts,
    # The gates of the heads are a thousandth of a block, and only LightX2V wants them quantized.
    policies={
        target: dict.fromkeys(_GATES)
        for target in ("comfyui", "gguf", "diffusers", "sglang", "vllm")
    },
    video=True,
    sensitive=(f"{BLOCK}.attn1.to_out.0", f"{BLOCK}.attn2.to_out.0"),
    # No folds: all blocks read one time projection, and the gates of 2.3 come between what
    # attention averages and the linear behind it.
    unguided=("distilled",),
    pipelines={"": "LTX2Pipeline"},
    encoders={"text_encoder": "gemma3"},
    # Others have them in a folder of their own, or read the first checkpoint for them.
    passengers=dict.fromkeys(_CONNECTORS, ("comfyui", "gguf")),
    vital=_CONNECTORS,
)
