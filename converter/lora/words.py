"""--lora and its friends on the command line."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

STRONGEST = 1000
"""Strengths are near 1; what is far beyond overflows, or was meant to be a path."""


class Lora(click.ParamType[tuple[Path, float]]):
    """FILE[:STRENGTH]: a number behind the last colon is the strength, any other colon is the
    path's."""

    name = "FILE[:STRENGTH]"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Path, float]:
        """The file, which must exist, and the strength, 1 without one."""
        if isinstance(value, tuple):
            return value
        whole, strength = Path(str(value)), 1.0
        head, colon, tail = str(value).rpartition(":")
        if colon and not whole.exists():
            try:
                whole, strength = Path(head), float(tail)
            except ValueError:
                whole = Path(str(value))
        if (not head and colon) or not whole.exists():
            self.fail(f"'{value}': no such file or folder", param, ctx)
        if not math.isfinite(strength):
            self.fail(f"'{value}': the strength must be a number", param, ctx)
        if abs(strength) > STRONGEST:
            self.fail(f"'{value}': the strength must be {STRONGEST} at most", param, ctx)
        return whole, strength


def merging(command: F) -> F:
    """The options of a command that merges LoRAs."""
    partial = click.option(
        "--lora-partial", is_flag=True, help="Go on without what the model has no place for."
    )
    lora = click.option(
        "--lora",
        "loras",
        type=Lora(),
        multiple=True,
        help="Merged in 32 bit before anything else; any number.",
    )
    return lora(partial(command))


def branching(command: F) -> F:
    """The options of a command that may put LoRAs into low-rank branches as well."""
    mode = click.option(
        "--lora-mode",
        type=click.Choice(["merge", "branch"]),
        default="merge",
        show_default=True,
        help="branch: into SVDQuant's low-rank branch; MODEL may be an output, without --scheme.",
    )
    cap = click.option(
        "--rank-cap", type=int, metavar="N", help="Re-compress branch and LoRA to this rank."
    )
    return merging(mode(cap(command)))
