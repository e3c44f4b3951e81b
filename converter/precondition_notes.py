"""What is said of preconditioning: what it brought, what had no place, and where it would help."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from dqconvert.converter.job import LayerReport
from dqconvert.converter.plan import Plan
from dqconvert.converter.precondition import places
from dqconvert.converter.precondition_choice import Outcome, judge, readers_of
from dqconvert.converter.work import Recipe

ADVISED, WORTHWHILE = 2, 1.0
"""Inputs that advice looks at, and the dB from which it is given."""


def gain(outcomes: Sequence[Outcome]) -> float:
    """By how many dB the summed squared errors of some places fall."""
    before, after = (sum(getattr(one, name) for one in outcomes) for name in ("before", "after"))
    return 10 * math.log10(before / after) if before > 0 and after > 0 else 0.0


def advice(work: Recipe, reports: Sequence[LayerReport]) -> str | None:
    """Whether preconditioning would help, from the places that the worst layers read."""
    worst = [one.name for one in sorted(reports, key=lambda one: -one.error)]
    rank = {name: place for place, name in enumerate(worst)}
    read = [
        (min(rank.get(layer.name, len(rank)) for layer in layers), place)
        for place in places(work.source)
        if (layers := readers_of(place, work))
    ]
    if work.options.smooth == "auto":  # one exponent instead of a search, for speed
        work = replace(work, options=replace(work.options, smooth="0.5"))
    chosen = [place for _, place in sorted(read, key=lambda pair: pair[0])[:ADVISED]]
    decibels = gain([judge(place, work, "auto") for place in chosen])
    if decibels < WORTHWHILE:
        return None
    return (
        f"--precondition auto would take about {decibels:.0f} dB off the output error of the "
        f"{len(chosen)} worst inputs that it can reach, at no cost at run time; LoRAs then need "
        "`dqconvert rebase-lora`"
    )


def notes_of(outcomes: Sequence[Outcome], plan: Plan) -> Iterator[str]:
    """What the user should know: how much it brought, and what an AWQ scale had no place in."""
    chosen = [one for one in outcomes if one.transform is not None]
    if chosen:
        what = "AWQ's scales folded into" if plan.folds else "preconditioned"
        yield (
            f"{what} {len(chosen)} of {len(outcomes)} inputs ({gain(outcomes):.1f} dB of "
            "their layers' output error, rounded to nearest): a LoRA of the original must be "
            "rewritten by `dqconvert rebase-lora`"
        )
    elif outcomes:
        yield f"none of {len(outcomes)} inputs gained by preconditioning; the weights are as given"
    if plan.folds:
        held = {module for one in outcomes for module in one.place.consumers}
        left = [layer.name for layer in plan.folds if not held & {*layer.modules}]
        if left:
            yield (
                f"{len(left)} layers have nothing before them that could hold an AWQ scale and go "
                f"without: {', '.join(left[:3])}{' ...' if len(left) > 3 else ''}"
            )
