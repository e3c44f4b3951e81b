"""A whole pipeline at once: `--component all`. Torch-free until it runs.

    OUT/model_index.json, scheduler/, vae/, tokenizer/ ...   the pipeline's own
    OUT/transformer/, transformer_2/                         by the scheme
    OUT/text_encoder*/, image_encoder/                       by the scheme of encoders, if one is
                                                             given, else the pipeline's own
    OUT/COMPONENT/dqconvert.json                             the manifest of one that was quantized
    OUT/dqconvert.json                                       the transformer's, with all files

Weights that stay as they are, are hard links where the file system has them, other files are
copies. What is not named in model_index.json is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dqconvert.converter import manifest
from dqconvert.converter.job import Job, Progress, Report
from dqconvert.converter.lora.apply import holding
from dqconvert.converter.prepare import Prepared, check_apart, prepare
from dqconvert.converter.resolve import ALL, INDEX, TRANSFORMER, UNET, read_json, resolve
from dqconvert.converter.statistics import ENCODER
from dqconvert.formats.folder import OutputFolder
from dqconvert.formats.targets import target
from dqconvert.quantizers.errors import OutputError, PlanError
from dqconvert.quantizers.schemes import scheme

RUNTIMES = ("diffusers", "sglang", "vllm")
"""Targets that read pipeline folders."""

WEIGHTS = (".safetensors", ".bin", ".msgpack", ".h5", ".onnx", ".onnx_data", ".gguf")

ENCODERS = (ENCODER, "image_encoder")
NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
"""Of the weights in a component's folder."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A pipeline that is ready to be converted: its folder, what is quantized, where it goes."""

    job: Job
    pipeline: Path
    parts: Mapping[str, Prepared]
    output: Path

    @property
    def kept(self) -> tuple[Path, ...]:
        """Files of the pipeline that stay as they are, relative to its folder."""
        return tuple(_kept(self.pipeline, self.parts))


def prepare_all(job: Job) -> Whole:
    """Resolve, recognise and plan all parts of a pipeline. Raises DQConvertError."""
    chosen = scheme(job.scheme)
    goal = target(job.target or chosen.targets[0])
    if goal.NAME not in RUNTIMES:
        raise PlanError(
            [f"--component all: target {goal.NAME} reads single files; try {', '.join(RUNTIMES)}"]
        )
    model = resolve(job.model, whole=True, component=ALL)
    assert model.pipeline is not None
    output = job.output or Path(f"{model.name}-{chosen.name}-{goal.NAME}")
    OutputFolder(output, job.overwrite).check()
    check_apart(output, [model.pipeline / INDEX])
    parts = {}
    for name in components(model.pipeline):
        part = _job_of(job, name, output)
        if part is not None:
            found = prepare(part)
            own = replace(found.model, origin=model.origin, license=model.license)
            notes = (*found.found, *_notes_of_experts(model.pipeline, part))
            found = replace(found, found=notes)
            parts[name] = replace(found, model=own, output=output / name)
    if not parts:
        raise PlanError([f"{model.pipeline}: has no transformer, and no --encoder-scheme is given"])
    _check_folders(parts)
    _check_loras(job, parts)
    return Whole(job, model.pipeline, parts, output)


def components(pipeline: Path) -> list[str]:
    """Components that a pipeline's index names and that have a folder, transformers first."""
    said = read_json(pipeline / INDEX)
    names = [k for k, v in said.items() if isinstance(v, list) and (pipeline / k).is_dir()]
    return sorted(names, key=lambda name: (not name.startswith((TRANSFORMER, UNET)), name))


def convert_all(whole: Whole, listen: Callable[[Progress], None] = lambda _: None) -> Path:
    """Write the pipeline's folder, which appears whole or not at all; returns it."""
    from dqconvert.converter.convert import convert

    with OutputFolder(whole.output, whole.job.overwrite) as folder:
        for name, prepared in whole.parts.items():
            place = folder / f"{name}.part"
            *_, report = convert(replace(prepared, output=place), listen)
            assert isinstance(report, Report)
            _move(place, folder / name, prepared.plan.target.FOLDER, whole.output / name)
        for path in whole.kept:
            _place(whole.pipeline / path, folder / path)
        try:
            _describe(folder, whole)
        except OSError as error:
            raise OutputError(f"{whole.output}: {error.strerror}") from error
    return whole.output


def _job_of(job: Job, name: str, output: Path) -> Job | None:
    """The job of one component, None where it stays as it is.

    What is said of single linears or of layouts is said of the transformer.
    """
    part = replace(job, component=name, output=output / f"{name}.part")
    if name == UNET:  # in the place of the transformer
        part = replace(part, component=TRANSFORMER)
    if part.component.startswith(TRANSFORMER):
        return holding(part, part.component)
    if job.encoder_scheme is None or not name.startswith(ENCODERS):
        return None
    own = Job(
        model=job.model,
        scheme=job.encoder_scheme,
        target=job.target or scheme(job.scheme).targets[0],
        component=name,
        calib=job.calib if name.startswith(ENCODER) else None,
        calib_samples=job.calib_samples if job.calib and name.startswith(ENCODER) else None,
        output=output / f"{name}.part",
        workers=job.workers,
        loras=job.loras,
        lora_partial=job.lora_partial,
    )
    return holding(own, name)


def _check_folders(parts: Mapping[str, Prepared]) -> None:
    """PlanError where a layout is a file of its own, which no pipeline looks for."""
    names = {name: Path(next(iter(part.plan.files))).name for name, part in parts.items()}
    problems = [
        f"{name}: layout {parts[name].plan.context.layout} is a single file, which no pipeline "
        "loads; choose another --layout"
        for name, file in names.items()
        if parts[name].plan.target.NAME == "diffusers" and file not in NAMES
    ]
    if problems:
        raise PlanError(problems)


def _notes_of_experts(pipeline: Path, part: Job) -> Iterator[str]:
    """A LoRA of one of two experts does not say of which, where each has a file of its own."""
    if part.component == TRANSFORMER and part.loras and (pipeline / f"{TRANSFORMER}_2").is_dir():
        names = ", ".join(path.name for path, _ in part.loras)
        yield (
            f"{names}: merged into {TRANSFORMER}, and into {TRANSFORMER}_2 what names it alone; "
            f"where each expert has a file, convert --component {TRANSFORMER} and "
            f"--component {TRANSFORMER}_2 apart"
        )


def _check_loras(job: Job, parts: Mapping[str, Prepared]) -> None:
    """PlanError where a LoRA would be left out as a whole."""
    used = {path for part in parts.values() for path, _ in part.job.loras}
    problems = [
        f"{path.name}: is of no part that is quantized; --encoder-scheme quantizes the encoders"
        for path, _ in job.loras
        if path not in used
    ]
    if problems:
        raise PlanError(problems)


def _kept(pipeline: Path, quantized: Sequence[str] | Mapping[str, Any]) -> Iterator[Path]:
    yield Path(INDEX)
    for name in components(pipeline):
        files = sorted(path for path in (pipeline / name).rglob("*") if path.is_file())
        tensors = any(path.suffix == ".safetensors" for path in files)
        for path in files:
            known = path.suffix in WEIGHTS or path.name.endswith(".index.json")
            mine = name in quantized and (known or path.name == "config.json")
            twice = tensors and path.suffix in WEIGHTS and path.suffix != ".safetensors"
            if not mine and not twice:
                yield path.relative_to(pipeline)


def _place(source: Path, goal: Path) -> None:
    """Link weights, copy what people edit. OutputError where neither can be done."""
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix in WEIGHTS:
            try:
                os.link(source.resolve(), goal)
            except OSError:  # another file system, or one without links
                shutil.copyfile(source, goal)
        else:
            shutil.copyfile(source, goal)
    except OSError as error:
        raise OutputError(f"{goal}: {source} cannot be copied there: {error.strerror}") from error


def _move(part: Path, goal: Path, inner: str, final: Path) -> None:
    """Bring a component's output to its folder; its manifest tells files as they are called there.

    inner: the folder inside the output in which the target has weights and config.
    """
    said = read_json(part / manifest.NAME)
    (part / "README.md").unlink()
    (part / manifest.NAME).unlink()
    said["files"] = {name.removeprefix(f"{inner}/"): row for name, row in said["files"].items()}
    said["output"]["folder"] = str(final)
    source = part / inner if inner else part
    source.rename(goal)
    for path in sorted(part.iterdir()) if inner else ():
        path.rename(goal / path.name)
    if inner:
        part.rmdir()
    (goal / manifest.NAME).write_text(json.dumps(said, indent=2) + "\n")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe(folder: Path, whole: Whole) -> None:
    """The pipeline's manifest and card: the transformer's, and all files."""
    from dqconvert.converter import card

    said = {name: read_json(folder / name / manifest.NAME) for name in whole.parts}
    known = {f"{name}/{k}": row for name, one in said.items() for k, row in one["files"].items()}
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        files[name] = known.get(name) or {"bytes": path.stat().st_size, "sha256": _digest(path)}
    parts = {
        name: {"scheme": one["scheme"], "family": one["source"]["family"]}
        for name, one in said.items()
    }
    first = next(iter(said.values()))
    kept = [name for name in components(whole.pipeline) if name not in said]
    both = {**first, "components": parts, "kept": kept, "files": files}
    both["output"] = {
        "folder": str(whole.output),
        "bytes": sum(row["bytes"] for row in files.values()),
    }
    (folder / manifest.NAME).write_text(json.dumps(both, indent=2) + "\n")
    (folder / "README.md").write_text(card.of_pipeline(next(iter(whole.parts.values())), both))
