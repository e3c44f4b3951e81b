"""The diffusers pipeline of a folder in two halves: text first, then the denoiser.

    encode        all but the denoisers: loaded, called up to their first use, freed
    open_denoiser all but the text half, around the caller's transformer
    drawing       one prompt's whole pipeline call, as a function without arguments

Contract: nothing is asked of the network. A drawing computes what the stock pipeline computes for
that prompt and seed; its result stays latent. Drawings share their modules, and nothing that
changes during a call: each has its own pipeline object and scheduler. diffusers and transformers
are imported when these functions run. `tests/test_calibration.py` holds it.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqconvert.calibration.call import Call, Encoded, Outline
from dqconvert.calibration.denoiser import skeleton
from dqconvert.calibration.prompts import Prompt
from dqconvert.calibration.require import require
from dqconvert.calibration.settings import CalibrationSettings
from dqconvert.calibration.signature import Signature, read_signature
from dqconvert.quantizers.errors import CalibrationError

TEXT = ("text_encoder", "tokenizer")
"""How the names of the components begin that only the text needs."""

ENHANCERS = ("pe", "pe_tokenizer", "prompt_enhancer")
"""Components that would rewrite a prompt, which is taken as it is."""

DENOISERS = ("transformer", "unet")
"""How the names of the components begin that draw."""


@dataclass(frozen=True, slots=True)
class _Index:
    """What model_index.json says: the pipeline class, and (library, class) of each component."""

    folder: Path
    pipeline: type
    components: Mapping[str, tuple[str, str]]

    def named(self, *starts: str) -> list[str]:
        """Components whose name begins with one of the words."""
        return [name for name in self.components if name.startswith(starts)]


def encode(
    folder: Path,
    prompts: Sequence[Prompt],
    settings: CalibrationSettings,
    before: Callable[[Any, int], None] = lambda pipe, index: None,
    models: Mapping[str, nn.Module] | None = None,
) -> tuple[Encoded, ...]:
    """What the text half makes of every prompt, on the CPU, in the dtype of the settings.

    before: is told of the pipeline and the number of each prompt that is encoded next. models: a
    denoiser without weights, by its name in the pipeline, whose config is not that of the folder.
    The text encoders run in the dtype that their files have: in float32 T5-XXL alone is 19 GB.
    """
    index = _index(folder)
    signature = read_signature(index.pipeline)
    if hasattr(sys.modules[index.pipeline.__module__], "is_ftfy_available"):
        require("ftfy")  # which such a pipeline calls even where it is not there
    encoders = _text_encoders(index, settings)
    shapes = {name: _outlined(index, name, models or {}) for name in index.named(*DENOISERS)}
    pipe = _load(index, shapes | encoders)
    for name, model in shapes.items():
        object.__setattr__(pipe, name, Outline(model, settings))
    pipe.to(settings.device)
    pipe.set_progress_bar_config(disable=True)
    length = settings.max_sequence_length or _text_length(pipe, signature)
    encoded = []
    for place, prompt in enumerate(prompts):
        before(pipe, place)
        encoded.append(Call(pipe, prompt, settings, next(iter(shapes))).record(length))
    del pipe, encoders
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return tuple(encoded)


def open_denoiser(
    folder: Path,
    transformer: nn.Module,
    settings: CalibrationSettings,
    component: str = "transformer",
) -> Any:
    """The pipeline without its text half, around a transformer that is ready to run.

    component: what the pipeline calls it; where it has another expert, that one is loaded.
    """
    index = _index(folder)
    _check_denoiser(index, component)
    experts = {
        name: _expert(index, name, settings)
        for name in index.named(*DENOISERS)
        if name != component
    }
    experts[component] = transformer
    pipe = _load(index, dict.fromkeys(index.named(*TEXT)) | experts)
    pipe.set_progress_bar_config(disable=True)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name not in experts:
            part.to(settings.device, getattr(torch, settings.dtype))
    return pipe


def drawing(
    base: Any,
    prompt: Prompt,
    encoded: Encoded,
    settings: CalibrationSettings,
    on_step: Callable[[], None] = lambda: None,
) -> Callable[[], Tensor]:
    """The pipeline call, which returns the latents, of a prompt with a seed."""
    component = next(name for name in base.components if name.startswith(DENOISERS))
    call = Call(base, prompt, settings, component)
    return lambda: call.play(encoded, on_step)


def _index(folder: Path) -> _Index:
    diffusers = require("diffusers")
    path = folder / "model_index.json"
    try:
        content = json.loads(path.read_bytes())
        components = {
            name: (value[0], value[1]) for name, value in content.items() if _names_a_class(value)
        }
        name = content["_class_name"]
    except (OSError, ValueError, LookupError, AttributeError):
        raise CalibrationError(
            f"{path}: no index of a diffusers pipeline can be read here; calibration needs the"
            " whole pipeline folder, not the transformer alone"
        ) from None
    pipeline = getattr(diffusers, name, None)
    if pipeline is None:
        raise CalibrationError(
            f"{path}: asks for '{name}', which diffusers {diffusers.__version__} does not have;"
            " upgrade it with: pip install -U diffusers"
        )
    return _Index(folder, pipeline, components)


def _names_a_class(value: Any) -> bool:
    """Whether an entry of the index is a library and a class; options may be lists, too."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)


def _text_encoders(index: _Index, settings: CalibrationSettings) -> dict[str, Any]:
    """The text encoders that are transformers' own, in the dtype of their files."""
    transformers = require("transformers")
    loaded = {}
    for name in index.named("text_encoder"):
        library, class_name = index.components[name]
        model_class = getattr(transformers, class_name, None)
        if library != "transformers" or model_class is None:
            continue  # diffusers knows how to load it
        try:
            model = model_class.from_pretrained(
                index.folder / name, dtype="auto", local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise CalibrationError(f"{index.folder / name}: cannot be loaded: {error}") from error
        half = model.dtype == torch.float16 and settings.device == "cpu"
        loaded[name] = model.float() if half else model
    return loaded


def _expert(index: _Index, name: str, settings: CalibrationSettings) -> nn.Module:
    """Another transformer of the pipeline, in the dtype of the settings."""
    _check_present(index, name)
    model_class = getattr(require("diffusers"), index.components[name][1])
    try:
        model: nn.Module = model_class.from_pretrained(
            index.folder / name,
            torch_dtype=getattr(torch, settings.dtype),
            local_files_only=True,
        )
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{index.folder / name}: cannot be loaded: {error}") from error
    return model.requires_grad_(False).to(settings.device)


def _outlined(index: _Index, name: str, models: Mapping[str, nn.Module]) -> nn.Module:
    """A denoiser of the pipeline without its weights."""
    if name in models:
        return models[name]
    _check_present(index, name)
    try:
        config = json.loads((index.folder / name / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{index.folder / name}: cannot be loaded: {error}") from error
    return skeleton(config)


def _check_denoiser(index: _Index, component: str) -> None:
    if component not in index.components:
        raise CalibrationError(
            f"{index.folder}: {index.pipeline.__name__} has no {component}; only diffusion"
            " transformers can be calibrated"
        )


def _check_present(index: _Index, name: str) -> None:
    if not (index.folder / name).is_dir():
        raise CalibrationError(
            f"{index.folder / name}: this part of the pipeline is missing; download the whole"
            " pipeline folder"
        )


def _load(index: _Index, given: Mapping[str, Any]) -> Any:
    """The pipeline of a folder, with some components given, or None to go without.

    Folders are looked for here: of one that is missing transformers makes an empty tokenizer.
    """
    given = dict.fromkeys(name for name in ENHANCERS if name in index.components) | dict(given)
    for name in index.components:
        if name not in given:
            _check_present(index, name)
    try:
        return index.pipeline.from_pretrained(index.folder, local_files_only=True, **given)  # type: ignore[attr-defined]
    except ImportError as error:
        raise CalibrationError(f"{index.folder}: needs another package: {error}") from error
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{index.folder}: cannot be loaded: {error}") from error


def _text_length(pipe: Any, signature: Signature) -> int | None:
    """Tokens of text: the pipeline's own default, or fewer if its tokenizers are made for fewer."""
    parts = [part for name, part in pipe.components.items() if name.startswith("tokenizer")]
    known = [getattr(part, "tokenizer", part) for part in parts]  # some are processors
    lengths = [part.model_max_length for part in known if hasattr(part, "model_max_length")]
    own = signature.text_length
    return own if own is None or not lengths else int(min(own, max(lengths)))
