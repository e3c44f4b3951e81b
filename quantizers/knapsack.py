"""One choice for each item, so that errors sum to the least within a budget of sizes.

The multiple-choice knapsack, by dynamic programming over the budget in UNITS steps. Sizes are
rounded up, so that the budget holds; what that leaves is spent by exchanges afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

UNITS = 1 << 15

Table = Sequence[Sequence[float]]


def choose(errors: Table, sizes: Table, budget: float) -> list[int]:
    """The choice of each item.

    errors, sizes: of each item's choices. Raises ValueError where the smallest choices do not fit.
    """
    least = sum(min(row) for row in sizes)
    if least > budget:
        raise ValueError(f"the smallest choices take {least}, the budget is {budget}")
    spare = (budget - least) / UNITS or 1.0
    steps = [_steps(row, spare) for row in sizes]
    best: npt.NDArray[np.float64] = np.zeros(UNITS + 1)
    picks = []
    for row, extra in zip(errors, steps, strict=True):
        options = np.full((len(row), UNITS + 1), np.inf)
        for option, (error, step) in enumerate(zip(row, extra, strict=True)):
            if step <= UNITS:
                options[option, step:] = best[: UNITS + 1 - step] + error
        picks.append(options.argmin(0).astype(np.int16))
        best = options.min(0)
    return _spend(_traced(picks, steps), errors, sizes, budget)


def _steps(sizes: Sequence[float], spare: float) -> list[int]:
    """What each choice takes beyond the smallest, in steps of the spare budget, rounded up."""
    least = min(sizes)
    return [int(np.ceil((size - least) / spare - 1e-9)) for size in sizes]


def _traced(picks: Sequence[npt.NDArray[np.int16]], steps: Sequence[Sequence[int]]) -> list[int]:
    """The choices that led to the best sum, from the last item to the first."""
    left, found = UNITS, []
    for pick, extra in zip(reversed(picks), reversed(steps), strict=True):
        found.append(int(pick[left]))
        left -= extra[found[-1]]
    return found[::-1]


def _spend(chosen: list[int], errors: Table, sizes: Table, budget: float) -> list[int]:
    """Better choices for single items while they fit, the most for its size first."""
    left = budget - sum(row[pick] for row, pick in zip(sizes, chosen, strict=True))
    while True:
        gains = [
            (
                (errors[i][chosen[i]] - errors[i][j])
                / max(sizes[i][j] - sizes[i][chosen[i]], 1e-9),
                i,
                j,
            )
            for i in range(len(chosen))
            for j in range(len(errors[i]))
            if errors[i][j] < errors[i][chosen[i]] and sizes[i][j] - sizes[i][chosen[i]] <= left
        ]
        if not gains:
            return chosen
        _, i, j = max(gains)
        left -= sizes[i][j] - sizes[i][chosen[i]]
        chosen[i] = j
