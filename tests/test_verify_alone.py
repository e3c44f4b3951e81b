"""Damage that no manifest betrays, and manifests that are broken themselves."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dqconvert.converter.reopen import reopen

torch.set_num_threads(1)
workshop = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("workshop.py"))))
checkpoints = workshop.checkpoints
each = pytest.mark.parametrize("pair", checkpoints.PAIRS, ids="-".join)

Pair = tuple[str, str]
SCALES = ("weight_scale", "weight_scale_2", "weight_s_channel", "wtscale", "wcscales", "wscales")
INT4 = ("svdquant-w4a4", "nunchaku")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return workshop.Workshop(tmp_path_factory.mktemp("alone"))


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


@each
def test_a_file_without_manifest_is_sound(shop: Any, pair: Pair) -> None:
    out = shop.without_manifest(pair)
    assert "the file is sound" in checkpoints.done("verify", out, "--against", shop.model)


# ------------------------------------------------------------------------- what it says of itself


@pytest.mark.parametrize("scheme", ["svdquant-w4a4", "svdquant-nvfp4"])
def test_metadata_is_what_the_model_needs(shop: Any, scheme: str) -> None:
    pair = (scheme, "nunchaku")
    good = metadata_of(shop.file(shop.outputs[pair]))

    def lie(name: str, change: Callable[[Any], object]) -> str:
        said = json.loads(good[name])
        change(said)
        out = shop.without_manifest(pair, None, {name: json.dumps(said)})
        assert "the file is sound" in checkpoints.done("verify", out)
        return str(shop.problems(out, reference=True))

    text = lie("config", lambda said: said.update(num_layers=5))
    assert "metadata config.num_layers: is 5, should be 1" in text
    text = lie("comfy_config", lambda said: said["model_config"].pop("image_model"))
    assert 'metadata comfy_config.model_config.image_model: missing; should be "flux"' in text
    text = lie("comfy_config", lambda said: said.update(more=1))
    assert "metadata comfy_config.more: unexpected" in text
    text = lie("quantization_config", lambda said: said["weight"].update(group_size=32))
    assert "metadata quantization_config.weight.group_size: is 32, should be" in text

    for key in ("model_class", "comfy_config"):
        out = shop.without_manifest(pair)
        file = shop.file(out)
        save_file(load_file(file), file, {k: v for k, v in good.items() if k != key})
        assert f"metadata {key}: missing" in shop.problems(out, reference=True)


def test_only_notes_and_spelling_of_the_config_are_free(shop: Any) -> None:
    good = json.loads(metadata_of(shop.file(shop.outputs[INT4]))["config"])
    said = json.dumps({**good, "_diffusers_version": "0.1"}, indent=2, sort_keys=True)
    out = shop.without_manifest(INT4, None, {"config": said, "more": "x"})
    assert "the file is sound" in checkpoints.done("verify", out, "--against", shop.model)


def test_comfyuis_header_is_what_the_layers_need(shop: Any) -> None:
    pair = ("fp8-tensor", "comfyui")
    said = json.loads(metadata_of(shop.file(shop.outputs[pair]))["_quantization_metadata"])
    layer = "single_blocks.0.modulation.lin"
    del said["layers"][layer]["full_precision_matrix_mult"]
    out = shop.without_manifest(pair, None, {"_quantization_metadata": json.dumps(said)})
    text = shop.problems(out, reference=True)
    assert f"layers.{layer}.full_precision_matrix_mult: missing" in text


def test_the_config_beside_the_weights_is_the_models(shop: Any) -> None:
    out = shop.without_manifest(("svdquant-w4a4", "diffusers"))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_layers": 7}))
    assert "config.json.num_layers: is 7, should be 1" in shop.problems(out, reference=True)


@pytest.mark.parametrize("scheme", ["svdquant-w4a4", "svdquant-nvfp4"])
def test_a_name_that_loaders_read_must_be_true(shop: Any, scheme: str) -> None:
    out = shop.without_manifest((scheme, "nunchaku"))
    file = shop.file(out)
    kind = "int4" if scheme == "svdquant-w4a4" else "fp4"
    other = "fp4" if kind == "int4" else "int4"
    for bad in (f"svdq-{other}_r32-tiny", f"svdq-{kind}_r128-tiny"):
        file = file.rename(out / f"{bad}.safetensors")
        assert f"its tensors say svdq-{kind}_r32" in shop.problems(out)
        said = json.loads(checkpoints.dqconvert("inspect", out, "--json").stdout)
        assert f"its tensors say svdq-{kind}_r32" in said["problems"][0]
    file.rename(out / "mine.safetensors")
    assert "the file is sound" in checkpoints.done("verify", out)


# ------------------------------------------------------------------------------ what it consists of


def test_copies_of_the_smoothing_vector_are_equal(shop: Any) -> None:
    bad = shop.tensors(INT4)
    bad["transformer_blocks.0.mlp_fc1.smooth_orig"] *= 2
    text = shop.problems(shop.without_manifest(INT4, bad))
    assert "transformer_blocks.0.mlp_fc1: cannot be unpacked" in text and "smooth_orig" in text


@each
@pytest.mark.parametrize("factor", [1.1, 0.9])
def test_a_wrong_scale_is_named_layer_by_layer(shop: Any, pair: Pair, factor: float) -> None:
    """Even where most of the weight is in the low-rank branch."""
    for layer in reopen(shop.outputs[pair]).layers:
        bad = shop.tensors(pair)
        names = [f"{layer.name}.{leaf}" for leaf in SCALES]
        name = next(n for n in names if n in bad and bad[n].dtype != torch.float8_e4m3fn)
        words = "its quantized weights are"
        if bad[name].dtype == torch.float8_e8m0fnu:  # it has no other values
            factor, words = (2.0 if factor > 1 else 0.5), "weight error"
        for one in (name, f"{layer.name}.wzeros"):
            if one in bad:
                bad[one] = (bad[one].float() * factor).to(bad[one].dtype)
        text = shop.problems(shop.without_manifest(pair, bad), reference=True)
        assert f"{layer.name}: {words}" in text
        assert text.count(words) == 1


# -------------------------------------------------------------------------------- broken manifests

BROKEN: list[dict[str, Any]] = [
    {"files": []},
    {"files": {"x": {}}},
    {"files": {"x": None}},
    {"files": {"x": {"sha256": 5}}},
    {"layers": [{}]},
    {"layers": [None]},
    {"layers": {}},
    {"layers": [{"name": "x", "weight_error": "y"}]},
    {"calibration": "x"},
    {"calibration": {"key": 5}},
    {"options": None},
    {"options": {"keep": 5}},
    {"source": []},
    {"source": {"dialect": "nope"}},
    {"source": {"dialect": "nunchaku"}},
    {"source": {"dialect": None}},
    {"scheme": ["int8"]},
]


@pytest.mark.parametrize("change", BROKEN, ids=json.dumps)
def test_a_broken_manifest_is_one_error(shop: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    out = shop.damaged(INT4)
    beside = out / "dqconvert.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | change))
    for words in (
        ("verify", out, "--against", shop.model),
        ("verify", out),
        ("inspect", out),
        ("dequantize", out, "-o", tmp_path / "back.safetensors"),
    ):
        text = checkpoints.refused(tmp_path, *words)
        assert "dqconvert.json" in text and text.count("\n") == 1


def test_what_a_manifest_leaves_out_is_not_missed(shop: Any) -> None:
    out = shop.damaged(INT4)
    (out / "dqconvert.json").write_text("{}")
    assert "the file is sound" in checkpoints.done("verify", out, "--against", shop.model)


def test_lost_statistics_are_done_without_and_broken_ones_are_an_error(
    shop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DQCONVERT_CACHE", str(tmp_path))
    out = shop.damaged(INT4)
    beside = out / "dqconvert.json"
    said = json.loads(beside.read_text()) | {"calibration": {"key": "abc"}}
    beside.write_text(json.dumps(said))
    assert "the file is sound" in checkpoints.done("verify", out, "--against", shop.model)
    (tmp_path / "abc.safetensors").write_bytes(b"cut")
    text = checkpoints.refused(tmp_path, "verify", out, "--against", shop.model)
    assert "abc.safetensors" in text


# --------------------------------------------------------------------------------- what verify says


def test_what_cannot_be_compared_was_unpacked(shop: Any, tmp_path: Path) -> None:
    """A model of other widths is not a file that cannot be unpacked."""
    pair = ("int8", "comfyui")
    model = tmp_path / "model"
    shutil.copytree(shop.model / "transformer", model)
    weights = load_file(model / "diffusion_pytorch_model.safetensors")
    name = "transformer_blocks.0.ff.net.0.proj"
    for leaf in ("weight", "bias"):
        weights[f"{name}.{leaf}"] = weights[f"{name}.{leaf}"][:-8].clone()
    save_file(weights, model / "diffusion_pytorch_model.safetensors")
    result = checkpoints.dqconvert("verify", shop.outputs[pair], "--against", model)
    assert "double_blocks.0.img_mlp.0: cannot be compared" in result.stderr
    assert "cannot be unpacked" not in result.stderr


@each
def test_formats_are_called_as_in_the_manifest(shop: Any, pair: Pair) -> None:
    out = shop.outputs[pair]
    made = json.loads((out / "dqconvert.json").read_text())["layers"]
    found = json.loads(checkpoints.done("verify", out, "--json"))["layers"]
    assert {row["name"]: row["format"] for row in found} == {
        row["name"]: row["format"] for row in made
    }
