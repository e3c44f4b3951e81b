"""The plan: every output tensor's name, dtype, shape and reason, from headers alone. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dqconvert.converter.canonical import CanonicalSource, composed_info, entries_of
from dqconvert.converter.family import Entry, Linear, fill, leaves
from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.targets import Target
from dqconvert.quantizers.errors import PlanError
from dqconvert.quantizers.spec import ALL, Scheme, TensorInfo


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What a user may change of a plan.

    rank: of low-rank branches, None for the scheme's; keep: regular expression over canonical
    names of linears that stay unquantized; calibrated: whether statistics will be there;
    smooth: as typed, refused where the scheme has no smoothing.
    """

    rank: int | None = None
    keep: str | None = None
    calibrated: bool = False
    smooth: str = "auto"


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One module, or one tensor, of the output.

    name: in the output; entry, index: the row of the family's table that it comes from;
    sources: canonical tensors to read, weight then bias of each part for a linear. form: None
    where it is kept as it is. columns: input channels of the canonical linear. group: layers of
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
    def sites(self) -> tuple[str, ...]:
        """Canonical linears whose inputs calibration must observe."""
        return tuple(dict.fromkeys(layer.site for layer in self.layers if layer.form))

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
    _check_scheme(target, scheme, options)
    planner = _Planner(source, target, scheme, options)
    layers = tuple(
        planner.layer(entry, index)
        for entry, index in entries_of(source.family, target.DIALECT, source.infos)
    )
    if not planner.matched:
        planner.problems.append(f"--keep {options.keep}: matches no linear that is quantized")
    if planner.problems:
        raise PlanError(dict.fromkeys(planner.problems))  # a split linear is seen twice
    if not any(layer.form for layer in layers):
        raise PlanError([f"--keep {options.keep} leaves nothing to quantize"])
    model, config = identity
    context = FileContext(
        model=model,
        scheme=scheme,
        rank=planner.rank,
        config=config,
        layers={layer.name: layer.form for layer in layers if layer.form},
        facts=source.family.facts(target.DIALECT, config),
    )
    outputs = {name: info for layer in layers for name, info in layer.outputs.items()}
    total = sum(info.nbytes for info in source.infos.values())
    return Plan(target, scheme, context, layers, total, outputs)


def _check_scheme(target: Target, scheme: Scheme, options: PlanOptions) -> None:
    problems = []
    refusal = target.accepts(scheme)
    if refusal:
        others = [name for name in scheme.targets if name != target.NAME]
        hint = f"; try --target {' or '.join(others)}" if others else ""
        problems.append(f"target {target.NAME} cannot hold scheme {scheme.name}: {refusal}{hint}")
    if options.rank is not None and "lowrank" not in scheme.steps:
        problems.append(f"--rank: scheme {scheme.name} has no low-rank branch")
    elif options.rank is not None and (options.rank <= 0 or options.rank % 16):
        problems.append(f"--rank {options.rank}: must be a positive multiple of 16")
    if options.smooth != "auto" and "smooth" not in scheme.steps:
        problems.append(f"--smooth {options.smooth}: scheme {scheme.name} has no smoothing")
    if options.keep is not None:
        try:
            re.compile(options.keep)
        except re.error as error:
            problems.append(f"--keep {options.keep}: not a regular expression ({error})")
    if problems:
        raise PlanError(problems)


class _Planner:
    """Plans one layer after the other, collecting problems."""

    def __init__(
        self, source: CanonicalSource, target: Target, scheme: Scheme, options: PlanOptions
    ) -> None:
        self.source, self.target, self.scheme, self.options = source, target, scheme, options
        self.rank = 0
        if "lowrank" in scheme.steps:
            self.rank = scheme.rank if options.rank is None else options.rank
        self.problems: list[str] = []
        self.matched = options.keep is None

    def layer(self, entry: Entry, index: str) -> LayerPlan:
        """The plan of one entry of the target's dialect."""
        ours = [fill(name, index) for name in entry.ours]
        if not entry.theirs.endswith(".*"):
            return self._kept(entry, index, "not a linear of a block")
        modules = [name.removesuffix(".*") for name in ours]
        rows = [self.source.family.linear(module) for module in modules]
        if any(row is None for row in rows):
            return self._kept(entry, index, "not a linear of a block")
        linears = [row for row in rows if row is not None]
        treatment = self.target.ROLES.get(linears[0][0].role)
        if treatment is None:
            return self._kept(entry, index, f"{self.target.NAME} keeps {linears[0][0].role}")
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
            dtype = self.target.KEEP_DTYPE or info.dtype
            outputs[fill(leaf.theirs, index)] = replace(info, dtype=dtype)
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
        form = self._form(first, infos, columns, treatment)
        form = replace(form, bias=bool(bias), bias_dtype=self._bias_dtype(bias))
        problem = self.target.problem(form)
        if problem:
            self.problems.append(f"{name}: {problem}")
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
            group=f"{blocks}.{block}.{spread}" if first.shares else name,
            site=fill(first.site or first.name, block),
            carries_bias=columns[1] == infos[0].shape[1],
        )

    def _form(
        self,
        first: Linear,
        infos: list[TensorInfo],
        columns: tuple[int, int],
        treatment: str,
    ) -> PackedForm:
        shape = (sum(info.shape[0] for info in infos), columns[1] - columns[0])
        modulation = treatment == "modulation" and self.scheme.modulation is not None
        spec = self.scheme.modulation if modulation else self.scheme.weight
        assert spec is not None
        form = PackedForm(
            spec=spec,
            shape=shape,
            parts=len(infos),
            splits=first.splits,
            rank=0 if modulation else self.rank,
        )
        activation = self.scheme.activation
        static = activation is not None and activation.tile == spec.tile == (ALL, ALL)
        if static and self.options.calibrated and not first.splits:
            form = replace(form, input_scale=True)
        if first.gelu is not None and columns[0] >= self._extent(first.gelu):
            form = replace(form, shift=self.target.shift(form))
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
