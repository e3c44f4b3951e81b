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
from dqconvert.converter.lora.keys import encoder_of
from dqconvert.converter.lora.match import Loras, read
from dqconvert.converter.lora.merged import MergedSource
from dqconvert.quantizers.errors import PlanError, SourceError

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


def pair(module: str, columns: int = WIDTH, rank: int = 2) -> dict[str, Tensor]:
    return {
        f"{module}.lora_A.weight": torch.ones(rank, columns),
        f"{module}.lora_B.weight": torch.ones(WIDTH, rank),
    }


QUERY = "transformer.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (pair(QUERY) | {f"{QUERY}.alpha": torch.ones(0)}, "alpha is [0] and no number"),
        (pair(QUERY) | {f"{QUERY}.alpha": torch.ones(2)}, "alpha is [2] and no number"),
        (pair(QUERY, rank=0), "its rank is 0"),
        (pair(QUERY) | pair(QUERY.replace("transformer.", "diffusion_model.", 1)), "says again"),
        (pair("img_in", 128) | pair(QUERY), "as control LoRAs do"),
        (pair("transformer.x_embedder", 128) | pair(QUERY), "as control LoRAs do"),
    ],
    ids=["alpha-0", "alpha-2", "rank-0", "twice", "control", "control-diffusers"],
)
def test_what_cannot_be_meant_is_said(
    state: dict[str, Tensor], tmp_path: Path, lora: dict[str, Tensor], words: str
) -> None:
    save_file(lora, tmp_path / "lora.safetensors")
    with pytest.raises(PlanError) as refusal:
        loras_of(tmp_path / "lora.safetensors", model_of(state))
    (problem,) = refusal.value.problems
    assert words in problem


def test_an_alpha_is_finite(state: dict[str, Tensor], tmp_path: Path) -> None:
    path, source = tmp_path / "lora.safetensors", model_of(state)
    save_file(pair(QUERY) | {f"{QUERY}.alpha": torch.tensor(float("nan"))}, path)
    with pytest.raises(SourceError, match=r"to_q\.alpha is nan"):
        MergedSource(source, loras_of(path, source)).read("transformer_blocks.0.attn.to_q.weight")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_loras_of_other_widths_are_read(
    state: dict[str, Tensor], tmp_path: Path, dtype: torch.dtype
) -> None:
    name, path, source = (
        "transformer_blocks.0.attn.to_q",
        tmp_path / "l.safetensors",
        model_of(state),
    )
    lora = {key: tensor.to(dtype) for key, tensor in plain(f"transformer.{name}").items()}
    save_file(lora, path)
    down, up = (tensor.double() for tensor in lora.values())
    got = MergedSource(source, loras_of(path, source)).read(f"{name}.weight")
    assert torch.allclose(got.double(), state[f"{name}.weight"].double() + up @ down, atol=1e-6)


def test_strengths_are_near_one(pipeline: Path, tmp_path: Path) -> None:
    save_file(pair(QUERY), tmp_path / "l.safetensors")
    words = (pipeline, "--scheme", "int8", "--target", "comfyui", "-o", tmp_path / "out")
    said = refused(tmp_path, *words, "--lora", f"{tmp_path / 'l.safetensors'}:1e39", code=2)
    assert "1000 at most" in said


@pytest.mark.parametrize(
    ("key", "number"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", 1),
        ("lora_te1_text_projection.alpha", 1),
        ("lora_te2_text_projection.alpha", 2),
        ("te2.text_model.encoder.layers.0.mlp.fc1.alpha", 2),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1.alpha", 1),
        ("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight", 2),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.alpha", 1),
        ("text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.alpha", 2),
        ("clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.alpha", 2),
        ("text_encoders.t5xxl.transformer.encoder.block.0.layer.1.DenseReluDense.wo.alpha", 3),
        ("t5xxl.transformer.encoder.block.0.layer.1.DenseReluDense.wo.alpha", 3),
        ("text_encoders.qwen25_7b.transformer.model.layers.0.mlp.up_proj.alpha", 1),
        ("transformer.transformer_blocks.0.attn.to_q.alpha", None),
        ("lora_unet_double_blocks_0_img_attn_qkv.alpha", None),
        ("text_embedder.linear_1.alpha", None),
    ],
)
def test_keys_say_which_encoder_they_are_of(key: str, number: int | None) -> None:
    assert encoder_of(key) == number


def test_t5_is_the_second_or_the_third_encoder(tmp_path: Path) -> None:
    configs = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("configs.py"))))
    state = checkpoints.meta_model(configs.CONFIGS["t5"][-1])
    source, path = model_of(state), tmp_path / "lora.safetensors"
    name = "encoder.block.0.layer.0.SelfAttention.q"
    rows, columns = state[f"{name}.weight"].shape
    for prefix in ("text_encoders.t5xxl.transformer.", "t5xxl.transformer.", "lora_te3_"):
        base = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
        down, up = torch.ones(2, columns), torch.ones(rows, 2)
        save_file({f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up}, path)
        for component in ("text_encoder_2", "text_encoder_3"):
            (patch,) = read([opened(LoraSpec(path))], source, component, False).patches
            assert patch.home.parts == (f"{name}.weight",)
