"""Text encoders of today: transformers' own models judge names, and load what we write."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

from dqconvert.converter.detect import open_canonical
from dqconvert.converter.families import families
from dqconvert.converter.options import PlanOptions
from dqconvert.converter.plan import make_plan
from dqconvert.converter.reopen import reopen
from dqconvert.formats.targets import targets
from dqconvert.quantizers.errors import PlanError
from dqconvert.quantizers.schemes import scheme

torch.set_num_threads(1)
HERE = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
models = SimpleNamespace(**runpy.run_path(str(HERE / "language_models.py")))
Memory, meta_model = checkpoints.Memory, checkpoints.meta_model

PATH = Path("memory.safetensors")
CLASSES = [
    ("qwen3", "Qwen3ForCausalLM", "transformers", 32),
    ("qwen3", "Qwen3Model", "bare", 32),
    ("qwen3_vl", "Qwen3VLForConditionalGeneration", "composite", 32),
    ("qwen3_vl", "Qwen3VLModel", "submodel", 32),
    ("qwen25_vl", "Qwen2_5_VLForConditionalGeneration", "transformers", 32),
    ("mistral3", "Mistral3ForConditionalGeneration", "llava", 128),
    ("mistral3", "Mistral3Model", "llava", 128),
    ("llama", "LlamaModel", "bare", 128),
    ("gemma2", "Gemma2Model", "bare", 256),
    ("gemma3", "Gemma3ForConditionalGeneration", "llava", 32),
]
"""Family, class, how transformers 5 spells its files, and the width of a head."""


def built(name: str, head: int, class_name: str) -> Any:
    base = {"Model": "ForCausalLM"} if families()[name].name in ("qwen3", "llama", "gemma2") else {}
    usual = class_name
    if class_name.endswith("Model"):
        ending = base.get("Model", "ForConditionalGeneration")
        usual = class_name.removesuffix("Model") + ending
    config = models.text_config(usual, head, intermediate_size=256)
    if name == "qwen25_vl":
        del config["head_dim"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return models.build(config, class_name).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folders that transformers writes, by class."""
    root = tmp_path_factory.mktemp("encoders")
    for name, class_name, _, head in CLASSES:
        built(name, head, class_name).save_pretrained(root / class_name)
    return root


@pytest.mark.parametrize(("name", "class_name", "dialect", "head"), CLASSES)
def test_files_of_transformers_are_known(
    saved: Path, name: str, class_name: str, dialect: str, head: int
) -> None:
    """Nothing is left over but the other half, and nothing is lost."""
    state = load_file(saved / class_name / "model.safetensors")
    found = open_canonical(Memory(state), PATH)
    assert (found.family.name, found.dialect, found.ignored) == (name, dialect, 0)
    assert len(found.infos) == len(state)


@pytest.mark.parametrize("kind", ["bnb-nf4", "int8"])
@pytest.mark.parametrize(("name", "class_name"), [one[:2] for one in CLASSES])
def test_transformers_loads_what_we_write(
    saved: Path, tmp_path: Path, kind: str, name: str, class_name: str
) -> None:
    """No tensor is missing, unexpected or made anew, and the model computes almost the same."""
    import transformers

    out = tmp_path / "out"
    words = ("--scheme", kind, "--target", "diffusers", "--output", out)
    checkpoints.done("convert", saved / class_name, *words)
    assert "sound" in checkpoints.done("verify", out, "--against", saved / class_name)
    assert reopen(out).family.name == name
    load = getattr(transformers, class_name).from_pretrained
    quantized, said = load(out, output_loading_info=True, device_map={"": "cpu"})
    assert not any(said.values())
    kinds = {"bnb-nf4": "Params4bit", "int8": "Int8Tensor"}
    linears = [m for m in quantized.modules() if isinstance(m, torch.nn.Linear)]
    assert sum(type(m.weight).__name__ == kinds[kind] for m in linears) == 14
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        wanted = load(saved / class_name)(input_ids=ids)[0].float()
        found = quantized(input_ids=ids)[0].float()
    assert (found - wanted).norm() / wanted.norm() < (0.3 if kind == "bnb-nf4" else 0.05)


def test_layouts_that_transformers_does_not_read_are_refused(saved: Path, tmp_path: Path) -> None:
    words = ("--scheme", "fp8-cast", "--target", "diffusers")
    said = checkpoints.refused(tmp_path / "out", "convert", saved / "Qwen3Model", *words)
    assert "transformers, which loads this model, cannot read it" in said


@pytest.mark.parametrize(
    ("class_name", "tensor"), [("Gemma2Model", "spiece_model"), ("LlamaModel", "")]
)
def test_a_tokenizer_that_comfyui_needs_is_missed(
    saved: Path, tmp_path: Path, class_name: str, tensor: str
) -> None:
    words = ("--scheme", "fp8-tensor", "--target", "comfyui", "-o", tmp_path / "out")
    said = checkpoints.done("convert", saved / class_name, *words)
    assert (f"a tensor called {tensor}" in said) == bool(tensor)


def test_a_lone_file_has_no_config_for_transformers(saved: Path, tmp_path: Path) -> None:
    alone = tmp_path / "encoder.safetensors"
    alone.write_bytes((saved / "Qwen3Model" / "model.safetensors").read_bytes())
    words = ("--scheme", "bnb-nf4", "--target", "diffusers")
    said = checkpoints.refused(tmp_path / "out", "convert", alone, *words)
    assert "no config.json of transformers" in said


@pytest.mark.parametrize("class_name", [class_name for _, class_name, _, _ in CLASSES])
def test_comfyui_gets_its_names(saved: Path, class_name: str) -> None:
    """comfy/sd.py tells encoders by model.layers, wherever they come from."""
    found = open_canonical(Memory(load_file(saved / class_name / "model.safetensors")), PATH)
    config = found.family.config_of(found.infos)
    plan = make_plan(
        found, targets()["comfyui"], scheme("fp8-tensor"), PlanOptions(), ("m", config)
    )
    assert "model.layers.0.post_attention_layernorm.weight" in plan.outputs
    assert plan.outputs["model.layers.1.mlp.down_proj.weight"].dtype == "F8_E4M3"
    assert len(plan.context.layers) == 14


@pytest.mark.parametrize(
    ("name", "arch"), [("qwen3", gguf.MODEL_ARCH.QWEN3), ("qwen3_vl", gguf.MODEL_ARCH.QWEN3VL)]
)
def test_gguf_knows_the_names(name: str, arch: Any) -> None:
    """gguf's own table, and sizes under its keys."""
    family, config = families()[name], checkpoints.CONFIGS[name][-1]
    table = gguf.get_tensor_name_map(arch, 40)
    source = open_canonical(Memory(meta_model(config)), PATH)
    plan = make_plan(source, targets()["gguf"], scheme("gguf-q8_0"), PlanOptions(), (name, config))
    known = {
        table.get_name(ours, try_suffixes=(".weight", ".bias"))
        for ours in source.infos
        if not ours.startswith("visual.")
    }
    assert set(plan.outputs) == known
    assert family.architecture == gguf.MODEL_ARCH_NAMES[arch]
    said = family.facts("gguf", config)
    assert said[gguf.Keys.LLM.BLOCK_COUNT.format(arch=family.architecture)] == 36
    assert said[gguf.Keys.Attention.HEAD_COUNT_KV.format(arch=family.architecture)] == 8


@pytest.mark.parametrize("name", ["qwen3", "qwen3_vl"])
def test_gguf_files_say_which_of_two_alike_they_are(name: str, saved: Path, tmp_path: Path) -> None:
    folder = saved / {"qwen3": "Qwen3Model", "qwen3_vl": "Qwen3VLModel"}[name]
    out = tmp_path / "out"
    checkpoints.done("convert", folder, "--scheme", "gguf-q8_0", "--target", "gguf", "-o", out)
    assert "sound" in checkpoints.done("verify", out, "--against", folder)
    assert json.loads((out / "dqconvert.json").read_text())["source"]["family"] == name


@pytest.mark.parametrize("name", ["llama", "mistral3", "gemma2", "gemma3"])
def test_gguf_is_refused_where_nobody_reads_it(name: str) -> None:
    config = checkpoints.CONFIGS[name][0]
    source = open_canonical(Memory(meta_model(config)), PATH)
    with pytest.raises(PlanError, match="gguf does not run"):
        make_plan(source, targets()["gguf"], scheme("gguf-q8_0"), PlanOptions(), (name, config))


def test_every_encoder_that_a_family_names_is_one() -> None:
    """ByT5, which reads glyphs, is T5 with other tokens."""
    named = {name for family in families().values() for name in family.encoders.values()}
    assert named <= families().keys()
    assert not any(families()[name].task for name in named)
