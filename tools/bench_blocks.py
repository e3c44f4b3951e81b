"""Speed of ggml's block types, in millions of weights per CPU second on one thread.

Beside ggml's own C: its figures of specs/gguf.md, or, with a path to libggml-base.so, measured in
the same run.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from gguf import GGMLQuantizationType

from dqconvert.quantizers.ggml import blocks
from dqconvert.quantizers.ggml.blocks import MODULES
from dqconvert.quantizers.spec import NEEDS_IMPORTANCE

GGML: dict[str, tuple[float | None, float | None]] = {
    "q4_0": (958, 33), "q4_1": (1019, 7), "q5_0": (545, 33), "q5_1": (579, 7), "q8_0": (290, None),
    "q2_k": (17.9, 7.3), "q3_k": (85.5, 26), "q4_k": (15.4, 7.7), "q5_k": (18.5, 8.0),
    "q6_k": (35.4, None), "iq4_nl": (4.3, None), "iq4_xs": (4.3, None), "iq3_s": (2.5, None),
    "iq3_xxs": (1.9, None), "iq2_s": (4.1, None), "iq2_xs": (None, 1.1), "iq2_xxs": (None, 1.9),
    "iq1_s": (None, 4.4), "iq1_m": (1.4, None), "tq1_0": (318, None), "tq2_0": (274, None),
    "mxfp4": (218, None),
}  # fmt: skip
"""ggml's C, one thread, on the machine of specs/gguf.md: without and with an importance matrix."""

COLUMNS, SECONDS = 3072, 0.6
Ways = tuple[float | None, float | None]


def speed(work: Callable[[int], object], rows: int) -> float:
    """Millions of weights per CPU second of work on so many rows, the best of several turns."""
    work(rows)
    best, spent = 0.0, 0.0
    while spent < SECONDS:
        start = time.process_time()
        work(rows)
        taken = time.process_time() - start
        best, spent = max(best, rows * COLUMNS / max(taken, 1e-9)), spent + taken
    return best / 1e6


def ours(code: str, weight: torch.Tensor) -> Ways:
    """Without and with an importance matrix; None where there is no such way."""
    ones = torch.ones(COLUMNS)
    plain = (
        None
        if code in NEEDS_IMPORTANCE
        else speed(lambda rows: blocks.quantize(weight[:rows], code), _rows(code))
    )
    if code in ("q8_0", *MODULES["ternary"]):
        return plain, None
    return plain, speed(lambda rows: blocks.quantize(weight[:rows], code, ones), _rows(code))


def back(code: str, weight: torch.Tensor) -> float:
    """Decoding."""
    packed = blocks.quantize(weight[: _rows(code)], code, torch.ones(COLUMNS))
    return speed(lambda rows: blocks.dequantize(packed[:rows], code), _rows(code))


def theirs(library: ctypes.CDLL, code: str, weight: torch.Tensor) -> Ways:
    """ggml's C on the same weights."""
    kind = int(GGMLQuantizationType[code.upper()])
    ones, rows = torch.ones(COLUMNS), min(_rows(code), 128)
    out = torch.empty(rows, blocks.row_bytes(code, COLUMNS), dtype=torch.uint8)
    sizes = [ctypes.c_int64(n) for n in (0, rows, COLUMNS)]

    def run(importance: torch.Tensor | None) -> float:
        places = [ctypes.c_void_p(t.data_ptr()) for t in (weight, out)]
        last = None if importance is None else ctypes.c_void_p(importance.data_ptr())
        return speed(lambda _: library.ggml_quantize_chunk(kind, *places, *sizes, last), rows)

    return None if code in NEEDS_IMPORTANCE else run(None), run(ones)


def _rows(code: str) -> int:
    """As many as take a moment."""
    return 64 if code.startswith(("iq1", "iq2", "iq3")) else 1024


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _ratio(ours: float | None, theirs: float | None) -> str:
    return "" if ours is None or theirs is None else f"{ours / theirs:.1f}"


def table(path: Path | None) -> None:
    """Print ours, ggml's and how many times as fast ours is, both ways, and decoding."""
    torch.set_num_threads(1)
    library = ctypes.CDLL(str(path)) if path else None
    weight = torch.randn(1024, COLUMNS, generator=torch.Generator().manual_seed(0))
    click.echo("| type | plain | ggml | times | weighted | ggml | times | decoding |")
    click.echo("|---|---|---|---|---|---|---|---|")
    for code in (code for codes in MODULES.values() for code in codes):
        found = ours(code, weight)
        other = theirs(library, code, weight) if library else GGML[code]
        cells = [
            cell
            for one, two in zip(found, other, strict=True)
            for cell in (_cell(one), "" if one is None else _cell(two), _ratio(one, two))
        ]
        click.echo(f"| {code.upper()} | {' | '.join(cells)} | {_cell(back(code, weight))} |")
