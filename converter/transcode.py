"""One quantization in another target's layout, without a code being touched.

The file is opened by its own bytes, planned anew for the other target as a conversion of the same
scheme would be, and its layers are cut, joined and packed as that plan says. What the other target
quantizes and the file does not, or the other way round, is refused.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dqconvert.converter.convert import extra_tensors, peak_memory
from dqconvert.converter.family import fill
from dqconvert.converter.job import Job, Progress, Report
from dqconvert.converter.options import KEEP, PlanOptions
from dqconvert.converter.plan import Plan, make_plan
from dqconvert.converter.prepare import Prepared, check_apart
from dqconvert.converter.regroup import PackedSource, unfit
from dqconvert.converter.reopen import Reopened, reopen
from dqconvert.converter.resolve import Model, read_json
from dqconvert.converter.statistics import config_of
from dqconvert.converter.written import options_of, scheme_of
from dqconvert.formats.fileset import FileSet
from dqconvert.formats.folder import MANIFEST, OutputFolder
from dqconvert.formats.recognition import json_object
from dqconvert.formats.targets import Target, gguf, target
from dqconvert.quantizers.errors import PlanError, SourceError
from dqconvert.quantizers.schemes import scheme

OVER = "; leave it out with --keep"
"""What a conversion may advise, and nobody can do here."""

SAME = ("rounding", "smooth", "bits", "imatrix", "precondition", "lora_mode")
"""Options of the conversion that are still true."""

TITLES = r"^svdq-(int4|fp4)_r\d+-"
"""What names of nunchaku's files begin with."""


@dataclass(frozen=True, slots=True)
class Transcoding:
    """What is asked for. dequantize_kept: whether layers may become 16 bit again that the target
    does not quantize."""

    out: Path
    target: str
    layout: str | None = None
    output: Path | None = None
    dequantize_kept: bool = False
    overwrite: bool = False


def transcode(
    wish: Transcoding, listen: Callable[[Progress], None] = lambda _: None
) -> tuple[Path, tuple[str, ...]]:
    """Write the folder; returns it with what the user should know.

    Raises SourceError where the file is broken, PlanError with all that the target cannot have.
    """
    from dqconvert.converter import manifest, precondition
    from dqconvert.converter.repack import Losses, repack

    start = time.perf_counter()
    found = reopen(wish.out)
    _check_sound(found)
    prepared = _prepared(found, wish)
    plan, source = prepared.plan, prepared.source
    assert isinstance(source, PackedSource)
    losses, layers = Losses(), []
    with OutputFolder(prepared.output, wish.overwrite) as folder:
        metadata = plan.target.metadata(plan.context)
        folded = precondition.load(found)
        if folded is not None:
            metadata = {**metadata, **precondition.metadata(folded)}
            precondition.save(folder, folded)
        (folder / plan.target.FOLDER).mkdir(exist_ok=True)
        places = {folder / name: tensors for name, tensors in plan.files.items()}
        with FileSet(places, plan.outputs, metadata) as files:
            for name, tensor in extra_tensors(plan).items():
                files.write(name, tensor)
            done = 0
            for report in repack(plan, source, files, losses):
                layers.append(report)
                done += report.nbytes
                listen(Progress("convert", done, plan.nbytes))
            if losses.problems:
                raise PlanError(losses.problems)
        listen(Progress("convert", plan.nbytes, plan.nbytes))
        notes = (*prepared.found, *losses.notes())
        done_report = Report(
            output=prepared.output,
            layers=tuple(layers),
            source_bytes=plan.source_bytes,
            output_bytes=plan.nbytes,
            seconds=time.perf_counter() - start,
            peak_memory=peak_memory(),
            weights=tuple(plan.files),
            notes=notes,
            precondition=folded.kinds if folded else {},
        )
        manifest.write(
            folder, prepared, done_report, files.digests, _history(found, losses.dequantized)
        )
    return prepared.output, notes


def _check_sound(found: Reopened) -> None:
    """SourceError where a file lacks what it should have; that it says too little is no matter."""
    problems = found.unreadable()
    if problems:
        raise SourceError(f"{found.path}: {len(problems)} problems, the first: {problems[0]}")


def _prepared(found: Reopened, wish: Transcoding) -> Prepared:
    """Everything decided: the plan of the other target over the same layers."""
    goal = target(wish.target)
    name = scheme_of(found)
    if name is None:
        raise SourceError(f"{found.path}: its layers are of no scheme that is known")
    source = PackedSource(found)
    model = _model(found, name)
    same = goal.NAME == found.target.NAME
    written = options_of(found, name)
    layout = wish.layout if wish.layout is not None or not same else written.layout
    unpacked = _unpacked(source)
    options = replace(
        written,
        keep=None,
        layout=layout,
        choices={**written.choices, **dict.fromkeys(unpacked, KEEP)},
        settings=written.settings if same else {},
        provenance=_provenance(found),
    )
    _check_static(goal, name, options)
    planner = _Planner(source, goal, name, (model.name, config_of(model, source)), wish)
    options = planner.settled(options)
    output = wish.output or Path(f"{model.name}-{name}-{goal.NAME}")
    OutputFolder(output, wish.overwrite).check()
    check_apart(output, found.source.files)
    job = Job(
        model=str(wish.out),
        scheme=name,
        target=goal.NAME,
        component=found.manifest.component,
        output=output,
        rounding=found.manifest.rounding,
        keep=options.keep,
        layout=options.layout,
        rank=options.rank,
        group_size=options.group_size,
        zero_points=options.zero_points,
        settings=options.settings,
    )
    held = sum(info.nbytes for info in found.source.infos.values())
    plan = replace(planner.plan(options), source_bytes=held)
    return Prepared(job, model, source, plan, None, output, options, tuple(planner.notes))


class _Planner:
    """Plans for the other target until the plan says what the file has."""

    def __init__(
        self,
        source: PackedSource,
        goal: Target,
        name: str,
        identity: tuple[str, Mapping[str, Any]],
        wish: Transcoding,
    ) -> None:
        self.source, self.goal, self.name, self.identity = source, goal, name, identity
        self.wish = wish
        self.notes: list[str] = []

    def plan(self, options: PlanOptions) -> Plan:
        """PlanError with every reason."""
        try:
            return make_plan(self.source, self.goal, scheme(self.name), options, self.identity)
        except PlanError as error:
            raise PlanError(problem.replace(OVER, "") for problem in error.problems) from error

    def settled(self, options: PlanOptions) -> PlanOptions:
        """Options under which the target quantizes what the file has quantized."""
        if "lowrank" in scheme(self.name).steps:
            options = replace(options, rank=self.source.found.recognized.rank or None)
        plan = self.plan(options)
        lacking = self._unfit(plan)
        if lacking and self.wish.dequantize_kept and self.goal.PARTIAL:
            options = replace(options, choices={**options.choices, **dict.fromkeys(lacking, KEEP)})
            plan, lacking = self.plan(options), {}
        problems = [*self._unquantized(plan), *self._quantized(plan)]
        problems += [f"{name}: {reason}" for name, reason in self._by_row(lacking)]
        if problems:
            raise PlanError(problems)
        if plan.context.rank:
            options = replace(options, rank=self._rank(plan))
        kept = [m for layer in plan.layers if layer.reason == "kept" for m in layer.modules]
        choices = {module: own for module, own in options.choices.items() if own != KEEP}
        return replace(options, choices=choices, keep=_expression(self.source, kept))

    def _unfit(self, plan: Plan) -> dict[str, str]:
        """Linears whose layers hold too little for the target, or another format, and why."""
        hint = "; --dequantize-kept makes it 16 bit" if self.goal.PARTIAL else ""
        found: dict[str, str] = {}
        for layer in plan.layers:
            for module in layer.modules if layer.form else ():
                for piece, _ in self.source.pieces.get(module, ()):
                    reason = unfit(layer.form, piece.form)
                    if reason is not None:
                        found[module] = f"{reason}{hint}"
        return found

    def _by_row(self, reasons: Mapping[str, str]) -> list[tuple[str, str]]:
        """Names and reasons, one for those of all blocks."""
        found: dict[tuple[str, str], None] = {}
        for module, reason in reasons.items():
            found |= {(name, reason): None for name in self._rows([module])}
        return list(found)

    def _unquantized(self, plan: Plan) -> Iterator[str]:
        """Linears that the target must have quantized, and the file has not."""
        if self.goal.PARTIAL:
            return
        kept = (layer for layer in plan.layers if layer.reason == "kept")
        lacking = [m for layer in kept for m in layer.modules if m not in self.source.pieces]
        for name in self._rows(lacking):
            yield (
                f"{name}: not quantized in the file, and {self.goal.NAME} has no layout for an "
                "unquantized one; convert the original model"
            )

    def _quantized(self, plan: Plan) -> Iterator[str]:
        """Linears that the target keeps in 16 bit, and the file has quantized."""
        if self.wish.dequantize_kept:
            return
        reasons: dict[str, list[str]] = {}
        for layer in plan.layers:
            packed = [m for m in layer.modules if m in self.source.pieces]
            if layer.form is None and packed:
                reason = "part of it is not quantized" if layer.reason == "kept" else layer.reason
                reasons.setdefault(reason, []).extend(packed)
        for reason, modules in reasons.items():
            for name in self._rows(modules):
                yield (
                    f"{name}: quantized in the file, but not for {self.goal.NAME} ({reason}); "
                    "--dequantize-kept makes it 16 bit again"
                )

    def _rows(self, modules: Iterable[str]) -> dict[str, None]:
        """Linears by the rows of the family's table: one line for those of all blocks."""
        found = (self.source.family.linear(module, outside=True) for module in modules)
        return dict.fromkeys(row[0].name for row in found if row is not None)

    def _rank(self, plan: Plan) -> int:
        """The rank that all layers get: the largest that one of them needs, a multiple of 16."""
        from dqconvert.converter.repack import logical
        from dqconvert.quantizers.slicing import trimmed

        problems, ranks = [], {16: ""}
        for layer in plan.layers:
            if layer.form is None or not layer.form.rank:
                continue
            try:
                branch = logical(plan, layer, self.source).lowrank
            except ValueError as error:
                problems.append(f"{layer.name}: {error}")
                continue
            if branch is not None:
                ranks.setdefault(len(trimmed(branch).down), layer.name)
        if problems:
            raise PlanError(problems)
        most, before = max(ranks), self.source.found.recognized.rank
        rank = -(-most // 16) * 16
        if rank > before:
            self.notes.append(
                f"rank {rank} in the place of {before}: {ranks[most]} joins layers with low-rank "
                "branches of their own; the others are filled up with zeros"
            )
        return rank


def _unpacked(source: PackedSource) -> list[str]:
    """Canonical linears that are not packed."""
    modules = [name.removesuffix(".weight") for name in source.infos if name.endswith(".weight")]
    found = source.family
    return [m for m in modules if m not in source.pieces and found.linear(m, outside=True)]


def _expression(source: PackedSource, modules: list[str]) -> str | None:
    """A regular expression for these canonical linears, of all blocks at once where that is so."""
    parts: dict[str, None] = {}
    for module in modules:
        row = source.family.linear(module, outside=True)
        assert row is not None
        pattern = re.escape(row[0].name).replace(re.escape("{i}"), r"\d+")
        alike = [
            name.removesuffix(".weight")
            for name in source.infos
            if re.fullmatch(pattern + r"\.weight", name)
        ]
        whole = set(alike) <= set(modules)
        parts[pattern if whole else re.escape(fill(row[0].name, row[1]))] = None
    return f"^({'|'.join(parts)})$" if parts else None


def _check_static(goal: Target, name: str, options: PlanOptions) -> None:
    """PlanError where a runtime needs ranges of inputs that the file does not hold."""
    main = scheme(name)
    known = () if goal.accepts(main) is not None else goal.layouts(main)
    layout = known[0] if options.layout is None and known else options.layout
    if options.calibrated or layout not in known:
        return
    if goal.static(goal.adapt(main, layout or ""), layout or "") == "required":
        raise PlanError(
            [
                f"target {goal.NAME} needs a static scale of every input, and the file has none; "
                "convert the original model with --calib"
            ]
        )


def _model(found: Reopened, name: str) -> Model:
    """What is known of the model: by the manifest, else by the file's name."""
    said = _said(found).get("source", {})
    said = said if isinstance(said, dict) else {}
    origin = said.get("origin")
    licenses = {
        hub: found.family.licenses[alias]
        for alias, hub in found.family.aliases.items()
        if alias in found.family.licenses
    }
    config = {k: v for k, v in found.config.items() if k != "quantization_config"}
    if "_class_name" not in config:
        config = json_object(str(found.source.metadata.get("config", ""))) or {}
    return Model(
        name=str(said.get("name") or _short(found, name)),
        path=found.path,
        pipeline=None,
        config=config if "_class_name" in config else None,
        origin=origin if isinstance(origin, str) else None,
        license=licenses.get(str(origin)),
    )


def _short(found: Reopened, name: str) -> str:
    """A model's name from that of its file, without what says how it is quantized."""
    stem = re.sub(TITLES, "", found.path.stem)
    if stem in ("diffusion_pytorch_model", "model", "non_block") or stem.startswith("block_"):
        stem = found.root.name
    return re.sub(rf"-({re.escape(name)}|[a-z0-9]+_[a-z0-9_]+|bf16|f16)$", "", stem, flags=re.I)


def _said(found: Reopened) -> dict[str, Any]:
    """The manifest beside the file, {} without."""
    path = found.root / MANIFEST
    return read_json(path) if path.exists() else {}


def _provenance(found: Reopened) -> dict[str, Any]:
    """What a GGUF file says of itself beside what its target says anew."""
    if found.target.NAME != gguf.NAME:
        return {}
    again = (*gguf.KEYS, "general.alignment")
    return {
        key: value
        for key, value in found.source.metadata.items()
        if key not in again and not key.startswith(gguf.RESHAPED)
    }


def _history(found: Reopened, dequantized: list[str]) -> dict[str, Any]:
    """For the new manifest: the file that this was made of, and what its manifest said.

    dequantized: canonical linears that were packed in it.
    """
    said = _said(found)
    made = {
        "file": found.path.name,
        "target": found.target.NAME,
        "files": {path.name: _sha256(path) for path in found.source.files},
        "dequantized": dequantized,
        "before": said.get("transcoded"),
    }
    kept = {key: said[key] for key in ("source", "calibration", "loras") if said.get(key)}
    options = said.get("options")
    options = options if isinstance(options, dict) else {}
    same = {key: options[key] for key in SAME if key in options} or {"rounding": None}
    return {**kept, "transcoded": made, "options": same}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
