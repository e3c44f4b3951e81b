"""What a user may change of a plan, and what of it makes no sense. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dqconvert.converter.canonical import CanonicalSource
from dqconvert.converter.family import Family
from dqconvert.formats.targets import Target, target
from dqconvert.quantizers import schemes
from dqconvert.quantizers.errors import PlanError
from dqconvert.quantizers.spec import Scheme

KEEP = "keep"
"""In the place of a scheme: the linear stays unquantized."""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What a user may change of a plan.

    rank: of low-rank branches, None for the scheme's; keep: regular expression over canonical
    names of linears that stay unquantized; calibrated: whether statistics will be there;
    smooth: as typed, refused where the scheme has no smoothing; layout: one of the target's,
    None for its default; group_size, zero_points: of weight-only int4; choices: {canonical
    linear: scheme, or KEEP} where some differ from the rest; overrides: (regular expression over
    canonical linears, scheme), the first match wins; settings: what is said of the target alone;
    provenance: where the model comes from, by the keys that GGUF files have for it; bits: of a
    weight on average, where each layer gets a scheme of a menu; config: what config.json says of a
    model that is none of diffusers.
    """

    rank: int | None = None
    keep: str | None = None
    calibrated: bool = False
    smooth: str = "auto"
    layout: str | None = None
    group_size: int | None = None
    zero_points: bool = False
    choices: Mapping[str, str] = field(default_factory=dict)
    overrides: tuple[tuple[str, str], ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    bits: float | None = None
    config: Mapping[str, Any] | None = None


def class_of(config: Mapping[str, Any] | None) -> str:
    """The class that a config.json of transformers names, "" where it names none."""
    named = (config or {}).get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def runs(target: Target, family: Family) -> bool:
    """Whether a runtime has names for a family, and a word for it where its files say one."""
    named = family.dialect_of(target.NAME, target.DIALECT) in family.dialects
    named = named and target.NAME not in family.unrun
    return named and bool(family.architecture or not hasattr(target, "ARCHITECTURE"))


def running(scheme: Scheme, family: Family, calibrated: bool) -> list[Target]:
    """The targets of a scheme that run a family, in the scheme's order."""
    known = (target(name) for name in scheme.targets)
    able = [one for one in known if runs(one, family) and one.accepts(scheme) is None]
    needs = (one.static(scheme, one.layouts(scheme)[0]) == "required" for one in able)
    return [one for one, needed in zip(able, needs, strict=True) if calibrated or not needed]


def customised(
    target: Target, scheme: Scheme, options: PlanOptions, source: CanonicalSource
) -> tuple[Scheme, str]:
    """The scheme as the user and the runtime want it, and the layout. PlanError otherwise."""
    known = source.family.layouts.get(target.NAME, ())
    problems = [*_option_problems(scheme, options)]
    problems += _target_problems(target, scheme, options, known)
    if not runs(target, source.family):
        others = [one.NAME for one in running(scheme, source.family, options.calibrated)]
        hint = f"; try --target {' or '.join(others)}" if others else ""
        problems.append(f"target {target.NAME} does not run {source.family.title}{hint}")
    if problems:
        raise PlanError(problems)
    weight = scheme.weight
    if options.group_size is not None:
        weight = replace(weight, tile=(1, options.group_size))
    if options.zero_points:
        weight = replace(weight, code="uint4", zero_point=True, full_range=False)
    layout = options.layout or (known or target.layouts(scheme))[0]
    adapted = target.adapt(replace(scheme, weight=weight), layout)
    if target.static(adapted, layout) == "required" and not options.calibrated:
        raise PlanError(
            [
                f"target {target.NAME} needs the range of every input for {scheme.name}: its "
                "loader fails without; give prompts with --calib"
            ]
        )
    return adapted, layout


def _target_problems(
    target: Target, scheme: Scheme, options: PlanOptions, known_layouts: tuple[str, ...]
) -> list[str]:
    wanted = [scheme, *(schemes.scheme(name) for _, name in options.overrides)]
    problems = [refusal for one in wanted if (refusal := _refusal(target, one))]
    if problems:
        return problems
    layouts = known_layouts or target.layouts(scheme)
    if options.layout is not None and options.layout not in layouts:
        known = ", ".join(layouts) if any(layouts) else "one only"
        problems.append(
            f"--layout {options.layout}: {target.NAME} has no such layout of {scheme.name}; "
            f"there is {known}"
        )
    allowed: Mapping[str, tuple[str, ...]] = getattr(target, "SETTINGS", {})
    for name, value in options.settings.items():
        if name not in allowed:
            problems.append(f"--{name}: means nothing to target {target.NAME}")
        elif value not in allowed[name]:
            problems.append(f"--{name} {value}: must be one of {', '.join(allowed[name])}")
    return problems


def _refusal(target: Target, scheme: Scheme) -> str | None:
    reason = target.accepts(scheme)
    if reason is None:
        return None
    others = [name for name in scheme.targets if name != target.NAME]
    hint = f"; try --target {' or '.join(others)}" if others else ""
    return f"target {target.NAME} cannot hold scheme {scheme.name}: {reason}{hint}"


def _option_problems(scheme: Scheme, options: PlanOptions) -> list[str]:
    problems = []
    if options.rank is not None and "lowrank" not in scheme.steps:
        problems.append(f"--rank: scheme {scheme.name} has no low-rank branch")
    elif options.rank is not None and (options.rank <= 0 or options.rank % 16):
        problems.append(f"--rank {options.rank}: must be a positive multiple of 16")
    if options.smooth != "auto" and "smooth" not in scheme.steps:
        problems.append(f"--smooth {options.smooth}: scheme {scheme.name} has no smoothing")
    patterns = [("--keep", options.keep)] if options.keep is not None else []
    for word, pattern in [*patterns, *(("--override", found) for found, _ in options.overrides)]:
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"{word} {pattern}: not a regular expression ({error})")
    problems += _size_problems(scheme, options)
    problems += [
        f"--override {pattern}={name}: a mix is for whole models; give one type"
        for pattern, name in options.overrides
        if _is_mix(schemes.scheme(name))
    ]
    wanted = [scheme, *(schemes.scheme(name) for _, name in options.overrides)]
    if not options.calibrated:
        problems += [
            f"scheme {one.name} learns from activations: give prompts with --calib"
            for one in wanted
            if one.calibrated
        ]
    return problems


def _is_mix(scheme: Scheme) -> bool:
    """Whether a scheme gives its layers several types, and its name stands for none of them."""
    return bool(scheme.menu or scheme.mixes) and not scheme.name.endswith(scheme.weight.code)


def is_grouped(scheme: Scheme) -> bool:
    """Whether the user may choose the size of a scheme's groups, and zero points."""
    return scheme.activation is None and scheme.weight.code == "int4"


def _size_problems(scheme: Scheme, options: PlanOptions) -> list[str]:
    problems = []
    if options.group_size is not None and not is_grouped(scheme):
        problems.append(f"--group-size: the groups of scheme {scheme.name} are fixed")
    elif options.group_size not in (None, 32, 64, 128):
        problems.append(f"--group-size {options.group_size}: must be 32, 64 or 128")
    if options.bits is not None and not scheme.menu:
        problems.append(f"--bits: scheme {scheme.name} has a size of its own")
    if options.zero_points and not is_grouped(scheme):
        problems.append(f"--zero-points: scheme {scheme.name} is symmetric")
    return problems
