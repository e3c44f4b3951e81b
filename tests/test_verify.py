"""What verify finds: sound files are sound, and every kind of damage is named.

A damaged copy has no hashes in its manifest, so that only the check under test can notice.
"""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dqconvert.converter.reopen import reopen

torch.set_num_threads(1)
checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))
workshop = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("workshop.py"))))
PAIRS = checkpoints.PAIRS
each = pytest.mark.parametrize("pair", PAIRS, ids="-".join)
each_4bit = pytest.mark.parametrize("pair", [p for p in PAIRS if p[1] != "comfyui"], ids="-".join)
each_8bit = pytest.mark.parametrize("pair", [p for p in PAIRS if p[1] == "comfyui"], ids="-".join)

Pair = tuple[str, str]
Tensors = dict[str, Tensor]
CANONICAL = ("transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff_context.net.0.proj")
SIDES = {
    "comfyui": ("double_blocks.0.img_mlp.0", "double_blocks.0.txt_mlp.0"),
    "nunchaku": ("transformer_blocks.0.mlp_fc1", "transformer_blocks.0.mlp_context_fc1"),
    "diffusers": CANONICAL,
}
"""Two layers of equal shape, in each target's names."""
MODULATION = {
    "comfyui": "single_blocks.0.modulation.lin",
    "nunchaku": "single_transformer_blocks.0.norm.linear",
    "diffusers": "single_transformer_blocks.0.norm.linear",
}
SMOOTH = {"nunchaku": ("smooth", "smooth_orig"), "diffusers": ("smooth_factor",)}
KEPT = {"comfyui": "img_in.weight", "nunchaku": "x_embedder.weight"}


def kept_of(pair: Pair) -> str:
    return KEPT.get(pair[1], KEPT["nunchaku"])


def scale_of(pair: Pair) -> str:
    if pair == ("convrot-w4a8", "comfyui"):
        return "weight_s_channel"
    return "weight_scale" if pair[1] == "comfyui" else "wscales"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return workshop.Workshop(tmp_path_factory.mktemp("verify"))


@each
def test_what_was_written_is_sound(shop: Any, pair: Pair) -> None:
    out = shop.outputs[pair]
    made = json.loads((out / "dqconvert.json").read_text())["layers"]
    for path in (out, shop.file(out)):
        assert "the file is sound" in checkpoints.done("verify", path)
        assert json.loads(checkpoints.done("inspect", path, "--json"))["problems"] == []
        said = json.loads(checkpoints.done("verify", path, "--against", shop.model, "--json"))
        assert said["problems"] == [] and (said["scheme"], said["target"]) == pair
        errors = {layer["name"]: layer["weight_error"] for layer in said["layers"]}
        assert errors == pytest.approx({row["name"]: row["weight_error"] for row in made}, rel=0.02)


@each
def test_a_copy_without_changes_is_sound(shop: Any, pair: Pair) -> None:
    """The damage below is in the tensors, not in how they were saved again."""
    out = shop.damaged(pair)
    assert "the file is sound" in checkpoints.done("verify", out, "--against", shop.model)


# ------------------------------------------------------- found in the file alone


@each
def test_a_missing_tensor_is_named(shop: Any, pair: Pair) -> None:
    layer = SIDES[pair[1]][0]
    whole = shop.tensors(pair)
    optional = {f"{layer}.comfy_quant", f"{layer}.wtscale", f"{layer}.wcscales"}
    for name in [n for n in whole if n.startswith(f"{layer}.")] + [kept_of(pair)[:-6] + "bias"]:
        out = shop.damaged(pair, {k: t for k, t in whole.items() if k != name})
        assert f"{name}: missing" in shop.problems(out, reference=True)
        if pair[1] == "nunchaku" and name in optional:  # loaders take it as 1
            continue
        if name.endswith(("comfy_quant", "codebook")):  # the header repeats it; there is a default
            continue
        text = shop.problems(out)
        assert layer in text or CANONICAL[0] in text or "x_embedder.bias" in text


@each
@pytest.mark.parametrize("extra", ["transformer_blocks.0.attn.to_w.weight", "lora_a"])
def test_an_extra_tensor_is_named(shop: Any, pair: Pair, extra: str) -> None:
    out = shop.damaged(pair, shop.tensors(pair) | {extra: torch.zeros(4)})
    for reference in (False, True):
        assert f"{extra}: unexpected" in shop.problems(out, reference)


@each
def test_wrong_shapes_and_dtypes_are_named(shop: Any, pair: Pair) -> None:
    name = f"{SIDES[pair[1]][0]}.{scale_of(pair)}"
    good = shop.tensors(pair)[name]
    short = good[:-1].clone() if good.ndim else good.repeat(2)
    deep = good.reshape(1, 1, *good.shape)  # [1] would load like []
    for bad in (short, good.half(), deep):
        out = shop.damaged(pair, shop.tensors(pair) | {name: bad})
        for reference in (False, True):
            assert name in shop.problems(out, reference)


@each
def test_not_a_number_is_named(shop: Any, pair: Pair) -> None:
    layer, modulated = SIDES[pair[1]][0], MODULATION[pair[1]]
    names = [f"{layer}.{scale_of(pair)}", f"{modulated}.{scale_of(pair)}", f"{layer}.bias"]
    if pair[1] == "nunchaku":
        names += [f"{layer}.{leaf}" for leaf in ("smooth", "lora_down", "lora_up")]
    if pair[0] == "fp8-tensor":
        names.append(f"{layer}.weight")
    for name in names:
        bad = shop.tensors(pair)
        flat = bad[name].contiguous().view(-1)
        flat[-1] = float("nan")
        bad[name] = flat.view(bad[name].shape)
        out = shop.damaged(pair, bad)
        for reference in (False, True):
            assert f"{name.rpartition('.')[0]}: " in shop.problems(out, reference), name
    bad = shop.tensors(pair)
    bad[kept_of(pair)][0, 0] = float("inf")
    assert "x_embedder.weight: holds NaN or infinity" in shop.problems(shop.damaged(pair, bad))


@each_4bit
def test_a_smooth_of_zeros_is_named(shop: Any, pair: Pair) -> None:
    layer = SIDES[pair[1]][0]
    bad = shop.tensors(pair)
    for leaf in SMOOTH[pair[1]]:
        bad[f"{layer}.{leaf}"][3] = 0
    assert f"{layer}: smooth holds zeros" in shop.problems(shop.damaged(pair, bad))


@each
def test_a_cut_file_is_named(shop: Any, pair: Pair) -> None:
    out = shop.damaged(pair)
    file = shop.file(out)
    size = file.stat().st_size
    for keep in (size - 1, size // 2, 50):
        with file.open("r+b") as opened:
            opened.truncate(keep)
        for command in ("verify", "inspect"):
            result = checkpoints.dqconvert(command, out)
            assert result.exit_code == 1
            assert file.name in result.stderr and "cut off" in result.stderr


@each
def test_a_changed_file_is_not_the_manifests(shop: Any, pair: Pair) -> None:
    out = shop.folder / "changed"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(shop.outputs[pair], out)
    names = json.loads((out / "dqconvert.json").read_text())["files"]
    for name in names:
        data = (out / name).read_bytes()
        last = bytes([data[-1] ^ 1]) if name.endswith(".safetensors") else b"\n\n"
        (out / name).write_bytes(data[:-1] + last)
        assert f"{name}: its SHA-256 is not the manifest's" in shop.problems(out)
    if "config.json" in names:
        (out / "config.json").rename(out / "elsewhere")
        assert checkpoints.dqconvert("verify", out).exit_code == 1


@each_8bit
def test_a_marker_that_lies_is_named(shop: Any, pair: Pair) -> None:
    layer = SIDES["comfyui"][0]
    name = f"{layer}.comfy_quant"
    good = bytes(shop.tensors(pair)[name].tolist())
    other = "float8_e4m3fn" if pair[0] == "int8" else "int8_tensorwise"
    for text in (good[:-1] + b" ", json.dumps({"format": other}).encode(), b"{}"):
        marker = torch.tensor(list(text), dtype=torch.uint8)
        out = shop.damaged(pair, shop.tensors(pair) | {name: marker})
        for reference in (False, True):
            assert f"{layer}: cannot be unpacked" in shop.problems(out, reference)
    full = torch.tensor(list(good[:-1] + b', "full_precision_matrix_mult": true}'))
    out = shop.damaged(pair, shop.tensors(pair) | {name: full.to(torch.uint8)})
    assert f"{name}: is" in shop.problems(out, reference=True)

    with safe_open(shop.file(shop.outputs[pair]), "pt") as opened:
        header = json.loads(opened.metadata()["_quantization_metadata"])
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
        out = shop.damaged(pair, None, {"_quantization_metadata": json.dumps(header)})
        text = shop.problems(out)
        assert layer in text and reason in text
    out = shop.damaged(pair, None, {"_quantization_metadata": "{"})
    assert "_quantization_metadata: not a JSON object" in shop.problems(out)


@pytest.mark.parametrize("scheme", ["svdquant-w4a4", "svdquant-nvfp4"])
def test_metadata_that_lies_is_named(shop: Any, scheme: str) -> None:
    pair = (scheme, "nunchaku")
    with safe_open(shop.file(shop.outputs[pair]), "pt") as opened:
        said = json.loads(opened.metadata()["quantization_config"])
    out = shop.damaged(pair, None, {"quantization_config": json.dumps(said | {"rank": 64})})
    assert "quantization_config.rank: the file says 64, its tensors say 32" in shop.problems(out)
    said["weight"]["dtype"] = "int8"
    out = shop.damaged(pair, None, {"quantization_config": json.dumps(said)})
    assert "quantization_config.weight.dtype: the file says int8" in shop.problems(out)
    for key in ("quantization_config", "config"):
        out = shop.damaged(pair, None, {key: "none"})
        assert f"metadata {key}: missing" in shop.problems(out)


@pytest.mark.parametrize("scheme", ["svdquant-w4a4", "svdquant-nvfp4"])
def test_a_config_that_lies_is_named(shop: Any, scheme: str) -> None:
    out = shop.damaged((scheme, "diffusers"))
    config = json.loads((out / "config.json").read_text())
    layer = SIDES["diffusers"][0]

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


# ---------------------------------------------------- found by comparing with the model


@each
def test_swapped_layers_are_named(shop: Any, pair: Pair) -> None:
    one, two = SIDES[pair[1]]
    bad = shop.tensors(pair)
    leaves = [n.removeprefix(f"{one}.") for n in bad if n.startswith(f"{one}.")]
    for leaf in leaves:
        bad[f"{one}.{leaf}"], bad[f"{two}.{leaf}"] = bad[f"{two}.{leaf}"], bad[f"{one}.{leaf}"]
    out = shop.damaged(pair, bad)
    assert "the file is sound" in checkpoints.done("verify", out)
    text = shop.problems(out, reference=True)
    for layer in (one, two):
        assert f"{layer}: weight error" in text and f"{layer}: its bias" in text


@each
def test_query_and_key_in_each_others_place_are_named(shop: Any, pair: Pair) -> None:
    """Codes and scales only: biases, smooth vector and low-rank branch stay."""
    found = reopen(shop.outputs[pair])
    bad = shop.tensors(pair)
    layers = {layer.modules: layer for layer in found.layers}
    query, key = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k")
    if pair[1] == "diffusers":
        one, two = (layers[module,] for module in (query, key))
        for leaf in ("qweight", "wscales"):
            a, b = f"{one.name}.{leaf}", f"{two.name}.{leaf}"
            bad[a], bad[b] = bad[b], bad[a]
        named = [one.name, two.name]
    else:
        layer = next(layer for modules, layer in layers.items() if modules[0] == query)
        q, d = found.unpack(layer), found.hidden
        order = torch.cat([torch.arange(d, 2 * d), torch.arange(d), torch.arange(2 * d, 3 * d)])
        scale = q.scale[order] if len(q.scale) == len(order) else q.scale
        packed = found.target.pack(layer.form, replace(q, codes=q.codes[order], scale=scale))
        bad |= {f"{layer.name}.{leaf}": tensor for leaf, tensor in packed.items()}
        named = [layer.name]
    text = shop.problems(shop.damaged(pair, bad), reference=True)
    assert all(f"{name}: weight error" in text for name in named)


@each_4bit
def test_flipped_nibbles_are_named(shop: Any, pair: Pair) -> None:
    for layer in (SIDES[pair[1]][0], MODULATION[pair[1]]):
        bad = shop.tensors(pair)
        data = bad[f"{layer}.qweight"].view(torch.uint8)
        bad[f"{layer}.qweight"] = ((data >> 4) | (data << 4)).view(bad[f"{layer}.qweight"].dtype)
        text = shop.problems(shop.damaged(pair, bad), reference=True)
        assert f"{layer}: weight error" in text and text.count("weight error") == 1


@each_4bit
def test_a_small_change_is_not_what_the_manifest_says(shop: Any, pair: Pair) -> None:
    """Damage that the limits of the error alone would let pass."""
    layer = SIDES[pair[1]][0]
    smooth = SMOOTH[pair[1]]
    second = {"svdquant-w4a4": "wscales", "svdquant-nvfp4": "wtscale"}[pair[0]]
    for leaves, factor in ((smooth, 2.0), (smooth, 0.75), ((second,), 1.3)):
        bad = shop.tensors(pair)
        for leaf in leaves:
            bad[f"{layer}.{leaf}"] *= factor
        text = shop.problems(shop.damaged(pair, bad), reference=True)
        assert f"{layer}: weight error" in text and text.count("weight error") == 1


@each_8bit
def test_a_transposed_weight_is_named(shop: Any, pair: Pair) -> None:
    name = "double_blocks.0.txt_attn.proj"
    bad = shop.tensors(pair)
    turned = bad[f"{name}.weight"].t().contiguous()
    square = turned.shape == bad[f"{name}.weight"].shape
    bad[f"{name}.weight"] = turned
    text = shop.problems(shop.damaged(pair, bad), reference=True)
    assert (f"{name}: weight error" if square else name) in text


@each
@pytest.mark.parametrize("change", [torch.neg, torch.zeros_like, lambda bias: bias.roll(1)])
def test_a_changed_bias_is_named(shop: Any, pair: Pair, change: Any) -> None:
    for layer in (SIDES[pair[1]][0], MODULATION[pair[1]]):
        bad = shop.tensors(pair)
        bad[f"{layer}.bias"] = change(bad[f"{layer}.bias"]).contiguous()
        text = shop.problems(shop.damaged(pair, bad), reference=True)
        assert f"{layer}: its bias is not the model's" in text


@each
def test_a_kept_tensor_is_compared_bit_by_bit(shop: Any, pair: Pair) -> None:
    bad = shop.tensors(pair)
    bits = bad[kept_of(pair)].view(torch.int16)
    bits[-1, -1] ^= 1
    text = shop.problems(shop.damaged(pair, bad), reference=True)
    assert "x_embedder.weight: differs from the model's" in text and text.count("\n") == 1
    wide = {kept_of(pair): shop.tensors(pair)[kept_of(pair)].float()}
    out = shop.damaged(pair, shop.tensors(pair) | wide)
    assert f"{kept_of(pair)}: is" in shop.problems(out, reference=True)


@each
def test_another_model_is_not_the_same(shop: Any, pair: Pair, tmp_path: Path) -> None:
    other = {k: t.roll(1, 0) for k, t in checkpoints.weights_of(shop.model).items()}
    save_file(other, tmp_path / "other.safetensors")
    words = ("verify", shop.outputs[pair], "--against", tmp_path / "other.safetensors")
    result = checkpoints.dqconvert(*words)
    assert result.exit_code == 1
    for layer in SIDES[pair[1]]:
        assert f"{layer}: weight error" in result.stderr
    checkpoints.refused(tmp_path, *words[:-1], tmp_path / "none.safetensors")
