"""MiniMax-H3: video and sound from text, pictures and references.

Names: diffusers/models/transformers/transformer_minimax_h3.py, which LightX2V shares; original:
what Comfy-Org publishes as one file, q, k and v stacked. MiniMaxAI's own shards, which have the
same names and shapes, hold q, k and v of each head together; nothing in a file tells the two apart
(diffusers/loaders/single_file_utils.py), but that one is several files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.family import EQUAL, Entry, Family, Infos, Linear, depth
from dqconvert.quantizers.errors import SourceError

_BLOCK, _REFINER = "transformer_blocks.{i}", "token_refiner.refiner_blocks.{i}"
_TABLE = "adaln_t_table"
_FREQUENCIES = "rope.inv_freq"
"""What ComfyUI reads of the file, and others compute from the config."""

_LINEARS = (
    *(
        Linear(f"{_BLOCK}.attn.{name}", "attention", "qkv", f"{_BLOCK}.attn.to_q")
        for name in ("to_q", "to_k", "to_v")
    ),
    Linear(f"{_BLOCK}.attn.to_out.0", "attention", "attention_out"),
    Linear(f"{_BLOCK}.ff.net.0.proj", "mlp", "mlp_in"),
    Linear(f"{_BLOCK}.ff.net.2", "mlp", "mlp_out"),
    # Six chunks for each of video, text and sound.
    Linear(f"{_BLOCK}.adaln_proj.linear", "modulation", splits=18),
)


def _block(theirs: str, ours: str, turn: int = 0) -> tuple[Entry, ...]:
    return (
        Entry(f"{theirs}.norm1.weight", (f"{ours}.norm1.weight",)),
        Entry(
            f"{theirs}.attn.qkv_proj.*",
            tuple(f"{ours}.attn.to_{x}.*" for x in "qkv"),
            bias=False,
            share=EQUAL,
            turn=turn,
        ),
        Entry(f"{theirs}.attn.q_norm.weight", (f"{ours}.attn.norm_q.weight",)),
        Entry(f"{theirs}.attn.k_norm.weight", (f"{ours}.attn.norm_k.weight",)),
        Entry(f"{theirs}.attn.out_proj.*", (f"{ours}.attn.to_out.0.*",), bias=False),
        Entry(f"{theirs}.norm2.weight", (f"{ours}.norm2.weight",)),
        # MiniMax's feed-forward has the gate first, diffusers' SwiGLU the value.
        Entry(f"{theirs}.mlp.fc1.*", (f"{ours}.ff.net.0.proj.*",), swap=True, bias=False),
        Entry(f"{theirs}.mlp.fc2.*", (f"{ours}.ff.net.2.*",), bias=False),
    )


_HEAD = 128
"""Width of an attention head of the released model."""


def _entries(turn: int = 0) -> tuple[Entry, ...]:
    return (
        Entry("video_patch_proj.*", ("proj_in.*",)),
        Entry("audio_patch_proj.*", ("audio_proj_in.*",)),
        Entry("condition_proj.*", ("context_embedder.*",)),
        Entry("time_embedder.proj_in.*", ("time_embedder.linear_1.*",)),
        Entry("time_embedder.proj_out.*", ("time_embedder.linear_2.*",)),
        Entry(_TABLE, (_TABLE,)),
        *_block("token_refiner.blocks.{i}", _REFINER, turn),
        Entry("token_refiner.final_norm.weight", ("token_refiner.final_norm.weight",)),
        *_block("blocks.{i}", _BLOCK, turn),
        Entry("blocks.{i}.adaln_proj.linear.*", (f"{_BLOCK}.adaln_proj.linear.*",)),
        Entry("final_layer.norm.weight", ("norm_out.norm.weight",)),
        Entry("final_layer.adaln_proj.linear.*", ("norm_out.linear.*",)),
        Entry("final_layer.video_out.*", ("proj_out.*",)),
        Entry("final_layer.audio_out.*", ("audio_proj_out.*",)),
    )


def _config_of(infos: Infos) -> dict[str, Any]:
    """The MiniMaxH3Transformer3DModel config that the shapes imply.

    pruned: that a table stands for the embedding of the time, which diffusers does not read.
    """
    hidden, channels = infos["proj_in.weight"].shape
    head = infos["transformer_blocks.0.attn.norm_q.weight"].shape[0]
    time = infos.get("time_embedder.linear_1.weight")
    return {
        "_class_name": "MiniMaxH3Transformer3DModel",
        "num_attention_heads": infos["transformer_blocks.0.attn.to_q.weight"].shape[0] // head,
        "attention_head_dim": head,
        "hidden_size": hidden,
        "num_layers": depth(infos, "transformer_blocks"),
        "num_refiner_layers": depth(infos, "token_refiner.refiner_blocks"),
        "ffn_dim": infos["transformer_blocks.0.ff.net.2.weight"].shape[1],
        "in_channels": channels // 4,
        "audio_in_channels": infos["audio_proj_in.weight"].shape[1],
        "patch_size": [1, 2, 2],
        "text_dim": infos["context_embedder.weight"].shape[1],
        "freq_dim": time.shape[1] if time else 256,
        "time_embed_hidden_dim": time.shape[0] if time else hidden,
        "time_embed_dim": infos["norm_out.linear.weight"].shape[1],
        **({} if time else {"pruned": True}),
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("pruned") and dialect != "original":
        raise SourceError(
            f"a pruned MiniMax-H3: {_TABLE} stands for its time_embedder, which is read under "
            "ComfyUI's names alone; convert it for ComfyUI, or the unpruned checkpoint "
            "(MiniMaxAI/MiniMax-H3)"
        )
    if dialect != "original":
        return {}
    count, theta = config.get("rope_freq_dim", 16), config.get("rope_theta", 10000.0)
    return {"tensors": {_FREQUENCIES: tuple(theta ** (-i / count) for i in range(count))}}


FAMILY = Family(
    name="minimax_h3",
    title="MiniMax-H3",
    task="text-to-video",
    aliases={"minimax-h3": "MiniMaxAI/MiniMax-H3"},
    licenses={},
    classes=("MiniMaxH3Transformer3DModel",),
    signature=(
        "proj_in.weight",
        "audio_proj_in.weight",
        "context_embedder.weight",
        "token_refiner.final_norm.weight",
        "transformer_blocks.0.adaln_proj.linear.weight",
        "transformer_blocks.0.attn.to_q.weight",
        "transformer_blocks.0.ff.net.0.proj.weight",
    ),
    hidden="proj_in.weight",
    optional=("time_embedder", _TABLE),
    blocks=("transformer_blocks", "token_refiner.refiner_blocks"),
    # The refiner of the prompt stays: two blocks, which LightX2V builds unquantized.
    linears=_LINEARS,
    dialects={
        "diffusers": (),
        "original": _entries(),
        "original-shards": _entries(_HEAD),
        "lightx2v": (),
    },
    sharded={"original": "original-shards"},
    unread=(_FREQUENCIES,),
    config_of=_config_of,
    assumed=("in_channels", "patch_size", "freq_dim", "time_embed_hidden_dim"),
    facts=_facts,
    # Both have code for it, but load quantized weights under MiniMax's own names alone; SGLang
    # takes every weight_scale for that of blocks (configs/models/dits/minimax_h3.py).
    unrun=("sglang", "vllm"),
    video=True,
    sensitive=(f"{_BLOCK}.attn.to_out.0",),
    # No folds: q, k, v and the feed-forward have no bias that could take a shift back, and one
    # table of shift and scale serves three kinds of tokens.
    # diffusers runs it in modular blocks alone, so it has no pipeline class here.
    encoders={"text_encoder": "qwen3_vl"},
)
