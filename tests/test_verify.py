"""What verify finds in the file itself: sound files are sound, and what is missing or broken is
named, for every scheme and target.

A damaged copy has no hashes in its manifest, so that only the check under test can notice.
"""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)
checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))
PAIRS = checkpoints.PAIRS
each = pytest.mark.parametrize("pair", PAIRS, ids="-".join)

Pair = tuple[str, str]
OPTIONAL = ("comfy_quant", "weight_codebook", "wtscale", "wcscales", "_weight_zero_point")
"""Tensors that a file need not have: the header repeats markers, loaders take the rest as 1 or as
the codes themselves. Only the model shows that they are gone."""


def verified(*words: Any) -> Any:
    return json.loads(checkpoints.done("verify", *words, "--json"))


@each
def test_what_was_written_is_sound(shop: Any, pair: Pair) -> None:
    out = shop.output(pair)
    made = json.loads((out / "dqconvert.json").read_text())["layers"]
    for path in (out, shop.file(out)):
        found = verified(path)
        assert found["problems"] == []
        formats = {row["name"]: row["format"] for row in found["layers"]}
        assert formats == {row["name"]: row["format"] for row in made}
        assert json.loads(checkpoints.done("inspect", path, "--json"))["problems"] == []
    said = verified(out, "--against", shop.model)
    assert said["problems"] == [] and (said["scheme"], said["target"]) == pair
    errors = {row["name"]: row["weight_error"] for row in said["layers"]}
    assert errors == pytest.approx({row["name"]: row["weight_error"] for row in made}, rel=0.02)


@each
def test_a_file_without_manifest_is_sound(shop: Any, pair: Pair) -> None:
    """The damage below is in the tensors, not in how they were saved again."""
    out = shop.without_manifest(shop.output(pair))
    assert "the file is sound" in checkpoints.done("verify", out, "--against", shop.model)


# ---------------------------------------------------------------------------- tensors of a header


@each
def test_a_missing_tensor_is_named(shop: Any, pair: Pair) -> None:
    out = shop.output(pair)
    bias = shop.kept(out).replace("weight", "bias")
    for changes in shop.spoiled(out, lambda _: None):
        copy = shop.damaged(out, {**changes, bias: None})
        alone, compared = shop.problems(copy), shop.problems(copy, reference=True)
        assert "x_embedder.bias: missing" in alone
        for name in changes:
            assert f"{name}: missing" in compared
            if not name.endswith(OPTIONAL):
                assert any(word in alone for word in shop.names_of(out, name)), name


@each
def test_a_file_without_its_first_layer_is_named(shop: Any, pair: Pair) -> None:
    """Its height is the width of the model, without which nothing can be cut."""
    out = shop.output(pair)
    copy = shop.damaged(out, {shop.kept(out): None})
    for reference in (False, True):
        assert f"{shop.kept(out)}: missing" in shop.problems(copy, reference)


@each
def test_an_extra_tensor_is_named(shop: Any, pair: Pair) -> None:
    extras = ("transformer_blocks.0.attn.to_w.weight", "lora_a")
    out = shop.damaged(shop.output(pair), {extra: torch.zeros(4) for extra in extras})
    for reference in (False, True):
        text = shop.problems(out, reference)
        assert all(f"{extra}: unexpected" in text for extra in extras)


@each
def test_wrong_shapes_and_dtypes_are_named(shop: Any, pair: Pair) -> None:
    """With half its rows, in another dtype, with two dimensions more, for every tensor."""
    out = shop.output(pair)
    damages = (_half, lambda t: t.float().long(), lambda t: t.reshape(1, 1, *t.shape))
    for changes in shop.spoiled(out, *damages):
        copy = shop.damaged(out, changes)
        alone, compared = shop.problems(copy), shop.problems(copy, reference=True)
        for name in changes:
            assert f"{name}: is" in compared
            if not name.endswith(OPTIONAL[0]):
                assert any(word in alone for word in shop.names_of(out, name)), name


def _half(tensor: Tensor) -> Tensor:
    """Block formats fill rows up, so that a bias may be a little shorter than the weight."""
    return tensor[: len(tensor) // 2] if tensor.ndim else tensor.repeat(2)


@each
def test_not_a_number_is_named(shop: Any, pair: Pair) -> None:
    out = shop.output(pair)
    for changes in shop.spoiled(out, _with_nan):
        kept = shop.tensors(out)[shop.kept(out)].clone()
        kept[0, 0] = float("inf")
        copy = shop.damaged(out, changes | {shop.kept(out): kept})
        for reference in (False, True):
            text = shop.problems(copy, reference)
            assert "x_embedder.weight: holds NaN or infinity" in text
            assert all(f"{shop.names_of(out, name)[0]}: " in text for name in changes)


def _with_nan(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    flat = tensor.float().flatten().clone()
    flat[-1] = float("nan")
    return flat.reshape(tensor.shape).to(tensor.dtype)


# ------------------------------------------------------------------------------------------- files


@each
def test_a_cut_file_is_named(shop: Any, pair: Pair) -> None:
    out = shop.damaged(shop.output(pair))
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
    shutil.copytree(shop.output(pair), out)
    names = json.loads((out / "dqconvert.json").read_text())["files"]
    for name in names:
        data = (out / name).read_bytes()
        last = bytes([data[-1] ^ 1]) if name.endswith(".safetensors") else b"\n\n"
        (out / name).write_bytes(data[:-1] + last)
    text = shop.problems(out)
    assert all(f"{name}: its SHA-256 is not the manifest's" in text for name in names)
    (config,) = [name for name in names if name.endswith("config.json")] or [None]
    if config:
        (out / config).unlink()
        assert checkpoints.dqconvert("verify", out).exit_code == 1
