"""GPTQ onto ggml's types: gguf-py's opinion of the fields, the textbook's of the codes."""

from __future__ import annotations

import runpy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from dqconvert.quantizers import gptq as common
from dqconvert.quantizers import recipe
from dqconvert.quantizers.ggml import blocks, fields, gptq, jit
from dqconvert.quantizers.recipe import RecipeOptions
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.schemes.gguf import block_spec
from dqconvert.quantizers.spec import BLOCKS, CODES
from dqconvert.quantizers.tensors import LinearProblem, QuantizedTensor

torch.set_num_threads(1)

problems = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("problems.py"))))
GOLDEN = load_file(Path(__file__).with_name("data") / "ggml.safetensors")


@pytest.fixture(autouse=True)
def nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same bytes, and no compiler to wait for."""
    monkeypatch.setattr(jit, "available", lambda: False)


TAME = [0, 1, 2, 3, 4, 10]
"""Golden rows whose magnitudes are ordinary."""

every_type = pytest.mark.parametrize("code", sorted(fields.LAYOUTS))
some_types = pytest.mark.parametrize("code", ["q2_k", "q3_k", "q4_k", "q6_k", "q4_0", "iq4_xs"])


def key(code: str) -> str:
    return code.replace("_k", "_K") if code[0] == "q" else code


def golden(code: str) -> QuantizedTensor:
    """ggml's blocks of the ordinary rows."""
    return blocks.wrap(GOLDEN[f"{key(code)}.bytes"][TAME], block_spec(code))


def weights() -> Tensor:
    return GOLDEN["input"][TAME].clone()


def grid(q: QuantizedTensor) -> Tensor:
    """All that each weight could be under its scales, [N, K, levels] fp64."""
    found = fields.split(q.codes, q.spec.code)
    wide = found.codes.shape[1] // found.step.shape[1]
    step = found.step.double().repeat_interleave(wide, 1)
    offset = 0.0
    if found.offset is not None:
        offset = found.offset.double().repeat_interleave(wide, 1)[..., None]
    levels = fields.levels(q.spec.code).double()
    if q.spec.code == "q8_0":  # of which ggml never writes -128
        levels = levels[1:]
    return step[..., None] * levels + offset


def values(q: QuantizedTensor) -> Tensor:
    """The weights as gguf-py decodes them, fp64."""
    raw = gguf.quants.dequantize(q.codes.numpy(), Kind[q.spec.code.upper()])
    return torch.from_numpy(raw).double()


def loss(q: QuantizedTensor, weight: Tensor, moment: Tensor) -> float:
    off = values(q) - weight.double()
    return float(((off @ moment.double()) * off).sum())


def moment_of(columns: int, seed: int = 0) -> Tensor:
    x = problems.inputs(columns, seed, rows=2 * columns)
    return x.T @ x / len(x)


def loudest(moment: Tensor) -> tuple[Tensor, Tensor]:
    order = moment.diagonal().argsort(descending=True)
    return order, common.inverse_factor(moment[order][:, order])


def textbook(weight: Tensor, upper: Tensor, start: QuantizedTensor, order: Tensor) -> Tensor:
    """The loop of the paper in float64, over columns in an order: what the weights become."""
    w, u, levels = weight.double().clone(), upper.double(), grid(start)
    for place, j in enumerate(order.tolist()):
        nearest = (levels[:, j] - w[:, j : j + 1]).abs().argmin(1, keepdim=True)
        value = levels[:, j].gather(1, nearest)[:, 0]
        error = (w[:, j] - value) / u[place, place]
        rest = order[place + 1 :]
        w[:, rest] -= error[:, None] * u[place, place + 1 :]
        w[:, j] = value
    return w


@every_type
@settings(max_examples=25, derandomize=True, deadline=None)
@given(data=st.data())
def test_fields_are_those_of_any_bytes_and_go_back(code: str, data: st.DataObject) -> None:
    columns, size = BLOCKS[code.upper()]
    rows, across = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    packed = torch.from_numpy(rng.integers(0, 256, (rows, across * size), dtype=np.uint8))
    found = fields.split(packed, code)
    assert found.codes.shape == (rows, across * columns)
    assert torch.equal(fields.join(packed, code, found.codes), packed)
    count = len(fields.levels(code))
    other = torch.from_numpy(rng.integers(0, count, found.codes.shape, dtype=np.uint8))
    again = fields.split(fields.join(packed, code, other), code)
    assert torch.equal(again.codes, other)
    assert torch.equal(again.step.nan_to_num(), found.step.nan_to_num())


@every_type
def test_fields_give_the_weights_bit_for_bit(code: str) -> None:
    rng = np.random.default_rng(3)
    size = BLOCKS[code.upper()][1]
    packed = rng.integers(0, 256, (40, 2 * size), dtype=np.uint8)
    found = fields.split(torch.from_numpy(packed), code)
    levels = fields.levels(code)
    assert torch.equal(levels, levels.sort()[0])
    wide = found.codes.shape[1] // found.step.shape[1]
    ours = found.step.repeat_interleave(wide, 1) * levels[found.codes.int()]
    if found.offset is not None:
        ours += found.offset.repeat_interleave(wide, 1)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(packed, Kind[code.upper()])
    np.testing.assert_array_equal(ours.numpy(), theirs)


def test_types_whose_codes_stand_for_several_weights_are_not_covered() -> None:
    left_out = {name for name in CODES if CODES[name].block and not gptq.covers(name)}
    assert left_out == {
        "iq1_m", "iq1_s", "iq2_s", "iq2_xs", "iq2_xxs", "iq3_s", "iq3_xxs", "tq1_0", "tq2_0",
    }  # fmt: skip


@every_type
def test_it_is_the_textbooks_loop(code: str) -> None:
    weight, start = weights(), golden(code)
    order, upper = loudest(moment_of(1024))
    ours = values(gptq.quantize(weight, upper, start, order))
    theirs = textbook(weight, upper, start, order)
    assert ((ours - theirs).abs() < 1e-6 * weight.abs().amax()).double().mean() > 0.9
    off, want = (((w - weight.double()).square().mean()) for w in (ours, theirs))
    assert torch.isclose(off, want, rtol=0.02)


@every_type
def test_inputs_that_know_nothing_of_each_other_get_the_nearest_levels(code: str) -> None:
    weight, start = weights(), golden(code)
    nearest = (grid(start) - weight.double()[..., None]).abs().amin(2)
    plain = gptq.quantize(weight, torch.eye(1024), start, torch.arange(1024))
    swept = gptq.sweep(weight, torch.rand(1024).add(0.1).diag(), start)
    for q in (plain, swept):
        off = (values(q) - weight.double()).abs()
        torch.testing.assert_close(off, nearest, rtol=1e-4, atol=1e-6)


@some_types
@pytest.mark.parametrize("seed", [0, 1])
def test_it_beats_ggmls_own_rounding_by_the_inputs_importance(code: str, seed: int) -> None:
    columns, spec = 512, block_spec(code)
    weight = problems.problem_of(24, columns, seed).weight
    moment = moment_of(columns, seed)
    order, upper = loudest(moment)
    theirs = loss(blocks.result(weight, spec, moment.diagonal()), weight, moment)
    metric = gptq.importance(moment.diagonal(), upper, order)
    q = gptq.quantize(weight, upper, blocks.result(weight, spec, metric), order)
    swept = gptq.sweep(weight, moment, q)
    assert loss(swept, weight, moment) <= loss(q, weight, moment) < 0.5 * theirs


@every_type
def test_a_sweep_never_errs_more(code: str) -> None:
    weight, q, moment = weights(), golden(code), moment_of(1024, 5)
    losses = [loss(q, weight, moment)]
    for _ in range(3):
        q = gptq.sweep(weight, moment, q)
        losses.append(loss(q, weight, moment))
    assert all(b <= a * (1 + 1e-4) for a, b in pairwise(losses))
    assert losses[1] < losses[0]


def test_channels_that_were_never_active_keep_their_codes() -> None:
    weight, start, moment = weights(), golden("q4_k"), moment_of(1024)
    dead = torch.arange(5, 1024, 7)
    moment[dead], moment[:, dead] = 0.0, 0.0
    swept = fields.split(gptq.sweep(weight, moment, start).codes, "q4_k")
    assert torch.equal(swept.codes[:, dead], fields.split(start.codes, "q4_k").codes[:, dead])


@every_type
def test_zeros_stay_zeros(code: str) -> None:
    moment, weight = moment_of(256), torch.zeros(1, 256)
    order, upper = loudest(moment)
    start = blocks.result(weight, block_spec(code), moment.diagonal())
    for q in (gptq.quantize(weight, upper, start, order), gptq.sweep(weight, moment, start)):
        assert not values(q).any()


def test_no_rows_are_no_rows() -> None:
    moment, weight = moment_of(256), torch.zeros(0, 256)
    order, upper = loudest(moment)
    start = blocks.result(weight, block_spec("q4_k"))
    assert gptq.quantize(weight, upper, start, order).codes.shape == (0, 144)
    assert gptq.sweep(weight, moment, start).codes.shape == (0, 144)


def test_rows_know_nothing_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, start, moment = weights(), golden("q5_k"), moment_of(1024)
    order, upper = loudest(moment)
    whole = gptq.quantize(weight, upper, start, order)
    monkeypatch.setattr(gptq, "ROWS", 1)
    single = gptq.quantize(weight, upper, start, order)
    same = fields.split(whole.codes, "q5_k").codes == fields.split(single.codes, "q5_k").codes
    assert same.double().mean() > 0.99  # sums of other widths may round otherwise


@pytest.mark.parametrize("code", ["q4_k", "q2_k"])
def test_a_recipe_with_gptq_beats_one_without(code: str) -> None:
    scheme = schemes()[f"gguf-{code}"]
    problem: LinearProblem = problems.problem_of(32, 256)
    errors = []
    for rounding in ("rtn", "mse", "gptq"):
        q = recipe.quantize_linear(problem, scheme, RecipeOptions(rounding=rounding))
        errors.append(problems.error_of(q, problem, scheme))
    assert errors[2] < 0.8 * errors[1]
    assert errors[1] < errors[0]


def test_a_recipe_of_a_codebook_type_does_without() -> None:
    scheme = replace(schemes()["gguf-q4_k"], weight=block_spec("iq3_s"))
    problem: LinearProblem = problems.problem_of(4, 256)
    q = recipe.quantize_linear(problem, scheme, RecipeOptions(rounding="gptq"))
    assert q.spec.code == "iq3_s"
