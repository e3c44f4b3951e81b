"""What the work on all groups of a conversion shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dqconvert.converter.canonical import CanonicalSource
from dqconvert.converter.lora.branch import Branch
from dqconvert.converter.plan import Plan
from dqconvert.converter.prepare import Prepared
from dqconvert.formats.fileset import FileSet
from dqconvert.quantizers.recipe import RecipeOptions
from dqconvert.quantizers.tensors import LayerStats

Stats = Mapping[str, LayerStats]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What quantizes all groups of a plan."""

    plan: Plan
    source: CanonicalSource
    stats: Stats
    options: RecipeOptions


@dataclass(frozen=True, slots=True)
class Work(Recipe):
    """The same, the files that they go to, and what is appended to low-rank branches."""

    files: FileSet
    branch: Branch | None = None


def recipe_of(prepared: Prepared, stats: Stats) -> Recipe:
    """What a prepared job asks for, with the statistics that it got."""
    plan = prepared.plan
    job = prepared.job
    options = RecipeOptions(prepared.rank, prepared.rounding, job.smooth, device=job.device)
    return Recipe(plan, prepared.source, stats, options)
