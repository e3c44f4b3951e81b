"""From what the user typed to local files: an embedded model, an alias, a Hub id, a folder, a file.

Torch-free. Hub snapshots come from huggingface-hub's cache and are completed from the network
where there is one.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dqconvert.converter.families import aliases, families
from dqconvert.quantizers.errors import DQConvertError, SourceError, UnknownName

DATA = Path(__file__).parent / "data"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TRANSFORMER = "transformer"
UNET = "unet"
"""In the place of the transformer in older pipelines."""
INDEX = "model_index.json"
ALL = "all"
"""In the place of a component: every one of the pipeline."""
_MODELS = (
    "transformer*",
    "unet",
    "vae",
    "audio_vae",
    "vocoder",
    "connectors",
    "text_encoder*",
    "image_encoder",
    "guider",
    "ocr_guider",
)
_PIPELINE = (
    "scheduler/*",
    "tokenizer*/*",
    "*processor/*",
    "feature_extractor/*",
    *(f"{folder}/*.{end}" for folder in _MODELS for end in ("json", "safetensors")),
)
"""What a pipeline reads to make latents of prompts."""

_TOP = ("config.json", "diffusion_pytorch_model*.json", "diffusion_pytorch_model*.safetensors")
"""A model alone in its repository; what else lies at the top is for other programs."""

_UNWANTED = ("*.bin", "*.msgpack", "*.h5", "*.onnx*", "*.pt", "*.ckpt", "*openvino*")
"""Copies of weights in forms that nobody reads here."""

_VARIANTS = tuple(f"*.{name}{end}*" for name in ("fp16", "bf16", "fp32", "non_ema") for end in ".-")
"""Copies in other dtypes, which are read where there is nothing else."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model on this machine.

    name: short, for file names; path: of the transformer's weights; pipeline: folder with
    model_index.json, None where only the transformer is there; config: of the transformer, or of an
    encoder in transformers' words, None where no config.json lies beside it; origin: what a model
    card names as its base; license: of the base model, if known; part: what the names of tensors
    begin with that are meant.
    """

    name: str
    path: Path
    pipeline: Path | None
    config: dict[str, Any] | None
    origin: str | None = None
    license: str | None = None
    part: str = ""


def embedded() -> dict[str, Path]:
    """Models that ship with the package: the pipeline folders of data/."""
    return {path.parent.name: path.parent for path in sorted(DATA.glob("*/model_index.json"))}


def resolve(name: str, whole: bool = False, component: str = TRANSFORMER) -> Model:
    """The model that a word on the command line means.

    whole: calibration follows, so the text encoders are needed too; component: the folder of a
    pipeline that is meant, or FOLDER.PART for tensors in it that begin with PART. Raises
    SourceError, or UnknownName with near names.
    """
    folder, _, part = component.partition(".")
    found = _resolve(name, whole, folder)
    return replace(found, name=f"{found.name}.{part}", part=f"{part}.") if part else found


def _resolve(name: str, whole: bool, component: str) -> Model:
    inside = embedded()
    if name in inside:
        return _local(inside[name], name, component, license="apache-2.0")
    if name in aliases():
        license_name = next(
            (f.licenses[name] for f in families().values() if name in f.licenses), None
        )
        hub = aliases()[name]
        return _local(_snapshot(hub, whole, component), name, component, hub, license_name)
    path = _path(name)
    if path.exists():
        return _local(path, _short(path), component)
    if _HUB_ID.fullmatch(name) and not path.parent.exists():
        folder = _snapshot(name, whole, component)
        return _local(folder, name.split("/")[1].lower(), component, origin=name)
    known = [*inside, *aliases()]
    if "/" in name or path.suffix or not difflib.get_close_matches(name, known, cutoff=0.5):
        raise SourceError(
            f"{name}: no such file or folder, and no model is called so (see `dqconvert list "
            "models`); give one of those, a path, or a Hub id such as owner/name"
        )
    raise UnknownName("model", name, known)


def _path(name: str) -> Path:
    """The path that a word names; SourceError for words that cannot be one."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise SourceError(f"{name[:80]}: cannot be a path ({error})") from error
    if not name.strip():
        raise SourceError("the model's name is empty")
    return path


def _local(
    path: Path,
    name: str,
    component: str,
    origin: str | None = None,
    license: str | None = None,
) -> Model:
    """A pipeline folder, the folder of its transformer, or a file."""
    weights: Path = path
    pipeline: Path | None = None
    if component == ALL and not (path / INDEX).exists():
        raise SourceError(f"{path}: --component all needs a pipeline, which has a {INDEX}")
    component = TRANSFORMER if component == ALL else component
    if (path / INDEX).exists():
        weights, pipeline = path / folder_of(path, component), path
        if not weights.is_dir():
            raise SourceError(f"{path}: the pipeline has no folder called {component}")
    elif is_folder_of_one(path, component):
        weights = path / folder_of(path, component)
    elif component != TRANSFORMER:
        raise SourceError(f"{path}: --component {component} needs a pipeline folder or a Hub id")
    elif path.is_dir() and (path.absolute().parent / "model_index.json").exists():
        pipeline = path.absolute().parent
    folder = weights if weights.is_dir() else weights.parent
    name = name if component == TRANSFORMER else f"{name}-{component}"
    return Model(name, weights, pipeline, _config(folder), origin, license)


def is_folder_of_one(path: Path, component: str = TRANSFORMER) -> bool:
    """Whether a folder holds a component in a folder of its own, but no pipeline around it."""
    bare = path.is_dir() and not any(path.glob("*.safetensors"))
    return bare and (path / folder_of(path, component)).is_dir()


def folder_of(path: Path, component: str) -> str:
    """The folder of a component: a pipeline without a transformer may have a U-Net."""
    older = component == TRANSFORMER and not (path / TRANSFORMER).is_dir()
    return UNET if older and (path / UNET).is_dir() else component


def _config(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    if not path.exists():
        return None
    config = read_json(path)
    return config if "_class_name" in config or "model_type" in config else None


def _short(path: Path) -> str:
    """A short name from a path: the pipeline's rather than "transformer"."""
    path = path.absolute()  # links keep their names: a hub cache links to hashes
    if path.name in (TRANSFORMER, UNET):
        path = path.parent
    stem = path.stem if path.is_file() else path.name
    return re.sub(r"-\d{5}-of-\d{5}$|\.safetensors\.index$", "", stem).lower()


def _snapshot(repo: str, whole: bool, component: str) -> Path:
    """The local snapshot of a Hub repository; SourceError that says why there is none."""
    folders = (TRANSFORMER, UNET) if component == TRANSFORMER else (component,)
    weights = [f"{folder}/*.{end}" for folder in folders for end in ("json", "safetensors")]
    more = _PIPELINE if whole else () if component == TRANSFORMER else ("tokenizer*/*",)
    patterns = [INDEX, "*/*"] if component == ALL else [INDEX, *weights, *more]
    found = _fetched(repo, patterns, _VARIANTS)
    if _lacks_weights(found, ("*",) if whole or component == ALL else folders):
        found = _fetched(repo, patterns)
    if component == TRANSFORMER and not any((found / folder).is_dir() for folder in folders):
        found = _fetched(repo, _TOP, _VARIANTS)
        if not any(found.glob("*.safetensors")):
            raise SourceError(
                f"{repo}: has no folder called {TRANSFORMER} or {UNET}, and no model at its top; "
                "download the file that you want, and give its path"
            )
    return found


def _lacks_weights(snapshot: Path, folders: Sequence[str]) -> bool:
    """Whether one of these parts of a snapshot has the config of a model, but no weights."""
    configs = [path for folder in folders for path in snapshot.glob(f"{folder}/config.json")]
    return any(not any(path.parent.glob("*.safetensors")) for path in configs)


def _fetched(repo: str, patterns: Sequence[str], unwanted: Sequence[str] = ()) -> Path:
    """The snapshot with files of these patterns; SourceError that says why there is none."""
    import huggingface_hub
    from huggingface_hub import errors as hub

    ignored = [*_UNWANTED, *unwanted]
    page = f"https://huggingface.co/{repo}"
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo, allow_patterns=list(patterns), ignore_patterns=ignored
            )
        )
    except hub.GatedRepoError:
        reason = f"is gated: accept its licence at {page}, then run: hf auth login"
    except hub.RepositoryNotFoundError:
        reason = "is not on the Hub, or is private: check the name, or run: hf auth login"
    except (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError):
        reason = "is not in the local cache and the Hub cannot be reached; give a local folder"
    except (hub.HfHubHTTPError, hub.HFValidationError, OSError) as error:
        reason = f"cannot be fetched: {(str(error) or type(error).__name__).splitlines()[0]}"
    raise SourceError(f"{repo}: {reason}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; DQConvertError if it is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DQConvertError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise DQConvertError(f"{path}: not a JSON object")
    return found
