"""Checkpoints that were quantized before: what is read of them is what they stand for."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dqconvert.converter.opening import open_model
from dqconvert.converter.reopen import reopen

torch.set_num_threads(1)
checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))
PAIRS, done, refused = checkpoints.PAIRS, checkpoints.done, checkpoints.refused
opened, off, is_linear = checkpoints.opened, checkpoints.off, checkpoints.is_linear
Tensors = dict[str, Tensor]
LOST = "what they lost stays lost"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DQCONVERT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = checkpoints.tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")
    return found


@pytest.fixture(scope="module")
def exact(pipeline: Path) -> Tensors:
    found: Tensors = checkpoints.weights_of(pipeline)
    return found


def weights(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.rglob("*.safetensors")}


# ------------------------------------------------------------------------------ files of ours


@pytest.mark.parametrize(("scheme", "target"), PAIRS, ids=lambda word: str(word))
def test_what_we_wrote_is_converted_again(
    pipeline: Path, exact: Tensors, tmp_path: Path, scheme: str, target: str
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    done(pipeline, "--scheme", scheme, "--target", target, "-o", out, "-q")
    rows = json.loads((out / "dqconvert.json").read_text())["layers"]
    worst = max(row["weight_error"] for row in rows)
    found = opened(out / "transformer" if (out / "transformer").exists() else out)
    assert {n: info.shape for n, info in found.infos.items()} == {
        n: tuple(t.shape) for n, t in exact.items()
    }
    packed = {module for layer in reopen(out).layers for module in layer.modules}
    for name, tensor in exact.items():
        got = found.read(name)
        if name.rpartition(".")[0] not in packed:
            assert checkpoints.same_bits(got, tensor), name
        elif name.endswith("weight"):
            assert off(got, tensor) < 1.25 * worst + 0.003, name
            assert found.infos[name].dtype == "BF16"
            assert torch.equal(found.stack([name, name], (5, 7)), got[5:7])
            half = len(got) - 3
            assert torch.equal(found.stack([name, name], (half, half + 9))[3:], got[:6])
    said = done(out, "--scheme", "int8", "-o", again)
    assert LOST in said and LOST in (again / "README.md").read_text()
    manifest = json.loads((again / "dqconvert.json").read_text())
    assert max(row["weight_error"] for row in manifest["layers"]) < 0.01
    files = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    assert manifest["source"]["bytes"] <= files  # not what they are when decoded
    assert "sound" in done("verify", again, "--against", out)


def test_from_8_bit_to_svdquant_on_several_threads(pipeline: Path, tmp_path: Path) -> None:
    done(pipeline, "--scheme", "fp8-tensor", "-o", tmp_path / "fp8", "-q")
    words = (tmp_path / "fp8", "--scheme", "svdquant-w4a4", "-q", "-o")
    done(*words, tmp_path / "one", "--workers", "1")
    done(*words, tmp_path / "two", "--workers", "5")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    done(tmp_path / "one", "--scheme", "svdquant-w4a4", "-q", "-o", tmp_path / "again")
    done(tmp_path / "one", "--scheme", "int8", "-q", "-o", tmp_path / "x", "--workers", "1")
    done(tmp_path / "one", "--scheme", "int8", "-q", "-o", tmp_path / "y", "--workers", "5")
    assert weights(tmp_path / "x") == weights(tmp_path / "y")


def test_a_config_says_nothing_of_the_former_format(pipeline: Path, tmp_path: Path) -> None:
    done(pipeline, "--scheme", "bnb-nf4", "-o", tmp_path / "nf4", "-q")
    done(tmp_path / "nf4", "--scheme", "fp8", "--target", "vllm", "-o", tmp_path / "fp8", "-q")
    said = json.loads((tmp_path / "fp8" / "transformer" / "config.json").read_text())
    assert said["quantization_config"]["quant_method"] != "bitsandbytes"
    done(tmp_path / "fp8", "--scheme", "svdquant-w4a4", "-o", tmp_path / "svdq", "-q")
    (file,) = (tmp_path / "svdq").glob("*.safetensors")
    assert "quant_method" not in str(reopen(file).source.metadata["config"])


@pytest.mark.parametrize("settings", [(), ("--save-by-block",)], ids=["file", "blocks"])
def test_lightx2v(tmp_path: Path, settings: tuple[str, ...]) -> None:
    """Also in files of one block each, which only their folder holds together."""
    config = checkpoints.MODELS["wan"][0]
    model = {
        n: 0.05 * t.float() for n, t in checkpoints.filled(checkpoints.meta_model(config)).items()
    }
    plain = {name: tensor.bfloat16() for name, tensor in model.items()}
    save_file(plain, tmp_path / "wan.safetensors")
    words = ("--scheme", "int8", "--target", "lightx2v", "-q", "-o")
    done(tmp_path / "wan.safetensors", *words, tmp_path / "out", *settings)
    found = opened(tmp_path / "out")
    assert found.infos.keys() == plain.keys()
    for name, tensor in plain.items():
        assert off(found.read(name), tensor) < 0.02, name
    words = ("--scheme", "int8", "--target", "comfyui", "-o")
    assert LOST in done(tmp_path / "out", *words, tmp_path / "again")


def test_an_all_in_one_file_of_ours(pipeline: Path, exact: Tensors, tmp_path: Path) -> None:
    """Entries of the header for other components are none of the transformer's."""
    done(pipeline, "--scheme", "int8", "-o", tmp_path / "one", "-q")
    (file,) = (tmp_path / "one").glob("*.safetensors")
    metadata = reopen(file).source.metadata
    said = json.loads(metadata["_quantization_metadata"])
    prefix = "model.diffusion_model."
    said["layers"] = {prefix + name: one for name, one in said["layers"].items()}
    said["layers"]["text_encoders.t5.x"] = {"format": "float8_e4m3fn"}
    tensors = {prefix + name: tensor for name, tensor in load_file(file).items()}
    tensors["text_encoders.t5.x.weight"] = torch.ones(8, 8).to(E4M3)
    tensors["text_encoders.t5.x.weight_scale"] = torch.ones(())
    whole = tmp_path / "whole.safetensors"
    save_file(tensors, whole, {"_quantization_metadata": json.dumps(said)})
    words = ("--scheme", "gguf-q8_0", "-q", "-o")
    done(file, *words, tmp_path / "a")
    done(whole, *words, tmp_path / "b")
    one, two = open_model(file), open_model(whole)
    assert (one.ignored, two.ignored) == (0, 2)
    assert all(torch.equal(one.read(name), two.read(name)) for name in exact)


# ---------------------------------------------------------------------------------- what is wrong


def test_what_nobody_can_read_is_refused(pipeline: Path, exact: Tensors, tmp_path: Path) -> None:
    original = checkpoints.original(exact)
    name = "double_blocks.0.img_attn.qkv"
    words = ("--scheme", "int8", "-o", tmp_path / "out")
    file = tmp_path / "x.safetensors"
    for codes in (torch.ones(384, 128, dtype=torch.int8), torch.ones(384, 64, dtype=torch.uint8)):
        save_file({**original, f"{name}.weight": codes}, file)
        text = refused(tmp_path, file, *words)
        assert f"{file}: tensor {name}.weight" in text and "already quantized" in text
    odd = {f"{name}.weight": exact_codes(original, name), f"{name}.weight_scale": torch.ones(7)}
    save_file({**original, **odd}, file)
    text = refused(tmp_path, file, *words)
    assert f"{name}.weight_scale" in text

    done(pipeline, "--scheme", "nvfp4", "-o", tmp_path / "nvfp4", "-q")
    (made,) = (tmp_path / "nvfp4").glob("*.safetensors")
    tensors, metadata = load_file(made), reopen(made).source.metadata
    del tensors[f"{name}.weight_scale_2"]
    save_file(tensors, file, metadata)
    text = refused(tmp_path, file, *words)
    assert "quantized for comfyui, but broken" in text and f"{name}.weight_scale_2" in text


def exact_codes(tensors: Tensors, name: str) -> Tensor:
    return tensors[f"{name}.weight"].to(E4M3)


def test_a_model_of_no_known_family(tmp_path: Path) -> None:
    """What is told by names alone is told of packed layers as well."""
    config = {
        "_class_name": "CogVideoXTransformer3DModel",
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "time_embed_dim": 64,
        "text_embed_dim": 48,
    }
    (tmp_path / "cog").mkdir()
    save_file(
        checkpoints.filled(checkpoints.meta_model(config)), tmp_path / "cog" / checkpoints.WEIGHTS
    )
    (tmp_path / "cog" / "config.json").write_text(json.dumps(config))
    words = ("--target", "diffusers", "-o")
    done(tmp_path / "cog", "--scheme", "bnb-nf4", *words, tmp_path / "nf4", "-q")
    said = done(tmp_path / "nf4", "--scheme", "int8", *words, tmp_path / "int8")
    assert f"quantized weights (16 nf4): {LOST}" in said
    found, back = opened(tmp_path / "nf4"), opened(tmp_path / "int8")
    for name in found.infos:
        assert off(back.read(name), found.read(name)) < 0.01, name


def test_a_quantized_transformer_is_calibrated(pipeline: Path, tmp_path: Path) -> None:
    """Also with layers that were folded, which is taken back first."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    calib = ("--calib", prompts, "--calib-steps", "1", "--size", "32x32", "-o")
    words = ("--scheme", "awq-w4a16", "--target", "diffusers", "-q")
    done(pipeline, *words, *calib, tmp_path / "awq")
    rows = json.loads((tmp_path / "awq" / "dqconvert.json").read_text())["layers"]
    worst = max(row["weight_error"] for row in rows)
    found = opened(tmp_path / "awq")
    for name, tensor in checkpoints.weights_of(pipeline).items():
        if is_linear(name, tensor):
            assert off(found.read(name), tensor) < worst + 0.01, name
    whole = tmp_path / "whole"
    shutil.copytree(pipeline, whole)
    shutil.rmtree(whole / "transformer")
    shutil.copytree(tmp_path / "awq", whole / "transformer")
    said = done(whole, "--scheme", "fp8-tensor", *calib, tmp_path / "fp8")
    assert LOST in said and "output error" in said
