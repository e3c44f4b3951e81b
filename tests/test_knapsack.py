"""One choice for each item within a budget: what trying everything finds."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqconvert.quantizers import knapsack

Items = list[list[tuple[float, int]]]

CHOICE = st.tuples(st.integers(0, 50).map(float), st.integers(0, 60))
ITEMS = st.lists(st.lists(CHOICE, min_size=1, max_size=4), min_size=1, max_size=5)


def choose(items: Items, budget: float) -> list[int]:
    errors = [[error for error, _ in row] for row in items]
    return knapsack.choose(errors, [[size for _, size in row] for row in items], budget)


def total(items: Items, chosen: list[int]) -> tuple[float, int]:
    picked = [row[option] for row, option in zip(items, chosen, strict=True)]
    return sum(error for error, _ in picked), sum(size for _, size in picked)


def least(items: Items, budget: float) -> float | None:
    """The smallest sum of errors, by trying everything; None where nothing fits."""
    sums = [
        (sum(error for error, _ in picked), sum(size for _, size in picked))
        for picked in itertools.product(*items)
    ]
    return min((error for error, size in sums if size <= budget), default=None)


@given(ITEMS, st.floats(0, 320))
def test_nothing_is_better_and_the_budget_holds(items: Items, budget: float) -> None:
    best = least(items, budget)
    if best is None:
        with pytest.raises(ValueError, match="too large for the budget"):
            choose(items, budget)
        return
    error, size = total(items, choose(items, budget))
    assert error == best and size <= budget


@given(ITEMS, st.integers(0, 320), st.integers(0, 100))
def test_a_larger_budget_never_errs_more(items: Items, budget: int, more: int) -> None:
    if least(items, budget) is None:
        return
    found = [total(items, choose(items, size))[0] for size in (budget, budget + more)]
    assert found[1] <= found[0]


def test_of_two_that_err_alike_the_smaller_one() -> None:
    assert choose([[(1.0, 5), (1.0, 3), (1.0, 4)]], 10) == [1]


def test_one_item_takes_the_best_that_fits() -> None:
    item = [(9.0, 1), (4.0, 2), (1.0, 3)]
    assert [choose([item], budget) for budget in (1, 2, 2.9, 3, 100)] == [[0], [1], [1], [2], [2]]


def test_no_item_and_no_spare_budget() -> None:
    assert choose([], 0) == []
    assert choose([[(2.0, 4), (1.0, 6)], [(3.0, 5)]], 9) == [0, 0]


def test_a_large_model_takes_little_time_and_almost_nothing_is_lost() -> None:
    """500 layers of 8 types; the bound is the relaxation in which layers are mixtures of types."""
    rng = np.random.default_rng(0)
    weights = rng.choice([3072 * 3072, 9216 * 3072, 12288 * 3072, 21504 * 3072], 500)
    bits = np.array([2.625, 3.4375, 4.25, 4.5, 5.5, 6.5625, 8.5, 16])
    errors = rng.lognormal(size=(500, 1)) * 4.0**-bits
    sizes = weights[:, None] * bits
    budget = 4.5 * float(weights.sum())
    start = time.process_time()
    chosen = knapsack.choose(errors.tolist(), sizes.astype(int).tolist(), budget)
    assert time.process_time() - start < 2
    found, rows = np.array(chosen), np.arange(500)
    assert sizes[rows, found].sum() <= budget
    bound = max(
        (errors + price * sizes).min(1).sum() - price * budget
        for price in np.geomspace(1e-14, 1e-6, 4000)
    )
    assert bound <= errors[rows, found].sum() <= bound * 1.001
