"""What a person, or with --json a program, gets to see."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dqconvert.converter.job import LayerReport, Progress, Report

if TYPE_CHECKING:
    from dqconvert.converter.components import Whole
    from dqconvert.converter.inspect import Inspection
    from dqconvert.converter.prepare import Prepared
    from dqconvert.converter.verify import Verdict

T = TypeVar("T")
TITLES = {
    "calibrate": ("calibrating", "step"),
    "precondition": ("preconditioning", "input"),
    "measure": ("measuring", "layer"),
    "convert": ("converting", "B"),
}


def plan(prepared: Prepared, as_json: bool) -> None:
    """The plan of a dry run."""
    from dqconvert.converter import manifest

    if as_json:
        click.echo(json.dumps(manifest.describe(prepared)))
        return
    decided = prepared.plan
    rows = [
        {
            "layer": layer.name,
            "format": layer.form.label if layer.form else "kept",
            "shape": "x".join(map(str, layer.form.shape)) if layer.form else "",
            "bytes": f"{layer.nbytes:,}",
            "reason": layer.reason,
        }
        for layer in decided.layers
    ]
    table(rows, False)
    click.echo(
        f"\n{prepared.source.family.title} ({prepared.source.dialect} names), "
        f"{prepared.source_bytes / 1e9:.3f} GB -> {decided.nbytes / 1e9:.3f} GB, "
        f"{len(decided.outputs)} tensors: {prepared.output}/{_filename(decided.files)}"
    )
    for note in prepared.notes:
        click.echo(f"note: {note}")


def pipeline_plan(whole: Whole, as_json: bool) -> None:
    """The plans of a pipeline's parts."""
    from dqconvert.converter import manifest

    if as_json:
        said = {name: manifest.describe(one) for name, one in whole.parts.items()}
        click.echo(json.dumps({"components": said, "kept": [str(path) for path in whole.kept]}))
        return
    for name, prepared in whole.parts.items():
        click.echo(f"{name}:")
        plan(prepared, False)
    click.echo(f"\n{len(whole.kept)} files of the pipeline stay as they are: {whole.output}/")


def rewriting(said: dict[str, Any], as_json: bool) -> None:
    """What --lora-mode branch would make of a file that is there."""
    if as_json:
        click.echo(json.dumps(said))
        return
    rank, size, modules = said["rank"], said["bytes"], said["modules"]
    click.echo(
        f"{said['output']}/: {said['file']}, rank {rank['before']} -> {rank['after']}, "
        f"{size['before'] / 1e9:.3f} GB -> {size['after'] / 1e9:.3f} GB"
    )
    for where in ("branch", "merged", "left out"):
        for name in modules[where]:
            click.echo(f"  {where}: {name}")
    for note in said["notes"]:
        click.echo(f"note: {note}")


def manifest_of(path: Path) -> None:
    """The manifest of an output."""
    from dqconvert.converter import manifest
    from dqconvert.converter.resolve import read_json

    click.echo(json.dumps(read_json(path / manifest.NAME)))


def conversion(prepared: Prepared, as_json: bool, quiet: bool) -> None:
    """Run a prepared job under a progress bar, then its summary."""
    from dqconvert.converter.convert import convert

    def run(listen: Callable[[Progress], None]) -> Report:
        *_, report = convert(prepared, listen)
        assert isinstance(report, Report)
        return report

    report = with_progress(run, quiet or as_json)
    if as_json:
        manifest_of(report.output)
    elif not quiet:
        _summary(prepared, report)


def with_progress(work: Callable[[Callable[[Progress], None]], T], quiet: bool) -> T:
    """Do work that reports progress, with a bar on stderr for each stage."""
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def listen(progress: Progress) -> None:
        if progress.stage not in bars:
            title, unit = TITLES[progress.stage]
            bars[progress.stage] = tqdm(
                total=progress.total,
                desc=title,
                unit=unit,
                unit_scale=unit == "B",
                disable=quiet or None,
                file=sys.stderr,
            )
        bar = bars[progress.stage]
        if progress.done < bar.n or progress.total != bar.total:  # the pipeline's next part
            bar.reset(total=progress.total)
        bar.update(progress.done - bar.n)

    try:
        return work(listen)
    finally:
        for bar in bars.values():
            bar.close()


def table(rows: Sequence[dict[str, str]], as_json: bool) -> None:
    """Rows with equal keys, as columns."""
    if as_json:
        click.echo(json.dumps(list(rows)))
        return
    if not rows:
        return
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    for row in [{key: key for key in widths}, *rows]:
        line = "  ".join(row[key].ljust(width) for key, width in widths.items())
        click.echo(line.rstrip())


def made(path: Path, as_json: bool) -> None:
    """The file that a command made."""
    click.echo(json.dumps({"file": str(path)}) if as_json else str(path))


def folder(path: Path, notes: Iterable[str], as_json: bool, quiet: bool) -> None:
    """The folder that a command made, or its manifest, and what the user should know of it."""
    from dqconvert.converter import manifest
    from dqconvert.converter.resolve import read_json

    if as_json:
        click.echo(json.dumps(read_json(path / manifest.NAME)))
    elif not quiet:
        click.echo("\n".join([str(path), *(f"  note: {note}" for note in notes)]))


def inspection(found: Inspection, as_json: bool) -> None:
    """What a checkpoint is."""
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found)))
        return
    for key, value in found.facts.items():
        click.echo(f"{key:10} {value}")
    table([{"format": k, "layers": str(n)} for k, n in found.formats.items()], False)
    for problem in found.problems:
        click.echo(f"problem: {problem}")


def verdict(found: Verdict, as_json: bool) -> None:
    """Errors layer by layer, worst last, then problems."""
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found)))
        return
    ordered = sorted(found.layers, key=lambda layer: layer.error)
    table([_errors(layer) for layer in ordered], False)
    click.echo(f"\n{len(found.layers)} layers of {found.title}")
    for problem in found.problems:
        click.echo(f"problem: {problem}", err=True)
    click.echo("the file is broken" if found.problems else "the file is sound")


def _errors(layer: LayerReport) -> dict[str, str]:
    output = "" if layer.output_error is None else f"{layer.output_error:.4f}"
    weight = "" if layer.weight_error is None else f"{layer.weight_error:.4f}"
    return {
        "layer": layer.name,
        "format": layer.format,
        "weight error": weight,
        "output error": output,
    }


def _summary(prepared: Prepared, report: Report) -> None:
    worst = report.worst
    mean, output = report.mean("weight_error"), report.mean("output_error")
    ratio = report.source_bytes / max(report.output_bytes, 1)
    lines = [
        f"{report.output}/{_filename(report.weights)}",
        f"  {prepared.plan.scheme.name} for {prepared.plan.target.NAME}: "
        f"{len(report.layers)} layers, {report.source_bytes / 1e6:,.1f} MB -> "
        f"{report.output_bytes / 1e6:,.1f} MB ({ratio:.2f} times smaller)",
        f"  weight error {mean:.4f} in the mean"
        + ("" if output is None else f", output error {output:.4f} {prepared.measured}"),
        f"  worst layer {worst.name}: {worst.error:.4f}",
        f"  {report.seconds:.1f} s, {report.peak_memory / 2**30:.2f} GiB at most",
        *(f"  note: {note}" for note in report.notes),
    ]
    click.echo("\n".join(lines))


def _filename(files: Iterable[str]) -> str:
    first, *others = files
    return f"{first} and {len(others)} more" if others else first
