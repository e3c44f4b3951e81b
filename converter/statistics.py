"""Statistics for a conversion: from the cache, or from a calibration run that fills it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqconvert.calibration.prompts import Prompt, read_prompts
from dqconvert.calibration.settings import CalibrationSettings, Site, stats_key
from dqconvert.converter.canonical import CanonicalSource
from dqconvert.converter.families import families
from dqconvert.converter.family import Family, fill
from dqconvert.converter.job import Job, Progress
from dqconvert.converter.lora.apply import merged
from dqconvert.converter.lora.merged import MergedSource
from dqconvert.converter.opening import open_model
from dqconvert.converter.plan import Plan
from dqconvert.converter.resolve import INDEX, TRANSFORMER, UNET, Model, read_json, resolve
from dqconvert.formats.targets import Target
from dqconvert.quantizers.errors import CalibrationError, OutputError, SourceError

if TYPE_CHECKING:
    from torch import Tensor

    from dqconvert.quantizers.tensors import LayerStats

FRAMES, VIDEO_SIZE = 17, (256, 416)
"""Of a video, unless told otherwise: half as many tokens as a picture of a megapixel has."""

SECOND = "transformer_2"
"""What Wan 2.2's pipelines call their expert for the steps of little noise."""

ENCODER = "text_encoder"
"""How the names of text encoders begin, which are observed while they encode the prompts."""

STEPS = 12
"""Denoising steps of a prompt: spread over the schedule, they matter more than many prompts."""

FP32_LIMIT = 4 << 30
"""Transformers with more bytes than this calibrate in bf16: fp32 would double them."""


_PACKED = re.compile(r"quantization_config|mm_config|\w+_quantized|\w+_quant_scheme")
"""Keys of a config.json that say how its weights are packed, and nothing of the model."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """A calibration that is decided: prompts, settings, and the file that holds its result."""

    prompts: tuple[Prompt, ...]
    settings: CalibrationSettings
    sites: tuple[Site, ...]
    pipeline: Path
    key: str
    path: Path
    component: str = "transformer"

    @property
    def notes(self) -> tuple[str, ...]:
        """What was chosen for the user."""
        found, chosen = [], self.settings
        if chosen.frames:
            found.append(
                f"calibrated on videos of {chosen.frames} frames, {chosen.height}x{chosen.width}; "
                "--size takes another size"
            )
        if chosen.guidance == 0:
            found.append(
                "calibrated without guidance, as distilled models run; 'guidance' in a .jsonl "
                "file of prompts says otherwise"
            )
        if (self.pipeline / SECOND).is_dir():
            found.append(
                f"calibrated as {self.component} of two: on the steps that the pipeline gives it"
            )
        return tuple(found)


def plan_calibration(
    job: Job, model: Model, source: CanonicalSource, rounding: str = "gptq"
) -> Calibration | None:
    """Decide a job's calibration, None if it asks for none. Reads prompts, runs nothing.

    rounding: only "gptq" needs second moments, which take 4 K² bytes for each input; others do
    without, unless statistics that have them are there already.

    Raises CalibrationError on bad prompts or where the text encoders are missing.
    """
    if job.calib is None:
        return None
    prompts = read_prompts(job.calib)
    family = source.family
    size = job.size or (VIDEO_SIZE if family.video else (None, None))
    total = sum(info.nbytes for info in source.infos.values())
    settings = CalibrationSettings(
        steps=1 if job.component.startswith(ENCODER) else job.calib_steps or STEPS,
        height=size[0],
        width=size[1],
        frames=FRAMES if family.video else None,
        guidance=0.0 if any(word in model.name for word in family.unguided) else None,
        samples=job.calib_samples,
        dtype="float32" if total <= FP32_LIMIT else "bfloat16",
    )
    sites, pipeline = _sites(source), _pipeline(job, model, family)

    config = config_of(model, source)
    component = _component(job, pipeline)
    fingerprint = _fingerprint(source, pipeline / component, config)

    def under(settings: CalibrationSettings) -> Calibration:
        key = stats_key(fingerprint, prompts, settings, sites)
        path = cache() / f"{key}.safetensors"
        return Calibration(prompts, settings, sites, pipeline, key, path, component)

    whole = under(settings)
    if rounding == "gptq" or whole.path.exists():
        return whole
    return under(replace(settings, moments=False))


def statistics(
    calibration: Calibration,
    model: Model,
    source: CanonicalSource,
    listen: Callable[[Progress], None],
) -> Mapping[str, LayerStats]:
    """The statistics by canonical linear, read one at a time; runs the pipeline if need be."""
    from dqconvert.calibration import store

    try:
        return store.LazyStats(calibration.path, calibration.key)
    except CalibrationError:  # none yet, or of an older version, or damaged
        _writable(calibration.path)
        _run(calibration, model, source, listen)
    return store.LazyStats(calibration.path, calibration.key)


def unseen(plan: Plan, stats: Mapping[str, LayerStats]) -> tuple[str, ...]:
    """A note on the layers that the prompts never ran, such as experts that no token was sent to.

    They are quantized as without calibration; CalibrationError where that cannot be.
    """
    layers = [one for one in plan.layers if one.form and one.site not in stats]
    if not layers:
        return ()
    which = f"{len(layers)} layers never ran on these prompts, {layers[0].name} first"
    if any(one.form.input_scale for one in layers if one.form):
        raise CalibrationError(
            f"{which}, and {plan.scheme.name} for {plan.target.NAME} needs the range of their"
            " inputs; give more prompts or --calib-steps"
        )
    return (f"{which}: they are quantized as without calibration; more prompts may run them",)


def calibrate(job: Job, listen: Callable[[Progress], None], imatrix: Path | None = None) -> Path:
    """Collect the statistics of a job's model and prompts; returns their file.

    imatrix: where to write them as an importance matrix as well.
    """
    from dqconvert.converter import importance

    if imatrix is not None:
        importance.check(imatrix)
    model = resolve(job.model, whole=True, component=job.component)
    source = merged(job, open_model(model.path, model.config))
    calibration = plan_calibration(job, model, source)
    assert calibration is not None
    stats = statistics(calibration, model, source, listen)
    if imatrix is not None:
        importance.write(imatrix, source, stats)
    return calibration.path


def cache() -> Path:
    """Where statistics are kept between runs: $DQCONVERT_CACHE, or in the user's cache folder."""
    root = os.environ.get("DQCONVERT_CACHE")
    if root:
        return Path(root)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "dqconvert"


def config_of(model: Model, source: CanonicalSource) -> dict[str, Any]:
    """The transformer's diffusers config: what the shapes imply, under what config.json says.

    config.json leaves out what was a default when it was written (FLUX.1's has no axes). Raises
    SourceError where a count or a width in it is not that of the tensors.
    """
    implied = source.family.config_of(source.infos)
    said = {key: v for key, v in (model.config or {}).items() if not _PACKED.match(key)}
    for key, value in implied.items():
        if key in source.family.assumed:
            continue
        if isinstance(value, int) and said.get(key, value) != value:
            raise SourceError(
                f"{model.path}: config.json says {key} {said[key]}, the tensors say {value}; "
                "the checkpoint is incomplete, or the config is another model's"
            )
    return implied | said


def foreign_config(model: Model, source: CanonicalSource, target: Target) -> dict[str, Any] | None:
    """The config.json of a transformers model, None where the target wants a diffusers one or none.

    SourceError where there is none to copy: the shapes do not imply all of it.
    """
    if target.NAME not in source.family.spellings:
        return None
    said = model.config or {}
    if "model_type" not in said:
        raise SourceError(
            f"{model.path}: no config.json of transformers lies beside the {source.family.title}, "
            f"which target {target.NAME} needs; give the folder of the encoder or its pipeline"
        )
    return {key: value for key, value in said.items() if not _PACKED.match(key)}


def _writable(path: Path) -> None:
    """Find out before the work whether its result can be kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(
            f"{path.parent}: statistics cannot be kept there ({error.strerror}); "
            "set DQCONVERT_CACHE to another folder"
        ) from error


def _run(
    calibration: Calibration,
    model: Model,
    source: CanonicalSource,
    listen: Callable[[Progress], None],
) -> None:
    from dqconvert.calibration import store
    from dqconvert.calibration.collect import Subject, collect
    from dqconvert.calibration.encoders import observe_encoder

    def weights(prefix: str) -> dict[str, Tensor]:
        return {name: source.read(name) for name in source.infos if name.startswith(prefix)}

    def progress(done: int, total: int) -> None:
        listen(Progress("calibrate", done, total))

    chosen = (calibration.sites, calibration.prompts, calibration.settings)
    if calibration.component.startswith(ENCODER):
        found = observe_encoder(calibration.pipeline / calibration.component, *chosen, progress)
        store.save(calibration.path, calibration.key, found)
        return
    config = config_of(model, source)
    blocks = tuple(
        blocks
        for blocks in source.family.blocks
        if any(name.startswith(f"{blocks}.") for name in source.infos)
    )
    subject = Subject(calibration.pipeline, config, weights, blocks, calibration.component)
    found = collect(subject, *chosen, progress)
    store.save(calibration.path, calibration.key, found)


def _sites(source: CanonicalSource) -> tuple[Site, ...]:
    """Every distinct input of the model's linears, so that statistics serve all schemes."""
    names: dict[str, None] = {}
    for name in source.infos:
        found = source.family.linear(name.removesuffix(".weight"), outside=True)
        if name.endswith(".weight") and found:
            row, index = found
            names[fill(row.site or row.name, index)] = None
    return tuple(Site(name, name) for name in names)


def _pipeline(job: Job, model: Model, family: Family) -> Path:
    """The folder with the text encoders; CalibrationError where it is another family's."""
    if job.pipeline and job.component.startswith(ENCODER):
        raise CalibrationError(
            f"--pipeline {job.pipeline}: leave it out; {job.component} is observed in its own"
        )
    folder = resolve(job.pipeline, whole=True).pipeline if job.pipeline else model.pipeline
    if folder is None:
        raise CalibrationError(
            f"{model.path}: only a transformer; calibration also needs its text encoders and "
            "scheduler: name a pipeline folder, alias or Hub id with --pipeline"
        )
    if not (folder / "scheduler").is_dir():
        raise SourceError(f"{folder}: the pipeline has no folder called scheduler")
    kind = str(read_json(folder / INDEX).get("_class_name", ""))
    own = dict.fromkeys(family.pipelines.values())
    others = (one for one in families().values() if kind in one.pipelines.values())
    if own and kind not in own and (other := next(others, None)):
        raise CalibrationError(
            f"{folder}: a {kind}, which runs {other.title}; {family.title} runs in "
            f"{' or '.join(own)}"
        )
    return folder


def _component(job: Job, pipeline: Path) -> str:
    """What the pipeline calls the model that is observed: older ones have a U-Net."""
    known = read_json(pipeline / INDEX)
    older = job.component == TRANSFORMER and TRANSFORMER not in known and UNET in known
    return UNET if older else job.component


def _fingerprint(source: CanonicalSource, place: Path, config: Mapping[str, Any]) -> str:
    """What is run: names and shapes of the weights, and every file's name, size and time.

    place: the folder in the pipeline that the weights replace.
    """
    parts = [path for path in sorted(place.parent.rglob("*")) if path.parent != place]
    files = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in (*source.source.files, *parts)
        if path.is_file()
    ]
    infos = [(name, info.dtype, info.shape) for name, info in source.infos.items()]
    said: list[object] = [place.name, files, infos, dict(config)]
    if isinstance(source, MergedSource):
        said.append(source.loras.identity)
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
