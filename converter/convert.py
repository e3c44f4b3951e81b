"""The conversion: a generator over the plan.

Groups are independent, so a pool of threads works on them and writes what is done. What a run
leaves behind appears whole or not at all.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from dqconvert.converter.job import LayerReport, Progress, Report
from dqconvert.converter.plan import LayerPlan, Plan
from dqconvert.converter.prepare import Prepared
from dqconvert.formats.fileset import FileSet
from dqconvert.formats.folder import OutputFolder
from dqconvert.quantizers.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor

    from dqconvert.quantizers.tensors import LayerStats

T = TypeVar("T")
R = TypeVar("R")
Stats = Mapping[str, "LayerStats"]

MAX_WORKERS = 8
"""Groups in hand at once: each holds a few fp32 copies of one weight."""


def convert(
    prepared: Prepared, listen: Callable[[Progress], None] = lambda _: None
) -> Iterator[LayerReport | Report]:
    """Run a prepared job: a report of each layer as it is written, then the whole one."""
    _import_torch()
    _check_device(prepared.job.device)
    from dqconvert.converter import importance, manifest, precondition
    from dqconvert.converter.refine import advised, refine
    from dqconvert.converter.statistics import statistics, unseen

    start = time.perf_counter()
    stats: Stats = {}
    with OutputFolder(prepared.output, prepared.job.overwrite) as folder:
        if prepared.calibration is not None:
            stats = statistics(prepared.calibration, prepared.model, prepared.observed, listen)
            found = (*prepared.found, *unseen(prepared.plan, stats))
            prepared = replace(prepared, found=found)
        elif prepared.job.imatrix is not None:
            stats, unknown = importance.read(prepared.job.imatrix, prepared.plan)
            prepared = replace(prepared, found=(*prepared.found, *_unknown(unknown)))
        prepared, stats = refine(prepared, stats, listen)
        plan = prepared.plan
        layers: list[LayerReport] = []
        metadata = plan.target.metadata(plan.context)
        if prepared.precondition is not None:
            metadata = {**metadata, **precondition.metadata(prepared.precondition)}
            precondition.save(folder, prepared.precondition)
        (folder / plan.target.FOLDER).mkdir(exist_ok=True)
        places = {folder / name: tensors for name, tensors in plan.files.items()}
        with FileSet(places, plan.outputs, metadata) as files:
            for name, tensor in extra_tensors(plan).items():
                files.write(name, tensor)
            for reports in _groups(prepared, files, stats, listen):
                layers += reports
                yield from reports
        order = {layer.name: place for place, layer in enumerate(plan.layers)}
        report = Report(
            output=prepared.output,
            layers=tuple(sorted(layers, key=lambda layer: order[layer.name])),
            source_bytes=prepared.source_bytes,
            output_bytes=plan.nbytes,
            seconds=time.perf_counter() - start,
            peak_memory=peak_memory(),
            weights=tuple(plan.files),
            notes=(*prepared.notes, *advised(prepared, stats, layers)),
            precondition=prepared.precondition.kinds if prepared.precondition else {},
        )
        report = manifest.write(folder, prepared, report, files.digests)
    yield report


def _unknown(count: int) -> list[str]:
    return [f"{count} layers are not in the importance matrix: theirs is 1"] if count else []


def extra_tensors(plan: Plan) -> Mapping[str, Tensor]:
    """Tensors that belong to the file as a whole."""
    make = getattr(plan.target, "extra_tensors", None)  # of some targets only
    found: Mapping[str, Tensor] = make(plan.context) if make else {}
    return found


def _import_torch() -> None:
    """Import torch with Ctrl-C held back: its C++ side swallows an interruption of its imports."""
    # Large buffers in huge pages: torch reads this when it first allocates.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        import torch  # noqa: F401
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _check_device(device: str) -> None:
    """PlanError where this machine has no such device."""
    import torch

    if device == "cpu":
        return
    found = torch.cuda.device_count()
    if int(device.partition(":")[2] or 0) >= found:
        raise PlanError([f"--device {device}: torch finds {found} CUDA devices here"])


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _groups(
    prepared: Prepared,
    files: FileSet,
    stats: Stats,
    listen: Callable[[Progress], None],
) -> Iterator[list[LayerReport]]:
    """Quantize and write all groups of the plan; yields the reports of each."""
    import torch

    from dqconvert.converter.layers import run_group
    from dqconvert.converter.work import Work, recipe_of

    plan, job = prepared.plan, prepared.job
    found = recipe_of(prepared, stats)
    shared = Work(found.plan, found.source, found.stats, found.options, files, prepared.branch)
    done = 0

    def work(group: list[LayerPlan]) -> tuple[int, list[LayerReport]]:
        reports = run_group(group, shared)
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
