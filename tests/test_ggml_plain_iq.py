"""The IQ types in torch alone: ggml's own bytes, and the gguf package's decoder."""

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

from dqconvert.quantizers.ggml import blocks
from dqconvert.quantizers.ggml.plain import codebook, iq1, iq2, iq3, lanes
from dqconvert.quantizers.spec import BLOCKS, NEEDS_IMPORTANCE

MODULES = (iq3, iq2, iq1)
QUANTIZERS = {code: way for module in MODULES for code, way in module.QUANTIZERS.items()}
DEQUANTIZERS = {code: way for module in MODULES for code, way in module.DEQUANTIZERS.items()}

DATA = Path(__file__).with_name("data")
GOLDEN = load_file(DATA / "ggml.safetensors")
EDGES = load_file(DATA / "ggml_iq_edges.safetensors")
"""What ggml's library makes of twelve rows with ties, sub-blocks of zeros, spikes and extremes;
with an importance of zeros, of zeros with a few others, and of e^-40 to e^40."""

every_code = pytest.mark.parametrize("code", QUANTIZERS)
lawful = settings(derandomize=True, deadline=None, max_examples=60)


def ways(ending: str) -> list[tuple[str, str]]:
    """Codes and the ways of which there is golden data."""
    keys = (f"bytes{ending}", f"bytes_ones{ending}", f"bytes_imatrix{ending}")
    return [(code, key) for code in QUANTIZERS for key in keys if f"{code}.{key}" in GOLDEN]


@pytest.mark.parametrize(("code", "way"), ways(""))
def test_bytes_are_ggmls(code: str, way: str) -> None:
    imatrix = GOLDEN["imatrix"]
    importance = {"bytes_ones": torch.ones_like(imatrix), "bytes_imatrix": imatrix}.get(way)
    assert torch.equal(QUANTIZERS[code](GOLDEN["input"], importance), GOLDEN[f"{code}.{way}"])


@pytest.mark.parametrize("key", [key for key in GOLDEN if ".dequantized" in key])
def test_weights_are_ggmls(key: str) -> None:
    code = key.split(".")[0]
    if code not in DEQUANTIZERS:
        return
    found = DEQUANTIZERS[code](GOLDEN[key.replace("dequantized", "bytes")])
    assert torch.equal(found.view(torch.int32), GOLDEN[key].view(torch.int32))


@pytest.mark.parametrize("key", [key for key in EDGES if key.startswith("iq")])
def test_bytes_are_ggmls_at_the_edges(key: str) -> None:
    code, way = key.split(".")
    assert torch.equal(QUANTIZERS[code](EDGES["input"], EDGES.get(f"importance.{way}")), EDGES[key])


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
def test_chunks_change_nothing(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    importance, expected = EDGES["importance.sparse"], EDGES[f"{code}.sparse"][:7]
    weight = DEQUANTIZERS[code](expected)
    monkeypatch.setitem(lanes.CHUNK, "cpu", 5 * 256)
    monkeypatch.setitem(codebook.ROOM, "cpu", 3 * 256 * 25)
    assert torch.equal(QUANTIZERS[code](EDGES["input"][:7], importance), expected)
    assert torch.equal(DEQUANTIZERS[code](expected), weight)


@every_code
def test_one_block_alone(code: str) -> None:
    size = BLOCKS[code.upper()][1]
    importance = EDGES["importance.wild"][:256]
    for row, expected in zip(EDGES["input"], EDGES[f"{code}.wild"], strict=True):
        assert torch.equal(QUANTIZERS[code](row[None, :256], importance)[0], expected[:size])


@every_code
@pytest.mark.parametrize("importance", [None, torch.ones(512), torch.zeros(512)])
def test_zeros_stay_zeros(code: str, importance: Tensor | None) -> None:
    if importance is None and code in NEEDS_IMPORTANCE:
        return
    weight = DEQUANTIZERS[code](QUANTIZERS[code](torch.zeros(3, 512), importance))
    assert torch.equal(weight, torch.zeros(3, 512))


@pytest.mark.parametrize("code", ["iq3_s", "iq2_s", "iq1_m"])
def test_error_is_what_bits_allow(code: str) -> None:
    """Relative error of normal weights, as measured with ggml's library."""
    allowed = {"iq3_s": 0.14, "iq2_s": 0.26, "iq1_m": 0.46}
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    back = DEQUANTIZERS[code](QUANTIZERS[code](x, torch.ones(512)))
    assert float((back - x).norm() / x.norm()) < allowed[code]


@every_code
def test_without_a_compiler(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dqconvert.quantizers.ggml.jit.available", lambda: False)
    rows = EDGES["input"][1:2]  # multiples of a half, which bf16 holds
    found = blocks.quantize(rows.bfloat16(), code, EDGES["importance.wild"].double())
    assert torch.equal(found, EDGES[f"{code}.wild"][1:2])
    assert torch.equal(blocks.dequantize(found, code), DEQUANTIZERS[code](found))


@every_code
def test_everything_happens_on_the_tensors_device(
    code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without data refuse those of other devices, numpy, and questions about values.

    Which points are chosen is such a question.
    """
    monkeypatch.setattr(codebook.Codebook, "choose", lambda self, codes, *_: codes)
    rows, importance = torch.empty(3, 768, device="meta"), torch.empty(768, device="meta")
    for given_importance in (importance,) if code in NEEDS_IMPORTANCE else (None, importance):
        packed = QUANTIZERS[code](rows, given_importance)
        assert packed.shape == (3, blocks.row_bytes(code, 768))
        assert DEQUANTIZERS[code](packed).shape == rows.shape
