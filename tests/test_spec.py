"""Numbers as they are described: limits against the formats' own tables, grids, schemes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from dqconvert.formats.targets import targets
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import ALL, BLOCKS, CODES, DTYPE_BITS, STEPS, QuantSpec, TensorInfo
from dqconvert.quantizers.tensors import DTYPE_NAMES, TORCH_DTYPES

MAXIMA = {"int4": 7, "uint4": 15, "int8": 127, "e2m1": 6, "e3m2": 28, "e4m3": 448, "e5m2": 57344}
MAXIMA |= {
    "nf4": 1,
    "fp4": 1,
    "lut4": 0.980671,
    "f16": 65504,
    "bf16": torch.finfo(torch.bfloat16).max,
}

lawful = settings(derandomize=True, deadline=None, max_examples=50)


@pytest.mark.parametrize("name", MAXIMA)
def test_limits_follow_from_the_bits(name: str) -> None:
    assert CODES[name].maximum == MAXIMA[name]
    assert QuantSpec(name, (1, ALL)).maximum == MAXIMA[name]
    assert QuantSpec(name, (1, ALL)).bits == CODES[name].bits


def test_block_types_are_those_of_ggml() -> None:
    for dtype, (weights, size) in BLOCKS.items():
        assert GGML_QUANT_SIZES[GGMLQuantizationType[dtype]] == (weights, size)
        assert CODES[dtype.lower()].block == weights
        assert TensorInfo(dtype, (3, 512)).nbytes == 3 * 512 // weights * size
        assert TensorInfo(dtype, (3, 512)).stored.nbytes == TensorInfo(dtype, (3, 512)).nbytes
    assert set(CODES) == MAXIMA.keys() | {dtype.lower() for dtype in BLOCKS}


def test_limits_are_torchs() -> None:
    assert CODES["int8"].maximum == torch.iinfo(torch.int8).max
    assert CODES["e4m3"].maximum == torch.finfo(torch.float8_e4m3fn).max
    assert CODES["e5m2"].maximum == torch.finfo(torch.float8_e5m2).max


def test_dtypes_are_torchs() -> None:
    assert TORCH_DTYPES.keys() == DTYPE_BITS.keys()
    for name, dtype in TORCH_DTYPES.items():
        assert dtype.itemsize * 8 == DTYPE_BITS[name]
        assert DTYPE_NAMES[dtype] == name
        assert TensorInfo(name, (3, 5)).nbytes == torch.empty(3, 5, dtype=dtype).nbytes
    assert TensorInfo("F32", ()).nbytes == 4
    assert TensorInfo("F32", (0, 7)).nbytes == 0


tiles = st.tuples(st.sampled_from([1, 2, 128, ALL]), st.sampled_from([1, 16, 64, 128, ALL]))
extents = st.integers(0, 400)


@lawful
@given(tile=tiles, shape=st.tuples(extents, extents))
def test_the_grid_counts_the_tiles(tile: tuple[int, int], shape: tuple[int, int]) -> None:
    spec = QuantSpec("int8", tile)
    sides = [e if t == ALL else t for t, e in zip(tile, shape, strict=True)]
    if any(side and extent % side for side, extent in zip(sides, shape, strict=True)):
        with pytest.raises(ValueError, match=r"int8 needs tiles of .* does not divide"):
            spec.grid(shape)
        return
    want = tuple(e // s if s else 0 for e, s in zip(shape, sides, strict=True))
    assert spec.grid(shape) == want


@pytest.mark.parametrize("name", schemes())
def test_schemes_name_what_exists(name: str) -> None:
    scheme = schemes()[name]
    assert scheme.name == name
    assert scheme.targets, "a scheme that nobody reads"
    assert all(targets()[target].accepts(scheme) is None for target in scheme.targets)
    for spec in (scheme.weight, scheme.activation, scheme.modulation):
        if spec is not None:
            assert spec.code in CODES
            assert spec.scale in DTYPE_BITS
            assert spec.tensor_scale is None or spec.tensor_scale in DTYPE_BITS
    assert scheme.steps == tuple(step for step in STEPS if step in scheme.steps)
    assert (scheme.rotation > 0) is ("rotate" in scheme.steps)
    assert (0 < scheme.share < 1) is (scheme.better in schemes())
    assert (scheme.rank > 0) is ("lowrank" in scheme.steps)
    assert scheme.rounding in ("rtn", "gptq")
    assert scheme.summary == scheme.summary.strip() != ""
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.rank = 1  # type: ignore[misc]
