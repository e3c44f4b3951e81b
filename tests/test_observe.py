"""Statistics against float64 over the concatenated rows, and the laws of the held sample.

The identity n·XᵀX + heldᵀ·held = the sum over all rows fails if a row is lost or counted twice;
with one-hot rows it counts each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dqconvert.calibration.observe import Observer
from dqconvert.quantizers.errors import CalibrationError
from dqconvert.quantizers.tensors import LayerStats


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only lose time to the start of other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def observe(
    parts: list[tuple[int, Tensor]], rows: int = 16, moments: bool = True, seed: int = 0
) -> tuple[LayerStats, Observer]:
    observer = Observer("site", rows, moments, seed)
    for source, part in parts:
        observer.add(part, source)
    return observer.finish(), observer


def rows_of(count: int, channels: int, seed: int, gain: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, generator=generator) * gain


def cut(x: Tensor, places: list[int]) -> list[tuple[int, Tensor]]:
    ends = sorted({0, len(x), *(place % (len(x) + 1) for place in places)})
    return [(0, x[a:b]) for a, b in pairwise(ends)]


def same(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    scale = max(float(b.abs().max()), 1e-30)
    return float((a.double() - b.double()).abs().max()) <= tolerance * scale


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 300),
    channels=st.integers(1, 9),
    rows=st.integers(1, 40),
    places=st.lists(st.integers(0, 10_000), max_size=6),
    seed=st.integers(0, 2**31),
    gain=st.floats(1e-6, 1e6),
)
def test_against_float64(
    count: int, channels: int, rows: int, places: list[int], seed: int, gain: float
) -> None:
    x = rows_of(count, channels, seed, gain)
    stats, observer = observe(cut(x, places), rows)
    wide = x.double()
    assert stats.count == count
    assert torch.equal(stats.absmax, x.abs().amax(0))
    assert same(stats.mean_square, wide.square().mean(0), 1e-6)
    assert float((stats.mean - wide.mean(0)).abs().max()) <= 1e-6 * float(wide.abs().max())
    held = stats.rows.double()
    assert len(held) == min(rows, count // 8 or int(count > 1))
    assert observer.moment_rows + len(held) == count, "each row is in one of the two"
    assert stats.second_moment is not None
    both = stats.second_moment.double() * observer.moment_rows + held.T @ held
    assert same(both, wide.T @ wide)
    assert stats.second_moment.dtype == stats.rows.dtype == stats.mean.dtype == torch.float32


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 200),
    rows=st.integers(1, 30),
    places=st.lists(st.integers(0, 10_000), max_size=8),
)
def test_held_rows_are_in_no_moment_exactly(count: int, rows: int, places: list[int]) -> None:
    """One-hot rows: the diagonal of XᵀX counts how often each row went in, 0 or 1."""
    x = torch.eye(count)
    stats, observer = observe(cut(x, places), rows)
    assert stats.second_moment is not None
    times = (stats.second_moment * observer.moment_rows).round()
    assert torch.equal(times, torch.diag(1 - stats.rows.sum(0)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    count=st.integers(2, 200),
    places=st.lists(st.integers(0, 10_000), max_size=8),
    seed=st.integers(0, 2**31),
)
def test_batches_do_not_matter(count: int, places: list[int], seed: int) -> None:
    x = rows_of(count, 5, seed)
    whole, _ = observe([(0, x)])
    parts, _ = observe(cut(x, places))
    assert torch.equal(whole.rows, parts.rows)
    assert torch.equal(whole.absmax, parts.absmax)
    assert same(parts.mean_square, whole.mean_square, 1e-6)
    assert whole.second_moment is not None and parts.second_moment is not None
    assert same(parts.second_moment, whole.second_moment)


def test_the_order_of_the_prompts_does_not_matter() -> None:
    parts = [(source, rows_of(50 + source, 4, seed)) for seed, source in enumerate([0, 1, 2, 0, 1])]
    here, _ = observe(parts)
    there, _ = observe([parts[i] for i in (2, 1, 0, 4, 3)])  # each prompt's own order is kept
    assert torch.equal(here.rows, there.rows)
    assert here.second_moment is not None and there.second_moment is not None
    assert same(here.second_moment, there.second_moment)


def test_the_same_stream_gives_the_same_bits() -> None:
    parts = [(source % 3, rows_of(97, 7, source)) for source in range(9)]
    (one, _), (two, _) = observe(parts), observe(parts)
    for field in ("absmax", "mean", "mean_square", "second_moment", "rows"):
        assert torch.equal(getattr(one, field), getattr(two, field))


def test_the_seed_chooses_the_sample() -> None:
    x = rows_of(400, 3, 0)
    assert not torch.equal(observe([(0, x)], seed=0)[0].rows, observe([(0, x)], seed=1)[0].rows)


def test_the_sample_is_uniform_over_the_stream() -> None:
    """Over 600 seeds each of 64 places is held 75 times, with a standard deviation of 8.1."""
    x = torch.eye(64)
    times = sum(observe([(0, x)], rows=8, seed=seed)[0].rows.sum(0) for seed in range(600))
    assert isinstance(times, Tensor)
    assert times.sum() == 600 * 8
    assert float(times.min()) > 40 and float(times.max()) < 112
    assert abs(float(times[:32].sum()) - 2400) < 5 * 33, "the early half is held half the time"


def test_many_rows_of_a_large_mean_keep_their_precision() -> None:
    """300 000 rows in batches of 1 000: the error stays at that of a few fp32 roundings."""
    observer = Observer("site", 64, True)
    moment = torch.zeros(6, 6, dtype=torch.float64)
    square, mean = torch.zeros(2, 6, dtype=torch.float64)
    for step in range(300):
        x = rows_of(1000, 6, step) + 100
        wide = x.double()
        moment += wide.T @ wide
        square += wide.square().sum(0)
        mean += wide.sum(0)
        observer.add(x, step % 4)
    stats = observer.finish()
    held = stats.rows.double()
    moment = (moment - held.T @ held) / (300_000 - 64)
    assert stats.second_moment is not None
    assert same(stats.second_moment, moment, 3e-6)
    assert same(stats.mean_square, square / 300_000, 2e-7)
    assert same(stats.mean, mean / 300_000, 2e-7)


def test_without_moments_the_same_rows_are_held() -> None:
    x = rows_of(100, 4, 0)
    without, _ = observe([(0, x)], rows=16, moments=False)
    stats, _ = observe([(0, x)], rows=16)
    assert without.second_moment is None and stats.second_moment is not None
    assert torch.equal(without.rows, stats.rows) and len(stats.rows) == 12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_strides_and_shapes(dtype: torch.dtype) -> None:
    x = rows_of(60, 8, 3).to(dtype).reshape(2, 30, 8)[:, ::2, 1::2]
    stats, _ = observe([(0, x)])
    plain, _ = observe([(0, x.float().reshape(-1, 4).contiguous())])
    for field in ("absmax", "mean", "mean_square", "second_moment", "rows"):
        assert torch.equal(getattr(stats, field), getattr(plain, field))


def test_a_vector_is_one_row_and_an_empty_batch_is_none() -> None:
    stats, observer = observe([(0, torch.empty(0, 3)), (0, torch.tensor([1.0, -2.0, 0.0]))])
    assert stats.count == observer.moment_rows == 1
    assert stats.rows.shape == (0, 3)
    assert stats.absmax.tolist() == [1, 2, 0]


def test_the_input_is_not_kept_alive_or_changed() -> None:
    x = rows_of(4, 3, 0)
    before = x.clone()
    observer = Observer("site", 8, True)
    observer.add(x)
    x.zero_()
    observer.add(before)
    assert torch.equal(observer.finish().absmax, before.abs().amax(0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_names_site_and_prompt(bad: float) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = bad
    with pytest.raises(CalibrationError, match=r"blocks\.0: prompt 3 \('a cat'\).*float32"):
        Observer("blocks.0", 8, True).add(x, 2, "a cat")


def test_a_site_that_is_never_run_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"blocks\.0: no input ever came"):
        Observer("blocks.0", 8, True).finish()
