"""What transcoding says, what it refuses, and GGUF files of others."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dqconvert.converter.reopen import reopen
from dqconvert.quantizers.forward import effective_weight

torch.set_num_threads(1)
HERE = Path(__file__).parent
bytes_of = SimpleNamespace(**runpy.run_path(str(HERE / "test_transcode.py")))
checkpoints, Bench = bytes_of.checkpoints, bytes_of.Bench
done, refused = checkpoints.done, checkpoints.refused
weights_are_equal = bytes_of.weights_are_equal


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return Bench(tmp_path_factory.mktemp("bench"))


# GGUF


def rewritten(path: Path, out: Path, architecture: str | None, prefix: str) -> Path:
    """A GGUF file with other words around the same tensors, by gguf-py."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, architecture or "")
    if architecture is None:
        writer.kv_data[0].pop("general.architecture", None)
    for tensor in reader.tensors:
        kind = tensor.tensor_type
        writer.add_tensor(prefix + tensor.name, np.array(tensor.data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(
    ("architecture", "prefix"), [(None, ""), ("sd", ""), (None, "model.diffusion_model.")]
)
def test_gguf_files_of_others_get_our_words(
    shop: Any, bench: Any, architecture: str | None, prefix: str
) -> None:
    out = bench.direct(shop.model, "gguf-q8_0", "gguf")
    (ours,) = out.glob("*.gguf")
    name = f"model{len(list(bench.folder.iterdir()))}-Q8_0.gguf"
    theirs = rewritten(ours, bench.folder / name, architecture, prefix)
    moved = bench.moved(theirs, "gguf")
    (found,) = moved.glob("*.gguf")
    assert found.name == name
    one, two = gguf.GGUFReader(ours), gguf.GGUFReader(found)
    assert str(two.fields["general.architecture"].contents()) == "flux"
    assert [t.name for t in one.tensors] == [t.name for t in two.tensors]
    for a, b in zip(one.tensors, two.tensors, strict=True):
        assert a.tensor_type == b.tensor_type and bytes(a.data) == bytes(b.data), a.name
    done("verify", moved, "--against", shop.model)


# what is said, and what is refused


def test_the_manifest_and_the_card_say_where_it_comes_from(shop: Any, tmp_path: Path) -> None:
    first = shop.output(("int8", "vllm"))
    out = tmp_path / "out"
    said = json.loads(done("transcode", first, "--target", "diffusers", "-o", out, "--json"))
    before = json.loads((first / "dqconvert.json").read_text())
    assert said == json.loads((out / "dqconvert.json").read_text())
    assert said["source"] == before["source"] and said["source"]["name"] == "tiny"
    made = said["transcoded"]
    assert (made["file"], made["target"]) == ("diffusion_pytorch_model.safetensors", "vllm")
    digest = before["files"]["transformer/diffusion_pytorch_model.safetensors"]["sha256"]
    assert made["files"] == {"diffusion_pytorch_model.safetensors": digest}
    assert said["options"]["rounding"] == before["options"]["rounding"]
    card = (out / "README.md").read_text()
    assert "a file for vllm: the codes" in card and "weight error" not in card
    kept = said["options"]["keep"]
    assert kept.startswith("^(") and r"transformer_blocks\.\d+\.norm1\.linear" in kept
    done("verify", out, "--against", shop.model)
    again = tmp_path / "again"
    done("transcode", out, "--target", "vllm", "-o", again, "-q")
    assert weights_are_equal(again, first)
    made = json.loads((again / "dqconvert.json").read_text())["transcoded"]
    assert made["target"] == "diffusers" and made["before"]["target"] == "vllm"


def test_layers_that_only_one_of_two_targets_quantizes(shop: Any, tmp_path: Path) -> None:
    first = shop.output(("int8", "comfyui"))
    words = ("transcode", first, "--target", "vllm", "-o", tmp_path / "out")
    text = refused(tmp_path, *words)
    line = "transformer_blocks.{i}.norm1.linear: quantized in the file, but not for vllm"
    assert line in text and text.count("norm1.linear:") == 1
    stdout = done(*words, "--dequantize-kept")
    found = reopen(tmp_path / "out")
    packed = reopen(first)
    gone = len({m for x in packed.layers for m in x.modules}) - len(found.layers)
    assert f"note: {gone} layers were dequantized to 16 bit" in stdout
    exact = {m: packed.unpack(x) for x in packed.layers for m in x.modules}
    name = "transformer_blocks.0.norm1.linear"
    weight = effective_weight(exact[name]).bfloat16()
    assert torch.equal(found.read_kept(f"{name}.weight"), weight)
    done("verify", tmp_path / "out", "--against", shop.model)
    file = shop.file(tmp_path / "out")
    tensors = load_file(file)
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].flip(0)
    save_file(tensors, file, shop.metadata(tmp_path / "out"))
    result = checkpoints.dqconvert("verify", tmp_path / "out", "--against", shop.model)
    assert f"{name}.weight: these are not the model's weights" in result.stderr


def test_what_cannot_be_is_refused_by_name(shop: Any, bench: Any, tmp_path: Path) -> None:
    first = shop.output(("int8", "comfyui"))
    out = ("-o", tmp_path / "out")
    text = refused(tmp_path, "transcode", first, "--target", "gguf", *out)
    assert "target gguf cannot hold scheme int8" in text
    text = refused(tmp_path, "transcode", first, "--target", "lightx2v", *out)
    assert "target lightx2v does not run FLUX.1" in text
    text = refused(tmp_path, "transcode", first, "--target", "comfy", *out, code=2)
    assert "comfyui" in text
    text = refused(tmp_path, "transcode", first, "--target", "vllm", "--layout", "x", *out)
    assert "--layout x: vllm has no such layout" in text
    text = refused(tmp_path, "transcode", first, "--target", "diffusers", "--layout", "x", *out)
    assert "--layout x: diffusers has no such layout" in text
    text = refused(tmp_path, "transcode", shop.model / "transformer", "--target", "vllm", *out)
    assert "not a quantized checkpoint" in text
    text = refused(tmp_path, "transcode", tmp_path / "none", "--target", "vllm", *out)
    assert "no such file or folder" in text
    done("transcode", first, "--target", "diffusers", *out, "-q")
    text = refused(tmp_path, "transcode", first, "--target", "diffusers", *out)
    assert "exists; choose another -o" in text
    text = refused(
        tmp_path, "transcode", tmp_path / "out", "--target", "comfyui", *out, "--overwrite"
    )
    assert "which is read; choose another -o" in text
    # vLLM fuses q, k and v: scales of their own would be rounded again by its loader
    own = bench.direct(bench.wan(), "fp8-tensor", "comfyui")
    text = refused(tmp_path, "transcode", own, "--target", "vllm", "-o", tmp_path / "x")
    assert "blocks.0.attn1.to_k: has a scale of its own, but the runtime fuses it" in text
    part = bench.direct(bench.wan(), "int8", "vllm", "--keep", r"attn1\.to_q")
    text = refused(tmp_path, "transcode", part, "--target", "lightx2v", "-o", tmp_path / "x")
    assert "blocks.{i}.attn1.to_q: not quantized in the file, and lightx2v has no layout" in text
    with safe_open(shop.file(first), "pt") as opened:
        name = next(name for name in opened.keys() if name.endswith("img_in.weight"))  # noqa: SIM118
    broken = shop.damaged(first, {name: None})
    text = refused(tmp_path, "transcode", broken, "--target", "diffusers", "-o", tmp_path / "x")
    assert "x_embedder.weight: missing" in text or "img_in.weight: missing" in text
