"""IQ1, IQ2 and IQ3 against ggml's own bytes, and against gguf's dequantizers on any bytes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from dqconvert.quantizers.ggml import blocks, grids
from dqconvert.quantizers.spec import BLOCKS, NEEDS_IMPORTANCE

pytest.importorskip("numba")
from dqconvert.quantizers.ggml.compiled.floats import to_half

CODES = ["iq1_m", "iq1_s", "iq2_s", "iq2_xs", "iq2_xxs", "iq3_s", "iq3_xxs"]
WAYS = ["", "_ones", "_imatrix"]


@cache
def golden() -> dict[str, np.ndarray]:
    """What ggml made of the rows in `input`."""
    return load_file(Path(__file__).parent / "data" / "ggml.safetensors")


def importance(way: str) -> torch.Tensor | None:
    """What a way weighs columns with."""
    columns = torch.from_numpy(golden()["imatrix"])
    return {"": None, "_ones": torch.ones_like(columns), "_imatrix": columns}[way]


def cases() -> list[tuple[str, str]]:
    """Types with the ways that ggml has for them."""
    return [(code, way) for code in CODES for way in WAYS if way or code not in NEEDS_IMPORTANCE]


@pytest.mark.parametrize(("code", "way"), cases())
def test_bytes_are_ggmls(code: str, way: str) -> None:
    weight = torch.from_numpy(golden()["input"])
    expected = golden().get(f"{code}.bytes{way}", golden().get(f"{code}.bytes"))
    found = blocks.quantize(weight, code, importance(way))
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("code", CODES)
def test_one_row_is_what_it_is_among_others(code: str) -> None:
    weight = torch.from_numpy(golden()["input"])
    rows = [blocks.quantize(row[None], code, importance("_imatrix")) for row in weight]
    np.testing.assert_array_equal(torch.cat(rows).numpy(), golden()[f"{code}.bytes_imatrix"])


@pytest.mark.parametrize("code", CODES)
def test_zeros_come_back(code: str) -> None:
    found = blocks.quantize(torch.zeros(2, 512), code, torch.ones(512))
    assert not blocks.dequantize(found, code).any()


@pytest.mark.parametrize(
    ("code", "way"),
    [case for case in cases() if "{}.dequantized{}".format(*case) in golden()],
)
def test_weights_are_ggmls(code: str, way: str) -> None:
    expected = golden()[f"{code}.dequantized{way}"]
    rows = torch.from_numpy(golden()[f"{code}.bytes{way}"])
    np.testing.assert_array_equal(blocks.dequantize(rows, code).numpy(), expected)


@pytest.mark.parametrize("code", CODES)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 3), columns=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_any_bytes_mean_what_gguf_says(code: str, seed: int, rows: int, columns: int) -> None:
    size = BLOCKS[code.upper()][1] * columns
    some = np.random.default_rng(seed).integers(0, 256, (rows, size), dtype=np.uint8)
    found = blocks.dequantize(torch.from_numpy(some), code).numpy()
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(some, gguf.GGMLQuantizationType[code.upper()])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("code", CODES)
def test_points_are_found_and_other_codes_have_the_nearest(code: str) -> None:
    grid = grids.grid(code)
    powers = grid.base ** np.arange(grid.dims)
    np.testing.assert_array_equal(grid.index[grid.levels @ powers], np.arange(len(grid.levels)))
    for at in np.random.default_rng(0).integers(0, len(grid.index), 100):
        distances = ((grid.levels.astype(int) - at // powers % grid.base) ** 2).sum(1)
        found = grid.neighbours[grid.starts[at] : grid.starts[at + 1]]
        if grid.index[at] >= 0:
            assert not distances[grid.index[at]] and not len(found)
            continue
        order = np.argsort(distances, kind="stable")[: len(found)]
        np.testing.assert_array_equal(found, order)
        rest = np.delete(distances, found)
        assert distances[found].max() < rest.min()


def test_signs_are_ggufs() -> None:
    expected = np.frombuffer(gguf.quants.IQ2_XXS.ksigns, np.uint8)
    np.testing.assert_array_equal(grids.signs(), expected)


@pytest.mark.parametrize("first", range(0, 65536, 8192))
def test_halves_round_as_numpy_does(first: int) -> None:
    exact = np.arange(first, first + 8192, dtype=np.uint32).astype(np.uint16)
    wide = exact.view(np.float16).astype(np.float32)
    bits = wide.view(np.uint32)[:, None] + np.arange(-0x1000, 0x1001, 0x800).astype(np.uint32)
    near = bits.view(np.float32)[np.isfinite(wide)].ravel()
    near = near[np.isfinite(near)][:: max(1, near.size // 4096)]
    with np.errstate(all="ignore"):
        expected = near.astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal([to_half(x) for x in near], expected)
