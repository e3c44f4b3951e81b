"""Text encoders in GGUF: gguf's tables judge the names, the readers' own renaming undoes them."""

from __future__ import annotations

import runpy
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dqconvert.converter.detect import open_canonical
from dqconvert.converter.families import families
from dqconvert.converter.options import PlanOptions
from dqconvert.converter.plan import make_plan
from dqconvert.formats.targets import targets
from dqconvert.quantizers.schemes import scheme

torch.set_num_threads(1)
HERE = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
configs = SimpleNamespace(**runpy.run_path(str(HERE / "configs.py")))
Memory, meta_model = checkpoints.Memory, checkpoints.meta_model

PATH = Path("memory.safetensors")
Names = Iterable[tuple[str, str]]

COMFY_T5 = {
    "enc.": "encoder.",
    ".blk.": ".block.",
    "token_embd": "shared",
    "output_norm": "final_layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_norm": "layer.0.layer_norm",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_norm": "layer.1.layer_norm",
}
COMFY_LLM = {
    "blk.": "model.layers.",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_norm": "post_attention_layernorm",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output.weight": "lm_head.weight",
}
COMFY_VISION = {
    "mm.": "visual.merger.mlp.",
    "v.post_ln.": "visual.merger.ln_q.",
    "v.patch_embd": "visual.patch_embed.proj",
    "v.blk.": "visual.blocks.",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate": "mlp.gate_proj",
    "attn_out.": "attn.proj.",
    "ln1.": "norm1.",
    "ln2.": "norm2.",
}
"""What ComfyUI-GGUF (loader.py) replaces in names, every occurrence, in this order."""

CPP_T5 = {
    "enc.": "encoder.",
    "blk.": "block.",
    "output_norm.": "final_layer_norm.",
    "attn_q.": "layer.0.SelfAttention.q.",
    "attn_k.": "layer.0.SelfAttention.k.",
    "attn_v.": "layer.0.SelfAttention.v.",
    "attn_o.": "layer.0.SelfAttention.o.",
    "attn_norm.": "layer.0.layer_norm.",
    "ffn_norm.": "layer.1.layer_norm.",
    "ffn_up.": "layer.1.DenseReluDense.wi_1.",
    "ffn_down.": "layer.1.DenseReluDense.wo.",
    "ffn_gate.": "layer.1.DenseReluDense.wi_0.",
    "attn_rel_b.": "layer.0.SelfAttention.relative_attention_bias.",
    "token_embd.": "shared.",
}
CPP_LLM = {
    "token_embd.": "model.embed_tokens.",
    "blk.": "model.layers.",
    "attn_q.": "self_attn.q_proj.",
    "attn_k.": "self_attn.k_proj.",
    "attn_v.": "self_attn.v_proj.",
    "attn_output.": "self_attn.o_proj.",
    "attn_norm.": "input_layernorm.",
    "ffn_down.": "mlp.down_proj.",
    "ffn_gate.": "mlp.gate_proj.",
    "ffn_up.": "mlp.up_proj.",
    "ffn_norm.": "post_attention_layernorm.",
    "output_norm.": "model.norm.",
    "output.": "lm_head.",  # not there: it skips the tensor under either name
}
CPP_VISION = {
    "mm.": "merger.mlp.",
    "v.post_ln.": "merger.ln_q.",
    "v.patch_embd.weight": "patch_embed.proj.0.weight",
    "patch_embed.proj.0.weight.1": "patch_embed.proj.1.weight",
    "v.blk.": "blocks.",
    "attn_q.": "attn.q.",  # q_proj there, the module of its own class
    "attn_k.": "attn.k.",
    "attn_v.": "attn.v.",
    "attn_out.": "attn.proj.",
    "ffn_down.": "mlp.down_proj.",
    "ffn_gate.": "mlp.gate_proj.",
    "ffn_up.": "mlp.up_proj.",
    "ln1.": "norm1.",
    "ln2.": "norm2.",
}
"""What stable-diffusion.cpp (name_conversion.cpp) replaces, the first occurrence of each."""

RENAMED = {"t5": (COMFY_T5, CPP_T5), "umt5": (COMFY_T5, CPP_T5), "qwen25_vl": (COMFY_LLM, CPP_LLM)}
ENCODERS = ("t5", "umt5", "clip_text", "qwen25_vl", "qwen25_vl_vision")
SMALL = [
    pytest.param(name, config, id=f"{name}-{number}")
    for name in ENCODERS
    for number, config in enumerate(configs.CONFIGS[name])
    if checkpoints.small(config)
]


def replaced(name: str, table: Mapping[str, str], count: int = -1) -> str:
    for old, new in table.items():
        name = name.replace(old, new, count)
    return name


def dialect(name: str, tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = checkpoints.write_dialect(families()[name], kind, tensors)[0]
    return found


def comfy_mmproj(files: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ComfyUI-GGUF's loader of the vision tower: frames stacked, q, k and v joined."""
    state = dict(files)
    frames = [state.pop("v.patch_embd.weight"), state.pop("v.patch_embd.weight.1")]
    state["v.patch_embd.weight"] = torch.stack(frames, dim=2)
    state = {replaced(name, COMFY_VISION): tensor for name, tensor in state.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        head, _, tail = name.partition(".attn_")
        if not tail:
            found[name] = tensor
        elif tail.startswith("q."):
            parts = [state[f"{head}.attn_{x}{tail[1:]}"] for x in "qkv"]
            found[f"{head}.attn.qkv{tail[1:]}"] = torch.cat(parts)
    return found


@pytest.mark.parametrize(("name", "config"), SMALL)
def test_llama_cpp_names_go_there_and_back(name: str, config: Any) -> None:
    """One tensor for each, none twice, and the file alone tells the family."""
    model = checkpoints.filled(meta_model(config))
    files = dialect(name, model, "gguf")
    assert len(files) == len(model)
    found = open_canonical(Memory(files), PATH)
    assert found.family.name == name
    assert checkpoints.same_tensors({k: found.read(k) for k in found.infos}, model)


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("t5", gguf.MODEL_ARCH.T5ENCODER),
        ("umt5", gguf.MODEL_ARCH.T5ENCODER),
        ("qwen25_vl", gguf.MODEL_ARCH.QWEN2VL),
        ("qwen25_vl_vision", gguf.MODEL_ARCH.MMPROJ),
    ],
)
def test_gguf_knows_the_names(name: str, arch: Any) -> None:
    """As its converter calls it: with q, k and v apart, and frames under one name."""
    table = gguf.get_tensor_name_map(arch, 40)
    model = meta_model(configs.CONFIGS[name][-1])
    for theirs, ours in zip(dialect(name, model, "gguf"), _ours_of(name, model), strict=True):
        asked = ours.replace("patch_embed.proj.0", "patch_embed.proj")
        if asked == "visual.patch_embed.proj.1.weight":
            assert theirs == "v.patch_embd.weight.1"
            continue
        assert table.get_name(asked, try_suffixes=(".weight", ".bias")) == theirs, ours
    assert families()[name].architecture == gguf.MODEL_ARCH_NAMES[arch]


def _ours_of(name: str, model: Mapping[str, Tensor]) -> list[str]:
    """Canonical names in the order of the file."""
    _, used = checkpoints.write_dialect(families()[name], "gguf", model)
    return [leaf.ours[0].replace("{i}", index) for leaf, index in used]


@pytest.mark.parametrize(("name", "config"), [one for one in SMALL if one.values[0] in RENAMED])
def test_readers_rename_to_what_transformers_says(name: str, config: Any) -> None:
    model = meta_model(config)
    comfy, cpp = RENAMED[name]
    files = dialect(name, model, "gguf")
    for table, count in ((comfy, -1), (cpp, 1)):
        renamed = {replaced(key, table, count): tensor.shape for key, tensor in files.items()}
        assert renamed == {key: tensor.shape for key, tensor in model.items()}


def test_readers_join_the_vision_tower_again() -> None:
    """ComfyUI-GGUF to transformers' names and shapes; stable-diffusion.cpp leaves all apart."""
    model = checkpoints.filled(meta_model(configs.CONFIGS["qwen25_vl_vision"][0]))
    files = dialect("qwen25_vl_vision", model, "gguf")
    whole = dialect("qwen25_vl_vision", model, "transformers")
    assert whole["visual.patch_embed.proj.weight"].shape == (64, 3, 2, 14, 14)
    assert checkpoints.same_tensors(comfy_mmproj(files), whole)
    renamed = {f"visual.{replaced(key, CPP_VISION, 1)}": tensor for key, tensor in files.items()}
    assert checkpoints.same_tensors(renamed, model)


@pytest.mark.parametrize("prefix", ["clip_l", "clip_g"])
def test_clip_needs_no_names_of_its_own(prefix: str) -> None:
    """ComfyUI and stable-diffusion.cpp look for transformers' names, and find them."""
    family = families()["clip_text"]
    model = meta_model(configs.CONFIGS["clip_text"][0])
    assert dialect("clip_text", model, "gguf").keys() == model.keys()
    for name in (*COMFY_T5, *COMFY_LLM):
        assert not any(name in key for key in model)  # nothing that either would replace
    assert family.facts("gguf", {})["general.type"] in ("clip-vision", "mmproj")


@pytest.mark.parametrize("named", ["whole", "bare"])
def test_clip_of_either_version_of_transformers(named: str) -> None:
    """The latest saves CLIPTextModel without the module around it."""
    config = configs.CONFIGS["clip_text"][1]
    model = checkpoints.filled(meta_model(config))
    kind = "bare" if named == "bare" else "transformers"
    files = dialect("clip_text", model, kind)
    assert all(name.startswith("text_model.") == (named == "whole") for name in files)
    more = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    found = open_canonical(Memory(files | (more if named == "whole" else {})), PATH)
    assert checkpoints.same_tensors({k: found.read(k) for k in found.infos}, model)


def test_a_whole_encoder_gives_its_language_model() -> None:
    """Both halves of Qwen2.5-VL stand in one checkpoint; each reads its own."""
    halves = [
        dialect(name, checkpoints.filled(meta_model(configs.CONFIGS[name][0])), "transformers")
        for name in ("qwen25_vl", "qwen25_vl_vision")
    ]
    found = open_canonical(Memory(halves[0] | halves[1]), PATH)
    assert (found.family.name, found.ignored) == ("qwen25_vl", 0)
    said = configs.CONFIGS["qwen25_vl"][0]
    for target, kind, other in (
        ("gguf", "gguf-q8_0", 0),
        ("comfyui", "fp8-tensor", len(halves[1])),
    ):
        plan = make_plan(found, targets()[target], scheme(kind), PlanOptions(), ("q", said))
        assert sum(name in halves[1] for name in plan.outputs) == other
    assert open_canonical(Memory(halves[1]), PATH).family.name == "qwen25_vl_vision"


T5 = [f"attn_{x}" for x in "qkvo"] + ["ffn_gate", "ffn_up", "ffn_down"]
LLM = [f"attn_{x}" for x in ("q", "k", "v", "output")] + T5[4:]
VISION = [f"attn_{x}" for x in ("q", "k", "v", "out")] + T5[4:]
CLIP = [f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
LAYERS = {
    "t5": {f"enc.blk.{i}.{x}" for i in range(24) for x in T5},
    "umt5": {f"enc.blk.{i}.{x}" for i in range(24) for x in T5},
    "clip_text": {f"text_model.encoder.layers.{i}.{x}" for i in range(32) for x in CLIP},
    "qwen25_vl": {f"blk.{i}.{x}" for i in range(28) for x in LLM} | {"output"},
    "qwen25_vl_vision": {f"v.blk.{i}.{x}" for i in range(32) for x in VISION},
}


ADDED = ("position_embedding.weight", "attn_rel_b.weight")
"""What ComfyUI's CLIP adds without decoding it, and what llama.cpp never quantizes."""


@pytest.mark.parametrize("name", ENCODERS)
def test_real_encoders_quantize_the_linears_of_their_blocks(name: str) -> None:
    """Norms and positions are F32, embeddings stay as they were."""
    config = configs.CONFIGS[name][-1]
    source = open_canonical(Memory(dialect(name, meta_model(config), "gguf")), PATH)
    plan = make_plan(source, targets()["gguf"], scheme("gguf-q8_0"), PlanOptions(), (name, config))
    assert set(plan.context.layers) == LAYERS[name]
    for tensor, info in plan.outputs.items():
        if tensor.removesuffix(".weight") not in LAYERS[name]:
            stays = len(info.shape) == 2 and not tensor.endswith(ADDED)
            assert info.dtype == ("BF16" if stays else "F32"), tensor


KEYS = {
    "t5": "t5encoder",
    "umt5": "t5encoder",
    "qwen25_vl": "qwen2vl",
}


@pytest.mark.parametrize("name", KEYS)
def test_sizes_are_said_in_llama_cpps_words(name: str) -> None:
    config, arch = configs.CONFIGS[name][-1], KEYS[name]
    said = families()[name].facts("gguf", config)
    words = gguf.Keys
    heads = config.get("num_heads", config.get("num_attention_heads"))
    wanted = {
        words.LLM.BLOCK_COUNT: config.get("num_layers", config.get("num_hidden_layers")),
        words.LLM.EMBEDDING_LENGTH: config.get("d_model", config.get("hidden_size")),
        words.LLM.FEED_FORWARD_LENGTH: config.get("d_ff", config.get("intermediate_size")),
        words.Attention.HEAD_COUNT: heads,
    }
    for key, value in wanted.items():
        assert said[key.format(arch=arch)] == value
    if arch == "qwen2vl":
        assert said[words.Attention.HEAD_COUNT_KV.format(arch=arch)] == 4
        assert said[words.Rope.DIMENSION_SECTIONS.format(arch=arch)] == [16, 24, 24, 0]
    else:
        assert said[words.Attention.REL_BUCKETS_COUNT.format(arch=arch)] == 32


def test_the_vision_tower_says_what_it_is() -> None:
    said = families()["qwen25_vl_vision"].facts("gguf", configs.CONFIGS["qwen25_vl_vision"][-1])
    words = gguf.Keys
    assert said[words.General.TYPE] == gguf.GGUFType.MMPROJ
    assert said[words.Clip.PROJECTOR_TYPE] == gguf.VisionProjectorType.QWEN25VL
    assert said[words.Clip.HAS_VISION_ENCODER] is True
    assert said[words.ClipVision.EMBEDDING_LENGTH] == 1280
    assert said[words.ClipVision.PROJECTION_DIM] == 3584
    assert said[words.ClipVision.N_WA_PATTERN] == 8
    assert said[words.ClipVision.Attention.HEAD_COUNT] == 16
    assert {key for key in said if key.count(".") > 1} <= _all_keys(words.ClipVision)


def _all_keys(words: Any) -> set[str]:
    found = {value for value in vars(words).values() if isinstance(value, str)}
    for inner in vars(words).values():
        if isinstance(inner, type):
            found |= _all_keys(inner)
    return found


@pytest.mark.parametrize("name", ENCODERS)
def test_files_are_sound_and_readers_see_the_model(name: str, tmp_path: Path) -> None:
    """From transformers' file to GGUF, through gguf's own reader, to what a reader joins."""
    model = {
        k: t * 0.05 for k, t in checkpoints.filled(meta_model(configs.CONFIGS[name][0])).items()
    }
    whole = dialect(name, model, "transformers")
    source, out = tmp_path / "model.safetensors", tmp_path / "out"
    save_file({k: t.contiguous() for k, t in whole.items()}, source)
    words = ("--scheme", "gguf-f16", "--target", "gguf", "--output", out)
    checkpoints.done("convert", source, *words)
    assert "sound" in checkpoints.done("verify", out, "--against", source)
    (path,) = out.glob("*.gguf")
    files = {one.name: _values(one) for one in gguf.GGUFReader(path).tensors}
    if name == "qwen25_vl_vision":
        files = comfy_mmproj(files)
    elif name in RENAMED:
        files = {replaced(key, RENAMED[name][0]): tensor for key, tensor in files.items()}
    assert files.keys() == whole.keys()
    for key, tensor in files.items():
        assert tensor.shape == whole[key].shape
        assert torch.allclose(tensor, whole[key].float(), rtol=1e-3, atol=1e-7), key


def _values(tensor: Any) -> Tensor:
    shape = [int(size) for size in reversed(tensor.shape)]
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).view(shape)
