"""Q2_K, Q4_K and Q5_K by numba, against ggml's own bytes and gguf-py's reading of any bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file

from dqconvert.quantizers.spec import BLOCKS

pytest.importorskip("numba")
from dqconvert.quantizers.ggml.compiled import kquants

GOLDEN = load_file(Path(__file__).parent / "data" / "ggml.safetensors")
INPUT, IMATRIX = GOLDEN["input"], GOLDEN["imatrix"]
CODES = ("q2_k", "q4_k", "q5_k")
WAYS = {"bytes": None, "bytes_ones": np.ones_like(IMATRIX), "bytes_imatrix": IMATRIX}

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

every_code = pytest.mark.parametrize("code", CODES)
every_way = pytest.mark.parametrize("way", WAYS)
codes = st.sampled_from(CODES)


def quantize(rows: Floats, code: str, importance: Floats | None = None) -> Bytes:
    plain, weighted = kquants.QUANTIZERS[code]
    size = BLOCKS[code.upper()][1]
    out = np.full((rows.shape[0], rows.shape[1] // 256 * size), 0xA5, np.uint8)
    if importance is None:
        plain(np.ascontiguousarray(rows), out)
    else:
        weighted(np.ascontiguousarray(rows), np.ascontiguousarray(importance), out)
    return out


def dequantize(blocks: Bytes, code: str) -> Floats:
    size = BLOCKS[code.upper()][1]
    out = np.full((blocks.shape[0], blocks.shape[1] // size * 256), np.nan, np.float32)
    kquants.DEQUANTIZERS[code](np.ascontiguousarray(blocks), out)
    return out


def golden(code: str, way: str = "bytes") -> Bytes:
    name = code.replace("k", "K")
    found: Bytes = GOLDEN.get(f"{name}.{way}", GOLDEN[f"{name}.bytes"])
    return found


@every_way
@every_code
def test_bytes_are_ggmls(code: str, way: str) -> None:
    np.testing.assert_array_equal(quantize(INPUT, code, WAYS[way]), golden(code, way))


@every_code
def test_weights_are_ggmls(code: str) -> None:
    expected = GOLDEN[f"{code.replace('k', 'K')}.dequantized"]
    np.testing.assert_array_equal(dequantize(golden(code), code), expected)


@given(code=codes, rows=st.integers(1, 5), blocks=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_any_bytes_read_as_gguf_reads_them(code: str, rows: int, blocks: int, seed: int) -> None:
    size = BLOCKS[code.upper()][1]
    found = np.random.default_rng(seed).integers(0, 256, (rows, blocks * size), np.uint8)
    with np.errstate(all="ignore"):
        expected = quants.dequantize(found, GGMLQuantizationType[code.upper()])
    np.testing.assert_array_equal(dequantize(found, code), expected)


@given(code=codes, chosen=st.lists(st.integers(0, 47), min_size=1, max_size=40))
def test_a_block_does_not_depend_on_its_neighbours(code: str, chosen: list[int]) -> None:
    """Any number of blocks in any order, one to a row, whatever lanes they come to lie in."""
    expected = golden(code).reshape(48, -1)[chosen]
    np.testing.assert_array_equal(quantize(INPUT.reshape(48, 256)[chosen], code), expected)


@given(
    code=codes,
    way=st.sampled_from(["bytes_ones", "bytes_imatrix"]),
    rows=st.lists(st.integers(0, 11), min_size=1, max_size=9),
    span=st.tuples(st.integers(0, 3), st.integers(0, 3)).map(sorted),
)
def test_importance_belongs_to_columns(
    code: str, way: str, rows: list[int], span: list[int]
) -> None:
    """Any rows, and any run of their blocks with its part of the importance."""
    first, end = span[0], span[1] + 1
    columns = slice(256 * first, 256 * end)
    importance = WAYS[way]
    assert importance is not None
    found = quantize(INPUT[rows, columns], code, importance[columns])
    expected = golden(code, way).reshape(12, 4, -1)[rows, first:end]
    np.testing.assert_array_equal(found, expected.reshape(len(rows), -1))


@every_way
@every_code
def test_zeros_stay_zeros(code: str, way: str) -> None:
    zeros = np.zeros((3, 1024), np.float32)
    assert not quantize(zeros, code, WAYS[way]).any()
    assert not dequantize(quantize(zeros, code, WAYS[way]), code).any()


@every_code
def test_without_any_importance_nothing_is_kept(code: str) -> None:
    """As in ggml: no fit exists, and the block's scales are 0."""
    found = dequantize(quantize(INPUT, code, np.zeros_like(IMATRIX)), code)
    assert not found.any()


@every_code
def test_weights_without_importance_do_not_count(code: str) -> None:
    """The error of the others falls below what it is when all count."""
    generator = np.random.default_rng(7)
    weights = generator.standard_normal((8, 1024), np.float32)
    importance = (generator.random(1024) < 0.5).astype(np.float32)

    def error(found: Bytes) -> float:
        off = (dequantize(found, code) - weights) * importance
        return float(np.square(off).sum())

    assert error(quantize(weights, code, importance)) < 0.9 * error(quantize(weights, code))
