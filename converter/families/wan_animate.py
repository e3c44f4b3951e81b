"""Wan Animate: Wan that follows the pose and the face of another video.

Names: diffusers/models/transformers/transformer_wan_animate.py; original: Wan-Video
wan/modules/animate, which ComfyUI (comfy/ldm/wan/model_animate.py) and LightX2V share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.families import wan
from dqconvert.converter.family import EQUAL, Entry, Family, Fold, Infos, Linear, depth

_BLOCK, _FACE, _MOTION = "blocks.{i}", "face_adapter.{i}", "motion_encoder"
_CONVS = f"{_MOTION}.enc.net_app.convs"
_STAGES = 7
"""Blocks of the motion encoder, which halve a face of 512 pixels until 4 are left."""

_BLURRED = ("conv2", "skip")
"""Their parts that blur before they halve."""

_FACE_LINEARS = (
    Linear(f"{_FACE}.to_q", "attention", "face_q"),
    *(
        Linear(f"{_FACE}.{name}", "attention", "face_kv", f"{_FACE}.to_k")
        for name in ("to_k", "to_v")
    ),
    Linear(f"{_FACE}.to_out", "attention", "face_out"),
)


def _bias(theirs: str, ours: str) -> Entry:
    """The bias of an activation, which the original has for each pixel."""
    return Entry(f"{theirs}.bias", (f"{ours}.act_fn.bias",), view=((1, -1, 1, 1), (-1,)))


def _stage(number: int) -> tuple[Entry, ...]:
    """One block of the motion encoder; the original blurs first where it halves the picture."""
    theirs, ours = f"{_CONVS}.{number + 1}", f"{_MOTION}.res_blocks.{number}"
    return (
        Entry(f"{theirs}.conv1.0.weight", (f"{ours}.conv1.weight",)),
        _bias(f"{theirs}.conv1.1", f"{ours}.conv1"),
        Entry(f"{theirs}.conv2.1.weight", (f"{ours}.conv2.weight",)),
        _bias(f"{theirs}.conv2.2", f"{ours}.conv2"),
        Entry(f"{theirs}.skip.1.weight", (f"{ours}.conv_skip.weight",)),
    )


_ORIGINAL = (
    *wan.ENTRIES,
    Entry("pose_patch_embedding.*", ("pose_patch_embedding.*",)),
    Entry(f"{_MOTION}.dec.direction.weight", (f"{_MOTION}.motion_synthesis_weight",)),
    Entry(f"{_CONVS}.0.0.weight", (f"{_MOTION}.conv_in.weight",)),
    _bias(f"{_CONVS}.0.1", f"{_MOTION}.conv_in"),
    *(entry for number in range(_STAGES) for entry in _stage(number)),
    Entry(f"{_CONVS}.{_STAGES + 1}.weight", (f"{_MOTION}.conv_out.weight",)),
    *(
        Entry(f"{_MOTION}.enc.fc.{number}.*", (f"{_MOTION}.motion_network.{number}.*",))
        for number in range(5)
    ),
    Entry("face_encoder.padding_tokens", ("face_encoder.padding_tokens",)),
    Entry("face_encoder.conv1_local.conv.*", ("face_encoder.conv1_local.*",)),
    Entry("face_encoder.conv2.conv.*", ("face_encoder.conv2.*",)),
    Entry("face_encoder.conv3.conv.*", ("face_encoder.conv3.*",)),
    Entry("face_encoder.out_proj.*", ("face_encoder.out_proj.*",)),
    Entry("face_adapter.fuser_blocks.{i}.linear1_q.*", (f"{_FACE}.to_q.*",)),
    Entry(
        "face_adapter.fuser_blocks.{i}.linear1_kv.*",
        (f"{_FACE}.to_k.*", f"{_FACE}.to_v.*"),
        share=EQUAL,
    ),
    Entry("face_adapter.fuser_blocks.{i}.linear2.*", (f"{_FACE}.to_out.*",)),
    Entry("face_adapter.fuser_blocks.{i}.q_norm.weight", (f"{_FACE}.norm_q.weight",)),
    Entry("face_adapter.fuser_blocks.{i}.k_norm.weight", (f"{_FACE}.norm_k.weight",)),
)


def _channels(infos: Infos) -> dict[str, int] | None:
    """Channels of the motion encoder by the size of the picture there; None for the usual ones."""
    stages = [f"{_MOTION}.res_blocks.{i}.conv1.weight" for i in range(_STAGES)]
    widths = [infos[name].shape[1] for name in (*stages, f"{_MOTION}.conv_out.weight")]
    found = {str(4 << (_STAGES - place)): width for place, width in enumerate(widths)}
    usual = all(width == min(512, 16384 // int(size)) for size, width in found.items())
    return None if usual else found


def _config_of(infos: Infos) -> dict[str, Any]:
    """The WanAnimateTransformer3DModel config that the shapes imply."""
    found = wan.shared_config(infos)
    directions = infos[f"{_MOTION}.motion_synthesis_weight"].shape
    hidden = infos["face_encoder.conv2.weight"].shape[1]
    return found | {
        "_class_name": "WanAnimateTransformer3DModel",
        "latent_channels": infos[wan.ANIMATE].shape[1],
        "motion_encoder_channel_sizes": _channels(infos),
        "motion_style_dim": infos[f"{_MOTION}.conv_out.weight"].shape[0],
        "motion_dim": directions[1],
        "motion_encoder_dim": directions[0],
        "face_encoder_hidden_dim": hidden,
        "face_encoder_num_heads": infos["face_encoder.conv1_local.weight"].shape[0] // hidden,
        "inject_face_latents_blocks": found["num_layers"] // depth(infos, "face_adapter"),
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


_ALIASES = {"wan2.2-animate-14b": "Wan-AI/Wan2.2-Animate-14B-Diffusers"}

FAMILY = Family(
    name="wan_animate",
    title="Wan Animate",
    task="video-to-video",
    aliases=_ALIASES,
    licenses=dict.fromkeys(_ALIASES, "apache-2.0"),
    architecture="wan",
    classes=("WanAnimateTransformer3DModel",),
    signature=(
        wan.ANIMATE,
        "patch_embedding.weight",
        "condition_embedder.time_proj.weight",
        "motion_encoder.motion_synthesis_weight",
        "face_adapter.0.to_q.weight",
        "blocks.0.attn1.to_q.weight",
    ),
    hidden="patch_embedding.weight",
    optional=wan.IMAGE_MODULES,
    blocks=("blocks", "face_adapter"),
    linears=(*wan.block_linears("blocks"), *_FACE_LINEARS),
    dialects={"diffusers": (), "original": _ORIGINAL, "lightx2v": _ORIGINAL},
    # The kernels that blur, which are computed and not learnt.
    unread=tuple(f"{_CONVS}.{i + 1}.{name}.0.kernel" for i in range(_STAGES) for name in _BLURRED),
    config_of=_config_of,
    assumed=(
        "num_attention_heads",
        "attention_head_dim",
        "face_encoder_num_heads",
        "inject_face_latents_blocks",
    ),
    facts=_facts,
    # vLLM-Omni has no code for it (its folder wan2_2), SGLang builds its linears
    # unquantized (2026).
    unrun=("sglang", "vllm"),
    video=True,
    sensitive=(f"{_BLOCK}.attn1.to_out.0", f"{_BLOCK}.attn2.to_out.0", f"{_FACE}.to_out"),
    # As in Wan: only what self attention averages.
    folds=(Fold((f"{_BLOCK}.attn1.to_out.0",), values=(f"{_BLOCK}.attn1.to_v",)),),
    pipelines={"": "WanAnimatePipeline"},
    fields=("prompt", "negative_prompt", "image"),
    encoders={"text_encoder": "umt5", "image_encoder": "clip_vision"},
)
