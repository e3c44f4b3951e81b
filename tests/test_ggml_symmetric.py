"""Q3_K, Q6_K, IQ4_NL and IQ4_XS by compiled kernels: ggml's own bytes, and what they stand for."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dqconvert.quantizers.ggml.blocks import dequantize, quantize, row_bytes

pytest.importorskip("numba")

GOLDEN = load_file(Path(__file__).parent / "data" / "ggml.safetensors")
INPUT, IMATRIX = GOLDEN["input"], GOLDEN["imatrix"]
NAMES = {"q3_k": "q3_K", "q6_k": "q6_K", "iq4_nl": "iq4_nl", "iq4_xs": "iq4_xs"}
WAYS = {"bytes": None, "bytes_ones": torch.ones(1024), "bytes_imatrix": IMATRIX}

codes = pytest.mark.parametrize("code", NAMES)
lawful = settings(derandomize=True, deadline=None, max_examples=40)


def golden(code: str, way: str) -> torch.Tensor:
    """ggml's bytes of INPUT; the file leaves out those that importance does not change."""
    return GOLDEN.get(f"{NAMES[code]}.{way}", GOLDEN[f"{NAMES[code]}.bytes"])


@codes
@pytest.mark.parametrize("way", WAYS)
def test_bytes_are_those_of_ggml(code: str, way: str) -> None:
    assert torch.equal(quantize(INPUT, code, WAYS[way]), golden(code, way))


@codes
def test_weights_are_those_of_ggml(code: str) -> None:
    found = dequantize(golden(code, "bytes"), code)
    assert torch.equal(found, GOLDEN[f"{NAMES[code]}.dequantized"])


@codes
@lawful
@given(rows=st.integers(1, 5), blocks=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_any_bytes_are_the_weights_that_gguf_reads(
    code: str, rows: int, blocks: int, seed: int
) -> None:
    shape = rows, row_bytes(code, 256 * blocks)
    stored = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        wanted = gguf.dequantize(stored, gguf.GGMLQuantizationType[code.upper()])
    found = dequantize(torch.from_numpy(stored), code).numpy()
    assert np.array_equal(found, wanted, equal_nan=True)


@codes
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [slice(0, 1), slice(1, 4), slice(4, 11)])
def test_rows_do_not_see_each_other(code: str, way: str, rows: slice) -> None:
    assert torch.equal(quantize(INPUT[rows], code, WAYS[way]), golden(code, way)[rows])


@codes
@pytest.mark.parametrize("way", WAYS)
def test_many_rows(code: str, way: str) -> None:
    rows = torch.cat([INPUT, INPUT.flip(0), INPUT[:3], INPUT])
    wanted = golden(code, way)
    wanted = torch.cat([wanted, wanted.flip(0), wanted[:3], wanted])
    assert torch.equal(quantize(rows, code, WAYS[way]), wanted)


@codes
def test_columns_of_one_block(code: str) -> None:
    wide = quantize(INPUT, code, IMATRIX)
    size = wide.shape[1] // 4
    for part in range(4):
        columns = slice(256 * part, 256 * part + 256)
        found = quantize(INPUT[:, columns], code, IMATRIX[columns])
        assert torch.equal(found, wide[:, size * part : size * part + size])


@codes
@pytest.mark.parametrize("importance", [None, torch.ones(512), torch.zeros(512)])
def test_zeros_stay_zeros(code: str, importance: torch.Tensor | None) -> None:
    found = dequantize(quantize(torch.zeros(3, 512), code, importance), code)
    assert torch.equal(found, torch.zeros(3, 512))


@codes
@lawful
@given(seed=st.integers(0, 2**32))
def test_importance_moves_the_error_to_what_does_not_matter(code: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 1024, generator=generator)
    matters = torch.rand(1024, generator=generator) < 0.1
    importance = torch.where(matters, 1.0, 0.0)
    plain = dequantize(quantize(weight, code), code) - weight
    weighted = dequantize(quantize(weight, code, importance), code) - weight
    assert weighted[:, matters].square().mean() < plain[:, matters].square().mean()


@codes
@lawful
@given(seed=st.integers(0, 2**32), scale=st.floats(-5, 12))
def test_error_is_that_of_the_bits_at_any_scale(code: str, seed: int, scale: float) -> None:
    weight = torch.randn(3, 512, generator=torch.Generator().manual_seed(seed)) * 2.0**scale
    limit = {"q3_k": 0.18, "q6_k": 0.025, "iq4_nl": 0.1, "iq4_xs": 0.1}[code]
    error = dequantize(quantize(weight, code), code) - weight
    assert error.norm() < limit * weight.norm()
