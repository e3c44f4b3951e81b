"""The plan: every output tensor's name, dtype, shape and reason, from headers alone. Torch-free."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dqconvert.converter.canonical import CanonicalSource, composed_info, entries_of
from dqconvert.converter.family import Entry, Linear, fill, leaves, match
from dqconvert.converter.options import KEEP, PlanOptions, class_of, customised
from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.targets import Target, fitted
from dqconvert.quantizers import schemes
from dqconvert.quantizers.errors import PlanError
from dqconvert.quantizers.spec import ALL, Mix, Scheme, TensorInfo


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One module, or one tensor, of the output.

    name: in the output; entry, index: the row of the family's table that it comes from;
    sources: canonical tensors to read, weight then bias of each part for a linear. form: None
    where it is kept as it is. scheme: the one of this layer, as the runtime needs it. columns:
    input channels of the canonical linear. group: layers of
    equal group share a smooth vector and are quantized together. site: canonical linear whose
    input statistics apply. outputs: tensors by full name.
    """

    name: str
    entry: Entry
    index: str
    sources: tuple[str, ...]
    outputs: Mapping[str, TensorInfo]
    reason: str
    form: PackedForm | None = None
    columns: tuple[int, int] | None = None
    group: str = ""
    site: str = ""
    carries_bias: bool = True
    scheme: Scheme | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        """The canonical linears that are stacked here."""
        return tuple(fill(ours, self.index).removesuffix(".*") for ours in self.entry.ours)

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return sum(info.nbytes for info in self.outputs.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """A conversion, decided: layers in the order in which they are written."""

    target: Target
    scheme: Scheme
    context: FileContext
    layers: tuple[LayerPlan, ...]
    source_bytes: int = 0
    outputs: Mapping[str, TensorInfo] = field(default_factory=dict)

    @property
    def groups(self) -> list[list[LayerPlan]]:
        """Layers that are quantized together, in writing order; kept ones stand alone."""
        found: dict[str, list[LayerPlan]] = {}
        for layer in self.layers:
            found.setdefault(layer.group or layer.name, []).append(layer)
        return list(found.values())

    @property
    def folds(self) -> tuple[LayerPlan, ...]:
        """The layers whose scheme folds by itself (AWQ)."""
        found = (layer for layer in self.layers if layer.form)
        return tuple(one for one in found if "fold" in (one.scheme or self.scheme).steps)

    @property
    def files(self) -> dict[str, tuple[str, ...]]:
        """The files of weights inside the output, and the names of their tensors."""
        split = getattr(self.target, "files", None)  # of some targets only
        names = tuple(self.outputs)
        found: Mapping[str, Iterable[str]] = {self.target.filename(self.context): names}
        if split is not None:
            found = split(self.context, names)
        folder = f"{self.target.FOLDER}/" if self.target.FOLDER else ""
        return {f"{folder}{name}": tuple(tensors) for name, tensors in found.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(info.nbytes for info in self.outputs.values())


def make_plan(
    source: CanonicalSource,
    target: Target,
    scheme: Scheme,
    options: PlanOptions,
    identity: tuple[str, Mapping[str, Any]],
) -> Plan:
    """Decide a conversion. identity: the model's short name and its diffusers config.

    Raises PlanError with every problem there is.
    """
    scheme, layout = customised(target, scheme, options, source)
    planner = _Planner(source, target, scheme, options, layout)
    family = source.family
    dialect = family.dialect_of(target.NAME, target.DIALECT, class_of(options.config))
    dialect = family.layout_dialect(dialect, layout)
    held = {k: info for k, info in source.infos.items() if family.carries(target.NAME, k)}
    layers = tuple(
        planner.layer(entry, index)
        for entry, index in entries_of(family, dialect, held, outside=layout in family.policies)
    )
    if not planner.matched:
        planner.problems.append(f"--keep {options.keep}: matches no linear that is quantized")
    for pattern in planner.unmatched:
        planner.problems.append(f"--override {pattern}: matches no linear that is quantized")
    if planner.problems:
        raise PlanError(dict.fromkeys(planner.problems))  # a split linear is seen twice
    if not any(layer.form for layer in layers):
        raise PlanError([f"--keep {options.keep} leaves nothing to quantize"])
    model, config = identity
    outputs = {name: info for layer in layers for name, info in layer.outputs.items()}
    context = FileContext(
        model=model,
        scheme=scheme,
        rank=planner.rank,
        config=config if options.config is None else options.config,
        layers={layer.name: layer.form for layer in layers if layer.form},
        facts={"architecture": family.architecture, **_facts(source, dialect, config)},
        library="diffusers" if options.config is None else "transformers",
        kept=tuple(
            name.removesuffix(".weight")
            for layer in layers
            if layer.form is None
            for name, info in layer.outputs.items()
            if name.endswith(".weight") and len(info.shape) == 2
        ),
        layout=layout,
        settings=options.settings,
        names=tuple(outputs),
        provenance=options.provenance,
    )
    extras = getattr(target, "extras", None)  # of some targets only
    if extras:
        outputs |= extras(context)
        context = replace(context, names=tuple(outputs))
    _check_readable(target, context, outputs)
    total = sum(info.nbytes for info in source.infos.values())
    return Plan(target, scheme, context, layers, total, outputs)


def _facts(source: CanonicalSource, dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the family has to tell; metadata as the source has it, where it has it."""
    facts, known = source.family.facts(dialect, config), source.source.metadata
    said = {key: known.get(key, text) for key, text in facts.get("metadata", {}).items()}
    return facts | ({"metadata": said} if said else {})


def _check_readable(
    target: Target, context: FileContext, outputs: Mapping[str, TensorInfo]
) -> None:
    """Refuse now what a runtime would not load, such as formats that its config cannot mix.

    PlanError with what the target finds wrong with its own file, or cannot say in its config.
    """
    said, config = target.metadata(context), target.config(context)
    found = target.recognize(outputs, said, json.loads(json.dumps(config or {})))
    if found is None:
        raise PlanError([f"target {target.NAME} would not know the file again"])
    if found.problems:
        raise PlanError(f"the file would not load; {problem}" for problem in found.problems)


class _Planner:
    """Plans one layer after the other, collecting problems."""

    def __init__(
        self,
        source: CanonicalSource,
        target: Target,
        scheme: Scheme,
        options: PlanOptions,
        layout: str,
    ) -> None:
        self.source, self.target, self.scheme, self.options = source, target, scheme, options
        self.layout = layout
        policies = source.family.policies
        self.roles = {**target.ROLES, **policies.get(target.NAME, {}), **policies.get(layout, {})}
        self.rank = 0
        if "lowrank" in scheme.steps:
            self.rank = scheme.rank if options.rank is None else options.rank
        self.problems: list[str] = []
        self.matched = options.keep is None
        self.mixed: Counter[Mix] = Counter()
        self.unmatched = {pattern for pattern, _ in options.overrides}

    def layer(self, entry: Entry, index: str) -> LayerPlan:
        """The plan of one entry of the target's dialect."""
        ours = [fill(name, index) for name in entry.ours]
        if not entry.theirs.endswith(".*"):
            return self._kept(entry, index, "not a linear of a block")
        modules = [name.removesuffix(".*") for name in ours]
        rows = [self.source.family.linear(module, outside=True) for module in modules]
        if any(row is None for row in rows):
            return self._kept(entry, index, "not a linear of a block")
        if entry.swap:
            return self._kept(entry, index, "halves of its rows change places")
        linears = [row for row in rows if row is not None]
        first = linears[0][0]
        words = (modules[0], first.name, first.role)
        treatment = next((self.roles[word] for word in words if word in self.roles), None)
        if treatment is None and first in self.source.family.outside:
            return self._kept(entry, index, "not a linear of a block")
        if treatment is None:
            return self._kept(entry, index, f"{self.target.NAME} keeps {first.role}")
        if any(self.options.choices.get(module) == KEEP for module in modules):
            return self._kept(entry, index, "kept")
        if self.options.keep and any(re.search(self.options.keep, name) for name in modules):
            self.matched = True
            return self._kept(entry, index, "--keep")
        return self._quantized(entry, index, linears, treatment)

    def _kept(self, entry: Entry, index: str, reason: str) -> LayerPlan:
        outputs: dict[str, TensorInfo] = {}
        sources: list[str] = []
        for leaf in leaves(entry):
            names = [fill(name, index) for name in leaf.ours]
            if names[0] not in self.source.infos:
                continue  # a linear without a bias
            info = composed_info(leaf, [self.source.infos[name] for name in names])
            theirs = fill(leaf.theirs, index)
            choose = getattr(self.target, "kept", None)  # of some targets only
            dtype = choose(theirs, info) if choose else self.target.KEEP_DTYPE or info.dtype
            outputs[theirs] = replace(info, dtype=dtype)
            sources += names
        if reason == "--keep" and not self.target.PARTIAL:
            self.problems.append(
                f"{sources[0]}: --keep matches it, but {self.target.NAME} has no layout for an "
                "unquantized one"
            )
        elif entry.columns is not None:
            self.problems.append(f"{sources[0]}: {self.target.NAME} cannot keep a split linear")
        name = fill(entry.theirs, index).removesuffix(".*")
        return LayerPlan(name, entry, index, tuple(sources), outputs, reason)

    def _quantized(
        self, entry: Entry, index: str, linears: list[tuple[Linear, str]], treatment: str
    ) -> LayerPlan:
        first, block = linears[0]
        modules = [fill(row.name, i) for row, i in linears]
        infos = [self.source.infos[f"{module}.weight"] for module in modules]
        columns = self._columns(entry, infos[0].shape[1])
        bias = [f"{m}.bias" for m in modules if f"{m}.bias" in self.source.infos]
        name = fill(entry.theirs, index).removesuffix(".*")
        scheme, layout = self._scheme(modules, name)
        form = self._form((first, treatment), infos, columns, (scheme, layout))
        spec = fitted(self.target, form.spec, form.shape)
        if spec != form.spec:
            form, scheme = replace(form, spec=spec), replace(scheme, weight=spec)
        form = replace(form, bias=bool(bias), bias_dtype=self._bias_dtype(bias))
        problem = self.target.problem(form)
        if problem:
            self.problems.append(f"{name}: {problem}{self._way_out}")
        spread = f"{first.shares}@{columns[0]}" if entry.columns else first.shares
        blocks = first.name.split(".{i}")[0]
        return LayerPlan(
            name=name,
            entry=entry,
            index=index,
            sources=tuple(
                t for m in modules for t in (f"{m}.weight", f"{m}.bias") if t in self.source.infos
            ),
            outputs={} if problem else self._promise(name, form),
            reason=first.role,
            form=form,
            columns=columns if entry.columns else None,
            group=f"{blocks}.{block}.{spread}.{scheme.name}" if first.shares else name,
            site=fill(first.site or first.name, block),
            carries_bias=columns[1] == infos[0].shape[1],
            scheme=scheme,
        )

    @property
    def _way_out(self) -> str:
        return "; leave it out with --keep" if self.target.PARTIAL else ""

    def _scheme(self, modules: list[str], theirs: str) -> tuple[Scheme, str]:
        """A layer's scheme and layout: the user's word, else what was chosen, else a sensitive
        one's, else what its name in the file decides."""
        mixed = self._mixed(f"{theirs}.weight")
        choices, name = self.options.choices, ""
        for pattern, other in self.options.overrides:
            if not name and any(re.search(pattern, module) for module in modules):
                self.unmatched.discard(pattern)
                name = other
        if not name:
            name = next((choices[module] for module in modules if module in choices), "")
        if not name and self.scheme.better and not self.options.choices:
            patterns = self.source.family.sensitive
            if all(any(match(p, module) is not None for p in patterns) for module in modules):
                name = self.scheme.better
        name = name or mixed
        if name in ("", self.scheme.name):
            return self.scheme, self.layout
        chosen = schemes.scheme(name)
        layouts = self.target.layouts(chosen)
        layout = self.layout if self.layout in layouts else layouts[0]
        return self.target.adapt(chosen, layout), layout

    def _mixed(self, name: str) -> str:
        """What a scheme's mixes give to a weight, by its name in the file; "" for nothing.

        Layers that others have a say in are counted as well.
        """
        group = [m for m in self.scheme.mixes if any(part in name for part in m.parts)]
        for mix in group:
            if mix.parts != group[0].parts:
                break
            if mix.first is None or self.mixed[mix] < mix.first:
                self.mixed[mix] += 1
                return mix.scheme
        return ""

    def _form(
        self,
        row: tuple[Linear, str],
        infos: list[TensorInfo],
        columns: tuple[int, int],
        chosen: tuple[Scheme, str],
    ) -> PackedForm:
        (first, treatment), (scheme, layout) = row, chosen
        shape = (sum(info.shape[0] for info in infos), columns[1] - columns[0])
        modulation = treatment == "modulation" and scheme.modulation is not None
        spec = scheme.modulation if modulation else scheme.weight
        assert spec is not None
        form = PackedForm(
            spec=spec,
            shape=shape,
            parts=len(infos),
            splits=first.splits,
            rank=self.rank if "lowrank" in scheme.steps and not modulation else 0,
            layout=layout,
            rotation=0 if modulation else _rotation(scheme.rotation, shape[1]),
        )
        gelu = first.gelu is not None and columns[0] >= self._extent(first.gelu)
        if gelu:
            form = replace(form, shift=self.target.shift(form))
        static = self.target.static(scheme, layout)
        if static == "required":
            return replace(form, input_scale=True)
        activation = scheme.activation
        if static == "optional" and activation is not None:
            form = replace(form, input_scale=self.options.calibrated and not first.splits)
            made = self.target.activation(form, scheme)  # some find a scale at run time
            if made is not None and made.tile == (ALL, ALL) and not form.input_scale:
                # the runtime would quantize these inputs at scale 1: adaLN's see one row per
                # image, so nothing is saved, and those behind a GELU pass the largest code
                form = replace(form, full_precision=gelu or bool(first.splits))
        return form

    def _promise(self, name: str, form: PackedForm) -> dict[str, TensorInfo]:
        return {f"{name}.{suffix}": info for suffix, info in self.target.promise(form).items()}

    def _columns(self, entry: Entry, width: int) -> tuple[int, int]:
        if entry.columns is None:
            return 0, width
        start, stop = entry.columns
        return self._extent(start), width if stop is None else self._extent(stop)

    def _extent(self, size: int | str) -> int:
        return self.source.hidden if size == "hidden" else int(size)

    def _bias_dtype(self, bias: list[str]) -> str:
        return self.source.infos[bias[0]].dtype if bias else "BF16"


def _rotation(widest: int, columns: int) -> int:
    """The widest group of 256, 64 or 16 channels that divides the columns, 0 if none does."""
    while widest >= 16 and columns % widest:
        widest //= 4
    return widest if widest >= 16 else 0
