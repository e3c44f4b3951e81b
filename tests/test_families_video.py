"""Video families: names that no loader of diffusers reads, variants, and what LightX2V wants.

HunyuanVideo 1.5 and LTX-2.3 come in names that only scripts of diffusers convert: the rules are
those of scripts/convert_hunyuan_video1_5_to_diffusers.py and scripts/convert_ltx2_to_diffusers.py.
ComfyUI's q, k and v in one linear are its comfy/ldm/flux/layers.py, DoubleStreamBlock. What
LightX2V builds with a quantized linear is read in its lightx2v/models/networks/*/weights.
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

from dqconvert.converter.canonical import CanonicalSource
from dqconvert.converter.detect import open_canonical, unknown
from dqconvert.converter.families import families
from dqconvert.converter.options import PlanOptions
from dqconvert.converter.plan import make_plan
from dqconvert.formats.targets import targets
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.schemes import scheme

torch.set_num_threads(1)
HERE = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
Memory, MODELS = checkpoints.Memory, checkpoints.FAMILY_MODELS
PATH = Path("memory.safetensors")

HUNYUAN = {
    "time_in.mlp.0": "time_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_embed.timestep_embedder.linear_2",
    "time_r_in.mlp.0": "time_embed.timestep_embedder_r.linear_1",
    "time_r_in.mlp.2": "time_embed.timestep_embedder_r.linear_2",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder": "context_embedder.time_text_embed.text_embedder",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.individual_token_refiner.blocks": "context_embedder.token_refiner.refiner_blocks",
    "self_attn_proj": "attn.to_out.0",
    "adaLN_modulation.1": "norm_out.linear",
    "byt5_in.layernorm": "context_embedder_2.norm",
    "byt5_in.fc": "context_embedder_2.linear_",
    "vision_in.proj.0": "image_embedder.norm_in",
    "vision_in.proj.1": "image_embedder.linear_1",
    "vision_in.proj.3": "image_embedder.linear_2",
    "vision_in.proj.4": "image_embedder.norm_out",
    "img_in.proj": "x_embedder.proj",
    "cond_type_embedding": "cond_type_embed",
    "double_blocks": "transformer_blocks",
    "img_mod": "norm1",
    "txt_mod": "norm1_context",
    "img_attn_q_norm": "attn.norm_q",
    "img_attn_k_norm": "attn.norm_k",
    "txt_attn_q_norm": "attn.norm_added_q",
    "txt_attn_k_norm": "attn.norm_added_k",
    "img_attn_proj": "attn.to_out.0",
    "txt_attn_proj": "attn.to_add_out",
    "img_attn_q.": "attn.to_q.",
    "img_attn_k.": "attn.to_k.",
    "img_attn_v.": "attn.to_v.",
    "txt_attn_q.": "attn.add_q_proj.",
    "txt_attn_k.": "attn.add_k_proj.",
    "txt_attn_v.": "attn.add_v_proj.",
    "img_mlp": "ff",
    "txt_mlp": "ff_context",
    ".mlp.": ".ff.",
    "fc1": "net.0.proj",
    "fc2": "net.2",
    "final_layer.norm_out.linear": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
STACKED = {
    "self_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
LTX23 = {
    "patchify_proj": "proj_in",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    "scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
    "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
    "prompt_adaln_single": "prompt_adaln",
    "adaln_single": "time_embed",
}


def model_of(name: str, number: int = 0) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config of a tiny model, and its tensors without their bytes."""
    config = MODELS[name]["CONFIGS"][number]
    return config, checkpoints.meta_model(config)


def written(name: str, dialect: str, model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found, _ = checkpoints.write_dialect(families()[name], dialect, model)
    return dict(found)


def read_all(source: CanonicalSource) -> dict[str, Tensor]:
    return {name: source.read(name) for name in source.infos}


def renamed(checkpoint: Mapping[str, Tensor], rules: Mapping[str, str]) -> dict[str, Tensor]:
    """What a script makes of a checkpoint: stacks cut, rules in turn, the last layer swapped."""
    found: dict[str, Tensor] = {}
    for name, tensor in checkpoint.items():
        stack = next((stack for stack in STACKED if stack in name), "")
        parts = tensor.chunk(3) if stack else [tensor]
        for part, ours in zip(parts, STACKED.get(stack, ("",)), strict=True):
            new = name.replace(stack, ours) if stack else name
            for old, rule in rules.items():
                new = new.replace(old, rule)
            swap = new.startswith("norm_out.linear")
            found[new] = torch.cat(part.chunk(2)[::-1]) if swap else part
    return found


@pytest.mark.parametrize("dialect", ["tencent", "original"])
@pytest.mark.parametrize("number", [0, 1])
def test_hunyuan_video_15_is_read_as_its_script_reads_it(number: int, dialect: str) -> None:
    """ComfyUI's stacks are cut before, as all others are."""
    _, meta = model_of("hunyuan_video15", number)
    model = checkpoints.filled(meta, columns=2)
    checkpoint = written("hunyuan_video15", dialect, model)
    assert any("img_attn_qkv" in name for name in checkpoint) == (dialect == "original")
    found = open_canonical(Memory(checkpoint), PATH)
    assert (found.family.name, found.dialect) == ("hunyuan_video15", dialect)
    assert checkpoints.same_tensors(read_all(found), model)
    assert checkpoints.same_tensors(renamed(checkpoint, HUNYUAN), model)


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_ltx_2_of_every_version_is_read_as_its_script_reads_it(number: int) -> None:
    _, meta = model_of("ltx2", number)
    model = checkpoints.filled(meta, columns=2)
    checkpoint = written("ltx2", "original", model)
    assert checkpoints.same_tensors(renamed(checkpoint, LTX23), model)
    assert checkpoints.same_tensors(read_all(open_canonical(Memory(checkpoint), PATH)), model)


@pytest.mark.parametrize(("target", "held"), [("comfyui", True), ("lightx2v", False)])
def test_what_connects_the_text_encoder_of_ltx_2_is_kept_for_comfyui(
    target: str, held: bool
) -> None:
    """LightX2V drops it (remove_keys of its LTX2Model) and reads the first checkpoint for it."""
    config, meta = model_of("ltx2")
    beside = "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q.weight"
    rest = {beside: torch.empty(3, 2, device="meta", dtype=torch.bfloat16)}
    found = open_canonical(Memory(written("ltx2", "original", meta) | rest), PATH)
    assert unknown(found) == [beside]
    plan = make_plan(found, targets()[target], scheme("int8"), PlanOptions(), ("m", config))
    assert (beside in plan.outputs) == held


def lightx2v_layers(name: str) -> set[str]:
    """What a tiny model's file for LightX2V holds quantized."""
    config, meta = model_of(name, 1 if name == "ltx2" else 0)
    source = open_canonical(Memory(meta), PATH)
    goal = targets()["lightx2v"]
    plan = make_plan(source, goal, scheme("int8"), PlanOptions(), ("m", config))
    return {layer.removesuffix(".weight") for layer in plan.context.layers}


def block(name: str, layers: list[str], count: int = 2) -> set[str]:
    return {f"{name}.{i}.{layer}" for i in range(count) for layer in layers}


WAN = [f"{kind}_attn.{x}" for kind in ("self", "cross") for x in "qkvo"] + ["ffn.0", "ffn.2"]
SEEN = [*WAN, "cross_attn.k_img", "cross_attn.v_img"]
HUNYUAN_LAYERS = [
    f"{stream}_{layer}"
    for stream in ("img", "txt")
    for layer in ("attn_q", "attn_k", "attn_v", "attn_proj", "mlp.fc1", "mlp.fc2", "mod.linear")
]
H3 = [f"attn.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0")]
LTX_ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2")
LTX_ACROSS = ("audio_to_video_attn", "video_to_audio_attn")
LTX = [
    *(
        f"{attention}.{x}"
        for attention in (*LTX_ATTENTIONS, *LTX_ACROSS)
        for x in ("to_q", "to_k", "to_v", "to_out.0", "to_gate_logits")
    ),
    *(f"{ff}.net.{x}" for ff in ("ff", "audio_ff") for x in ("0.proj", "2")),
]
LIGHTX2V = {
    "wan_vace": block("blocks", WAN, 4) | block("vace_blocks", WAN),
    "wan_animate": block("blocks", SEEN, 4)
    | block("face_adapter.fuser_blocks", ["linear1_q", "linear1_kv", "linear2"]),
    "wan_animate2": block("blocks", [f"block.{layer}" for layer in SEEN]),
    "hunyuan_video15": block("double_blocks", HUNYUAN_LAYERS),
    "minimax_h3": block(
        "transformer_blocks", [*H3, "ff.net.0.proj", "ff.net.2", "adaln_proj.linear"]
    ),
    "ltx2": block("model.diffusion_model.transformer_blocks", LTX),
}


@pytest.mark.parametrize("name", LIGHTX2V)
def test_lightx2v_gets_the_layers_that_its_loader_wants(name: str) -> None:
    assert lightx2v_layers(name) == LIGHTX2V[name]


@pytest.mark.parametrize(
    ("name", "number", "config", "said"),
    [
        ("wan", 0, {}, "t2v"),
        ("wan", 1, {}, "i2v"),
        ("wan", 2, {}, "flf2v"),
        ("wan", 5, {}, "i2v"),
        ("wan", 6, {}, "ti2v"),
        ("wan", 0, {"_class_name": "ChronoEditTransformer3DModel"}, "chronoedit"),
        ("wan", 7, {"_class_name": "SkyReelsV2Transformer3DModel"}, "skyreels-v2"),
        ("wan", 7, {}, "skyreels-v2"),
        ("hunyuan_video", 0, {}, "t2v"),
        ("hunyuan_video", 0, {"image_condition_type": "token_replace"}, "i2v"),
        ("hunyuan_video", 1, {}, "i2v"),
        ("hunyuan_video", 2, {}, "framepack"),
        ("hunyuan_video15", 0, {"task_type": "i2v"}, "i2v"),
        ("cosmos", 0, {}, "t2i"),
        ("cosmos", 1, {}, "2.5"),
        ("cosmos", 2, {}, "1.0"),
    ],
)
def test_variants(name: str, number: int, config: Any, said: str) -> None:
    _, meta = model_of(name, number)
    family = families()[name]
    assert family.variant(checkpoints.infos_of(meta), config) == said
    assert said in family.pipelines


def test_pipelines_are_classes_of_diffusers() -> None:
    import diffusers

    for name in MODELS:
        for pipeline in families()[name].pipelines.values():
            assert hasattr(diffusers, pipeline), f"{name}: {pipeline}"


def test_a_pruned_minimax_h3_is_for_comfyui_alone() -> None:
    """diffusers' own loader refuses it as well."""
    _, meta = model_of("minimax_h3")
    model = {name: t for name, t in meta.items() if not name.startswith("time_embedder.")}
    model["adaln_t_table"] = torch.empty(9, 160, device="meta", dtype=torch.bfloat16)
    source = open_canonical(Memory(written("minimax_h3", "original", model)), PATH)
    assert not unknown(source)
    config = source.family.config_of(source.infos)
    plan = make_plan(source, targets()["comfyui"], scheme("int8"), PlanOptions(), ("m", config))
    assert "adaln_t_table" in plan.outputs
    with pytest.raises(SourceError, match="pruned MiniMax-H3"):
        make_plan(source, targets()["lightx2v"], scheme("int8"), PlanOptions(), ("m", config))


def test_shards_have_rows_that_alternate() -> None:
    """MiniMaxAI's own shards have the names and shapes of Comfy-Org's one file."""
    from diffusers.loaders.single_file_utils import (
        convert_minimax_h3_transformer_checkpoint_to_diffusers as convert,
    )

    config, meta = model_of("minimax_h3")
    checkpoint = written("minimax_h3", "original", checkpoints.filled(meta, columns=2))
    source = Memory(checkpoint)
    assert not open_canonical(source, PATH).notes
    source.files = (Path("one.safetensors"), Path("two.safetensors"))
    found = open_canonical(source, PATH)
    theirs = convert(dict(checkpoint), config=config, qkv_layout="interleaved")
    assert checkpoints.same_tensors(read_all(found), theirs)
    assert found.dialect == "original" and "alternate head by head" in found.notes[0]
    names = [f"transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"]
    whole = torch.cat([theirs[name] for name in names])
    for rows in ((0, len(whole)), (0, 128), (100, 700), (383, 385)):
        assert torch.equal(found.stack(names, rows), whole[slice(*rows)])


def test_kernels_that_blur_are_not_missed() -> None:
    """What Wan Animate's first files hold beside the weights, and no runtime reads."""
    _, meta = model_of("wan_animate")
    checkpoint = written("wan_animate", "original", checkpoints.filled(meta, columns=2))
    kernel = "motion_encoder.enc.net_app.convs.3.conv2.0.kernel"
    found = open_canonical(Memory(checkpoint | {kernel: torch.ones(4, 4)}), PATH)
    assert not unknown(found)


def test_what_cosmos_was_trained_with_is_not_missed() -> None:
    """Counters and the state of Transformer Engine, as NVIDIA's own files have them."""
    _, meta = model_of("cosmos")
    beside = ("accum_iteration", "pos_embedder.seq", "blocks.0.self_attn.q_norm._extra_state")
    checkpoint = written("cosmos", "original", checkpoints.filled(meta, columns=2))
    checkpoint |= dict.fromkeys(beside, torch.ones(4, dtype=torch.uint8))
    found = open_canonical(Memory({f"net.{name}": t for name, t in checkpoint.items()}), PATH)
    assert found.family.name == "cosmos"
    assert not unknown(found)
