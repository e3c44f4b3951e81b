"""What verify finds by comparing with the model, for every scheme and target: files that load and
compute something else.
"""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dqconvert.quantizers.forward import effective_weight
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import CODES
from dqconvert.quantizers.tensors import QuantizedTensor

torch.set_num_threads(1)
workshop = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("workshop.py"))))
checkpoints = workshop.checkpoints
each = pytest.mark.parametrize("pair", checkpoints.PAIRS, ids="-".join)

Pair = tuple[str, str]


@each
def test_every_tensor_of_a_layer_counts(shop: Any, pair: Pair) -> None:
    """Floats negated, bits inverted: no tensor is there for nothing."""
    out = shop.output(pair)
    for changes in shop.spoiled(out, _inverted):
        text = shop.problems(shop.damaged(out, changes), reference=True)
        for name in changes:
            assert f"{shop.names_of(out, name)[0]}: " in text or f"{name}: " in text, name


def _inverted(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return ~tensor
    if not tensor.any():
        return torch.ones_like(tensor)
    if tensor.dtype == torch.float8_e8m0fnu:  # they have no sign
        return tensor.view(torch.uint8).flip(0).view(tensor.dtype)
    return (-tensor.float()).to(tensor.dtype)


@each
def test_swapped_layers_are_named(shop: Any, pair: Pair) -> None:
    out = shop.output(pair)
    one, two = shop.twins(out)
    swapped = {f"{one.name}.{leaf}": t for leaf, t in shop.parts(out, two).items()}
    swapped |= {f"{two.name}.{leaf}": t for leaf, t in shop.parts(out, one).items()}
    copy = shop.damaged(out, swapped)
    assert "the file is sound" in checkpoints.done("verify", copy)
    text = shop.problems(copy, reference=True)
    for layer in (one, two):
        assert f"{layer.name}: weight error" in text and f"{layer.name}: its bias" in text
    assert text.count("weight error") == 2


@each
def test_query_and_key_in_each_others_place_are_named(shop: Any, pair: Pair) -> None:
    """Codes and scales only: biases, smooth vector and low-rank branch stay."""
    out = shop.output(pair)
    found = shop.opened(out)
    query, key = (f"single_transformer_blocks.0.attn.to_{letter}" for letter in "qk")
    holders = [layer for layer in found.layers if layer.modules[0] in (query, key)]
    results = [found.unpack(layer) for layer in holders]
    if len(holders) == 1:
        d, rows = found.hidden, holders[0].form.shape[0]
        order = torch.cat([torch.arange(d, 2 * d), torch.arange(d), torch.arange(2 * d, rows)])
        swapped = [workshop.reordered(results[0], order)]
    else:
        fields = ("codes", "scale", "zero", "tensor_scale")
        swapped = [
            replace(q, **{field: getattr(other, field) for field in fields})
            for q, other in zip(results, reversed(results), strict=True)
        ]
    changes: dict[str, Tensor] = {}
    for layer, q in zip(holders, swapped, strict=True):
        changes |= shop.packed(out, layer, q)
    text = shop.problems(shop.damaged(out, changes), reference=True)
    assert all(f"{layer.name}: weight error" in text for layer in holders)


FOUR = [pair for pair in checkpoints.PAIRS if schemes()[pair[0]].weight.bits == 4]


@pytest.mark.parametrize("pair", FOUR, ids="-".join)
def test_flipped_nibbles_are_named(shop: Any, pair: Pair) -> None:
    """Of one layer of each 4-bit format."""
    out = shop.output(pair)
    four = {
        layer.form.label: layer
        for layer in shop.opened(out).layers
        if CODES[layer.form.spec.code].bits == 4
    }
    names = {layer.name: shop.codes(out, layer) for layer in four.values()}
    changes = {name: _flipped(shop.tensors(out)[name]) for name in names.values()}
    text = shop.problems(shop.damaged(out, changes), reference=True)
    assert names and all(f"{layer}: weight error" in text for layer in names)
    assert text.count("weight error") == len(names)


def _flipped(codes: Tensor) -> Tensor:
    data = codes.view(torch.uint8)
    return ((data >> 4) | (data << 4)).view(codes.dtype)


def test_scales_in_another_order_are_named(shop: Any) -> None:
    """Where a layout permutes scales (swizzled, or as kernels read them) and they were not."""
    permuted = set()
    for pair in checkpoints.PAIRS:
        out = shop.output(pair)
        changes = _in_rows(shop, out)
        if not changes:
            continue
        permuted.add(pair)
        text = shop.problems(shop.damaged(out, changes), reference=True)
        for name in changes:
            layer = name.rpartition(".")[0]
            assert f"{layer}: weight error" in text or f"{layer}: cannot be unpacked" in text, pair
    assert permuted >= {("nvfp4", "comfyui"), ("mxfp8", "comfyui"), ("svdquant-w4a4", "nunchaku")}


def _in_rows(shop: Any, out: Path) -> dict[str, Tensor]:
    """Scales in their natural order, row by row, where the layout has them in another."""
    changes = {}
    for layer in shop.opened(out).layers:
        scale = shop.opened(out).unpack(layer).scale.contiguous()
        for leaf, tensor in shop.parts(out, layer).items():
            if tensor.nbytes == scale.nbytes and tensor.numel() == scale.numel():
                natural = scale.view(tensor.dtype).view(tensor.shape)
                if not checkpoints.same_bits(natural, tensor) and _same_values(natural, tensor):
                    changes[f"{layer.name}.{leaf}"] = natural
    return changes


def _same_values(one: Tensor, two: Tensor) -> bool:
    return all(torch.equal(a, b) for a, b in [[t.float().flatten().sort()[0] for t in (one, two)]])


@each
def test_a_transposed_weight_is_named(shop: Any, pair: Pair) -> None:
    out = shop.output(pair)
    found = shop.opened(out)
    square = [layer for layer in found.layers if len(set(layer.form.shape)) == 1]
    changes: dict[str, Tensor] = {}
    for layer in square:
        q = found.unpack(layer)
        changes |= shop.packed(out, layer, replace(q, codes=q.codes.t().contiguous()))
    text = shop.problems(shop.damaged(out, changes), reference=True)
    assert square and all(f"{layer.name}: weight error" in text for layer in square)


SCALED = [pair for pair in checkpoints.PAIRS if not schemes()[pair[0]].weight.unit]


@pytest.mark.parametrize("pair", SCALED, ids="-".join)
def test_a_wrong_scale_is_named_layer_by_layer(shop: Any, pair: Pair) -> None:
    """By a tenth, even where most of the weight is in the low-rank branch."""
    out = shop.output(pair)
    found = shop.opened(out)
    for factors in ((1.1, 0.9), (0.9, 1.1)):
        changes: dict[str, Tensor] = {}
        named = []
        for place, layer in enumerate(found.layers[1:]):  # that one stays sound
            q = found.unpack(layer)
            changes |= shop.packed(out, layer, workshop.resized(q, factors[place % 2]))
            powers = q.scale.dtype == torch.float8_e8m0fnu  # off by 2 or by a half
            named.append((layer.name, "weight" if powers else "its quantized weights are"))
        text = shop.problems(shop.without_manifest(out, changes), reference=True)
        for name, words in named:
            assert f"{name}: {words}" in text or f"{name}: its quantized weights are" in text
        assert f"problem: {found.layers[0].name}: " not in text


@each
def test_a_small_change_is_not_what_the_manifest_says(shop: Any, pair: Pair) -> None:
    """A few rows, which the limits of the error alone let pass."""
    out = shop.output(pair)
    found = shop.opened(out)
    layer = max(found.layers, key=lambda one: one.form.shape[0] * (not one.form.splits))
    q = found.unpack(layer)
    sizes = effective_weight(q).norm(dim=1)
    few = (sizes - sizes.square().mean().sqrt()).abs().argsort()[:4]  # of ordinary size
    codes = q.codes.clone()
    codes[few] = codes[few].roll(1, 1)
    changes = shop.packed(out, layer, replace(q, codes=codes))
    text = shop.problems(shop.damaged(out, changes), reference=True)
    assert f"{layer.name}: weight error" in text and text.count("\n") == 1
    assert "the manifest says" in text


SMOOTHED = [pair for pair in checkpoints.PAIRS if pair[0].startswith("svdquant")]


@pytest.mark.parametrize("pair", SMOOTHED, ids="-".join)
def test_a_wrong_smooth_vector_is_named(shop: Any, pair: Pair) -> None:
    out = shop.output(pair)

    def spoil(change: Any) -> tuple[str, int]:
        def smoothed(q: QuantizedTensor) -> QuantizedTensor:
            return q if q.smooth is None else replace(q, smooth=change(q.smooth.clone()))

        count = sum(bool(layer.form.rank) for layer in shop.opened(out).layers)
        return shop.problems(shop.damaged(out, shop.changed(out, smoothed)), True), count

    for factor in (2.0, 0.75):
        text, count = spoil(lambda smooth, by=factor: smooth * by)
        assert text.count(": weight error") == count
    text, count = spoil(lambda smooth: smooth.index_fill_(0, torch.tensor([3]), 0.0))
    assert text.count(": smooth holds zeros") == count


@each
def test_a_changed_bias_is_named(shop: Any, pair: Pair) -> None:
    out = shop.output(pair)
    found = shop.opened(out)
    damages = (torch.neg, torch.zeros_like, lambda bias: bias.roll(1))
    biases = {layer.name: found.unpack(layer).bias for layer in found.layers}
    biases = {name: bias for name, bias in biases.items() if bias is not None and bias.any()}
    for first in range(3):
        changes: dict[str, Tensor] = {}
        for place, name in enumerate(biases):
            tensor = shop.tensors(out)[f"{name}.bias"]
            changes[f"{name}.bias"] = damages[(first + place) % 3](tensor)
        text = shop.problems(shop.damaged(out, changes), reference=True)
        assert len(biases) > 3
        assert all(f"{name}: its bias is not the model's" in text for name in biases)


@each
def test_a_kept_tensor_is_compared_bit_by_bit(shop: Any, pair: Pair) -> None:
    out = shop.output(pair)
    name = shop.kept(out)
    bad = shop.tensors(out)[name].clone()
    bad.view(torch.int16)[-1, -1] ^= 1
    text = shop.problems(shop.damaged(out, {name: bad}), reference=True)
    assert "x_embedder.weight: differs from the model's" in text and text.count("\n") == 1
    wide = shop.tensors(out)[name].float()
    assert f"{name}: is" in shop.problems(shop.damaged(out, {name: wide}), reference=True)


@each
def test_another_model_is_not_the_same(shop: Any, pair: Pair, tmp_path: Path) -> None:
    other = {k: t.roll(1, 0) for k, t in checkpoints.weights_of(shop.model).items()}
    save_file(other, tmp_path / "other.safetensors")
    out = shop.output(pair)
    result = checkpoints.dqconvert("verify", out, "--against", tmp_path / "other.safetensors")
    assert result.exit_code == 1
    for layer in shop.opened(out).layers:
        assert f"{layer.name}: weight error" in result.stderr
    words = ("verify", out, "--against", tmp_path / "none.safetensors")
    checkpoints.refused(tmp_path, *words)


ROTATED = [("convrot-int8", "comfyui"), ("convrot-mixed", "comfyui")]


@pytest.mark.parametrize("pair", ROTATED, ids="-".join)
def test_a_lost_rotation_is_named(shop: Any, pair: Pair) -> None:
    """Neither the header nor the marker says that the layer is rotated: it loads, unrotated."""
    out = shop.output(pair)
    header = json.loads(shop.metadata(out)["_quantization_metadata"])
    name = next(n for n, e in header["layers"].items() if e["format"] == "int8_tensorwise")
    header["layers"][name] = {"format": "int8_tensorwise"}
    marker = torch.tensor(list(json.dumps(header["layers"][name]).encode()), dtype=torch.uint8)
    said = {"_quantization_metadata": json.dumps(header)}
    copy = shop.damaged(out, {f"{name}.comfy_quant": marker}, said)
    text = shop.problems(copy, reference=True)
    assert f"{name}: weight error" in text and text.count("weight error") == 1
