"""From a job to a conversion that is ready to run. Torch-free."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqconvert.converter import tokenizers
from dqconvert.converter.canonical import CanonicalSource
from dqconvert.converter.detect import some, unknown
from dqconvert.converter.generic import is_generic
from dqconvert.converter.job import Job
from dqconvert.converter.lora import apply as lora
from dqconvert.converter.lora.branch import Branch, branched
from dqconvert.converter.lora.merged import MergedSource
from dqconvert.converter.opening import open_model
from dqconvert.converter.options import PlanOptions, running
from dqconvert.converter.plan import Plan, make_plan
from dqconvert.converter.resolve import TRANSFORMER, Model, resolve
from dqconvert.converter.statistics import (
    ENCODER,
    SECOND,
    Calibration,
    config_of,
    foreign_config,
    plan_calibration,
)
from dqconvert.converter.vocabulary import names_of, with_vocabulary
from dqconvert.formats.folder import OutputFolder
from dqconvert.formats.targets import Target, gguf, target
from dqconvert.quantizers.errors import OutputError, PlanError
from dqconvert.quantizers.ggml import jit
from dqconvert.quantizers.schemes import scheme
from dqconvert.quantizers.spec import ALL, CODES, NEEDS_IMPORTANCE, Scheme

if TYPE_CHECKING:
    from dqconvert.converter.precondition import Precondition


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job that is ready to run: everything decided, nothing computed.

    options: what the plan was made from; found: notes that the work itself adds; precondition:
    how source differs from the checkpoint, None where it does not; branch: LoRAs that go into the
    low-rank branches, None where they are merged.
    """

    job: Job
    model: Model
    source: CanonicalSource
    plan: Plan
    calibration: Calibration | None
    output: Path
    options: PlanOptions = field(default_factory=PlanOptions)
    found: tuple[str, ...] = ()
    precondition: Precondition | None = None
    branch: Branch | None = None

    @property
    def observed(self) -> CanonicalSource:
        """The model as it will run, which calibration observes."""
        return self.source if self.branch is None else self.branch.observed

    @property
    def source_bytes(self) -> int:
        """What the model takes where it lies: less than what is read of it, if it is packed."""
        files = sum(path.stat().st_size for path in self.source.source.files)
        return min(self.plan.source_bytes, files)

    @property
    def rank(self) -> int:
        """Of the low-rank branches that weights are quantized with."""
        return self.plan.context.rank if self.branch is None else self.branch.rank

    @property
    def rounding(self) -> str:
        """The rounding that runs: GPTQ needs activations."""
        if self.calibration is None:
            return self.job.rounding or self.plan.scheme.data_free
        return self.job.rounding or self.plan.scheme.rounding

    @property
    def measured(self) -> str:
        """What output errors are measured on, in words."""
        known = self.job.imatrix is not None
        return "by the importance matrix" if known else "on held calibration rows"

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of what was decided."""
        found = [*self.found, *_notes_without_calibration(self)]
        found += [*_notes_of_types(self), *_notes_of_blocks(self)]
        found += self.plan.context.facts.get("notes", ())
        whole = sum(form.full_precision for form in self.plan.context.layers.values())
        if whole and self.calibration is not None:
            found.append(f"{whole} adaLN layers multiply in 16 bit: their inputs have no scale")
        if self.calibration is not None:
            found += self.calibration.notes
        found += [*self.source.notes, *_notes_of_names(self.source, self.plan.target)]
        if self.source.ignored:
            found.append(f"{self.source.ignored} tensors of other components were left out")
        return tuple(found)

    def replan(self, choices: Mapping[str, str]) -> Prepared:
        """The same job with these schemes for these canonical linears."""
        options = replace(self.options, choices=choices)
        name = self.job.scheme
        identity = (self.model.name, self.plan.context.config)
        plan = make_plan(self.source, self.plan.target, scheme(name), options, identity)
        return replace(self, plan=plan, options=options)


def _notes_of_names(source: CanonicalSource, goal: Target) -> Iterator[str]:
    """What no table says of a checkpoint, a whole model or single tensors; what no reader reads."""
    title = source.family.title
    if is_generic(source.family):
        yield (
            f"{title} is no family that is known: its linears were told by their names alone, and "
            "verified less; look at --dry-run, and leave out with --keep what must stay"
        )
    passengers = tuple(source.family.passengers)
    rest = [name for name in unknown(source) if not name.startswith(passengers)]
    if rest:
        yield f"{title} has no such tensors; kept as they are: {some(rest)}"
    left = [name for name in source.infos if not source.family.carries(goal.NAME, name)]
    if left:
        yield f"{len(left)} tensors are not read by {goal.NAME} and were left out: {some(left)}"


def _notes_without_calibration(prepared: Prepared) -> Iterator[str]:
    plan = prepared.plan
    if prepared.calibration is not None:
        return
    if "lowrank" in plan.scheme.steps:
        yield (
            "no --calib: without activations there is neither smoothing nor GPTQ; on "
            "flux-digits that costs 5 to 6 dB of PSNR, 13 to 18 dB with outlier channels"
        )
    if plan.scheme.better:
        yield (
            f"no --calib: the layers at {plan.scheme.better} are those of the published list, "
            "not the ones that measure as the most sensitive"
        )
    scaled = [
        form
        for form in plan.context.layers.values()
        if CODES[form.spec.code].is_float
        and form.spec.tile == (ALL, ALL)
        and not form.input_scale
        and getattr(plan.target.activation(form, plan.scheme), "tile", (ALL, ALL)) == (ALL, ALL)
    ]
    if scaled and plan.target.static(plan.scheme, plan.context.layout) == "optional":
        whole = sum(form.full_precision for form in scaled)
        yield (
            "no --calib: no input_scale is written, so the runtime quantizes activations at "
            f"scale 1 and clips them at {scaled[0].spec.maximum:.0f}"
            + (f"; {whole} layers whose inputs pass that multiply in 16 bit" if whole else "")
            + "; give prompts for static scales"
        )


def _notes_of_types(prepared: Prepared) -> Iterator[str]:
    """Layers that have, or will have, another type than the one that was asked for."""
    plan = prepared.plan
    if plan.scheme.menu and not prepared.options.choices:
        yield "the conversion measures which type each layer gets, and so sizes and the file's name"
    fitted = Counter(
        layer.form.spec.code.upper()
        for layer in plan.layers
        if layer.form and layer.scheme and hasattr(plan.target, "fitting")
        if layer.form.spec.code != scheme(layer.scheme.name).weight.code
    )
    if fitted:
        types = ", ".join(f"{count} {code}" for code, count in sorted(fitted.items()))
        yield f"layers whose width the blocks do not divide are of other types: {types}"


def _notes_of_blocks(prepared: Prepared) -> Iterator[str]:
    """What is missing that ggml's types want: numba, and an importance matrix."""
    forms = prepared.plan.context.layers.values()
    codes = dict.fromkeys(form.spec.code for form in forms if CODES[form.spec.code].block)
    if codes and not jit.available():
        yield (
            "numba is not installed: these types take about 10 times as long; "
            "pip install 'dqconvert[fast]'"
        )
    blind = [code.upper() for code in codes if code in NEEDS_IMPORTANCE]
    if blind and prepared.calibration is None and prepared.job.imatrix is None:
        yield (
            f"no --calib and no --imatrix: {', '.join(blind)} is made for an importance matrix; "
            "all inputs count the same"
        )


def prepare(job: Job) -> Prepared:
    """Resolve, recognise and plan a job. Reads headers and prompts only; imports no torch.

    Raises DQConvertError, with all problems of the plan at once.
    """
    chosen = scheme(job.scheme)
    _check_words(job, chosen)
    lora.check(job, chosen)
    model = resolve(job.model, whole=job.calib is not None, component=job.component)
    base = open_model(model.path, model.config, model.part)
    goal = _goal(job, chosen, base)
    source = lora.merged(job, with_vocabulary(base, model.path, goal))
    _check_device(job, goal)
    model = _credited(model, source.source.metadata)
    tokens = _tokenizer(model, source, goal)
    calibration = plan_calibration(job, model, source, _learns(job, chosen))
    options = PlanOptions(
        rank=job.rank,
        keep=job.keep,
        calibrated=calibration is not None,
        smooth=job.smooth,
        layout=job.layout,
        group_size=job.group_size,
        zero_points=job.zero_points,
        overrides=job.overrides,
        settings=job.settings,
        provenance=_provenance(model) | (tokens or {}),
        bits=job.bits,
        config=foreign_config(model, source, goal),
    )
    identity = (model.name, config_of(model, source))
    plan, branch = make_plan(source, goal, chosen, options, identity), None
    if job.lora_mode == lora.BRANCH and isinstance(source, MergedSource):
        branch, options = branched(plan, source, options, job.rank_cap)
        source = branch.source
        plan = make_plan(source, goal, chosen, options, identity)
    output = job.output or Path(f"{model.name}-{chosen.name}-{goal.NAME}")
    OutputFolder(output, job.overwrite).check()
    check_apart(output, [*source.source.files, *_given(job)])
    said = source.loras.notes if isinstance(source, MergedSource) else ()
    found = said if tokens is not None else (*said, _NO_TOKENIZER)
    found = (*found, *_notes_of_vocabulary(source, goal), *_notes_of_passengers(source, goal))
    prepared = Prepared(job, model, source, plan, calibration, output, options, found)
    return replace(prepared, branch=branch)


def _goal(job: Job, chosen: Scheme, source: CanonicalSource) -> Target:
    """The runtime that was asked for, or the scheme's first that runs the family."""
    able = running(chosen, source.family, job.calib is not None)
    return target(job.target) if job.target else [*able, target(chosen.targets[0])][0]


def _given(job: Job) -> list[Path]:
    """Files beside the checkpoint that a job reads."""
    return [*(one for one in (job.calib, job.imatrix) if one), *(path for path, _ in job.loras)]


def _notes_of_vocabulary(source: CanonicalSource, goal: Target) -> Iterator[str]:
    """ComfyUI has no tokenizers of its own for some encoders, and reads them from the file."""
    name = source.family.vocabulary
    if name and goal.NAME == "comfyui" and name not in source.infos:
        yield (
            f"ComfyUI makes this encoder's tokenizer of a tensor called {name} in the file, which "
            f"the source lacks; put its {names_of(name)} beside the encoder"
        )


def _notes_of_passengers(source: CanonicalSource, goal: Target) -> Iterator[str]:
    """Parts of the same file, for a runtime, that the source does not have."""
    family = source.family
    for start in family.vital:
        known = any(name.startswith(start) for name in source.infos)
        if goal.NAME in family.passengers[start] and not known:
            yield (
                f"target {goal.NAME} reads {start}* from the same file, and the source has none of "
                "it: what is written does not run; convert the original single file, which has"
            )


_NO_TOKENIZER = (
    "no tokenizer lies beside the encoder (tokenizer.json or spiece.model), so the file has none; "
    "ComfyUI-GGUF cannot do without"
)


def _tokenizer(model: Model, source: CanonicalSource, goal: Target) -> dict[str, Any] | None:
    """The tokenizer's keys where readers want them in the file; None where there is none."""
    family = source.family
    if not family.tokens or family.dialect_of(goal.NAME, goal.DIALECT) != "gguf":
        return {}
    folder = tokenizers.folder_beside(model.path)
    if folder is None:
        return None
    return tokenizers.metadata(folder, source.infos[family.tokens].shape[0])


def _learns(job: Job, chosen: Scheme) -> str:
    """The rounding that decides whether second moments are collected: whoever needs them."""
    needs = job.precondition != "off" or {"fold", "clip", "rotate"} & set(chosen.steps)
    return "gptq" if needs else job.rounding or chosen.rounding


def _check_words(job: Job, chosen: Scheme) -> None:
    """Options that only mean something with prompts are refused without them."""
    if job.imatrix is not None:
        _check_imatrix(job.imatrix, job, chosen)
    if job.calib is not None:
        if job.component not in (TRANSFORMER, SECOND) and not job.component.startswith(ENCODER):
            raise PlanError(
                [f"--calib: observes transformers and text encoders, not {job.component}"]
            )
        return
    given = {
        "--rounding gptq": job.rounding == "gptq",
        f"--smooth {job.smooth}": job.smooth not in ("auto", "off"),
        "--calib-steps": job.calib_steps is not None,
        "--calib-samples": job.calib_samples is not None,
        "--size": job.size is not None,
        "--pipeline": job.pipeline is not None,
        f"--precondition {job.precondition}": job.precondition != "off",
    }
    problems = [
        f"{word} needs activations: give prompts with --calib" for word in given if given[word]
    ]
    if problems:
        raise PlanError(problems)


def _check_device(job: Job, goal: Target) -> None:
    """A GPU rounds to ggml's types; the others were never tried on one."""
    if job.device == "cpu":
        return
    if not re.fullmatch(r"cuda(:\d+)?", job.device):
        raise PlanError([f"--device {job.device}: must be cpu, cuda or cuda:N"])
    if goal.NAME != gguf.NAME:
        raise PlanError([f"--device {job.device}: only target {gguf.NAME} rounds on a GPU"])


def _check_imatrix(path: Path, job: Job, chosen: Scheme) -> None:
    """An importance matrix stands in the place of calibration, and only ggml's types take one."""
    problems = []
    wanted = [chosen.name, *(name for _, name in job.overrides)]
    if not any(CODES[scheme(name).weight.code].block for name in wanted):
        problems.append(f"--imatrix: means nothing to {chosen.name}, which has no ggml blocks")
    if not path.is_file():
        problems.append(f"--imatrix {path}: no such file")
    if job.calib is not None:
        problems.append("--imatrix and --calib: give one; both say what the inputs are")
    if job.rounding == "rtn":
        problems.append("--rounding rtn takes no notice of --imatrix; leave one out")
    if problems:
        raise PlanError(problems)


def _credited(model: Model, metadata: Mapping[str, Any]) -> Model:
    """A model with the licence and the base that its own GGUF file names."""
    license_name = str(metadata.get("general.license", ""))
    url = str(metadata.get("general.base_model.0.repo_url", ""))
    origin = url.removeprefix("https://huggingface.co/")
    if model.license is None and re.fullmatch(r"[\w.-]+", license_name):
        model = replace(model, license=license_name)
    if model.origin is None and origin != url and re.fullmatch(r"[\w.-]+/[\w.-]+", origin):
        model = replace(model, origin=origin)
    return model


def _provenance(model: Model) -> dict[str, Any]:
    """Where a model comes from, by the keys that GGUF files have for it."""
    said: dict[str, Any] = {"general.name": model.name, "general.quantized_by": "dqconvert"}
    if model.license:
        said["general.license"] = model.license
    if model.origin:
        owner, _, name = model.origin.partition("/")
        said |= {
            "general.base_model.count": 1,
            "general.base_model.0.name": name,
            "general.base_model.0.organization": owner,
            "general.base_model.0.repo_url": f"https://huggingface.co/{model.origin}",
        }
    return said


def check_apart(output: Path, inputs: Sequence[Path]) -> None:
    """An output that is replaced must not take what it is made of with it."""
    for path in inputs:
        if path.resolve().is_relative_to(output.resolve()):
            raise OutputError(f"{output}: holds {path.name}, which is read; choose another -o")
