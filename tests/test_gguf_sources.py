"""GGUF files as what is converted: ours and others', whatever their names, types and keys."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dqconvert.converter.families import families
from dqconvert.formats.gguf_source import GGUFSource
from dqconvert.formats.writer import StreamWriter
from dqconvert.quantizers.ggml import blocks
from dqconvert.quantizers.spec import BLOCKS, TensorInfo
from dqconvert.quantizers.tensors import DTYPE_NAMES, TORCH_DTYPES

torch.set_num_threads(1)
HERE = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
configs = SimpleNamespace(**runpy.run_path(str(HERE / "configs.py")))
done, refused = checkpoints.done, checkpoints.refused

Tensors = dict[str, Tensor]
MODEL = HERE.parent / "converter/data/flux-digits/transformer" / checkpoints.WEIGHTS
PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def weights() -> Tensors:
    found: Tensors = load_file(MODEL)
    return found


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with our Q8_0 of flux-digits."""
    out = tmp_path_factory.mktemp("ours") / "digits"
    done("flux-digits", "--scheme", "gguf-q8_0", "-o", out, "-q")
    return out


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    keys: Mapping[str, Any],
    type_of: Callable[[str, Tensor], str] = lambda name, tensor: DTYPE_NAMES[tensor.dtype],
) -> Path:
    """A GGUF file of these weights, each of the type that a function gives it."""
    infos = {name: TensorInfo(type_of(name, t), tuple(t.shape)) for name, t in tensors.items()}
    with StreamWriter(path, infos, keys) as file:
        for name, tensor in tensors.items():
            code = infos[name].dtype.lower()
            if code.upper() in BLOCKS:
                data = blocks.quantize(tensor, code, torch.ones(tensor.shape[1]))
            else:
                data = tensor.to(TORCH_DTYPES[infos[name].dtype]).contiguous()
            file.write(name, data)
    return path


def linears(code: str, rest: str = "") -> Callable[[str, Tensor], str]:
    """A type for the matrices of blocks."""

    def choose(name: str, tensor: Tensor) -> str:
        inside = tensor.ndim == 2 and name.endswith(".weight") and "blocks" in name
        return code if inside else rest or DTYPE_NAMES[tensor.dtype]

    return choose


def file_of(out: Path) -> Path:
    (found,) = (path for path in out.iterdir() if path.suffix in (".gguf", ".safetensors"))
    return found


# --------------------------------------------------------------------------------------- ours


@pytest.mark.parametrize(
    ("scheme", "target"), [("int8", "comfyui"), ("gguf-q4_k", "gguf"), ("gguf-q8_0", "gguf")]
)
def test_our_file_is_converted_with_a_warning(
    scheme: str, target: str, ours: Path, tmp_path: Path
) -> None:
    model, out = file_of(ours), tmp_path / "out"
    said = done(model, "--scheme", scheme, "--target", target, "-o", out)
    warning = "made from quantized weights (19 Q8_0): what they lost stays lost"
    assert f"note: {warning}" in said
    assert warning in (out / "README.md").read_text()
    assert warning in json.loads((out / "dqconvert.json").read_text())["notes"]
    assert warning in done(model, "--scheme", scheme, "--target", target, "--dry-run")
    assert "sound" in done("verify", out, "--against", model)
    assert "sound" in done("verify", out, "--against", ours)  # the folder that holds it


def test_a_type_of_its_own_changes_nothing(ours: Path, tmp_path: Path) -> None:
    """Q8_0 of what Q8_0 stands for: the same bytes, but for the model's name."""
    done(ours, "--scheme", "gguf-q8_0", "-o", tmp_path / "out", "-q")
    one, two = GGUFSource((file_of(ours),)), GGUFSource((file_of(tmp_path / "out"),))
    assert one.infos == two.infos
    assert all(torch.equal(one.read(name), two.read(name)) for name in one.infos)


def test_a_folder_with_one_file_is_it(ours: Path, tmp_path: Path) -> None:
    done(ours, "--scheme", "gguf-q6_k", "-o", tmp_path / "out", "-q")
    assert file_of(tmp_path / "out").name == "digits-Q6_K.gguf"
    (ours / "other.gguf").write_bytes(b"")
    try:
        text = refused(tmp_path, ours, "--scheme", "gguf-q6_k", "-o", tmp_path / "more")
        assert "holds several checkpoints" in text
    finally:
        (ours / "other.gguf").unlink()


def test_an_output_does_not_replace_its_source(ours: Path) -> None:
    text = refused(ours, ours, "--scheme", "gguf-q4_k", "-o", ours, "--overwrite")
    assert "is read; choose another -o" in text


def test_licence_and_base_go_along(ours: Path, tmp_path: Path, weights: Tensors) -> None:
    done(ours, "--scheme", "gguf-q4_k", "-o", tmp_path / "out", "-q")
    assert GGUFSource((file_of(tmp_path / "out"),)).metadata["general.license"] == "apache-2.0"
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()
    keys = {
        "general.architecture": "flux",
        "general.license": "evil\nlicense: mit",
        "general.base_model.0.repo_url": "https://huggingface.co/owner/base",
    }
    path = write(tmp_path / "m.gguf", checkpoints.original(weights), keys, linears("Q8_0", "F32"))
    done(path, "--scheme", "gguf-q4_k", "-o", tmp_path / "more", "-q")
    card = (tmp_path / "more" / "README.md").read_text()
    assert "base_model: owner/base" in card and "evil" not in card
    said = GGUFSource((file_of(tmp_path / "more"),)).metadata
    assert said["general.base_model.0.name"] == "base"


# ------------------------------------------------------------------------- 16 bit: as the original


@pytest.mark.parametrize("code", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("scheme", [("int8", "comfyui"), ("gguf-q4_k_m", "gguf")])
def test_16_bit_is_as_good_as_the_original(
    code: str, scheme: tuple[str, str], tmp_path: Path, weights: Tensors
) -> None:
    dtype = {name: dtype for dtype, name in DTYPE_NAMES.items()}[code]
    same = {name: t.to(dtype) if t.ndim == 2 else t.float() for name, t in weights.items()}
    keys = {"general.architecture": "flux"}
    path = write(tmp_path / "m.gguf", checkpoints.original(same), keys)
    save_file(same, tmp_path / "m.safetensors")
    words = ("--scheme", scheme[0], "--target", scheme[1], "-q", "-o")
    done(path, *words, tmp_path / "one")
    done(tmp_path / "m.safetensors", *words, tmp_path / "two")
    one, two = file_of(tmp_path / "one"), file_of(tmp_path / "two")
    assert one.read_bytes() == two.read_bytes()
    notes = json.loads((tmp_path / "one" / "dqconvert.json").read_text())["notes"]
    assert not any("lost" in note for note in notes)
    assert "sound" in done("verify", tmp_path / "one", "--against", tmp_path / "m.safetensors")


def test_half_precision_safetensors(tmp_path: Path, weights: Tensors) -> None:
    half = {name: tensor.half() for name, tensor in weights.items()}
    save_file(half, tmp_path / "half.safetensors")
    model, out = tmp_path / "half.safetensors", tmp_path / "out"
    done(model, "--scheme", "gguf-q4_k_m", "-o", out, "-q")
    infos = GGUFSource((file_of(out),)).infos
    assert infos["img_in.weight"].dtype == "F16" and infos["img_in.bias"].dtype == "F32"
    assert "sound" in done("verify", out, "--against", model)


# ------------------------------------------------------------------------------------- others'


@pytest.mark.parametrize("code", ["Q8_0", "F16"])
def test_comfyuis_prefix_is_taken_off(code: str, tmp_path: Path, weights: Tensors) -> None:
    half = {name: t.half() if t.ndim == 2 else t.float() for name, t in weights.items()}
    keys = {"general.architecture": "flux", "general.file_type": 7 if code == "Q8_0" else 1}
    path = write(tmp_path / "m.gguf", checkpoints.original(half, PREFIX), keys, linears(code))
    assert "family     FLUX.1" in done("inspect", path) and "problem" not in done("inspect", path)
    assert "sound" in done("verify", path)
    out = tmp_path / "out"
    done(path, "--scheme", "gguf-q4_k", "-o", out, "-q")
    assert "img_in.weight" in GGUFSource((file_of(out),)).infos
    assert "sound" in done("verify", out, "--against", path)
    done("dequantize", path, "-o", tmp_path / "back.safetensors")
    assert load_file(tmp_path / "back.safetensors").keys() == weights.keys()


@pytest.mark.parametrize("code", ["Q8_0", "Q4_K"])
def test_diffusers_names_are_read(code: str, tmp_path: Path, weights: Tensors) -> None:
    keys = {"general.architecture": "flux", "general.quantization_version": 2}
    path = write(tmp_path / "m.gguf", weights, keys, linears(code, "F32"))
    assert "family     FLUX.1" in done("inspect", path)
    assert "sound" in done("verify", path)
    out = tmp_path / "out"
    assert f"(32 {code})" in done(path, "--scheme", "gguf-q6_k", "-o", out)
    assert "double_blocks.0.img_attn.qkv.weight" in GGUFSource((file_of(out),)).infos
    assert "sound" in done("verify", out, "--against", path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, weights: Tensors) -> Path:
    """As stable-diffusion.cpp writes: no key at all, BF16 in the place of F32, everything that is
    not on its list in blocks, norms too."""
    half = {name: tensor.bfloat16() for name, tensor in checkpoints.original(weights).items()}
    return write(tmp_path_factory.mktemp("plain") / "sd.gguf", half, {}, linears("Q4_K"))


def test_a_file_without_keys_is_read(plain: Path, tmp_path: Path) -> None:
    said = json.loads(done("inspect", plain, "--json"))
    assert said["facts"]["family"] == "FLUX.1" and said["facts"]["scheme"] == "gguf-q4_k"
    assert said["facts"]["read by ComfyUI-GGUF"].startswith("no: txt_in.bias is BF16")
    assert said["facts"]["read by stable-diffusion.cpp"] == "yes"
    assert "general.architecture: missing" in said["problems"][0]
    assert "txt_in.bias: found BF16 [256], needed F32" in said["problems"]
    result = checkpoints.dqconvert("verify", plain)
    assert result.exit_code == 1 and "txt_in.bias: found BF16" in result.stderr
    out = tmp_path / "out"
    done(plain, "--scheme", "gguf-q6_k", "-o", out, "-q")
    assert "sound" in done("verify", out, "--against", plain)
    assert "problem" not in done("inspect", out)


def test_a_file_that_readers_refuse_is_decoded(
    plain: Path, tmp_path: Path, weights: Tensors
) -> None:
    done("dequantize", plain, "-o", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    name = "transformer_blocks.0.attn.to_out.0.weight"
    assert back.keys() == weights.keys()
    assert torch.equal(back["x_embedder.bias"], weights["x_embedder.bias"].bfloat16())
    assert float((back[name].float() - weights[name].float()).norm() / weights[name].norm()) < 0.1


def test_blocks_outside_the_linears_are_read(tmp_path: Path, weights: Tensors) -> None:
    """Others quantize the layers around the blocks too."""
    tensors = checkpoints.original(weights)

    def choose(name: str, tensor: Tensor) -> str:
        wide = tensor.ndim == 2 and tensor.shape[1] % 32 == 0
        return "Q8_0" if wide else "F32"

    keys = {"general.architecture": "flux", "general.quantization_version": 2}
    model = write(tmp_path / "m.gguf", tensors, keys, choose)
    assert "q8_0 linear" in done("inspect", model) and "problem" not in done("inspect", model)
    assert "sound" in done("verify", model)
    out = tmp_path / "out"
    done(model, "--scheme", "gguf-q4_k", "-o", out, "-q")
    assert "sound" in done("verify", out, "--against", model)
    done("dequantize", model, "-o", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    for name in ("time_text_embed.timestep_embedder.linear_1.weight", "context_embedder.weight"):
        off = (back[name].float() - weights[name].float()).norm() / weights[name].float().norm()
        assert 0 < off < 0.02, name


def encoder(name: str, folder: Path, type_of: Callable[[str, Tensor], str]) -> Path:
    """An encoder's GGUF file as llama.cpp would name its tensors."""
    model = checkpoints.filled(checkpoints.meta_model(configs.CONFIGS[name][0]))
    found, _ = checkpoints.write_dialect(families()[name], "gguf", model)
    keys = {"general.architecture": families()[name].architecture}
    small = {key: (0.05 * tensor).float() for key, tensor in found.items()}
    return write(folder / f"{name}.gguf", small, keys, type_of)


@pytest.mark.parametrize("name", ["t5", "umt5", "qwen25_vl"])
def test_an_encoder_of_others_with_a_quantized_embedding(name: str, tmp_path: Path) -> None:
    """llama.cpp quantizes token embeddings, which we keep."""

    def choose(key: str, tensor: Tensor) -> str:
        wide = tensor.ndim == 2 and tensor.shape[1] % 32 == 0 and key.endswith(".weight")
        return "Q8_0" if wide and "rel_b" not in key else "F32"

    model = encoder(name, tmp_path, choose)
    assert GGUFSource((model,)).infos["token_embd.weight"].dtype == "Q8_0"
    assert f"family     {families()[name].title}" in done("inspect", model)
    assert "sound" in done("verify", model)
    out = tmp_path / "out"
    done(model, "--scheme", "gguf-q5_1", "-o", out, "-q")
    assert "sound" in done("verify", out, "--against", model)
    types = {key: info.dtype for key, info in GGUFSource((file_of(out),)).infos.items()}
    assert types["token_embd.weight"] == "BF16" and "Q5_1" in types.values()


# ------------------------------------------------------------------------------------ strangers


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small language model as gguf-py writes one."""
    path = tmp_path_factory.mktemp("llama") / "llama.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_file_type(7)
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(500)])
    kind = gguf.GGMLQuantizationType.Q8_0
    for name in ("token_embd", "blk.0.attn_q", "blk.0.ffn_gate_inp", "output"):
        data = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_language_model_is_looked_at_and_no_more(llama: Path, tmp_path: Path) -> None:
    said = done("inspect", llama)
    assert "metadata general.architecture llama" in said and "metadata general.name Tiny" in said
    assert max(map(len, said.splitlines())) < 200  # lists of tokens are cut
    for words in (("verify", llama), ("dequantize", llama, "-o", tmp_path / "x.safetensors")):
        assert checkpoints.dqconvert(*words).exit_code == 1
    text = refused(tmp_path, llama, "--scheme", "gguf-q4_k", "-o", tmp_path / "out")
    assert "not a diffusion transformer that is known" in text


def test_a_model_of_nobody_is_looked_at(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(4, 64), "b.bias": torch.ones(7)}
    path = write(tmp_path / "m.gguf", tensors, {}, lambda n, t: "Q8_0" if t.ndim == 2 else "F32")
    said = done("inspect", path)
    assert "family     not known" in said and "Q8_0" in said
    assert "of no known family" in refused(tmp_path, "verify", path)
