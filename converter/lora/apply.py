"""From a job's LoRAs to the model that they make, and what is recorded of them. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dqconvert.converter.canonical import CanonicalSource
from dqconvert.converter.job import Job
from dqconvert.converter.lora.files import LoraSpec, opened
from dqconvert.converter.lora.keys import SECOND, encoder_of
from dqconvert.converter.lora.match import Loras, read
from dqconvert.converter.lora.merged import MergedSource
from dqconvert.converter.resolve import TRANSFORMER
from dqconvert.quantizers.errors import PlanError
from dqconvert.quantizers.spec import Scheme

MERGE, BRANCH = "merge", "branch"
"""What becomes of a LoRA: part of the weights, or of the low-rank branches beside them."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A LoRA as a manifest has it. path: as it was given; partial: what did not fit was left out;
    skipped: modules of it that were left out for another reason."""

    path: str
    sha256: str
    strength: float
    partial: bool = False
    skipped: tuple[str, ...] = ()


def loras_of(job: Job, source: CanonicalSource) -> Loras:
    """The LoRAs of a job, all their tensors placed on its model. Raises PlanError otherwise."""
    files = [opened(LoraSpec(path, strength)) for path, strength in job.loras]
    return read(files, source, job.component.partition(".")[0], job.lora_partial)


def merged(job: Job, source: CanonicalSource) -> CanonicalSource:
    """A job's model with its LoRAs merged; the model itself where there are none."""
    return MergedSource(source, loras_of(job, source)) if job.loras else source


def holding(job: Job, component: str) -> Job:
    """A job for one part of its pipeline, with the LoRAs that name that part.

    What names none is the transformer's, as in diffusers.
    """
    held = tuple(one for one in job.loras if _names(one[0], component))
    if held or not job.loras:
        return replace(job, loras=held)
    return replace(job, loras=(), lora_partial=False, lora_mode=MERGE, rank_cap=None)


def _names(path: Path, component: str) -> bool:
    """Whether a LoRA has tensors of a part of the pipeline."""
    keys = opened(LoraSpec(path)).source.infos
    number = int(component.rpartition("_")[2]) if component[-1:].isdigit() else 1
    if component == TRANSFORMER:
        return not keys or any(not k.startswith(SECOND) and encoder_of(k) is None for k in keys)
    if component.startswith(TRANSFORMER):
        return any(key.startswith(SECOND) for key in keys)
    return any(encoder_of(key) == number for key in keys)


def check(job: Job, scheme: Scheme) -> None:
    """Words of LoRAs that make no sense. Raises PlanError."""
    problems = []
    if not job.loras:
        given = {
            "--lora-mode branch": job.lora_mode == BRANCH,
            "--lora-partial": job.lora_partial,
        }
        problems += [f"{word}: there is no --lora" for word in given if given[word]]
    if job.lora_mode == BRANCH:
        if "lowrank" not in scheme.steps:
            problems.append(f"--lora-mode branch: {scheme.name} has no low-rank branch; merge it")
        if job.precondition != "off":
            problems.append(
                "--precondition changes the inputs that a branch reads; merge the LoRA instead"
            )
    problems += cap_problems(job.rank_cap, job.lora_mode)
    if problems:
        raise PlanError(problems)


def cap_problems(cap: int | None, mode: str) -> list[str]:
    """What is wrong with --rank-cap."""
    if cap is None:
        return []
    if mode != BRANCH:
        return ["--rank-cap: is of --lora-mode branch alone"]
    return [f"--rank-cap {cap}: must be a multiple of 16"] if cap % 16 or cap < 16 else []


def record(loras: Loras, partial: bool, skipped: Sequence[str] = ()) -> list[dict[str, Any]]:
    """LoRAs as the manifest has them."""
    return [
        {
            "file": file.name,
            "path": str(file.spec.path),
            "sha256": file.sha256,
            "strength": file.spec.strength,
            "partial": partial,
            "skipped": [one for one in skipped if one],
        }
        for file in loras.files
    ]


def recorded(said: Mapping[str, Any]) -> Recorded:
    """A row of a manifest; KeyError, TypeError or ValueError on what is none of ours."""
    return Recorded(
        path=str(said["path"]),
        sha256=str(said["sha256"]),
        strength=float(said["strength"]),
        partial=bool(said.get("partial")),
        skipped=tuple(map(str, said.get("skipped", ()))),
    )
