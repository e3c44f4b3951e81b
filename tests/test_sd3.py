"""Stable Diffusion 3: diffusers' converter judges the names, ComfyUI's plan the layers."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dqconvert.converter.detect import open_canonical, unknown
from dqconvert.converter.families import families
from dqconvert.converter.options import PlanOptions
from dqconvert.converter.plan import Plan, make_plan
from dqconvert.formats.targets import targets
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.schemes import scheme

torch.set_num_threads(1)
HERE = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
configs = SimpleNamespace(**runpy.run_path(str(HERE / "configs.py")))
Memory, meta_model = checkpoints.Memory, checkpoints.meta_model

PATH = Path("memory.safetensors")
SD3 = families()["sd3"]
SMALL = [config for config in configs.CONFIGS["sd3"] if checkpoints.small(config)]
DUAL = next(one for one in SMALL if one["dual_attention_layers"] and one["qk_norm"])
LARGE = configs.sd3_config()
MEDIUM = configs.CONFIGS["sd3"][-1]


def original(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    found, _ = checkpoints.write_dialect(SD3, "original", tensors)
    return {prefix + name: tensor for name, tensor in found.items()}


def read_all(source: Any) -> dict[str, Tensor]:
    return {name: source.read(name) for name in source.infos}


def plan_of(config: dict[str, Any], kind: str, target: str) -> Plan:
    source = open_canonical(Memory(meta_model(config)), PATH)
    return make_plan(source, targets()[target], scheme(kind), PlanOptions(), ("sd3", config))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("config", SMALL)
def test_diffusers_reads_original_names_alike(config: dict[str, Any], prefix: str) -> None:
    """All columns: its converter takes the width of the text from the context embedder."""
    from diffusers.loaders.single_file_utils import (
        convert_sd3_transformer_checkpoint_to_diffusers as convert,
    )

    model = checkpoints.filled(meta_model(config))
    checkpoint = original(model, prefix)
    ours = read_all(open_canonical(Memory(checkpoint), PATH))
    rest = dict(checkpoint)
    theirs = convert(rest)
    assert not rest, "our original dialect has names that theirs has not"
    assert checkpoints.same_tensors(ours, theirs)
    assert checkpoints.same_tensors(ours, model)


def test_what_a_block_may_lack() -> None:
    """A second attention whole or not at all; text behind attention in all blocks but the last."""
    model = meta_model(DUAL)
    for name in (
        "transformer_blocks.1.attn2.to_k.bias",
        "transformer_blocks.0.ff_context.net.2.bias",
    ):
        with pytest.raises(SourceError, match=f"incomplete.*{name}"):
            open_canonical(Memory({k: t for k, t in model.items() if k != name}), PATH)
    last = {"transformer_blocks.2.attn.to_add_out.bias": torch.zeros(128)}
    assert unknown(open_canonical(Memory(model | last), PATH)) == [*last]


def test_comfyui_keeps_what_changes_places() -> None:
    """All linears of all blocks under their first names; of text, one tensor of the last."""
    plan = plan_of(MEDIUM, "int8", "comfyui")
    image = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    wanted = {f"joint_blocks.{i}.x_block.{name}" for i in range(24) for name in image}
    wanted |= {f"joint_blocks.{i}.context_block.{name}" for i in range(23) for name in image}
    wanted |= {f"joint_blocks.{i}.x_block.attn2.{n}" for i in range(13) for n in ("qkv", "proj")}
    wanted |= {"joint_blocks.23.context_block.attn.qkv"}
    assert set(plan.context.layers) == wanted
    assert "joint_blocks.23.context_block.adaLN_modulation.1" in plan.context.kept


@pytest.mark.parametrize("target", sorted(targets()))
@pytest.mark.parametrize("config", [LARGE, MEDIUM], ids=["large", "medium"])
def test_real_models_fit_every_target_that_runs_them(config: dict[str, Any], target: str) -> None:
    kinds = {"comfyui": "int8", "diffusers": "bnb-int8", "gguf": "gguf-q8_0"}
    if target not in kinds:
        return
    plan = plan_of(config, kinds[target], target)
    assert sorted(t for layer in plan.layers for t in layer.sources) == sorted(meta_model(config))
    assert plan.context.layers


@pytest.mark.parametrize(("kind", "target"), [("int8", "comfyui"), ("bnb-int8", "diffusers")])
def test_conversions_are_sound_and_go_back(tmp_path: Path, kind: str, target: str) -> None:
    """From either set of names; what was swapped for the runtime is swapped back."""
    tensors = {k: t * 0.05 for k, t in checkpoints.filled(meta_model(DUAL)).items()}
    (tmp_path / "folder").mkdir()
    save_file(tensors, tmp_path / "folder" / checkpoints.WEIGHTS)
    (tmp_path / "folder" / "config.json").write_text(json.dumps(DUAL))
    whole = original(tensors, "model.diffusion_model.")
    save_file({k: t.contiguous() for k, t in whole.items()}, tmp_path / "one.safetensors")
    outputs = []
    for source in (tmp_path / "folder", tmp_path / "one.safetensors"):
        out, plain = tmp_path / f"{source.name}-out", tmp_path / f"{source.name}.plain.safetensors"
        checkpoints.done("convert", source, "--scheme", kind, "--target", target, "--output", out)
        assert "sound" in checkpoints.done("verify", out, "--against", source)
        checkpoints.done("dequantize", out, "--output", plain)
        outputs.append(read_all(open_canonical(Memory(load_file(plain)), PATH)))
    assert checkpoints.same_tensors(*outputs)
    for name, tensor in tensors.items():
        assert (outputs[0][name].float() - tensor.float()).abs().max() < 0.01, name
