"""Back to a plain checkpoint: whole, in the source's naming, and as near as its errors say."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dqconvert.converter.canonical import CanonicalSource
from dqconvert.converter.detect import open_canonical
from dqconvert.converter.reopen import reopen
from dqconvert.formats.source import open_source

torch.set_num_threads(1)
checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))
PAIRS, done, refused = checkpoints.PAIRS, checkpoints.done, checkpoints.refused


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = checkpoints.tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")
    return found


def opened(path: Path) -> CanonicalSource:
    return open_canonical(open_source(path), path)


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize(
    ("scheme", "target", "dialect"),
    [(*pair, "diffusers") for pair in PAIRS]
    + [("int8", "comfyui", "original"), ("svdquant-w4a4", "nunchaku", "original")],
)
def test_a_quantized_file_becomes_a_checkpoint_again(
    pipeline: Path, tmp_path: Path, scheme: str, target: str, dialect: str
) -> None:
    source = pipeline
    exact = checkpoints.weights_of(pipeline)
    if dialect == "original":
        source = tmp_path / "original.safetensors"
        save_file(checkpoints.original(exact), source)
    out, back = tmp_path / "out", tmp_path / "deep" / "back.safetensors"
    done(source, "--scheme", scheme, "--target", target, "-o", out, "-q")
    done("dequantize", out, "-o", back)
    assert [path.name for path in back.parent.iterdir()] == [back.name]

    found = opened(back)
    assert (found.dialect, found.ignored) == (dialect, 0)
    assert dict(found.infos) == checkpoints.infos_of(exact)
    plain = load_file(back)
    assert plain.keys() == (exact if dialect == "diffusers" else checkpoints.original(exact)).keys()

    packed = reopen(out)
    linears = {module for layer in packed.layers for module in layer.modules}
    made = json.loads((out / "dqconvert.json").read_text())["layers"]
    worst = max(row["weight_error"] for row in made)
    for name, tensor in exact.items():
        module, _, leaf = name.rpartition(".")
        got = found.read(name)
        if module not in linears:
            assert checkpoints.same_bits(got, tensor), name
        elif leaf == "weight":
            assert error(got, tensor) < 1.25 * worst + 0.003, name
        else:
            # a shift is taken out of the bias in bf16, and modulation biases had 1 added
            assert torch.allclose(got.float(), tensor.float(), atol=0.008), name
    loads_strictly(pipeline, found)
    # the file is a source like any other
    done(back, "--scheme", "int8", "--dry-run")


def loads_strictly(pipeline: Path, found: CanonicalSource) -> None:
    from diffusers import FluxTransformer2DModel

    config = json.loads((pipeline / "transformer" / "config.json").read_text())
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)
    state = {name: found.read(name) for name in found.infos}
    model.load_state_dict(state, strict=True, assign=True)


def test_int8_comes_back_within_half_a_step(pipeline: Path, tmp_path: Path) -> None:
    """The bound of rounding itself, row by row, beside bf16's own half step."""
    out, back = tmp_path / "out", tmp_path / "back.safetensors"
    done(pipeline, "--scheme", "int8", "-o", out, "-q")
    done("dequantize", out, "-o", back)
    found, exact = opened(back), checkpoints.weights_of(pipeline)
    for layer in reopen(out).layers:
        for name in (f"{module}.weight" for module in layer.modules):
            top = exact[name].float().abs().amax(1, keepdim=True)
            off = (found.read(name).float() - exact[name].float()).abs()
            assert bool((off <= top * (0.5 / 127 * 1.001 + 2.0**-8)).all()), name


def test_what_cannot_be_written_back_is_refused(pipeline: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "out", tmp_path / "back.safetensors"
    done(pipeline, "--scheme", "int8", "-o", out, "-q")
    done("dequantize", out, "-o", back)
    before = back.read_bytes()
    assert "exists" in refused(tmp_path, "dequantize", out, "-o", back)
    done("dequantize", out, "-o", back, "--overwrite")
    assert back.read_bytes() == before
    assert ".safetensors" in refused(tmp_path, "dequantize", out, "-o", tmp_path / "back.bin")
    assert "no such" in refused(
        tmp_path, "dequantize", tmp_path / "none", "-o", tmp_path / "x.safetensors"
    )
    inside = back / "x.safetensors"
    text = refused(tmp_path, "dequantize", out, "-o", inside)
    assert f"{back}: no folder to write to" in text
    text = refused(
        tmp_path, "dequantize", pipeline / "transformer", "-o", tmp_path / "x.safetensors"
    )
    assert "not a quantized checkpoint" in text

    file = out / "tiny-int8.safetensors"
    tensors = load_file(file)
    del tensors["img_in.bias"]
    save_file(tensors, file, {"_quantization_metadata": '{"layers": {}}'})
    text = refused(tmp_path, "dequantize", out, "-o", tmp_path / "x.safetensors")
    assert "x_embedder.bias" in text
