"""The model card that lies beside converted weights, with the front matter that the Hub reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dqconvert.converter.job import Report

if TYPE_CHECKING:
    from dqconvert.converter.prepare import Prepared


def render(prepared: Prepared, report: Report, history: Mapping[str, Any]) -> str:
    """The card as Markdown. history: see manifest.write."""
    if "transcoded" in history:
        return _transcoded(prepared, report, history["transcoded"])
    model, plan = prepared.model, prepared.plan
    worst = report.worst
    lines = [
        *_front_matter(prepared),
        f"# {model.name}, {plan.scheme.name} for {plan.target.NAME}",
        "",
        f"{prepared.source.family.title} quantized with dqconvert: {plan.scheme.summary}.",
        f"Target: {plan.target.SUMMARY}.",
        "",
        "| | |",
        "|---|---|",
        f"| size | {plan.nbytes / 1e6:,.1f} MB, from {prepared.source_bytes / 1e6:,.1f} MB |",
        f"| quantized layers | {len(report.layers)} |",
        f"| mean weight error | {report.mean('weight_error') or 0:.4f} |",
    ]
    mean = report.mean("output_error")
    if mean is not None:
        lines.append(f"| mean output error {prepared.measured} | {mean:.4f} |")
    lines += [
        f"| worst layer | `{worst.name}` ({worst.error:.4f}) |",
        f"| calibration | {_calibration(prepared)} |",
        *(f"| LoRA | {path.name}, strength {one:g} |" for path, one in prepared.job.loras),
        "",
        "Errors are relative Frobenius norms. `dqconvert.json` has the error of every layer, the",
        "options, and the SHA-256 of every file.",
        "",
        *(f"Note: {note}." for note in report.notes),
    ]
    return "\n".join(lines).rstrip() + "\n"


def of_pipeline(first: Prepared, said: Mapping[str, Any]) -> str:
    """The card of a whole pipeline. first: its transformer; said: its manifest."""
    model, plan = first.model, first.plan
    lines = [
        *_front_matter(first),
        f"# {model.name}, {plan.scheme.name} for {plan.target.NAME}",
        "",
        f"{first.source.family.title} quantized with dqconvert: {plan.scheme.summary}.",
        f"Target: {plan.target.SUMMARY}.",
        "",
        "| component | |",
        "|---|---|",
        *(f"| {name} | {one['scheme']} |" for name, one in said["components"].items()),
        *(f"| {name} | as it was |" for name in said["kept"]),
        "",
        f"{said['output']['bytes'] / 1e6:,.1f} MB in all. Each quantized component has a "
        "`dqconvert.json` with the error",
        "of every layer; the one here has the SHA-256 of every file.",
    ]
    return "\n".join(lines) + "\n"


def _transcoded(prepared: Prepared, report: Report, made: Mapping[str, Any]) -> str:
    """The card of a file that holds the codes of another one."""
    model, plan = prepared.model, prepared.plan
    lines = [
        *_front_matter(prepared),
        f"# {model.name}, {plan.scheme.name} for {plan.target.NAME}",
        "",
        f"{prepared.source.family.title}, {plan.scheme.summary}.",
        f"Target: {plan.target.SUMMARY}.",
        "",
        f"Transcoded with dqconvert from `{made['file']}`, a file for {made['target']}: the codes",
        "of its layers are the same, nothing was quantized again.",
        "",
        "| | |",
        "|---|---|",
        f"| size | {plan.nbytes / 1e6:,.1f} MB |",
        f"| quantized layers | {len(report.layers)} |",
        "",
        "`dqconvert.json` has what is known of the original, and the SHA-256 of every file.",
        "",
        *(f"Note: {note}." for note in report.notes),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _front_matter(prepared: Prepared) -> list[str]:
    model, plan = prepared.model, prepared.plan
    lines = ["---"]
    if model.origin:
        lines += [f"base_model: {model.origin}", "base_model_relation: quantized"]
    if model.license in (None, "apache-2.0"):
        lines += [f"license: {model.license}"] if model.license else []
    else:
        lines += ["license: other", f"license_name: {model.license}"]
    if plan.target.NAME == "diffusers":
        lines.append("library_name: diffusers")
    task = prepared.source.family.task
    lines += [
        *([f"pipeline_tag: {task}"] if task else []),
        f"tags: [dqconvert, {plan.scheme.name}, {plan.target.NAME}]",
        "---",
        "",
    ]
    return lines


def _calibration(prepared: Prepared) -> str:
    found, imatrix = prepared.calibration, prepared.job.imatrix
    if imatrix is not None:
        return f"the importance matrix {imatrix.name}"
    if found is None:
        return "none, from weights alone"
    count = len(found.settings.chosen(found.prompts))
    return f"{count} prompts, {found.settings.steps} steps each"
