"""Files that people give as LoRAs and what they hold beside adapters."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dqconvert.converter.canonical import CanonicalSource
from dqconvert.converter.detect import open_canonical
from dqconvert.converter.lora.files import LoraSpec, opened
from dqconvert.converter.lora.match import Loras, read
from dqconvert.converter.lora.merged import MergedSource
from dqconvert.quantizers.errors import PlanError

torch.set_num_threads(1)
checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))
done, refused = checkpoints.done, checkpoints.refused
WIDTH = 128


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = checkpoints.tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")
    return found


@pytest.fixture(scope="module")
def state(pipeline: Path) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in checkpoints.weights_of(pipeline).items()}


def model_of(state: dict[str, Tensor]) -> CanonicalSource:
    found: CanonicalSource = open_canonical(checkpoints.Memory(state), Path("flux.safetensors"))
    return found


def loras_of(
    path: Path, source: CanonicalSource, strength: float = 1.0, partial: bool = False
) -> Loras:
    return read([opened(LoraSpec(path, strength))], source, "transformer", partial)


def plain(module: str, rows: int = WIDTH) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        f"{module}.lora_down.weight": torch.randn(2, WIDTH, generator=rng) / 8,
        f"{module}.lora_up.weight": torch.randn(rows, 2, generator=rng) / 8,
    }


def test_new_weights_are_taken_whatever_the_strength(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    """As ComfyUI (lora.py, "set") and diffusers (_load_norm_into_transformer) do; 0 is none."""
    name, path = "transformer_blocks.0.attn.norm_q", tmp_path / "lora.safetensors"
    other = torch.rand(state[f"{name}.weight"].shape)
    source = model_of(state)
    for key in ("double_blocks.0.img_attn.norm.query_norm.scale", f"transformer.{name}.set_weight"):
        save_file(plain("double_blocks.0.img_attn.proj") | {key: other}, path)
        for strength in (1.0, 0.5, -1.0, 0.0):
            got = MergedSource(source, loras_of(path, source, strength)).read(f"{name}.weight")
            assert torch.allclose(got, other if strength else state[f"{name}.weight"])


def test_a_checkpoint_is_no_lora(state: dict[str, Tensor], tmp_path: Path) -> None:
    path, source = tmp_path / "model.safetensors", model_of(state)
    for found in (state, checkpoints.original(state)):
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, path)
        for partial in (False, True):
            with pytest.raises(PlanError, match="is a checkpoint and no LoRA"):
                loras_of(path, source, partial=partial)


def test_numbers_that_are_none_are_the_loras_fault(pipeline: Path, tmp_path: Path) -> None:
    """The message names the LoRA, not the checkpoint."""
    lora, name = plain("transformer.transformer_blocks.0.attn.to_q"), tmp_path / "bad.safetensors"
    up = next(key for key in lora if "up" in key)
    lora[up][3, 1] = float("nan")
    save_file(lora, name)
    words = ("--scheme", "int8", "--target", "comfyui", "-q", "--lora", name)
    said = refused(tmp_path, pipeline, *words, "-o", tmp_path / "out")
    assert up in said and "bad.safetensors" in said, said
