"""Whole pipelines: diffusers' own from_pretrained loads the folder, and hashes cover all of it."""

from __future__ import annotations

import hashlib
import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

torch.set_num_threads(1)
checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))
tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_pipelines.py"))))
done, refused = checkpoints.done, checkpoints.refused

DIGITS = Path(__file__).parents[1] / "converter" / "data" / "flux-digits"


def files_of(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def check_manifest(out: Path) -> dict[str, Any]:
    """Every file but the manifest and the card is in it, with its hash."""
    said: dict[str, Any] = json.loads((out / "dqconvert.json").read_text())
    assert said["files"].keys() == files_of(out) - {"dqconvert.json", "README.md"}
    for name, row in said["files"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == row["sha256"]
    return said


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("all") / "out"
    words = ("--scheme", "int8", "--target", "diffusers", "--layout", "torchao-weight-only")
    encoders = ("--encoder-scheme", "bnb-nf4")
    done("convert", "flux-digits", "--component", "all", *words, *encoders, "--output", out)
    return out


def test_the_folder_is_whole(whole: Path) -> None:
    said = check_manifest(whole)
    assert {k: v["scheme"] for k, v in said["components"].items()} == {
        "transformer": "int8",
        "text_encoder": "bnb-nf4",
        "text_encoder_2": "bnb-nf4",
    }
    assert said["kept"] == ["scheduler", "tokenizer", "tokenizer_2", "vae"]
    ours = {"dqconvert.json", "README.md"}
    ours |= {f"{name}/dqconvert.json" for name in said["components"]}
    assert files_of(whole) - ours == files_of(DIGITS) - {
        "README.md",
        "planting.json",
        "prompts.txt",
    }


def test_unquantized_weights_take_no_room(whole: Path) -> None:
    name = "vae/diffusion_pytorch_model.safetensors"
    if (whole / name).stat().st_dev == (DIGITS / name).stat().st_dev:
        assert (whole / name).samefile(DIGITS / name)
    assert not (whole / "model_index.json").samefile(DIGITS / "model_index.json")


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "text_encoder_2"])
def test_each_part_is_sound(whole: Path, part: str) -> None:
    assert "sound" in done("verify", whole / part)


@pytest.mark.parametrize("model", [(), ("--against", "flux-digits")])
def test_a_pipeline_is_sound_as_a_whole(whole: Path, model: tuple[str, ...]) -> None:
    said = json.loads(done("verify", whole, *model, "--json"))
    parts = {layer["name"].partition(".")[0] for layer in said["layers"]}
    assert parts == {"transformer", "text_encoder", "text_encoder_2"} and not said["problems"]


def test_damage_anywhere_is_found(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name in ("text_encoder/model.safetensors", "vae/config.json", "text_encoder_2/config.json"):
        path = out / name
        data = path.read_bytes()
        path.unlink()  # a hard link of another's
        path.write_bytes(data + b" " if path.suffix == ".json" else data[:-1] + b"@")
    (out / "text_encoder" / "dqconvert.json").write_text("{}")
    result = checkpoints.dqconvert("verify", out)
    assert result.exit_code == 1
    for name in ("vae/config.json", "text_encoder/dqconvert.json", "text_encoder_2: config.json",
                 "text_encoder/model.safetensors"):  # fmt: skip
        assert f"{name}: its SHA-256" in result.stderr, result.output


def test_diffusers_draws_with_it(whole: Path) -> None:
    """Pictures of the quantized pipeline are near those of the one that it was made of."""
    import diffusers

    pictures = []
    for folder in (DIGITS, whole):
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
        pipe.set_progress_bar_config(disable=True)
        seeded = torch.Generator().manual_seed(0)
        found = pipe(
            "a handwritten seven", num_inference_steps=1, generator=seeded, output_type="pt"
        )
        pictures.append(found.images[0])
    kinds = {type(m.weight).__name__ for m in pipe.transformer.modules() if hasattr(m, "weight")}
    assert "Int8Tensor" in kinds
    assert (pictures[0] - pictures[1]).square().mean().sqrt() < 0.1


def test_runtimes_that_load_encoders_in_16_bit_keep_them(tmp_path: Path) -> None:
    words = ("convert", "flux-digits", "--component", "all", "--scheme", "fp8-tensor")
    words = (*words, "--target", "sglang")
    out = tmp_path / "out"
    done(*words, "--output", out)
    said = check_manifest(out)
    assert said["components"].keys() == {"transformer"} and "text_encoder" in said["kept"]
    assert "quantization_config" in json.loads((out / "transformer/config.json").read_text())
    assert "sound" in done("verify", out, "--against", "flux-digits")
    other = refused(tmp_path / "other", *words, "--encoder-scheme", "fp8-tensor")
    assert "sglang does not run" in other
    done(*words, "--output", out, "--overwrite")


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    words = ("convert", "flux-digits", "--component", "all")
    said = refused(tmp_path / "a", *words, "--scheme", "int8", "--target", "comfyui")
    assert "reads single files" in said
    said = refused(
        tmp_path / "b", *words, "--scheme", "fp8", "--target", "diffusers", "--layout", "bfl"
    )
    assert "single file" in said
    said = refused(
        tmp_path / "c",
        "convert",
        DIGITS / "transformer",
        *words[2:],
        "--scheme",
        "int8",
        "--target",
        "diffusers",
    )
    assert "needs a pipeline" in said


def lora(path: Path, module: str, columns: int, rows: int) -> Path:
    down, up = torch.randn(2, columns), torch.randn(rows, 2)
    save_file({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, path)
    return path


def test_loras_go_to_the_parts_that_they_name(tmp_path: Path) -> None:
    """One of an encoder alone needs a scheme for encoders; what no part takes is refused."""
    config = json.loads((DIGITS / "text_encoder" / "config.json").read_text())
    width, wide = config["hidden_size"], config["intermediate_size"]
    name = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    path = lora(tmp_path / "words.safetensors", name, width, wide)
    words = ("flux-digits", "--component", "all", "--scheme", "int8", "--target", "diffusers")
    words = (*words, "--layout", "torchao-weight-only", "--lora", path, "-o", tmp_path / "out")
    assert "words.safetensors: is of no part" in refused(tmp_path, *words, "--dry-run")
    said = json.loads(done(*words, "--encoder-scheme", "bnb-nf4", "--dry-run", "--json"))
    held = {part: one["loras"] for part, one in said["components"].items()}
    assert held == {"transformer": [], "text_encoder": [str(path)], "text_encoder_2": []}


def test_a_lora_of_one_expert_is_pointed_out(tmp_path: Path) -> None:
    folder = tiny.build_tiny("wan_two_experts", tmp_path / "wan")
    path = lora(tmp_path / "high.safetensors", "diffusion_model.blocks.0.self_attn.q", 128, 128)
    words = (folder, "--component", "all", "--scheme", "int8", "--target", "vllm", "--lora", path)
    said = done(*words, "--dry-run", "-o", tmp_path / "out")
    assert "high.safetensors: merged into transformer" in said


def test_a_unet_stands_in_the_transformers_place(tmp_path: Path) -> None:
    sdxl = checkpoints.FAMILY_MODELS["sdxl"]
    config = sdxl["config"](**sdxl["SMALL"] | sdxl["SHALLOW"])
    folder, out = tmp_path / "xl" / "unet", tmp_path / "out"
    folder.mkdir(parents=True)
    model = checkpoints.filled(checkpoints.meta_model(config))
    save_file(model, folder / checkpoints.WEIGHTS)
    (folder / "config.json").write_text(json.dumps(config))
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "unet": ["diffusers", config["_class_name"]],
    }
    (folder.parent / "model_index.json").write_text(json.dumps(index))
    words = ("--component", "all", "--scheme", "int8", "--target", "diffusers", "--output", out)
    done(folder.parent, *words)
    assert check_manifest(out)["components"].keys() == {"unet"}
    assert "quantization_config" in json.loads((out / "unet" / "config.json").read_text())
    assert "sound" in done("verify", out, "--against", folder.parent)


def test_both_experts_are_quantized(tmp_path: Path) -> None:
    """Wan 2.2's pipelines have two transformers, one for each half of the steps."""
    folder = tiny.build_tiny("wan_two_experts", tmp_path / "wan")
    out = tmp_path / "out"
    words = ("--component", "all", "--scheme", "int8", "--target", "vllm", "--output", out)
    done("convert", folder, *words)
    said = check_manifest(out)
    assert said["components"].keys() == {"transformer", "transformer_2"}
    for name in said["components"]:
        config = json.loads((out / name / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "int8"
        assert "sound" in done("verify", out / name)
