"""Original names that diffusers converts by scripts of their authors: PixArt and SANA-Sprint.

The rules are those of scripts/convert_pixart_sigma_to_diffusers.py and
scripts/convert_sana_to_diffusers.py in diffusers.
"""

from __future__ import annotations

import runpy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dqconvert.converter.detect import open_canonical
from dqconvert.converter.families import families

torch.set_num_threads(1)
HERE = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
MODELS = checkpoints.FAMILY_MODELS
BOTH = {
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.scale_shift_table": "scale_shift_table",
    ".cross_attn.proj": ".attn2.to_out.0",
    ".cross_attn.q_linear": ".attn2.to_q",
    ".attn.proj": ".attn1.to_out.0",
}
PIXART = BOTH | {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    ".mlp.fc1": ".ff.net.0.proj",
    ".mlp.fc2": ".ff.net.2",
}
SPRINT = BOTH | {
    "x_embedder.proj": "patch_embed.proj",
    "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
    "cfg_embedder.mlp.0": "time_embed.guidance_embedder.linear_1",
    "cfg_embedder.mlp.2": "time_embed.guidance_embedder.linear_2",
    "t_block.1": "time_embed.linear",
    "attention_y_norm": "caption_norm",
    ".cross_attn.q_norm": ".attn2.norm_q",
    ".cross_attn.k_norm": ".attn2.norm_k",
    ".attn.q_norm": ".attn1.norm_q",
    ".attn.k_norm": ".attn1.norm_k",
    ".mlp.inverted_conv.conv": ".ff.conv_inverted",
    ".mlp.depth_conv.conv": ".ff.conv_depth",
    ".mlp.point_conv.conv": ".ff.conv_point",
}
STACKED = {
    ".attn.qkv": (".attn1.to_q", ".attn1.to_k", ".attn1.to_v"),
    ".cross_attn.kv_linear": (".attn2.to_k", ".attn2.to_v"),
}


def converted(checkpoint: Mapping[str, Tensor], rules: Mapping[str, str]) -> dict[str, Tensor]:
    """What a script makes of a checkpoint; every name is one of its rules'."""
    found: dict[str, Tensor] = {}
    for name, tensor in checkpoint.items():
        name = f"transformer_{name}" if name.startswith("blocks.") else name
        stacks = [stack for stack in STACKED if stack in name]
        if stacks:
            parts = tensor.chunk(len(STACKED[stacks[0]]))
            for part, ours in zip(parts, STACKED[stacks[0]], strict=True):
                found[name.replace(stacks[0], ours)] = part
            continue
        held = [rule for rule in rules if rule in name]
        assert held or name.endswith(".scale_shift_table"), name
        found[name.replace(held[0], rules[held[0]]) if held else name] = tensor
    return found


@pytest.mark.parametrize(
    ("name", "number", "rules"),
    [("pixart", 0, PIXART), ("pixart", 1, PIXART), ("sana_sprint", 0, SPRINT)],
)
def test_the_authors_script_reads_original_names_alike(
    name: str, number: int, rules: Mapping[str, str]
) -> None:
    model = checkpoints.filled(checkpoints.meta_model(MODELS[name]["CONFIGS"][number]))
    checkpoint, _ = checkpoints.write_dialect(families()[name], "original", model)
    beside = {"pos_embed": torch.ones(1, 4, 8), "y_embedder.y_embedding": torch.ones(2, 8)}
    found = open_canonical(checkpoints.Memory(checkpoint | beside), Path("memory.safetensors"))
    assert (found.family.name, found.dialect) == (name, "original")
    ours = {key: found.read(key) for key in found.infos}
    assert checkpoints.same_tensors(ours, converted(checkpoint, rules))
    assert checkpoints.same_tensors(ours, model)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"sample_size": 128}, ""),
        ({"sample_size": 64, "interpolation_scale": 1}, ""),
        ({"sample_size": 64}, "alpha"),
        ({}, ""),
    ],
)
def test_pixart_alpha_at_512_is_told_by_its_config(config: Any, said: str) -> None:
    """By what the config.json of the released models say."""
    family = families()["pixart"]
    plain, told = MODELS["pixart"]["CONFIGS"]
    infos = checkpoints.infos_of(checkpoints.meta_model(plain))
    assert family.variant(infos, config) == said
    told = checkpoints.infos_of(checkpoints.meta_model(told))
    assert family.variant(told, {"sample_size": 128}) == "alpha"
