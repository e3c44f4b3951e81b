"""Laws of all of ggml's block types, whatever computes them.

Both ways to compute them give the same bytes, rows do not know of each other, and the errors on
Gaussian weights are those that ggml's own library makes (measured with it, relative RMSE).
"""

from __future__ import annotations

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dqconvert.quantizers.errors import DataError
from dqconvert.quantizers.ggml import blocks, jit
from dqconvert.quantizers.spec import BLOCKS, CODES, NEEDS_IMPORTANCE

ERRORS = {
    "q8_0": (0.00535, 0.00535), "q6_k": (0.01774, 0.01729), "q5_1": (0.03786, 0.03378),
    "q5_k": (0.03612, 0.03535), "q5_0": (0.04275, 0.04038), "q4_1": (0.07827, 0.06990),
    "q4_k": (0.07139, 0.07076), "q4_0": (0.08595, 0.08159), "iq4_nl": (0.07619, 0.07483),
    "iq4_xs": (0.07676, 0.07551), "mxfp4": (0.11494, 0.11494), "q3_k": (0.15092, 0.14436),
    "iq3_s": (0.16596, 0.13681), "iq3_xxs": (0.21297, 0.18162), "q2_k": (0.29674, 0.26804),
    "iq2_s": (0.26480, 0.24892), "iq2_xs": (None, 0.29978), "iq2_xxs": (None, 0.34344),
    "tq2_0": (0.807, 0.807), "tq1_0": (0.807, 0.807), "iq1_m": (0.581, 0.451),
    "iq1_s": (None, 0.485),
}  # fmt: skip
"""Without and with an importance matrix of ones: what specs measured with ggml 0.21."""

CODES_OF_BLOCKS = sorted(name for name in CODES if CODES[name].block)
every_code = pytest.mark.parametrize("code", CODES_OF_BLOCKS)
lawful = settings(derandomize=True, deadline=None, max_examples=8)


def ones_of(code: str, columns: int) -> Tensor | None:
    return torch.ones(columns) if code in NEEDS_IMPORTANCE else None


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def decoded(code: str, packed: Tensor) -> Tensor:
    """By the gguf package."""
    found = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[code.upper()])
    return torch.from_numpy(found.copy())


def test_all_types_are_here() -> None:
    assert set(ERRORS) == set(CODES_OF_BLOCKS) == {dtype.lower() for dtype in BLOCKS}


@every_code
def test_errors_are_those_of_ggml(code: str) -> None:
    weight = normal(24, 2048)
    for importance, want in zip((None, torch.ones(2048)), ERRORS[code], strict=True):
        if want is None:
            with pytest.raises(ValueError, match="needs an importance matrix"):
                blocks.quantize(weight, code, importance)
            continue
        again = decoded(code, blocks.quantize(weight, code, importance))
        assert float((again - weight).norm() / weight.norm()) == pytest.approx(want, rel=0.02)


@every_code
@lawful
@given(
    seed=st.integers(0, 2**20),
    rows=st.integers(1, 5),
    gain=st.sampled_from([1.0, 0.02, 1e-6, 100.0]),
    learned=st.booleans(),
)
def test_both_ways_to_compute_give_the_same_bytes(
    code: str, seed: int, rows: int, gain: float, learned: bool
) -> None:
    weight = normal(rows, 512, seed) * gain
    weight[0, ::37] *= 20
    importance = normal(1, 512, seed + 1)[0].square() if learned else ones_of(code, 512)
    compiled = blocks.quantize(weight, code, importance)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "available", lambda: False)
        plain = blocks.quantize(weight, code, importance)
        back = blocks.dequantize(compiled, code)
    assert torch.equal(compiled, plain)
    assert torch.equal(back, blocks.dequantize(compiled, code))


@every_code
def test_rows_do_not_know_of_each_other(code: str) -> None:
    weight, importance = normal(7, 768, 3), torch.ones(768)
    whole = blocks.quantize(weight, code, importance)
    apart = [blocks.quantize(weight[i : i + 1], code, importance) for i in range(7)]
    assert torch.equal(whole, torch.cat(apart))
    assert torch.equal(whole, blocks.quantize(weight.T.contiguous().T, code, importance))
    half = weight.bfloat16()
    assert torch.equal(
        blocks.quantize(half, code, importance), blocks.quantize(half.float(), code, importance)
    )


@every_code
def test_zeros_stay_zeros_and_nothing_is_nothing(code: str) -> None:
    importance = ones_of(code, 256)
    zeros = blocks.quantize(torch.zeros(3, 256), code, importance)
    back = blocks.dequantize(zeros, code)
    assert torch.equal(back, decoded(code, zeros))
    assert float(back.abs().max()) < 1e-6
    assert blocks.quantize(torch.zeros(0, 256), code, importance).shape == (
        0,
        blocks.row_bytes(code, 256),
    )


@every_code
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_refused(code: str, value: float) -> None:
    weight = normal(2, 512)
    weight[1, 300] = value
    with pytest.raises(DataError, match="NaN or infinity"):
        blocks.quantize(weight, code, torch.ones(512))


@every_code
def test_a_width_that_blocks_do_not_divide_is_refused(code: str) -> None:
    with pytest.raises(ValueError, match="does not divide"):
        blocks.quantize(normal(2, 40), code, torch.ones(40))
