"""The conversion: a generator over the plan.

Groups are independent, so a pool of threads works on them; at most one finished group waits for
its turn to be written. What a run leaves behind appears whole or not at all.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dqconvert.converter.canonical import CanonicalSource, open_canonical
from dqconvert.converter.job import Job, LayerReport, Progress, Report
from dqconvert.converter.plan import LayerPlan, Plan, PlanOptions, make_plan
from dqconvert.converter.resolve import Model, resolve
from dqconvert.converter.statistics import Calibration, config_of, plan_calibration
from dqconvert.formats.folder import OutputFolder
from dqconvert.formats.source import open_source
from dqconvert.formats.targets import target, targets
from dqconvert.formats.writer import StreamWriter
from dqconvert.quantizers.errors import PlanError, SourceError
from dqconvert.quantizers.schemes import scheme

if TYPE_CHECKING:
    from dqconvert.quantizers.tensors import LayerStats

T = TypeVar("T")
R = TypeVar("R")
Stats = Mapping[str, "LayerStats"]

MAX_WORKERS = 8
"""Groups in hand at once: each holds a few fp32 copies of one weight."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job that is ready to run: everything decided, nothing computed."""

    job: Job
    model: Model
    source: CanonicalSource
    plan: Plan
    calibration: Calibration | None
    output: Path

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of what was decided."""
        found = []
        chosen = self.plan.scheme
        if self.calibration is None and chosen.rounding == "gptq":
            found.append(
                "no --calib: without activations there is no smoothing and no GPTQ; outlier "
                "channels of the input will cost quality"
            )
        if self.calibration is None and any(
            form.spec.code.startswith("e") and form.spec.tile == (-1, -1)
            for form in self.plan.context.layers.values()
        ):
            found.append(
                "no --calib: no input_scale is written, so the runtime quantizes activations at "
                "scale 1 and clips them at 448"
            )
        if self.source.ignored:
            found.append(f"{self.source.ignored} tensors of other components were left out")
        return tuple(found)


def prepare(job: Job) -> Prepared:
    """Resolve, recognise and plan a job. Reads headers and prompts only; imports no torch.

    Raises DQConvertError, with all problems of the plan at once.
    """
    chosen = scheme(job.scheme)
    goal = target(job.target or chosen.targets[0])
    model = resolve(job.model, whole=job.calib is not None)
    raw = open_source(model.path)
    for known in targets().values():
        if known.recognize(raw.infos, raw.metadata, model.config or {}):
            raise SourceError(
                f"{model.path}: is already quantized, for {known.NAME}; give the original"
            )
    source = open_canonical(raw, model.path)
    calibration = plan_calibration(job, model, source)
    options = PlanOptions(job.rank, job.keep, calibration is not None)
    plan = make_plan(source, goal, chosen, options, (model.name, config_of(model, source)))
    if job.rounding == "gptq" and calibration is None:
        raise PlanError(["--rounding gptq needs activations: give prompts with --calib"])
    output = job.output or Path(f"{model.name}-{chosen.name}-{goal.NAME}")
    OutputFolder(output, job.overwrite).check()
    return Prepared(job, model, source, plan, calibration, output)


def convert(
    prepared: Prepared, listen: Callable[[Progress], None] = lambda _: None
) -> Iterator[LayerReport | Report]:
    """Run a prepared job: a report of each layer as it is written, then the whole one."""
    from dqconvert.converter import manifest
    from dqconvert.converter.statistics import statistics

    start = time.perf_counter()
    plan = prepared.plan
    stats: Stats = {}
    with OutputFolder(prepared.output, prepared.job.overwrite) as folder:
        if prepared.calibration is not None:
            stats = statistics(prepared.calibration, prepared.model, prepared.source, listen)
        weights = folder / plan.target.filename(plan.context)
        metadata = plan.target.metadata(plan.context)
        layers: list[LayerReport] = []
        with StreamWriter(weights, plan.outputs, metadata) as writer:
            for reports in _groups(prepared, writer, stats, listen):
                layers += reports
                yield from reports
        report = Report(
            output=prepared.output,
            layers=tuple(layers),
            source_bytes=plan.source_bytes,
            output_bytes=plan.nbytes,
            seconds=time.perf_counter() - start,
            peak_memory=peak_memory(),
            notes=prepared.notes,
        )
        report = manifest.write(folder, prepared, report)
    yield report


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _groups(
    prepared: Prepared,
    writer: StreamWriter,
    stats: Stats,
    listen: Callable[[Progress], None],
) -> Iterator[list[LayerReport]]:
    """Quantize and write all groups of the plan; yields the reports of each."""
    import torch

    from dqconvert.converter.layers import run_group
    from dqconvert.quantizers.recipe import RecipeOptions

    plan, job = prepared.plan, prepared.job
    options = RecipeOptions(
        rank=plan.context.rank, rounding=job.rounding or plan.scheme.rounding, smooth=job.smooth
    )
    done = 0

    def work(group: list[LayerPlan]) -> tuple[int, list[LayerReport]]:
        tensors, reports = run_group(group, plan, prepared.source, stats, options)
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        names = {name for layer in group for name in layer.sources}
        return sum(prepared.source.infos[name].nbytes for name in names), reports

    workers = job.workers or min(os.cpu_count() or 1, MAX_WORKERS)
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for size, reports in _bounded(pool, work, plan.groups, workers):
            done += size
            listen(Progress("convert", min(done, plan.source_bytes), plan.source_bytes))
            yield reports


def _bounded(
    pool: ThreadPoolExecutor, work: Callable[[T], R], items: Sequence[T], limit: int
) -> Iterator[R]:
    """Results as they finish, with at most limit + 1 items in hand."""
    waiting: set[Future[R]] = set()
    try:
        for item in items:
            waiting.add(pool.submit(work, item))
            if len(waiting) > limit:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
