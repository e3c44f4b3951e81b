"""What is kept of a stream of rows: sums over all of them, XᵀX, and a few rows held back.

    a row -> absmax, Σx, Σx²                      every row
          -> held, or XᵀX                         one of the two, never both

Held are the rows of lowest rank, where the rank is a hash of the site, the prompt and the row's
place among the prompt's rows. So they are a uniform sample, and the same one whatever the order of
the prompts and however the rows are cut into batches. A row that a lower rank pushes out goes to
XᵀX, hence no row is lost. At the end at most one row in eight stays held, so that small data
leave a useful XᵀX too; of two to seven rows one is held, of a single row none.

Precision: Σx and Σx² in float64. XᵀX is the running mean over its rows: each batch's product is
formed in fp32 by itself, and then moves the mean by its share. Adding a product into a large sum
within the matrix product (addmm) loses one digit more. `tests/test_observe.py` compares both with
float64 over the concatenated rows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dqconvert.quantizers.errors import CalibrationError
from dqconvert.quantizers.tensors import LayerStats

HELD_SHARE = 8
"""One row in so many is held at most, with or without XᵀX, so that both hold the same."""

Ranks = npt.NDArray[np.uint64]

PANEL = 1024
"""Rows of XᵀX that are updated at once: bounds the memory of the products."""

BATCH = 4096
"""Rows taken at once: bounds the fp32 copy, and the length of a sum in fp32."""


@dataclass(slots=True, eq=False)
class _Sums:
    """Sums over all rows of one site."""

    absmax: Tensor
    total: Tensor
    squares: Tensor


class Observer:
    """Accumulates the statistics of one site. rows: held at most; moments: whether XᵀX is kept."""

    def __init__(self, site: str, rows: int, moments: bool, seed: int = 0) -> None:
        self.site, self._rows, self._moments = site, rows, moments
        digest = hashlib.sha256(f"{seed}/{site}".encode()).digest()
        self._seed = int.from_bytes(digest[:8], "little")
        self._seen: dict[int, int] = {}
        self._sums: _Sums | None = None
        self._moment: Tensor | None = None
        self._moment_rows = 0
        self._held = torch.empty(0, 0)
        self._ranks = np.empty(0, np.uint64)

    @property
    def count(self) -> int:
        """Rows seen."""
        return sum(self._seen.values())

    @property
    def moment_rows(self) -> int:
        """Rows in XᵀX so far; the others are held."""
        return self._moment_rows

    def add(self, inputs: Tensor, source: int = 0, label: str = "") -> None:
        """Take [..., K] inputs of the prompt number `source`, which errors call `label`."""
        for batch in inputs.detach().reshape(-1, inputs.shape[-1]).split(BATCH):
            if len(batch):
                self._add(batch.float(), source, label)

    def finish(self) -> LayerStats:
        """The statistics, on the CPU. Ends the accumulation."""
        if self._sums is None:
            raise CalibrationError(
                f"{self.site}: no input ever came; the pipeline does not run this layer"
            )
        count, moment = self.count, self._moment
        share = count // HELD_SHARE or int(count > 1)
        self._keep(self._held, self._ranks, min(self._rows, share))
        return LayerStats(
            count=count,
            absmax=self._sums.absmax.cpu(),
            mean=(self._sums.total / count).float().cpu(),
            mean_square=(self._sums.squares / count).float().cpu(),
            second_moment=None if moment is None else moment.cpu(),
            rows=self._held.cpu(),
        )

    def _add(self, x: Tensor, source: int, label: str) -> None:
        peak = x.abs().amax(0)
        if not bool(peak.isfinite().all()):
            which = f"prompt {source + 1}" + (f" ('{label}')" if label else "")
            raise CalibrationError(
                f"{self.site}: {which} feeds it NaN or infinity; calibrate in bfloat16 or float32,"
                " and check the checkpoint if you do"
            )
        self._sum(x, peak)
        self._split(x, self._rank(len(x), source))

    def _sum(self, x: Tensor, peak: Tensor) -> None:
        total = x.sum(0, dtype=torch.float64)
        squares = x.square().sum(0, dtype=torch.float64)
        if self._sums is None:
            self._sums = _Sums(peak, total, squares)
            self._held = x.new_empty(0, x.shape[1])
            if self._moments:
                self._moment = x.new_zeros(x.shape[1], x.shape[1])
            return
        torch.maximum(self._sums.absmax, peak, out=self._sums.absmax)
        self._sums.total += total
        self._sums.squares += squares

    def _rank(self, rows: int, source: int) -> Ranks:
        """Ranks of the next rows of a prompt: splitmix64 of (site, prompt, place)."""
        start = self._seen.get(source, 0)
        self._seen[source] = start + rows
        places: Ranks = np.arange(start, start + rows, dtype=np.uint64)
        return _mix(_mix(np.array([self._seed ^ source], np.uint64)) + places)

    def _split(self, x: Tensor, ranks: Ranks) -> None:
        """Hold the rows of low rank, and pass all others on to XᵀX."""
        if len(self._ranks) == self._rows and ranks.min() > self._ranks[-1]:
            self._multiply(x)
            return
        self._keep(torch.cat((self._held, x)), np.concatenate((self._ranks, ranks)), self._rows)

    def _keep(self, pool: Tensor, ranks: Ranks, limit: int) -> None:
        """Hold the lowest of a pool of rows, in the order of their ranks; XᵀX gets the rest."""
        order = np.argsort(ranks, kind="stable")
        index = torch.from_numpy(order).to(pool.device)
        self._ranks = ranks[order[:limit]]
        self._held = pool[index[:limit]]
        self._multiply(pool[index[limit:]])

    def _multiply(self, x: Tensor) -> None:
        """Move the mean of XᵀX towards that of these rows, a panel of rows at a time."""
        if self._moment is None or not len(x):
            return
        self._moment_rows += len(x)
        weight = len(x) / self._moment_rows
        for start in range(0, len(self._moment), PANEL):
            panel = slice(start, start + PANEL)
            self._moment[panel].lerp_((x[:, panel].T @ x).div_(len(x)), weight)


def _mix(values: Ranks) -> Ranks:
    """The finalizer of splitmix64: a bijection whose output bits look random."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
