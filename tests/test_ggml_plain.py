"""ggml blocks in torch alone: ggml's own bytes, and the gguf package's decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from dqconvert.quantizers.ggml import blocks
from dqconvert.quantizers.ggml.plain import iq4, kquants, lanes, symmetric
from dqconvert.quantizers.spec import BLOCKS

torch.set_num_threads(1)

MODULES = (kquants, symmetric, iq4)
QUANTIZERS = {code: way for module in MODULES for code, way in module.QUANTIZERS.items()}
DEQUANTIZERS = {code: way for module in MODULES for code, way in module.DEQUANTIZERS.items()}
NAMES = {code: code.replace("k", "K") for code in QUANTIZERS}

DATA = Path(__file__).with_name("data")
GOLDEN = load_file(DATA / "ggml.safetensors")
EDGES = load_file(DATA / "ggml_edges.safetensors")
"""What ggml's library makes of twelve rows full of ties, zeros, spikes and extremes, with an
importance of zeros, of zeros with a few others, and of e^-40 to e^40."""

every_code = pytest.mark.parametrize("code", QUANTIZERS)
lawful = settings(derandomize=True, deadline=None, max_examples=40)


@every_code
@pytest.mark.parametrize("way", ["bytes", "bytes_ones", "bytes_imatrix"])
def test_bytes_are_ggmls(code: str, way: str) -> None:
    expected = GOLDEN.get(f"{NAMES[code]}.{way}", GOLDEN[f"{NAMES[code]}.bytes"])
    imatrix = GOLDEN["imatrix"]
    importance = {"bytes_ones": torch.ones_like(imatrix), "bytes_imatrix": imatrix}.get(way)
    assert torch.equal(QUANTIZERS[code](GOLDEN["input"], importance), expected)


@every_code
def test_weights_are_ggmls(code: str) -> None:
    found = DEQUANTIZERS[code](GOLDEN[f"{NAMES[code]}.bytes"])
    expected = GOLDEN[f"{NAMES[code]}.dequantized"]
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@every_code
@pytest.mark.parametrize("way", ["none", "zeros", "sparse", "wild"])
def test_bytes_are_ggmls_at_the_edges(code: str, way: str) -> None:
    found = QUANTIZERS[code](EDGES["input"], EDGES.get(f"importance.{way}"))
    assert torch.equal(found, EDGES[f"{code}.{way}"])


@pytest.mark.parametrize("count", [1, 2, 3, 500])
def test_sums_are_added_in_order(count: int) -> None:
    values = torch.randn(256, count, generator=torch.Generator().manual_seed(0))
    expected = [np.float32(0)] * count
    for row in values.numpy():
        expected = [found + number for found, number in zip(expected, row, strict=True)]
    np.testing.assert_array_equal(lanes.total(values).numpy(), expected)


def test_nearest_integers_of_what_has_none() -> None:
    odd = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert lanes.nearest(odd).tolist() == [0, 0, 0]
    values = torch.tensor([0.5, 1.5, -2.5, 4194303, torch.inf, -torch.inf])
    assert lanes.nearest(values).tolist() == [0, 2, -2, 4194303, -(2.0**22), -(2.0**22)]


@lawful
@given(
    code=st.sampled_from(sorted(QUANTIZERS)),
    rows=st.integers(1, 5),
    count=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_bytes_decode_as_in_gguf(code: str, rows: int, count: int, seed: int) -> None:
    size = BLOCKS[code.upper()][1]
    packed = np.random.default_rng(seed).integers(0, 256, (rows, count * size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(packed, gguf.GGMLQuantizationType[code.upper()])
    np.testing.assert_array_equal(DEQUANTIZERS[code](torch.from_numpy(packed)).numpy(), expected)


@every_code
@pytest.mark.parametrize("way", ["none", "sparse"])
def test_chunks_change_nothing(code: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    importance, expected = EDGES.get(f"importance.{way}"), EDGES[f"{code}.{way}"][:7]
    weight = DEQUANTIZERS[code](expected)
    monkeypatch.setitem(lanes.CHUNK, "cpu", 3 * 256)
    assert torch.equal(QUANTIZERS[code](EDGES["input"][:7], importance), expected)
    assert torch.equal(DEQUANTIZERS[code](expected).nan_to_num(), weight.nan_to_num())


@every_code
def test_one_block_alone(code: str) -> None:
    weights, size = BLOCKS[code.upper()]
    for row, expected in zip(EDGES["input"], EDGES[f"{code}.none"], strict=True):
        assert torch.equal(QUANTIZERS[code](row[None, :weights], None)[0], expected[:size])


@every_code
@pytest.mark.parametrize("importance", [None, torch.ones(512), torch.zeros(512)])
def test_zeros_stay_zeros(code: str, importance: Tensor | None) -> None:
    weight = DEQUANTIZERS[code](QUANTIZERS[code](torch.zeros(3, 512), importance))
    assert torch.equal(weight, torch.zeros(3, 512))


@every_code
@pytest.mark.parametrize(
    "prepared",
    [
        lambda rows: rows.T.contiguous().T,
        lambda rows: rows.repeat_interleave(2, 1)[:, ::2],
        lambda rows: rows.double(),
        lambda rows: rows.bfloat16(),
        lambda rows: rows.half().T.contiguous().T,
    ],
)
def test_any_layout_and_dtype_without_a_compiler(
    code: str, prepared: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dqconvert.quantizers.ggml.jit.available", lambda: False)
    rows = EDGES["input"][3:6]  # multiples of a quarter: all dtypes hold them
    found = blocks.quantize(prepared(rows), code, EDGES["importance.wild"].double())
    assert torch.equal(found, EDGES[f"{code}.wild"][3:6])
    expected = DEQUANTIZERS[code](found)
    assert torch.equal(blocks.dequantize(found.T.contiguous().T, code), expected)


@every_code
def test_everything_happens_on_the_tensors_device(code: str) -> None:
    """Tensors without data refuse those of other devices, numpy, and questions about values."""
    rows, importance = torch.empty(3, 768, device="meta"), torch.empty(768, device="meta")
    for given_importance in (None, importance):
        packed = QUANTIZERS[code](rows, given_importance)
        assert packed.shape == (3, blocks.row_bytes(code, 768))
        assert DEQUANTIZERS[code](packed).shape == rows.shape
