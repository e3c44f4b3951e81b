"""What lies beside the weights: the runtime's config, the manifest, the model card.

`dqconvert.json` holds the source, the versions, the options, the report of every layer, and the
SHA-256 of every file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqconvert.converter import card
from dqconvert.converter.job import Report
from dqconvert.converter.lora.apply import record
from dqconvert.converter.lora.match import Loras
from dqconvert.converter.lora.merged import MergedSource
from dqconvert.converter.precondition import PreconditionedSource
from dqconvert.formats.folder import MANIFEST
from dqconvert.quantizers.errors import OutputError

if TYPE_CHECKING:
    from dqconvert.converter.prepare import Prepared

NAME = MANIFEST
PACKAGES = ("torch", "safetensors", "diffusers", "transformers")


def write(
    folder: Path,
    prepared: Prepared,
    report: Report,
    digests: Mapping[Path, str],
    history: Mapping[str, Any] | None = None,
) -> Report:
    """Complete an output folder whose weights are there; returns the report with its files.

    digests: SHA-256 of the files that were hashed while they were written; history: of what is
    no conversion: entries that replace the manifest's own, or join them where both are objects.
    """
    plan = prepared.plan
    config = plan.target.config(plan.context)
    try:
        if config is not None:
            place = folder / plan.target.FOLDER / "config.json"
            place.write_text(json.dumps(config, indent=2) + "\n")
        files = {
            path.relative_to(folder).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": digests.get(path) or _digest(path),
            }
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        report = dataclasses.replace(report, files=files)
        said = describe(prepared, report)
        for key, value in (history or {}).items():
            both = isinstance(value, Mapping) and isinstance(said.get(key), Mapping)
            said[key] = {**said[key], **value} if both else value
        (folder / NAME).write_text(json.dumps(said, indent=2) + "\n")
        (folder / "README.md").write_text(card.render(prepared, report, history or {}))
    except OSError as error:
        raise OutputError(f"{prepared.output}: {error.strerror}") from error
    return report


def describe(prepared: Prepared, report: Report | None = None) -> dict[str, Any]:
    """The manifest as plain data; without a report, what the plan alone says."""
    job, plan, source = prepared.job, prepared.plan, prepared.source
    folded = "fold" if plan.folds and job.precondition == "off" else job.precondition
    found: dict[str, Any] = {
        "dqconvert": version("dqconvert"),
        "source": {
            "model": job.model,
            "name": prepared.model.name,
            "component": job.component,
            "origin": prepared.model.origin,
            "family": source.family.name,
            "dialect": source.dialect,
            "files": {path.name: path.stat().st_size for path in source.source.files},
            "bytes": prepared.source_bytes,
        },
        "scheme": plan.scheme.name,
        "target": plan.target.NAME,
        "options": {
            "rank": plan.context.rank,
            "rounding": prepared.rounding,
            "smooth": job.smooth if prepared.calibration and plan.scheme.steps else "off",
            "keep": job.keep,
            "overrides": [list(pair) for pair in job.overrides],
            "layout": plan.context.layout,
            "group_size": job.group_size,
            "bits": job.bits,
            "imatrix": job.imatrix.name if job.imatrix else None,
            "zero_points": job.zero_points,
            "settings": dict(job.settings),
            "precondition": folded,  # AWQ folds in any case
            "lora_mode": job.lora_mode if job.loras else None,
            "rank_cap": job.rank_cap,
        },
        "loras": _loras(prepared) if report else [str(path) for path, _ in job.loras],
        "calibration": _calibration(prepared),
        "precondition": dict(report.precondition) if report else {},
        "output": {"folder": str(prepared.output), "bytes": plan.nbytes},
        "notes": list(report.notes if report else prepared.notes),
    }
    if report is None:
        found["layers"] = [
            {"name": layer.name, "reason": layer.reason, "bytes": layer.nbytes}
            for layer in plan.layers
        ]
        return found
    found["layers"] = [dataclasses.asdict(layer) for layer in report.layers]
    found["seconds"] = round(report.seconds, 3)
    found["peak_memory"] = report.peak_memory
    found["files"] = report.files
    found["packages"] = {name: version(name) for name in PACKAGES}
    return found


def version(package: str) -> str | None:
    """Installed version of a package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _loras(prepared: Prepared) -> list[dict[str, Any]]:
    source = prepared.observed
    source = source.inner if isinstance(source, PreconditionedSource) else source
    loras = source.loras if isinstance(source, MergedSource) else Loras()
    return record(loras, prepared.job.lora_partial)


def _calibration(prepared: Prepared) -> dict[str, Any] | None:
    found = prepared.calibration
    if found is None:
        return None
    chosen = found.settings.chosen(found.prompts)
    text = "\n".join(prompt.prompt for prompt in chosen)
    return {
        "file": prepared.job.calib.name if prepared.job.calib else None,
        "pipeline": prepared.job.pipeline or prepared.job.model,
        "prompts": len(chosen),
        "prompts_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "key": found.key,
        "settings": dataclasses.asdict(found.settings),
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
