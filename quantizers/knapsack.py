"""One choice for each item, so that errors sum to the least within a budget of sizes.

The multiple-choice knapsack, by dynamic programming over what the budget leaves beyond the smallest
choices. Sizes are whole numbers, and the steps of the budget their greatest common divisor: the
result is the best there is. Where that makes more than STEPS of them, steps are longer, sizes are
rounded up, so that the budget holds, and what that leaves is spent on single items afterwards.

Laws (tests/test_knapsack.py): equal to trying everything; never more than the budget; a larger
budget never errs more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

STEPS = 1 << 15

Floats = npt.NDArray[np.float64]


def choose(
    errors: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: float
) -> list[int]:
    """The choice of each item; the smaller one where two err alike.

    errors, sizes: of each item's choices. Raises ValueError where the smallest choices do not fit.
    """
    extras = [[size - min(row) for size in row] for row in sizes]
    spare = math.floor(budget) - sum(min(row) for row in sizes)
    if spare < 0:
        raise ValueError(f"the smallest choices are {-spare} too large for the budget of {budget}")
    spare = min(spare, sum(max(row) for row in extras))
    step = math.gcd(*(size for row in extras for size in row)) or 1
    if spare // step > STEPS:
        step = math.ceil(spare / STEPS)
    chosen = _best(errors, [[-(-size // step) for size in row] for row in extras], spare // step)
    _spend(chosen, errors, extras, spare)
    return chosen


def _best(
    errors: Sequence[Sequence[float]], steps: Sequence[Sequence[int]], budget: int
) -> list[int]:
    """The choices that err least in all within a budget of steps."""
    least: Floats = np.zeros(budget + 1)  # within each budget up to this
    picks = []
    for row, taken in zip(errors, steps, strict=True):
        pick = np.zeros(budget + 1, dtype=np.int16)
        found = np.full(budget + 1, np.inf)
        for option in sorted(range(len(row)), key=lambda one: taken[one]):
            start = min(taken[option], budget + 1)
            sums = least[: budget + 1 - start] + row[option]
            better = sums < found[start:]
            found[start:][better] = sums[better]
            pick[start:][better] = option
        picks.append(pick)
        least = found
    chosen = []
    for pick, taken in zip(reversed(picks), reversed(steps), strict=True):
        chosen.append(int(pick[budget]))
        budget -= taken[chosen[-1]]
    return chosen[::-1]


def _spend(
    chosen: list[int],
    errors: Sequence[Sequence[float]],
    sizes: Sequence[Sequence[int]],
    budget: int,
) -> None:
    """Better choices for single items while they fit, the most for its size first."""
    left = budget - sum(row[pick] for row, pick in zip(sizes, chosen, strict=True))
    while True:
        gains = [
            (saved / max(more, 1), -more, item, option)
            for item, pick in enumerate(chosen)
            for option, size in enumerate(sizes[item])
            if (saved := errors[item][pick] - errors[item][option]) > 0
            and (more := size - sizes[item][pick]) <= left
        ]
        if not gains:
            return
        _, more, item, option = max(gains)
        left += more
        chosen[item] = option
