"""The types of 32 weights and the ternary ones against ggml's own bytes and the gguf package.

Compiled and in torch alone: both have the same bytes to give.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from dqconvert.quantizers.ggml import blocks, jit
from dqconvert.quantizers.ggml.plain import lanes, legacy, ternary
from dqconvert.quantizers.spec import BLOCKS

TWO_WAYS = ("q4_0", "q4_1", "q5_0", "q5_1")
CODES = (*TWO_WAYS, "q8_0", "tq1_0", "tq2_0", "mxfp4")
TORCH = {**legacy.QUANTIZERS, **ternary.QUANTIZERS}
TORCH_BACK = {**legacy.DEQUANTIZERS, **ternary.DEQUANTIZERS}

DATA = Path(__file__).with_name("data")
GOLDEN = load_file(DATA / "ggml.safetensors")
EDGES = load_file(DATA / "ggml_legacy.safetensors")
"""What ggml's library makes of twelve rows of zeros of both signs, of numbers that have no
inverse or no finite range, of ties, and of the numbers below powers of two; with an importance of
zeros, of zeros with a few others, and of e^-40 to e^40."""

every_code = pytest.mark.parametrize("code", CODES)
lawful = settings(derandomize=True, deadline=None, max_examples=40)


def quantize(code: str, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """Blocks, once both ways agree on them."""
    assert jit.available()
    compiled = blocks.quantize(weight, code, importance)
    assert torch.equal(TORCH[code](weight, importance), compiled)
    return compiled


def dequantize(code: str, packed: Tensor) -> Tensor:
    """Weights, once both ways agree on them."""
    assert jit.available()
    compiled = blocks.dequantize(packed, code)
    found = TORCH_BACK[code](packed)
    np.testing.assert_array_equal(found, compiled)
    assert torch.equal(found.signbit()[~found.isnan()], compiled.signbit()[~found.isnan()])
    return compiled


@every_code
@pytest.mark.parametrize("way", ["bytes", "bytes_ones", "bytes_imatrix"])
def test_bytes_are_ggmls(code: str, way: str) -> None:
    imatrix = GOLDEN["imatrix"]
    importance = {"bytes_ones": torch.ones_like(imatrix), "bytes_imatrix": imatrix}.get(way)
    expected = GOLDEN.get(f"{code}.{way}", GOLDEN[f"{code}.bytes"])
    assert torch.equal(
        quantize(code, GOLDEN["input"], importance if code in TWO_WAYS else None), expected
    )


@every_code
def test_weights_are_ggmls(code: str) -> None:
    found = dequantize(code, GOLDEN[f"{code}.bytes"])
    assert torch.equal(found.view(torch.int32), GOLDEN[f"{code}.dequantized"].view(torch.int32))


@pytest.mark.parametrize("name", [name for name in EDGES if name.startswith(CODES)])
def test_bytes_are_ggmls_at_the_edges(name: str) -> None:
    code, way = name.split(".")
    found = quantize(code, EDGES["input"], EDGES.get(f"importance.{way}"))
    assert torch.equal(found, EDGES[name])


@lawful
@given(
    code=st.sampled_from(CODES),
    rows=st.integers(1, 3),
    count=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
    magnitude=st.floats(-12, 12),
    ties=st.booleans(),
)
def test_bytes_are_ggufs(
    code: str, rows: int, count: int, seed: int, magnitude: float, ties: bool
) -> None:
    random = np.random.default_rng(seed)
    weight = random.standard_normal((rows, count * BLOCKS[code.upper()][0]))
    weight = np.round(weight * 4) if ties else weight * 10**magnitude
    weight = weight.astype(np.float32)
    expected = gguf.quantize(weight, gguf.GGMLQuantizationType[code.upper()])
    np.testing.assert_array_equal(quantize(code, torch.from_numpy(weight)), expected)


@lawful
@given(
    code=st.sampled_from(CODES),
    rows=st.integers(1, 3),
    count=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_bytes_mean_what_gguf_says(code: str, rows: int, count: int, seed: int) -> None:
    size = BLOCKS[code.upper()][1]
    packed = np.random.default_rng(seed).integers(0, 256, (rows, count * size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(packed, gguf.GGMLQuantizationType[code.upper()])
    np.testing.assert_array_equal(dequantize(code, torch.from_numpy(packed)), expected)


@pytest.mark.parametrize("code", TWO_WAYS)
def test_importance_lessens_the_error_that_it_weighs(code: str) -> None:
    weight, importance = GOLDEN["input"][:3], GOLDEN["imatrix"]
    errors = [
        (importance * (dequantize(code, quantize(code, weight, some)) - weight).square()).sum(1)
        for some in (None, importance)
    ]
    assert (errors[1] < errors[0]).all()


@every_code
def test_rows_and_blocks_do_not_touch_each_other(code: str) -> None:
    weights, size = BLOCKS[code.upper()]
    for row, expected in zip(EDGES["input"], EDGES[f"{code}.none"], strict=True):
        assert torch.equal(quantize(code, row[None, :weights])[0], expected[:size])
    if code in TWO_WAYS:
        importance, expected = EDGES["importance.wild"], EDGES[f"{code}.wild"]
        for row, one in zip(EDGES["input"], expected, strict=True):
            assert torch.equal(quantize(code, row[None], importance)[0], one)


@every_code
def test_many_rows_of_one_block(code: str) -> None:
    """More blocks than stand side by side, each with its own mean square."""
    weights, _ = BLOCKS[code.upper()]
    weight = GOLDEN["input"][:3, : 16 * weights].reshape(-1, weights)
    importance = GOLDEN["imatrix"][:weights] if code in TWO_WAYS else None
    found = quantize(code, weight, importance)
    alone = [quantize(code, row[None], importance) for row in weight[::7]]
    assert torch.equal(found[::7], torch.cat(alone))


@every_code
@pytest.mark.parametrize("importance", [None, torch.ones(512), torch.zeros(512)])
def test_zeros_stay_zeros(code: str, importance: Tensor | None) -> None:
    packed = quantize(code, torch.zeros(3, 512), importance if code in TWO_WAYS else None)
    assert torch.equal(dequantize(code, packed), torch.zeros(3, 512))


@every_code
def test_chunks_change_nothing(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lanes.CHUNK, "cpu", 3 * 256)
    expected = EDGES[f"{code}.none"]
    weight = dequantize(code, quantize(code, EDGES["input"]))
    assert weight.shape == EDGES["input"].shape
    assert torch.equal(TORCH[code](EDGES["input"], None), expected)
    if code in TWO_WAYS:
        assert torch.equal(
            TORCH[code](EDGES["input"], EDGES["importance.wild"]), EDGES[f"{code}.wild"]
        )


@every_code
def test_everything_happens_on_the_tensors_device(code: str) -> None:
    """Tensors without data refuse those of other devices, numpy, and questions about values."""
    rows, importance = torch.empty(3, 512, device="meta"), torch.empty(512, device="meta")
    for some in (None, importance):
        packed = TORCH[code](rows, some)
        assert packed.shape == (3, blocks.row_bytes(code, 512))
        assert TORCH_BACK[code](packed).shape == rows.shape
