"""Statistics of a text encoder: the pipeline's own encode_prompt runs on the prompts, observed.

Contract: the encoder sees what it sees when the stock pipeline draws, templates and padding
included. Sites whose module never runs (a head, the last layers of some) are left out of the
result. Modules may be called otherwise than in files: transformers moves a language model into the
model that has a vision tower as well, and takes CLIP's out of a shell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dqconvert.calibration.observe import Observer
from dqconvert.calibration.pipeline import encode
from dqconvert.calibration.prompts import Prompt
from dqconvert.calibration.quiet import quiet
from dqconvert.calibration.settings import CalibrationSettings, Site
from dqconvert.quantizers.errors import CalibrationError
from dqconvert.quantizers.tensors import LayerStats

SHELLS = ("model.", "text_model.")
ROOTS = ("", *SHELLS, "model.language_model.", "language_model.", "language_model.model.")
"""What stands before the names of modules, in files and in models."""


def observe_encoder(
    place: Path,
    sites: Sequence[Site],
    prompts: Sequence[Prompt],
    settings: CalibrationSettings,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, LayerStats]:
    """The statistics of every site that runs, by its name. progress is told (done, all) prompts.

    place: the encoder's folder in its pipeline. CalibrationError where the pipeline has no such
    encoder, or runs nothing of it.
    """
    chosen = settings.chosen(prompts)
    observers: dict[str, Observer] = {}
    seen: list[int] = []

    def before(pipe: Any, index: int) -> None:
        """Taps are set before the first prompt."""
        if not seen:
            observers.update(_tapped(_encoder(pipe, place), sites, settings, seen, chosen))
        seen.append(index)
        progress(index, len(chosen))

    with quiet():
        encode(place.parent, chosen, settings, before)
    progress(len(chosen), len(chosen))
    found = {name: one.finish() for name, one in observers.items() if one.count}
    if not found:
        raise CalibrationError(f"{place}: the pipeline runs no layer of it on these prompts")
    return found


def _encoder(pipe: Any, place: Path) -> nn.Module:
    found = getattr(pipe, place.name, None)
    if not isinstance(found, nn.Module):
        raise CalibrationError(
            f"{place.parent}: {type(pipe).__name__} encodes prompts without a {place.name}"
        )
    return found


def _tapped(
    model: nn.Module,
    sites: Sequence[Site],
    settings: CalibrationSettings,
    seen: Sequence[int],
    prompts: Sequence[Prompt],
) -> dict[str, Observer]:
    """An observer for every site that the model has. seen: ends in the number of the prompt."""
    modules = dict(model.named_modules())
    observers = {}

    def tap(observer: Observer) -> Callable[..., None]:
        def take(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs = args[0] if args else next(iter(named.values()))
            observer.add(inputs.detach(), seen[-1], prompts[seen[-1]].prompt)

        return take

    for site in sites:
        module = _module(modules, site.module)
        if module is not None:
            observer = Observer(site.name, settings.rows, settings.moments, settings.seed)
            module.register_forward_pre_hook(tap(observer), with_kwargs=True)
            observers[site.name] = observer
    return observers


def _module(modules: Mapping[str, nn.Module], name: str) -> nn.Module | None:
    """The module that a file calls so, behind whatever root."""
    shell = next((one for one in SHELLS if name.startswith(one)), "")
    names = (name, *(root + name.removeprefix(shell) for root in ROOTS))
    return next((modules[one] for one in names if one in modules), None)
