"""Whole conversions of tiny models of every family, from either set of names, and back."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dqconvert.converter.families import families
from dqconvert.formats.targets import targets

torch.set_num_threads(1)
HERE = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
configs = SimpleNamespace(**runpy.run_path(str(HERE / "configs.py")))

TWO = {"num_layers": 2, "num_attention_heads": 2}
I2V = {"in_channels": 36, "image_dim": 128, "added_kv_proj_dim": 256}
TINY = {
    "qwen_image": configs.qwen_image_config(**TWO, joint_attention_dim=128),
    "wan": configs.wan_config(**TWO, **I2V, text_dim=128, ffn_dim=512),
    "z_image": configs.z_image_config(
        dim=384, n_layers=2, n_heads=3, n_kv_heads=3, cap_feat_dim=128
    ),
    "umt5": configs.umt5_config(
        vocab_size=64, d_model=256, d_kv=64, d_ff=512, num_heads=4, num_layers=2
    ),
    "clip_vision": configs.clip_config(
        hidden_size=320,
        intermediate_size=640,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    ),
}
RUNS = [
    (name, scheme, target)
    for name in TINY
    for scheme, target in (
        ("int8", "lightx2v"),
        ("fp8-block128", "sglang"),
        ("int8", "vllm"),
        ("convrot-int8", "comfyui"),
        ("bnb-int8", "diffusers"),
    )
    if targets()[target].DIALECT in families()[name].dialects
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: Any) -> Path:
    """For each family a folder with a config, and a file under its first names."""
    folder: Path = tmp_path_factory.mktemp("models")
    for name, config in TINY.items():
        meta = checkpoints.meta_model(config)
        tensors = {key: tensor * 0.05 for key, tensor in checkpoints.filled(meta).items()}
        (folder / name).mkdir()
        save_file(tensors, folder / name / checkpoints.WEIGHTS)
        (folder / name / "config.json").write_text(json.dumps(config))
        family = families()[name]
        first, _ = checkpoints.write_dialect(family, family.sources[0], tensors)
        save_file({k: t.contiguous() for k, t in first.items()}, folder / f"{name}.safetensors")
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: t for file in sorted(folder.rglob("*.safetensors")) for k, t in load_file(file).items()
    }


@pytest.mark.parametrize(("name", "scheme", "target"), RUNS)
def test_conversions_are_sound_whatever_the_names(
    models: Path, tmp_path: Path, name: str, scheme: str, target: str
) -> None:
    words = ("--scheme", scheme, "--target", target, "--output")
    outputs = []
    for source in (models / name, models / f"{name}.safetensors"):
        out = tmp_path / source.name
        checkpoints.done("convert", source, *words, out)
        assert "sound" in checkpoints.done("verify", out, "--against", source)
        outputs.append(tensors_of(out))
    assert checkpoints.same_tensors(*outputs)


@pytest.mark.parametrize("name", TINY)
def test_dequantized_checkpoints_have_the_names_of_their_source(
    models: Path, tmp_path: Path, name: str
) -> None:
    for source in (models / name / checkpoints.WEIGHTS, models / f"{name}.safetensors"):
        packed, plain = tmp_path / source.stem, tmp_path / f"{source.stem}.safetensors"
        checkpoints.done(
            "convert", source, "--scheme", "int8", "--target", "lightx2v", "--output", packed
        )
        checkpoints.done("dequantize", packed, "--output", plain)
        before, after = load_file(source), load_file(plain)
        assert after.keys() == before.keys()
        for key, tensor in before.items():
            assert after[key].shape == tensor.shape
            assert (after[key].float() - tensor.float()).abs().max() < 0.01
