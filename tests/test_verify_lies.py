"""What a file says of itself and is not so: markers, metadata, configs, names."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))

Pair = tuple[str, str]
INT4 = ("svdquant-w4a4", "nunchaku")
COMFY = [pair for pair in checkpoints.PAIRS if pair[1] == "comfyui"]
LAYER = "double_blocks.0.img_mlp.0"


@pytest.mark.parametrize("pair", COMFY, ids="-".join)
def test_a_marker_that_lies_is_named(shop: Any, pair: Pair) -> None:
    layer, made = LAYER, shop.output(pair)
    name = f"{layer}.comfy_quant"
    good = bytes(shop.tensors(made)[name].tolist())
    other = "float8_e4m3fn" if pair[0] == "int8" else "int8_tensorwise"
    for text in (good[:-1] + b" ", json.dumps({"format": other}).encode(), b"{}"):
        marker = torch.tensor(list(text), dtype=torch.uint8)
        out = shop.damaged(made, {name: marker})
        for reference in (False, True):
            assert f"{layer}: cannot be unpacked" in shop.problems(out, reference)
    full = torch.tensor(list(good[:-1] + b', "full_precision_matrix_mult": true}'))
    out = shop.damaged(made, {name: full.to(torch.uint8)})
    assert f"{name}: is" in shop.problems(out, reference=True)

    header = json.loads(shop.metadata(made)["_quantization_metadata"])
    entry = header["layers"][layer]
    wrong: list[tuple[object, str]] = [
        ({"format": one}, "says") for one in (other, "mxfp8") if one != entry["format"]
    ]
    wrong.append(({}, "names no format"))
    if entry["format"] == "int8_tensorwise":  # ComfyUI believes the header
        turned = {**entry, "convrot": not entry.get("convrot", False), "convrot_groupsize": 64}
        wrong.append((turned, "cannot be unpacked"))
    for said, reason in wrong:
        header["layers"][layer] = said
        out = shop.damaged(made, None, {"_quantization_metadata": json.dumps(header)})
        text = shop.problems(out)
        assert layer in text and reason in text
    out = shop.damaged(made, None, {"_quantization_metadata": "{"})
    assert "_quantization_metadata: not a JSON object" in shop.problems(out)


@pytest.mark.parametrize("scheme", ["svdquant-w4a4", "svdquant-nvfp4"])
def test_metadata_that_lies_is_named(shop: Any, scheme: str) -> None:
    pair = (scheme, "nunchaku")
    said = json.loads(shop.metadata(shop.output(pair))["quantization_config"])
    out = shop.damaged(
        shop.output(pair), None, {"quantization_config": json.dumps(said | {"rank": 64})}
    )
    assert "quantization_config.rank: the file says 64, its tensors say 32" in shop.problems(out)
    said["weight"]["dtype"] = "int8"
    out = shop.damaged(shop.output(pair), None, {"quantization_config": json.dumps(said)})
    assert "quantization_config.weight.dtype: the file says int8" in shop.problems(out)
    for key in ("quantization_config", "config"):
        out = shop.damaged(shop.output(pair), None, {key: "none"})
        assert f"metadata {key}: missing" in shop.problems(out)


@pytest.mark.parametrize("scheme", ["svdquant-w4a4", "svdquant-nvfp4"])
def test_a_config_that_lies_is_named(shop: Any, scheme: str) -> None:
    out = shop.damaged(shop.output((scheme, "diffusers")))
    config = json.loads((out / "config.json").read_text())
    layer = "transformer_blocks.0.ff.net.0.proj"

    def lie(change: Callable[[dict[str, Any]], object]) -> str:
        changed = json.loads(json.dumps(config))
        change(changed["quantization_config"])
        (out / "config.json").write_text(json.dumps(changed))
        return shop.problems(out)

    assert "svdq_w4a4.rank: the file says 16" in lie(lambda q: q["svdq_w4a4"].update(rank=16))
    other = "nvfp4" if scheme == "svdquant-w4a4" else "int4"
    text = lie(lambda q: q["svdq_w4a4"].update(precision=other))
    assert f"svdq_w4a4.precision: the file says {other}" in text
    text = lie(lambda q: q["svdq_w4a4"]["targets"].remove(layer))
    assert f"{layer}: packed, but not a target of svdq_w4a4" in text
    text = lie(lambda q: q["awq_w4a16"]["targets"].append("proj_out"))
    assert "proj_out: a target of awq_w4a16 that is not packed" in text
    (out / "config.json").write_text("[")
    assert "config.json" in shop.problems(out)


@pytest.mark.parametrize("scheme", ["svdquant-w4a4", "svdquant-nvfp4"])
def test_metadata_is_what_the_model_needs(shop: Any, scheme: str) -> None:
    pair = (scheme, "nunchaku")
    good = shop.metadata(shop.output(pair))

    def lie(name: str, change: Callable[[Any], object]) -> str:
        said = json.loads(good[name])
        change(said)
        out = shop.without_manifest(shop.output(pair), None, {name: json.dumps(said)})
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
        out = shop.without_manifest(shop.output(pair))
        file = shop.file(out)
        save_file(load_file(file), file, {k: v for k, v in good.items() if k != key})
        assert f"metadata {key}: missing" in shop.problems(out, reference=True)


def test_only_notes_and_spelling_of_the_config_are_free(shop: Any) -> None:
    good = json.loads(shop.metadata(shop.output(INT4))["config"])
    said = json.dumps({**good, "_diffusers_version": "0.1"}, indent=2, sort_keys=True)
    out = shop.without_manifest(shop.output(INT4), None, {"config": said, "more": "x"})
    assert "the file is sound" in checkpoints.done("verify", out, "--against", shop.model)


def test_comfyuis_header_is_what_the_layers_need(shop: Any) -> None:
    pair = ("fp8-tensor", "comfyui")
    said = json.loads(shop.metadata(shop.output(pair))["_quantization_metadata"])
    layer = "single_blocks.0.modulation.lin"
    del said["layers"][layer]["full_precision_matrix_mult"]
    out = shop.without_manifest(
        shop.output(pair), None, {"_quantization_metadata": json.dumps(said)}
    )
    text = shop.problems(out, reference=True)
    assert f"layers.{layer}.full_precision_matrix_mult: missing" in text


def test_the_config_beside_the_weights_is_the_models(shop: Any) -> None:
    out = shop.without_manifest(shop.output(("svdquant-w4a4", "diffusers")))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_layers": 7}))
    assert "config.json.num_layers: is 7, should be 1" in shop.problems(out, reference=True)


@pytest.mark.parametrize("scheme", ["svdquant-w4a4", "svdquant-nvfp4"])
def test_a_name_that_loaders_read_must_be_true(shop: Any, scheme: str) -> None:
    out = shop.without_manifest(shop.output((scheme, "nunchaku")))
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


def test_copies_of_the_smoothing_vector_are_equal(shop: Any) -> None:
    out = shop.output(INT4)
    name = "transformer_blocks.0.mlp_fc1.smooth_orig"
    text = shop.problems(shop.without_manifest(out, {name: shop.tensors(out)[name] * 2}))
    assert "transformer_blocks.0.mlp_fc1: cannot be unpacked" in text and "smooth_orig" in text
