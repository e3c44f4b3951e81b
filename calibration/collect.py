"""From a pipeline folder and prompts to the statistics of every site.

Contract: the same subject, sites, prompts and settings give bit-equal statistics on the same
machine. Sites may lie anywhere in the transformer. XᵀX of all sites is in memory at once; where
that does not fit, call with a part of the sites at a time.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dqconvert.calibration.denoiser import Weights, blocks_of, fill, skeleton
from dqconvert.calibration.lockstep import Lockstep, Resident
from dqconvert.calibration.observe import Observer
from dqconvert.calibration.pipeline import drawing, encode, open_denoiser
from dqconvert.calibration.prompts import Prompt
from dqconvert.calibration.quiet import quiet
from dqconvert.calibration.settings import CalibrationSettings, Site
from dqconvert.quantizers.errors import CalibrationError
from dqconvert.quantizers.tensors import LayerStats

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Subject:
    """The model to observe.

    pipeline_dir: a diffusers pipeline folder; config: of its transformer, with _class_name;
    weights: the transformer's tensors whose diffusers name starts with a prefix; blocks: names of
    the transformer's ModuleLists of blocks, in the order in which it runs them.
    """

    pipeline_dir: Path
    config: Mapping[str, Any]
    weights: Weights
    blocks: tuple[str, ...]


def collect(
    subject: Subject,
    sites: Sequence[Site],
    prompts: Sequence[Prompt],
    settings: CalibrationSettings,
    progress: Progress | None = None,
) -> dict[str, LayerStats]:
    """The statistics of every site, by its name. progress is told (done, all) denoising steps."""
    chosen = settings.chosen(prompts)
    with quiet():
        model = skeleton(subject.config)
        blocks = blocks_of(model, subject.blocks)
        watched = _watched(model, sites)
        encoded = encode(subject.pipeline_dir, chosen, settings)
        fill(model, subject.weights, settings)
        pipe = open_denoiser(subject.pipeline_dir, model, settings)
        lockstep = Lockstep[nn.Module](blocks, Resident())
        step = _counter(progress, len(chosen) * settings.steps)
        tasks = [
            drawing(pipe, prompt, embeds, settings, step)
            for prompt, embeds in zip(chosen, encoded, strict=True)
        ]
        observers = {
            site.name: Observer(site.name, settings.rows, settings.moments, settings.seed)
            for site in sites
        }
        with _boundaries(lockstep, blocks), _taps(lockstep, watched, observers, chosen):
            _run(lockstep, tasks)
    return {name: observers.pop(name).finish() for name in list(observers)}


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


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    """Counts a denoising step of any prompt, and tells."""
    done = 0

    def step() -> None:
        nonlocal done
        done = min(done + 1, total)  # some schedulers call back more often than once a step
        if progress is not None:
            progress(done, total)

    return step


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


def _run(lockstep: Lockstep[nn.Module], tasks: Sequence[Callable[[], Any]]) -> None:
    try:
        lockstep.run(tasks)
    except torch.OutOfMemoryError as error:
        raise CalibrationError(
            "calibration does not fit the memory of the device; use fewer prompts"
            f" (--calib-samples), a smaller --size, or --device cpu ({error})"
        ) from error
