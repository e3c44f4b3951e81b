"""From a pipeline folder and prompts to the statistics of every site.

Contract: the same subject, sites, prompts and settings give bit-equal statistics on the same
machine. The work is done in the caller's thread as far as Ctrl-C is concerned: it ends all others.
Sites may lie anywhere in the transformer. XᵀX of all sites is in memory at once; where that does
not fit, call with a part of the sites at a time.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dqconvert.calibration.denoiser import Weights, blocks_of, fill, skeleton
from dqconvert.calibration.lockstep import Lockstep, Resident, drain
from dqconvert.calibration.observe import Observer
from dqconvert.calibration.pipeline import drawing, encode, open_denoiser
from dqconvert.calibration.prompts import Prompt
from dqconvert.calibration.quiet import quiet
from dqconvert.calibration.settings import CalibrationSettings, Site
from dqconvert.quantizers.errors import CalibrationError
from dqconvert.quantizers.tensors import LayerStats


@dataclass(frozen=True, slots=True)
class Subject:
    """The model to observe.

    pipeline_dir: a diffusers pipeline folder; config: of its transformer, with _class_name;
    weights: the transformer's tensors whose diffusers name starts with a prefix; blocks: names of
    the transformer's ModuleLists of blocks, in the order in which it runs them; component: what
    the pipeline calls that transformer, "transformer_2" for the second expert.
    """

    pipeline_dir: Path
    config: Mapping[str, Any]
    weights: Weights
    blocks: tuple[str, ...]
    component: str = "transformer"


def collect(
    subject: Subject,
    sites: Sequence[Site],
    prompts: Sequence[Prompt],
    settings: CalibrationSettings,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, LayerStats]:
    """The statistics of every site that runs, by its name.

    progress is told (done, all) denoising steps. CalibrationError where no site runs at all.
    """
    return drain(collecting(subject, sites, prompts, settings), lambda step: progress(*step))


def collecting(
    subject: Subject,
    sites: Sequence[Site],
    prompts: Sequence[Prompt],
    settings: CalibrationSettings,
) -> Generator[tuple[int, int], None, dict[str, LayerStats]]:
    """The same as a generator of (done, all), which returns the statistics. To close it stops."""
    chosen = settings.chosen(prompts)
    observers = {
        site.name: Observer(site.name, settings.rows, settings.moments, settings.seed)
        for site in sites
    }
    with quiet():
        model = skeleton(subject.config)
        blocks = blocks_of(model, subject.blocks)
        watched = _watched(model, sites)
        outline = {subject.component: model}
        encoded = encode(subject.pipeline_dir, chosen, settings, models=outline)
        fill(model, subject.weights, settings)
        pipe = open_denoiser(subject.pipeline_dir, model, settings, subject.component)
        lockstep = Lockstep[nn.Module](blocks, Resident())
        steps = _Steps(len(chosen) * settings.steps)
        tasks = [
            drawing(pipe, prompt, embeds, settings, steps.take)
            for prompt, embeds in zip(chosen, encoded, strict=True)
        ]
        with _boundaries(lockstep, blocks), _taps(lockstep, watched, observers, chosen):
            yield from _run(lockstep, tasks, steps)
    run = [name for name, observer in observers.items() if observer.count]
    if sites and not run:
        observers[sites[0].name].finish()
    return {name: observers.pop(name).finish() for name in run}


class _Steps:
    """Counts the denoising steps of all prompts."""

    def __init__(self, total: int) -> None:
        self.done, self.total = 0, total

    def take(self) -> None:
        """One more; some schedulers call back more often than once a step."""
        self.done = min(self.done + 1, self.total)


def _watched(model: nn.Module, sites: Sequence[Site]) -> list[tuple[str, nn.Module]]:
    """The module of each site."""
    if len({site.name for site in sites}) < len(sites):
        raise ValueError("two sites have the same name")
    modules = dict(model.named_modules())
    unknown = [site for site in sites if site.module not in modules]
    if unknown:
        near = difflib.get_close_matches(unknown[0].module, modules, n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise CalibrationError(
            f"{type(model).__name__} has no module '{unknown[0].module}'"
            f" ({len(unknown)} of {len(sites)} sites are unknown){hint}"
        )
    return [(site.name, modules[site.module]) for site in sites]


@contextmanager
def _boundaries(lockstep: Lockstep[nn.Module], blocks: Mapping[str, nn.Module]) -> Iterator[None]:
    """While open, every block waits for its turn before it runs."""

    def arrive(name: str) -> Callable[..., None]:
        return lambda _module, _args: lockstep.arrive(name)

    handles = [block.register_forward_pre_hook(arrive(name)) for name, block in blocks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _taps(
    lockstep: Lockstep[nn.Module],
    watched: Sequence[tuple[str, nn.Module]],
    observers: Mapping[str, Observer],
    prompts: Sequence[Prompt],
) -> Iterator[None]:
    """While open, observers see the inputs of their modules."""

    def tap(observer: Observer) -> Callable[..., None]:
        def take(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs = args[0] if args else next(iter(named.values()))
            observer.add(inputs, lockstep.index, prompts[lockstep.index].prompt)

        return take

    handles = [
        module.register_forward_pre_hook(tap(observers[name]), with_kwargs=True)
        for name, module in watched
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(
    lockstep: Lockstep[nn.Module], tasks: Sequence[Callable[[], Any]], steps: _Steps
) -> Iterator[tuple[int, int]]:
    """Run all tasks; says how many steps are done whenever that changes."""
    said = 0
    with closing(lockstep.passes(tasks)) as passes:
        try:
            for _ in passes:
                if steps.done > said:
                    said = steps.done
                    yield said, steps.total
        except torch.OutOfMemoryError as error:
            raise CalibrationError(
                "calibration does not fit the memory of the device; use fewer prompts"
                f" (--calib-samples) or a smaller --size ({error})"
            ) from error
