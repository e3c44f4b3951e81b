"""What verify finds in damaged GGUF files, alone and against the model: one line with a name."""

from __future__ import annotations

import json
import runpy
import shutil
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

from dqconvert.formats.gguf_source import GGUFSource
from dqconvert.formats.writer import StreamWriter
from dqconvert.quantizers.spec import TensorInfo

torch.set_num_threads(1)
HERE = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
done, refused = checkpoints.done, checkpoints.refused

Tensors = Mapping[str, Tensor | None]
LAYER, TWIN = "double_blocks.0.img_mlp.0", "double_blocks.0.txt_mlp.0"
WEIGHT, OTHER = f"{LAYER}.weight", f"{TWIN}.weight"
SCHEMES = ("gguf-q8_0", "gguf-q4_k_m", "gguf-iq4_nl")


class Bench:
    """Outputs of flux-digits, converted once, and damaged copies of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._outputs: dict[str, Path] = {}

    def output(self, scheme: str, *words: Any) -> Path:
        if scheme not in self._outputs:
            out = self.folder / scheme
            done("flux-digits", "--scheme", scheme, "-o", out, "-q", *words)
            self._outputs[scheme] = out
        return self._outputs[scheme]

    def source(self, scheme: str) -> GGUFSource:
        (file,) = self.output(scheme).glob("*.gguf")
        return GGUFSource((file,))

    def damaged(
        self,
        scheme: str,
        changes: Tensors | None = None,
        said: Mapping[str, Any] | None = None,
        infos: Mapping[str, TensorInfo] | None = None,
    ) -> Path:
        """A copy with other tensors, keys or types (None: without), and no hashes of the files."""
        copy, source = self.folder / "damaged", self.source(scheme)
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.output(scheme), copy)
        tensors = {name: source.read(name) for name in source.infos} | dict(changes or {})
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        types = {**source.infos, **(infos or {})}
        keys = {k: v for k, v in {**source.metadata, **(said or {})}.items() if v is not None}
        with StreamWriter(copy / source.files[0].name, {n: types[n] for n in kept}, keys) as file:
            for name, tensor in kept.items():
                file.write(name, tensor)
        manifest = json.loads((copy / "dqconvert.json").read_text())
        (copy / "dqconvert.json").write_text(json.dumps({**manifest, "files": {}}))
        return copy


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def problems(out: Path, *words: Any) -> list[str]:
    """The lines of verify on a broken file, the same with the manifest and without."""
    found = []
    for manifest in (True, False):
        if not manifest:
            (out / "dqconvert.json").unlink()
        result = checkpoints.dqconvert("verify", out, *words)
        assert result.exit_code == 1, result.output
        assert "the file is broken" in result.stdout
        found.append([line.removeprefix("problem: ") for line in result.stderr.splitlines()])
    assert len(found[0]) == len(found[1])
    return found[0]


def sound_alone(out: Path) -> None:
    assert "the file is sound" in done("verify", out)


AGAINST = ("--against", "flux-digits")


# ------------------------------------------------------------------------------------- bytes


def nibbles(blocks: Tensor) -> Tensor:
    """Quants alone: the first 16 bytes of a block of Q4_K, 2 of others, are its scales."""
    size = 144 if blocks.shape[1] % 144 == 0 else 18 if blocks.shape[1] % 18 == 0 else 34
    found = blocks.clone().view(-1, size)
    quants = found[:, {144: 16, 18: 2, 34: 2}[size] :]
    quants.copy_(~quants if size == 34 else quants >> 4 | quants << 4)
    return found.view(blocks.shape)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_flipped_nibbles_are_named(bench: Bench, scheme: str) -> None:
    copy = bench.damaged(scheme, {WEIGHT: nibbles(bench.source(scheme).read(WEIGHT))})
    sound_alone(copy)  # numbers like any others
    (line,) = problems(copy, *AGAINST)
    assert line.startswith(f"{LAYER}: weight error") and "not the model's" in line


@pytest.mark.parametrize("scheme", SCHEMES)
def test_swapped_tensors_are_named(bench: Bench, scheme: str) -> None:
    source = bench.source(scheme)
    copy = bench.damaged(scheme, {WEIGHT: source.read(OTHER), OTHER: source.read(WEIGHT)})
    sound_alone(copy)
    found = problems(copy, *AGAINST)
    assert sorted(line.split(":")[0] for line in found) == [LAYER, TWIN]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scale_that_is_not_a_number_is_named(bench: Bench, scheme: str) -> None:
    for value in (0x7E00, 0x7C00):  # NaN and infinity, in fp16
        bad = bench.source(scheme).read(WEIGHT).clone()
        bad[5, :2] = torch.tensor([value & 255, value >> 8], dtype=torch.uint8)
        (line,) = problems(bench.damaged(scheme, {WEIGHT: bad}))
        assert line == f"{LAYER}: its blocks stand for NaN or infinity"
        result = checkpoints.dqconvert("verify", bench.damaged(scheme, {WEIGHT: bad}), *AGAINST)
        assert result.exit_code == 1 and LAYER in result.stderr


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_few_changed_blocks_are_not_what_the_manifest_says(bench: Bench, scheme: str) -> None:
    bad = bench.source(scheme).read(WEIGHT).clone()
    bad[:8] = bad[8:16]
    result = checkpoints.dqconvert("verify", bench.damaged(scheme, {WEIGHT: bad}), *AGAINST)
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert f"{LAYER}: weight error" in result.stderr and "the manifest says" in result.stderr


def test_another_model_is_not_the_same(bench: Bench, tmp_path: Path) -> None:
    folder = HERE.parent / "converter/data/flux-digits/transformer"
    other = {k: t.roll(1, 0) for k, t in load_file(folder / checkpoints.WEIGHTS).items()}
    save_file(other, tmp_path / "other.safetensors")
    out = bench.output("gguf-q4_k_m")
    result = checkpoints.dqconvert("verify", out, "--against", tmp_path / "other.safetensors")
    assert result.exit_code == 1 and result.stderr.count(": weight error") == 19


def test_a_kept_tensor_is_compared_bit_by_bit(bench: Bench) -> None:
    name = "img_in.weight"
    bad = bench.source("gguf-q8_0").read(name).clone()
    bad.view(torch.int16)[3, 3] ^= 1
    (line,) = problems(bench.damaged("gguf-q8_0", {name: bad}), *AGAINST)
    assert line == "x_embedder.weight: differs from the model's"


def test_a_changed_file_has_another_hash(bench: Bench) -> None:
    out = bench.folder / "copy"
    shutil.copytree(bench.output("gguf-q8_0"), out)
    (file,) = out.glob("*.gguf")
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    result = checkpoints.dqconvert("verify", out)
    assert result.exit_code == 1
    assert f"{file.name}: its SHA-256 is not the manifest's" in result.stderr


def test_a_cut_off_file_is_refused(bench: Bench, tmp_path: Path) -> None:
    (file,) = bench.output("gguf-q4_k_m").glob("*.gguf")
    data = file.read_bytes()
    for length in (0, 20, 2000, len(data) // 2, len(data) - 100):
        (tmp_path / file.name).write_bytes(data[:length])
        for words in (("verify",), ("inspect",), ("dequantize", "-o", tmp_path / "x.safetensors")):
            text = refused(tmp_path, words[0], tmp_path / file.name, *words[1:])
            assert "cut off" in text and file.name in text


# ------------------------------------------------------------------------------------ header

FIVE, ONE = {"general.file_type": 15}, {"general.file_type": 1}
ARCHITECTURE = "general.architecture"
LIES: dict[str, tuple[dict[str, Any], str, str]] = {
    "architecture": ({ARCHITECTURE: "wan"}, "architecture: is 'wan'", 'is "wan", should be "flux"'),
    "flux2": ({ARCHITECTURE: "flux2"}, "readers call this model 'flux'", 'should be "flux"'),
    "none": ({ARCHITECTURE: None}, "architecture: missing", "general.architecture: missing"),
    "version": ({"general.quantization_version": 1}, "is 1; readers know 2", "is 1, should be 2"),
    "file type": (FIVE, "is 15, which means Q4_K", "is 15, should be 7"),
    "16 bit": (ONE, "is 1, which means F16", "is 1, should be 7"),
    "shape": (
        {f"comfy.gguf.orig_shape.{WEIGHT}": [512, 512]},
        f"{WEIGHT}: gives a tensor another shape",
        f"{WEIGHT}: gives a tensor another shape",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_keys_that_lie_are_named(bench: Bench, name: str) -> None:
    said, alone, against = LIES[name]
    copy = bench.damaged("gguf-q8_0", said=said)
    inspected = json.loads(done("inspect", copy, "--json"))["problems"]
    (line,) = problems(copy)
    assert alone in line and [line] == inspected
    assert any(against in one for one in problems(bench.damaged("gguf-q8_0", said=said), *AGAINST))


@pytest.mark.parametrize("key", ["general.file_type", "general.quantization_version"])
def test_keys_that_are_missing_are_named(bench: Bench, key: str) -> None:
    copy = bench.damaged("gguf-q8_0", said={key: None})
    sound_alone(copy)  # readers do without
    assert f"metadata {key}: missing" in problems(copy, *AGAINST)


def test_who_made_it_is_anybodys_business(bench: Bench) -> None:
    said = {"general.name": "other", "general.author": "me", "general.license": "mit"}
    assert "sound" in done("verify", bench.damaged("gguf-q8_0", said=said), *AGAINST)


@pytest.mark.parametrize(
    ("tensor", "canonical"),
    [
        (WEIGHT, "transformer_blocks.0.ff.net.0.proj.weight"),
        (f"{LAYER}.bias", "transformer_blocks.0.ff.net.0.proj.bias"),
        ("final_layer.linear.weight", "proj_out.weight"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "transformer_blocks.0.attn.norm_k.weight"),
    ],
)
def test_a_missing_tensor_is_named(bench: Bench, tensor: str, canonical: str) -> None:
    (line,) = problems(bench.damaged("gguf-q4_k_m", {tensor: None}))
    assert line == f"{canonical}: missing from the file"
    assert f"{tensor}: missing" in problems(bench.damaged("gguf-q4_k_m", {tensor: None}), *AGAINST)
    copy = bench.damaged("gguf-q4_k_m", {tensor: None})
    text = refused(copy, "dequantize", copy, "-o", copy / "x.safetensors")
    assert f"{canonical}: missing" in text


def test_a_tensor_too_many_is_named(bench: Bench) -> None:
    more = {"foo.weight": torch.ones(4, 4)}
    infos = {"foo.weight": TensorInfo("F32", (4, 4))}
    assert problems(bench.damaged("gguf-q8_0", more, infos=infos)) == ["foo.weight: unexpected"]


Change = Callable[[Tensor], Tensor]
SHAPES: dict[str, tuple[str, str, tuple[int, ...], Change, str]] = {
    "weight": (
        WEIGHT,
        "Q8_0",
        (512, 512),
        lambda t: t.view(512, -1),
        f"{LAYER}.bias: found [1024]",
    ),
    "bias": (f"{LAYER}.bias", "F32", (4, 256), lambda t: t.view(4, 256), "needed [1024]"),
    "cut bias": (f"{LAYER}.bias", "F32", (512,), lambda t: t[:512], "needed [1024]"),
    "dtype": (f"{LAYER}.bias", "BF16", (1024,), Tensor.bfloat16, "found BF16 [1024], needed F32"),
    "norm": (
        "double_blocks.0.img_attn.norm.key_norm.scale",
        "BF16",
        (128,),
        Tensor.bfloat16,
        "found BF16 [128], needed F32",
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_changed_shape_is_named(bench: Bench, name: str) -> None:
    tensor, dtype, shape, change, said = SHAPES[name]
    changed = {tensor: change(bench.source("gguf-q8_0").read(tensor)).contiguous()}
    infos = {tensor: TensorInfo(dtype, shape)}
    assert any(said in one for one in problems(bench.damaged("gguf-q8_0", changed, infos=infos)))
    against = problems(bench.damaged("gguf-q8_0", changed, infos=infos), *AGAINST)
    assert any(one.startswith(f"{tensor}: is {dtype} {list(shape)}, should be") for one in against)


def test_two_files_in_a_folder_are_two_models(bench: Bench, tmp_path: Path) -> None:
    for scheme in SCHEMES[:2]:
        (file,) = bench.output(scheme).glob("*.gguf")
        shutil.copy(file, tmp_path)
    text = refused(tmp_path, "verify", tmp_path)
    assert "holds several checkpoints" in text and "name one of them" in text


def test_another_name_of_the_file_is_no_damage(bench: Bench) -> None:
    copy = bench.damaged("gguf-q8_0")
    (file,) = copy.glob("*.gguf")
    file.rename(copy / "mine.gguf")
    assert "sound" in done("verify", copy, *AGAINST)


# ----------------------------------------------------------------------------- honest but bad


def test_a_bug_of_iq3_s_is_reported_as_the_error_that_it_is(tmp_path: Path) -> None:
    """ggml gives the blocks behind 32 zeros wrong signs; a file with ggml's bytes has that error.

    verify says the true error, judged by gguf-py's decoder, and none that is not there.
    """
    folder = HERE.parent / "converter/data/flux-digits/transformer"
    tensors = load_file(folder / checkpoints.WEIGHTS)
    name = "transformer_blocks.0.ff.net.0.proj.weight"
    for start in (0, 64, 160):
        tensors[name][:, start : start + 32] = 0
    save_file(tensors, tmp_path / "zeros.safetensors")
    out = tmp_path / "out"
    done(tmp_path / "zeros.safetensors", "--scheme", "gguf-iq3_s", "-o", out, "-q")
    result = checkpoints.dqconvert(
        "verify", out, "--against", tmp_path / "zeros.safetensors", "--json"
    )
    said = {row["name"]: row["weight_error"] for row in json.loads(result.stdout)["layers"]}
    (file,) = out.glob("*.gguf")
    (packed,) = [t for t in gguf.GGUFReader(file).tensors if t.name == WEIGHT]
    found = gguf.quants.dequantize(packed.data, packed.tensor_type)
    weight = tensors[name].float().numpy()
    error = float(np.linalg.norm(found - weight) / np.linalg.norm(weight))
    assert said[LAYER] == pytest.approx(error, rel=1e-4)
    assert (result.exit_code == 0) == (error < 0.7)
    assert "nan" not in result.output.lower()


@pytest.mark.parametrize("scheme", ["gguf-q2_k", "gguf-q4_0", "gguf-iq4_xs", "gguf-tq2_0"])
def test_weights_of_zeros_and_spikes_are_sound(scheme: str, tmp_path: Path) -> None:
    folder = HERE.parent / "converter/data/flux-digits/transformer"
    tensors = load_file(folder / checkpoints.WEIGHTS)
    tensors["transformer_blocks.0.ff.net.0.proj.weight"].zero_()
    tensors["transformer_blocks.0.ff_context.net.0.proj.weight"][:, ::2] = 0
    tensors["single_transformer_blocks.0.proj_out.weight"][7, 7] = 100.0
    save_file(tensors, tmp_path / "odd.safetensors")
    done(tmp_path / "odd.safetensors", "--scheme", scheme, "-o", tmp_path / "out", "-q")
    done("verify", tmp_path / "out", "--against", tmp_path / "odd.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_is_not_finite_is_refused_by_name(value: float, tmp_path: Path) -> None:
    folder = HERE.parent / "converter/data/flux-digits/transformer"
    tensors = load_file(folder / checkpoints.WEIGHTS)
    name = "transformer_blocks.0.ff.net.0.proj.weight"
    tensors[name][700, 100] = value
    save_file(tensors, tmp_path / "bad.safetensors")
    model = tmp_path / "bad.safetensors"
    for scheme in ("gguf-q4_k", "gguf-q8_0", "gguf-f16"):
        text = refused(tmp_path, model, "--scheme", scheme, "-o", tmp_path / "out")
        assert name in text and "NaN or infinity" in text, scheme
