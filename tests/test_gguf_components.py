"""Text encoders of a pipeline to GGUF: with the tokenizer, and the vision tower apart."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from dqconvert.converter.families import families

torch.set_num_threads(1)
HERE = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
configs = SimpleNamespace(**runpy.run_path(str(HERE / "configs.py")))

WORDS = ("--scheme", "gguf-f16", "--target", "gguf")
SUFFIX = re.compile(r"[-_]?(?:ud-)?i?q[0-9]_[a-z0-9_\-]{1,8}$")
"""What ComfyUI-GGUF takes off an encoder's name before it looks for the mmproj file."""


def pipeline(folder: Path, *encoders: str) -> Path:
    """A pipeline's folder with these families' tensors as its text encoder."""
    tensors = {}
    for name in encoders:
        model = checkpoints.filled(checkpoints.meta_model(checkpoints.CONFIGS[name][0]))
        found, _ = checkpoints.write_dialect(families()[name], "transformers", model)
        tensors |= {key: tensor.contiguous() * 0.05 for key, tensor in found.items()}
    (folder / "text_encoder").mkdir(parents=True)
    save_file(tensors, folder / "text_encoder" / "model.safetensors")
    (folder / "model_index.json").write_text("{}")
    return folder


def written(out: Path) -> tuple[Path, Any]:
    (path,) = out.glob("*.gguf")
    return path, gguf.GGUFReader(path)


def strings(reader: Any, key: str) -> list[str]:
    field = reader.get_field(key)
    return [str(bytes(field.parts[place]), "utf-8") for place in field.data]


def test_umt5_takes_its_tokenizer_along(tmp_path: Path) -> None:
    source, out = pipeline(tmp_path / "wan", "umt5"), tmp_path / "out"
    words = (source, "--component", "text_encoder", *WORDS, "--output")
    assert "ComfyUI-GGUF cannot do without" in checkpoints.dqconvert("convert", *words, out).output
    (source / "tokenizer").mkdir()
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.1), ("b", -2.3)]
    Tokenizer(models.Unigram(vocabulary, unk_id=2)).save(
        str(source / "tokenizer" / "tokenizer.json")
    )
    done = checkpoints.dqconvert("convert", *words, out, "--overwrite")
    assert done.exit_code == 0 and "no tokenizer" not in done.output
    assert "sound" in checkpoints.done("verify", out, "--against", source)
    path, reader = written(out)
    assert path.name == "wan-text_encoder-F16.gguf"
    rows = configs.CONFIGS["umt5"][0]["vocab_size"]
    tokens = strings(reader, "tokenizer.ggml.tokens")
    assert tokens[:6] == ["<pad>", "</s>", "<unk>", "▁a", "b", "[PAD5]"] and len(tokens) == rows
    scores = reader.get_field("tokenizer.ggml.scores")
    first = [float(scores.parts[place][0]) for place in scores.data[:5]]
    assert first == pytest.approx([score for _, score in vocabulary])


def test_the_vision_tower_is_a_file_beside_the_language_model(tmp_path: Path) -> None:
    source = pipeline(tmp_path / "Qwen-Image-Edit", "qwen25_vl", "qwen25_vl_vision")
    found = {}
    for component in ("text_encoder", "text_encoder.visual"):
        out = tmp_path / component
        checkpoints.done("convert", source, "--component", component, *WORDS, "--output", out)
        assert "sound" in checkpoints.done("verify", out, "--against", source)
        manifest = json.loads((out / "dqconvert.json").read_text())
        assert manifest["source"]["component"] == component
        found[component] = written(out)
        said = checkpoints.done("inspect", found[component][0])
        for reader, verdict in (("ComfyUI-GGUF", "yes"), ("stable-diffusion.cpp", "yes")):
            assert re.search(rf"read by {re.escape(reader)}\W+{verdict}", said)
        assert re.search(r"read by diffusers\W+no: it reads transformers alone", said)
    encoder, tower = found["text_encoder"], found["text_encoder.visual"]
    assert strings(encoder[1], "general.architecture") == ["qwen2vl"]
    assert strings(tower[1], "general.type") == ["mmproj"]
    assert {one.name.split(".")[0] for one in tower[1].tensors} == {"v", "mm"}
    assert {one.name.split(".")[0] for one in encoder[1].tensors} == {
        "blk",
        "output",
        "output_norm",
        "token_embd",
    }
    for kind in ("F16", "Q8_0", "Q4_K_M"):
        stem = encoder[0].name.replace("F16", kind).removesuffix(".gguf").lower()
        if kind != "F16":  # which it does not take for a type
            assert SUFFIX.sub("", stem) in tower[0].name.lower()
    assert "mmproj" in tower[0].name


PARTS = {
    "nothing": "no tensor's name begins with nothing.",
    "visual.blocks": "not a diffusion transformer that is known",
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_no_model_is_refused(tmp_path: Path, part: str) -> None:
    source = pipeline(tmp_path / "qwen", "qwen25_vl", "qwen25_vl_vision")
    words = ("--component", f"text_encoder.{part}", *WORDS, "--output", tmp_path / "out")
    said = checkpoints.refused(tmp_path, "convert", source, *words)
    assert PARTS[part] in said


@pytest.mark.parametrize(
    ("family", "tensor", "file"),
    [("umt5", "spiece_model", "spiece.model"), ("gemma3", "spiece_model", "tokenizer.model"),
     ("mistral3", "tekken_model", "tekken.json")],
)  # fmt: skip
def test_comfyuis_file_takes_the_tokenizer_of_the_folder_beside(
    family: str, tensor: str, file: str, tmp_path: Path
) -> None:
    """ComfyUI reads the file's bytes from a tensor of uint8 (text_encoders/spiece_tokenizer.py)."""
    source, out = pipeline(tmp_path / "pipe", family), tmp_path / "out"
    words = (source, "--component", "text_encoder", "--scheme", "fp8-tensor", "--target", "comfyui")
    without = checkpoints.done("convert", *words, "--output", tmp_path / "without")
    assert f"a tensor called {tensor}" in without and file in without
    (source / "tokenizer").mkdir()
    data = bytes(range(256)) * 3
    (source / "tokenizer" / file).write_bytes(data)
    said = checkpoints.done("convert", *words, "--output", out)
    assert f"a tensor called {tensor}" not in said
    (path,) = out.glob("*.safetensors")
    found = load_file(path)[tensor]
    assert found.dtype == torch.uint8 and found.numpy().tobytes() == data
    assert "is sound" in checkpoints.done("verify", out, "--against", source)
    again = checkpoints.done("convert", path, *words[3:], "--output", tmp_path / "again")
    assert f"a tensor called {tensor}" not in again
