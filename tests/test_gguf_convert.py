"""Conversions to GGUF as a user meets them: every scheme on flux-digits, and the options.

Oracles: ggml's bytes by blocks.quantize, which other tests hold to ggml itself; gguf-py's decoder.
"""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dqconvert.converter import layers, streaming
from dqconvert.converter.families import families
from dqconvert.formats.gguf_source import GGUFSource
from dqconvert.quantizers.ggml import blocks, jit
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import BLOCKS

torch.set_num_threads(1)
HERE = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
configs = SimpleNamespace(**runpy.run_path(str(HERE / "configs.py")))
done, refused = checkpoints.done, checkpoints.refused

GGUF = [name for name in schemes() if name.startswith("gguf-")]
SOME = ("gguf-q4_k_m", "gguf-q6_k", "gguf-iq4_xs", "gguf-q4_0", "gguf-mxfp4", "gguf-f16")
SAMPLE = {
    "double_blocks.0.img_attn.proj.weight": ("transformer_blocks.0.attn.to_out.0.weight",),
    "double_blocks.0.txt_attn.qkv.weight": tuple(
        f"transformer_blocks.0.attn.add_{letter}_proj.weight" for letter in "qkv"
    ),
}
"""Two layers of the file and the tensors of diffusers' that they are made of."""


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    folder = HERE.parent / "converter/data/flux-digits/transformer"
    found: dict[str, Tensor] = load_file(folder / checkpoints.WEIGHTS)
    return found


def converted(out: Path, scheme: str, *words: Any, model: Any = "flux-digits") -> Path:
    """The file of a conversion."""
    done(model, "--scheme", scheme, "-o", out, "-q", "--overwrite", *words)
    (file,) = out.glob("*.gguf")
    return file


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def manifest(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "dqconvert.json").read_text())
    return found


# ------------------------------------------------------------------------------ every scheme


@pytest.mark.parametrize("scheme", [name for name in GGUF if name != "gguf-auto"])
def test_every_scheme_goes_all_the_way(
    scheme: str, tmp_path: Path, weights: Mapping[str, Tensor]
) -> None:
    out = tmp_path / "out"
    file = converted(out, scheme)
    assert_ggmls(file, weights, torch.ones(256))  # as stable-diffusion.cpp does
    said = done("inspect", file)
    assert "family     FLUX.1" in said and "problem" not in said
    assert f"scheme     {scheme}" in said or scheme.endswith("_k")  # small, where it is pure
    assert "sound" in done("verify", out)
    seen = json.loads(done("verify", out, "--against", "flux-digits", "--json"))
    assert seen["problems"] == [] and len(seen["layers"]) == 19
    made = {row["name"]: row["weight_error"] for row in manifest(out)["layers"]}
    for layer in seen["layers"]:
        assert layer["weight_error"] == pytest.approx(made[layer["name"]], rel=1e-4), layer["name"]
    (out / "dqconvert.json").unlink()
    assert "sound" in done("verify", out)
    assert "sound" in done("verify", file, "--against", "flux-digits")
    done("dequantize", out, "-o", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == weights.keys()
    for name, tensor in back.items():
        off = (tensor.float() - weights[name].float()).norm() / weights[name].float().norm()
        assert off < 0.9, name


def assert_ggmls(file: Path, weights: Mapping[str, Tensor], importance: Tensor | None) -> None:
    source = GGUFSource((file,))
    for name, ours in SAMPLE.items():
        weight = torch.cat([weights[one] for one in ours])
        code, found = source.infos[name].dtype.lower(), source.read(name)
        if code.upper() in BLOCKS:
            assert torch.equal(found, blocks.quantize(weight, code, importance)), name
        else:
            assert checkpoints.same_bits(found, weight.to(found.dtype)), name


@pytest.mark.parametrize("scheme", [name for name in GGUF if "iq" not in name and "t" not in name])
def test_rounding_to_nearest_gives_what_llama_quantize_does(
    scheme: str, tmp_path: Path, weights: Mapping[str, Tensor]
) -> None:
    assert_ggmls(converted(tmp_path / "out", scheme, "--rounding", "rtn"), weights, None)


def test_reported_errors_are_those_of_gguf_pys_decoder(
    tmp_path: Path, weights: Mapping[str, Tensor]
) -> None:
    out = tmp_path / "out"
    tensors = {t.name: t for t in gguf.GGUFReader(converted(out, "gguf-q4_k_m")).tensors}
    said = {row["name"]: row["weight_error"] for row in manifest(out)["layers"]}
    for name, ours in SAMPLE.items():
        found = torch.from_numpy(
            gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        )
        weight = torch.cat([weights[one] for one in ours]).float()
        error = float((found - weight).norm() / weight.norm())
        assert said[name.removesuffix(".weight")] == pytest.approx(error, rel=1e-4)


# ------------------------------------------------------------------------------- how it is done


@pytest.mark.parametrize("scheme", SOME)
def test_no_way_to_do_it_changes_the_file(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again, by many hands, in rows or as a whole, with numba or without."""
    first = digest(converted(tmp_path / "first", scheme, "--workers", 1))
    assert digest(converted(tmp_path / "again", scheme, "--workers", 5)) == first
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "BLOCK", 1)
        assert digest(converted(tmp_path / "rows", scheme)) == first
    with monkeypatch.context() as patch:
        patch.setattr(layers, "streams", lambda *_: False)
        assert digest(converted(tmp_path / "whole", scheme)) == first
    with monkeypatch.context() as patch:
        patch.setattr(jit, "available", lambda: False)
        assert digest(converted(tmp_path / "torch", scheme)) == first


def test_without_numba_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("flux-digits", "--scheme", "gguf-q8_0", "--dry-run")
    assert "numba" not in done(*words)
    monkeypatch.setattr(jit, "available", lambda: False)
    assert "note: numba is not installed" in done(*words)
    assert "pip install 'dqconvert[fast]'" in done(*words)
    for scheme in ("gguf-f16", "int8"):
        assert "numba" not in done("flux-digits", "--scheme", scheme, "--dry-run")
    out = tmp_path / "out"
    assert "numba is not installed" in done("flux-digits", "--scheme", "gguf-q8_0", "-o", out)
    assert "numba is not installed" in (out / "README.md").read_text()


@pytest.mark.parametrize("scheme", ["gguf-iq2_xxs", "gguf-iq2_xs", "gguf-iq1_s"])
def test_types_that_want_an_importance_matrix_say_so(scheme: str) -> None:
    said = done("flux-digits", "--scheme", scheme, "--dry-run")
    assert "note: no --calib and no --imatrix: IQ" in said
    assert "imatrix" not in done("flux-digits", "--scheme", "gguf-iq2_s", "--dry-run")


# ------------------------------------------------------------------------------------- options


def test_overrides_and_keeps_are_in_the_file_and_the_manifest(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--override", r"ff\.net=gguf-q6_k", "--keep", r"transformer_blocks.0.attn.to_out.0$")
    source = GGUFSource((converted(out, "gguf-q4_k", *words),))
    types = {name: info.dtype for name, info in source.infos.items()}
    assert types["double_blocks.0.img_mlp.0.weight"] == "Q6_K"
    assert types["double_blocks.0.txt_mlp.0.weight"] == "Q4_K"
    assert types["double_blocks.0.img_attn.proj.weight"] == "BF16"
    said = manifest(out)
    assert said["options"]["overrides"] == [[r"ff\.net", "gguf-q6_k"]]
    schemes_of = {row["name"]: row["scheme"] for row in said["layers"]}
    assert schemes_of["double_blocks.0.img_mlp.0"] == "gguf-q6_k"
    assert "sound" in done("verify", out, "--against", "flux-digits")
    assert source.metadata["general.file_type"] == 14


def test_16_bit_among_blocks_is_no_damage(tmp_path: Path) -> None:
    words = ("--override", r"ff\.net=gguf-f16")
    source = GGUFSource((converted(tmp_path / "out", "gguf-q4_k", *words),))
    assert source.infos["double_blocks.0.img_mlp.0.weight"].dtype == "F16"
    assert "sound" in done("verify", tmp_path / "out", "--against", "flux-digits")


def test_an_override_of_everything_is_what_the_file_says_it_is(tmp_path: Path) -> None:
    """No layer is of the scheme's own type, so the file type is another."""
    file = converted(tmp_path / "out", "gguf-q4_k_m", "--override", ".=gguf-q8_0")
    assert GGUFSource((file,)).metadata["general.file_type"] == 7
    assert "sound" in done("verify", tmp_path / "out", "--against", "flux-digits")


def test_the_pure_layout(tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = converted(out, "gguf-q2_k", "--layout", "pure")
    types = {i.dtype for i in GGUFSource((file,)).infos.values() if i.dtype in BLOCKS}
    assert types == {"Q2_K"} and manifest(out)["options"]["layout"] == "pure"
    assert "sound" in done("verify", out, "--against", "flux-digits")


def test_a_dry_run_is_quick_and_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from dqconvert.converter.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "bad = {'torch', 'numba', 'numpy', 'diffusers'} & sys.modules.keys(); assert not bad, bad"
    )
    for words in (("gguf-q4_k_m",), ("gguf-auto", "--bits", "4"), ("gguf-iq1_s", "--json")):
        command = ("flux-digits", "--scheme", *words, "--dry-run")
        start = os.times()
        subprocess.run(
            [sys.executable, "-c", code, *command],
            check=True,
            capture_output=True,
            env=checkpoints.environment(),
            cwd=tmp_path,
        )
        end = os.times()
        used = end.children_user + end.children_system
        assert used - start.children_user - start.children_system < 1.5
    assert not list(tmp_path.iterdir())


def test_the_default_output_names_model_scheme_and_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = json.loads(done("flux-digits", "--scheme", "gguf-q5_k_s", "--json"))
    out = tmp_path / "flux-digits-gguf-q5_k_s-gguf"
    assert {path.name for path in out.iterdir()} == {
        "dqconvert.json",
        "README.md",
        "flux-digits-Q5_K_S.gguf",
    }
    file = out / "flux-digits-Q5_K_S.gguf"
    assert found["files"] == {
        file.name: {"bytes": file.stat().st_size, "sha256": digest(file)},
    }
    assert (found["scheme"], found["target"]) == ("gguf-q5_k_s", "gguf")
    assert found["options"]["rounding"] == "mse"
    card = (out / "README.md").read_text()
    assert "tags: [dqconvert, gguf-q5_k_s, gguf]" in card and "license: apache-2.0" in card
    assert "Q5_K throughout" in card and "ComfyUI-GGUF" in card
    assert "none, from weights alone" in card


AUTO = ("--scheme", "gguf-auto")


def test_auto_says_its_budget(tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = converted(out, "gguf-auto", "--bits", 6)
    assert "sound" in done("verify", out, "--against", "flux-digits")
    size = sum(i.nbytes for i in GGUFSource((file,)).infos.values() if i.dtype in BLOCKS)
    weights = sum(i.numel for i in GGUFSource((file,)).infos.values() if i.dtype in BLOCKS)
    assert 5.5 < 8 * size / weights <= 6
    assert file.name == f"flux-digits-{8 * size / weights:.2f}BPW.gguf"
    assert str(file) in done("flux-digits", *AUTO, "--bits", 6, "-o", out, "--overwrite")
    assert "measures which type" in done("flux-digits", *AUTO, "--dry-run")
    assert manifest(out)["options"]["bits"] == 6


REFUSED = {
    "target": (("gguf-q4_k", "--target", "comfyui"), "try --target gguf"),
    "other scheme": (("int8", "--target", "gguf"), "GGUF has no type for int8"),
    "bits of a type": (("gguf-q4_k", "--bits", "4"), "has a size of its own"),
    "bits of int8": (("int8", "--bits", "4"), "has a size of its own"),
    "few bits": (("gguf-auto", "--bits", "1.5"), "--bits: these layers take 2.63 at least"),
    "foreign override": (("gguf-q4_k", "--override", "to_out=int8"), "no type for int8"),
    "a mix": (("gguf-q8_0", "--override", "ff=gguf-q4_k_m"), "a mix is for whole models"),
    "a menu": (("gguf-q8_0", "--override", "ff=gguf-auto"), "a mix is for whole models"),
    "no match": (("gguf-q4_k", "--override", "none=gguf-q6_k"), "matches no linear"),
    "layout": (("gguf-q4_k_m", "--layout", "pure"), "no such layout of gguf-q4_k_m"),
    "rank": (("gguf-q4_k", "--rank", "32"), "has no low-rank branch"),
    "group": (("gguf-q4_k", "--group-size", "32"), "are fixed"),
    "zero points": (("gguf-q4_k", "--zero-points"), "is symmetric"),
    "gptq": (("gguf-q4_k", "--rounding", "gptq"), "give prompts with --calib"),
    "keep all": (("gguf-q4_k", "--keep", "."), "leaves nothing to quantize"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused(name: str, tmp_path: Path) -> None:
    words, why = REFUSED[name]
    text = refused(tmp_path, "flux-digits", "--scheme", *words, "-o", tmp_path / "out")
    assert why in text


def test_a_name_close_to_one_is_hinted_at(tmp_path: Path) -> None:
    for name in ("gguf-q4k", "gguf-Q4_K", "q4_k_m"):
        text = refused(tmp_path, "flux-digits", "--scheme", name, code=2)
        assert "did you mean gguf-q4_k" in text


# ------------------------------------------------------------------------------- text encoders


def encoder(folder: Path, *names: str, columns: int = 256) -> Path:
    """A pipeline whose text encoder has these families' tensors."""
    from safetensors.torch import save_file

    tensors = {}
    for name in names:
        model = checkpoints.filled(checkpoints.meta_model(configs.CONFIGS[name][0]))
        found, _ = checkpoints.write_dialect(families()[name], "transformers", model)
        tensors |= {key: tensor.contiguous() * 0.05 for key, tensor in found.items()}
    (folder / "text_encoder").mkdir(parents=True)
    save_file(tensors, folder / "text_encoder" / "model.safetensors")
    (folder / "model_index.json").write_text("{}")
    return folder


ENCODERS = {
    ("t5",): ("text_encoder", "t5encoder", ""),
    ("umt5",): ("text_encoder", "t5encoder", ""),
    ("clip_text",): ("text_encoder", None, ""),
    ("qwen25_vl", "qwen25_vl_vision"): ("text_encoder", "qwen2vl", ""),
    ("qwen25_vl_vision", "qwen25_vl"): ("text_encoder.visual", "clip", "-mmproj"),
}


@pytest.mark.parametrize("scheme", ["gguf-q8_0", "gguf-q4_k"])
@pytest.mark.parametrize("names", ENCODERS, ids="-".join)
def test_text_encoders_go_all_the_way(names: tuple[str, ...], scheme: str, tmp_path: Path) -> None:
    component, architecture, what = ENCODERS[names]
    model, out = encoder(tmp_path / "pipe", *names), tmp_path / "out"
    file = converted(out, scheme, "--component", component, model=model)
    kind = scheme.removeprefix("gguf-").upper()
    assert file.name == f"pipe-{component}{what}-{kind}.gguf"
    source = GGUFSource((file,))
    if architecture:
        assert source.metadata["general.architecture"] == architecture
    assert any(info.dtype in BLOCKS for info in source.infos.values())
    said = done("inspect", file)
    assert families()[names[0]].title in said and "problem" not in said
    assert "sound" in done("verify", out)
    assert "sound" in done("verify", out, "--against", model)
    done("dequantize", out, "-o", tmp_path / "back.safetensors")
    whole = load_file(model / "text_encoder" / "model.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back and back.keys() <= whole.keys()
    for name, tensor in back.items():
        off = (tensor.float() - whole[name].float()).norm() / whole[name].float().norm()
        assert off < (0.01 if scheme == "gguf-q8_0" else 0.12), name


def test_narrow_layers_have_other_types_and_it_says_so(tmp_path: Path) -> None:
    """Of widths that 256 does not divide, and of one that 32 does not divide either."""
    from safetensors.torch import save_file

    config = configs.t5_config(vocab_size=99, d_model=96, d_ff=80, num_layers=2, num_heads=2)
    tensors = checkpoints.filled(checkpoints.meta_model(config))
    save_file({name: 0.05 * tensors[name] for name in tensors}, tmp_path / "t5.safetensors")
    out, words = tmp_path / "out", (tmp_path / "t5.safetensors", "--scheme", "gguf-q6_k")
    said = done(*words, "-o", out)
    assert "width the blocks do not divide are of other types: 2 F16, 12 Q8_0" in said
    assert "sound" in done("verify", out)
    assert "sound" in done("verify", out, "--against", words[0])


def test_a_second_text_encoder(tmp_path: Path) -> None:
    model = encoder(tmp_path / "pipe", "t5")
    (model / "text_encoder").rename(model / "text_encoder_2")
    file = converted(tmp_path / "out", "gguf-q8_0", "--component", "text_encoder_2", model=model)
    assert file.name == "pipe-text_encoder_2-Q8_0.gguf"
    assert "sound" in done("verify", tmp_path / "out", "--against", model)
    text = refused(tmp_path, model, "--scheme", "gguf-q8_0", "--component", "text_encoder_3")
    assert "has no folder called text_encoder_3" in text
