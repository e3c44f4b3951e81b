"""Importance matrices in conversions: written by calibrate, read by --imatrix, refused where they
make no sense.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dqconvert.formats import imatrix
from dqconvert.formats.gguf_source import GGUFSource
from dqconvert.quantizers.ggml import blocks

torch.set_num_threads(1)
HERE = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
done, refused = checkpoints.done, checkpoints.refused

Matrix = dict[str, Tensor]
PREFIX = "model.diffusion_model."
NAME, OURS = "double_blocks.0.img_mlp.0.weight", "transformer_blocks.0.ff.net.0.proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """flux-digits' importance matrix in both containers, of one calibration."""
    found = tmp_path_factory.mktemp("importance")
    (found / "prompts.txt").write_text("a handwritten seven\n")
    words = ("--calib", found / "prompts.txt", "--calib-steps", 1, "--size", "32x32", "-q")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DQCONVERT_CACHE", str(found / "cache"))
        done("calibrate", "flux-digits", *words, "--imatrix", found / "x.dat")
        done("calibrate", "flux-digits", *words, "--imatrix", found / "x.gguf")
    return found


@pytest.fixture(scope="module")
def weight() -> Tensor:
    folder = HERE.parent / "converter/data/flux-digits/transformer"
    found: Tensor = load_file(folder / checkpoints.WEIGHTS)[OURS]
    return found


def converted(out: Path, scheme: str, matrix: Path, *words: Any) -> GGUFSource:
    done("flux-digits", "--scheme", scheme, "--imatrix", matrix, "-o", out, "-q", *words)
    (file,) = out.glob("*.gguf")
    return GGUFSource((file,))


def test_both_containers_hold_the_same_under_their_readers_names(folder: Path) -> None:
    dat, other = imatrix.read(folder / "x.dat"), imatrix.read(folder / "x.gguf")
    assert len(dat) == 19
    assert all(name.startswith(PREFIX) for name in dat)
    assert {name.removeprefix(PREFIX) for name in dat} == other.keys()
    assert all(torch.equal(dat[PREFIX + name], other[name]) for name in other)
    assert all(bool((values > 0).any()) for values in other.values())


@pytest.mark.parametrize("scheme", ["gguf-q4_k", "gguf-iq4_nl", "gguf-q2_k"])
def test_a_layer_is_ggmls_with_importance_or_with_ones(
    scheme: str, folder: Path, tmp_path: Path, weight: Tensor
) -> None:
    """Whichever errs less by what the matrix says of the outputs."""
    metric = imatrix.read(folder / "x.gguf")[NAME]
    found = converted(tmp_path / "out", scheme, folder / "x.gguf").read(NAME)
    code = scheme.removeprefix("gguf-")
    offers = [blocks.quantize(weight, code, one) for one in (torch.ones_like(metric), metric)]
    errors = [
        float(((blocks.dequantize(one, code) - weight.float()).square() * metric).sum())
        for one in offers
    ]
    best = offers[min((0, 1), key=errors.__getitem__)]
    assert not torch.equal(*offers) and torch.equal(found, best)
    assert "sound" in done("verify", tmp_path / "out", "--against", "flux-digits")


def test_both_containers_give_the_same_file(folder: Path, tmp_path: Path) -> None:
    files = [
        converted(tmp_path / kind, "gguf-q4_k_m", folder / f"x.{kind}").files[0].read_bytes()
        for kind in ("dat", "gguf")
    ]
    assert files[0] == files[1]


def test_types_that_ask_for_one_are_content(folder: Path, tmp_path: Path, weight: Tensor) -> None:
    words = ("flux-digits", "--scheme", "gguf-iq2_xs", "--dry-run")
    assert "made for an importance matrix" in done(*words)
    assert "made for an importance matrix" not in done(*words, "--imatrix", folder / "x.dat")
    out = tmp_path / "out"
    words = ("--keep", "^single", "-q")  # it is slow
    packed = converted(out, "gguf-iq2_xs", folder / "x.dat", *words).read(NAME)
    metric = imatrix.read(folder / "x.gguf")[NAME]
    plain = blocks.quantize(weight, "iq2_xs", torch.ones(256))

    def error(rows: Tensor) -> float:
        off = blocks.dequantize(rows, "iq2_xs") - weight.float()
        return float((off.square() * metric).sum())

    assert error(packed) < error(plain)
    assert "sound" in done("verify", out, "--against", "flux-digits")  # small where it matters less
    (out / "dqconvert.json").unlink()
    assert "sound" in done("verify", out, "--against", "flux-digits")


def test_what_it_was_made_with_is_said(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--scheme", "gguf-q4_k", "--imatrix", folder / "x.dat", "-o", out)
    said = done("flux-digits", *words)
    assert "by the importance matrix" in said and "held calibration rows" not in said
    manifest = json.loads((out / "dqconvert.json").read_text())
    assert manifest["options"]["imatrix"] == "x.dat" and manifest["calibration"] is None
    assert all(row["output_error"] is not None for row in manifest["layers"])
    card = (out / "README.md").read_text()
    assert "| calibration | the importance matrix x.dat |" in card
    assert "held calibration rows" not in card


def test_layers_that_it_does_not_know_are_counted(folder: Path, tmp_path: Path) -> None:
    some = dict(list(imatrix.read(folder / "x.gguf").items())[:5])
    imatrix.write(tmp_path / "some.dat", some)
    out = tmp_path / "out"
    source = converted(out, "gguf-q5_0", tmp_path / "some.dat")
    assert "q5_0" in done("inspect", source.files[0])
    notes = json.loads((out / "dqconvert.json").read_text())["notes"]
    assert "14 layers are not in the importance matrix: theirs is 1" in notes
    assert "sound" in done("verify", out, "--against", "flux-digits")


def test_zeros_say_nothing(folder: Path, tmp_path: Path, weight: Tensor) -> None:
    nothing = {k: torch.zeros_like(v) for k, v in imatrix.read(folder / "x.gguf").items()}
    imatrix.write(tmp_path / "zeros.gguf", nothing)
    found = converted(tmp_path / "out", "gguf-q4_k", tmp_path / "zeros.gguf").read(NAME)
    assert torch.equal(found, blocks.quantize(weight, "q4_k", torch.ones(256)))
    assert "sound" in done("verify", tmp_path / "out", "--against", "flux-digits")


REFUSED = {
    "int8": (("int8",), "x.dat", "means nothing to int8"),
    "svdquant": (("svdquant-w4a4",), "x.dat", "means nothing to svdquant-w4a4"),
    "16 bit": (("gguf-f16",), "x.dat", "means nothing to gguf-f16"),
    "rtn": (("gguf-q4_k", "--rounding", "rtn"), "x.dat", "takes no notice of --imatrix"),
    "gptq": (("gguf-q4_k", "--rounding", "gptq"), "x.dat", "give prompts with --calib"),
    "no file": (("gguf-q4_k",), "none.dat", "no such file"),
    "folder": (("gguf-q4_k",), "cache", "no such file"),
    "text": (("gguf-q4_k",), "prompts.txt", "prompts.txt: not an importance matrix"),
    "cut off": (("gguf-q4_k",), "cut.dat", "cut.dat: broken, or cut off"),
    "other model": (("gguf-q4_k",), "other.dat", "knows none of the layers"),
    "other width": (("gguf-q4_k",), "wide.gguf", "has 256 inputs, the file 257"),
    "not a number": (("gguf-q4_k",), "nan.dat", "holds NaN, infinity or negative"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    words, file, why = REFUSED[name]
    _spoil(folder, file)
    goal = ("-o", tmp_path / "out")
    text = refused(tmp_path, "flux-digits", "--scheme", *words, "--imatrix", folder / file, *goal)
    assert why in text


def _spoil(folder: Path, file: str) -> None:
    """A matrix that is no good, beside the good ones."""
    good = imatrix.read(folder / "x.gguf")
    data = (folder / "x.dat").read_bytes()
    if file == "cut.dat":
        (folder / file).write_bytes(data[:1000])
    elif file == "other.dat":
        imatrix.write(folder / file, {"blk.0.attn_q.weight": torch.ones(256)})
    elif file == "wide.gguf":
        imatrix.write(folder / file, {k: torch.ones(len(v) + 1) for k, v in good.items()})
    elif file == "nan.dat":
        (folder / file).write_bytes(data[:200] + b"\xff" * 8 + data[208:])


def test_prompts_and_a_matrix_are_one_too_many(folder: Path, tmp_path: Path) -> None:
    words = ("--calib", folder / "prompts.txt", "--imatrix", folder / "x.dat")
    text = refused(tmp_path, "flux-digits", "--scheme", "gguf-q4_k", *words, "-o", tmp_path / "out")
    assert "--imatrix and --calib: give one" in text


def test_an_output_does_not_replace_its_matrix(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    converted(out, "gguf-q4_0", folder / "x.dat")
    (out / "x.dat").write_bytes((folder / "x.dat").read_bytes())
    words = ("--scheme", "gguf-q4_0", "--imatrix", out / "x.dat", "-o", out, "--overwrite")
    assert "holds x.dat" in refused(out, "flux-digits", *words)


def test_a_place_that_cannot_be_written_is_refused_first(folder: Path, tmp_path: Path) -> None:
    words = ("calibrate", "flux-digits", "--calib", folder / "prompts.txt", "--imatrix")
    assert "must end in .dat or .gguf" in refused(tmp_path, *words, tmp_path / "x.bin")
    assert "no such folder" in refused(tmp_path, *words, tmp_path / "none" / "x.dat")
