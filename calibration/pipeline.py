"""The diffusers pipeline of a folder in two halves: text first, then the denoiser.

    encode        tokenizers and text encoders: loaded, used, freed
    open_denoiser everything else, around the caller's transformer
    drawing       one prompt's whole pipeline call, as a function without arguments

Contract: nothing is asked of the network. A drawing computes what the stock pipeline computes for
that prompt and seed; its result stays latent. Drawings share their modules, and nothing that
changes during a call: each has its own pipeline object and scheduler. diffusers and transformers
are imported when these functions run. `tests/test_calibration.py` holds it.
"""

from __future__ import annotations

import copy
import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqconvert.calibration.prompts import Prompt
from dqconvert.calibration.require import require
from dqconvert.calibration.settings import CalibrationSettings
from dqconvert.calibration.signature import Signature, read_signature
from dqconvert.quantizers.errors import CalibrationError

Encoded = Mapping[str, Any]
"""Embeddings of one prompt, by the names under which the pipeline's __call__ takes them."""

TEXT = ("text_encoder", "tokenizer")
"""How the names of the components begin that only the text needs."""

EMPTY = " "
"""The negative prompt of those who have none to give, as Qwen-Image's own examples write it."""


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
) -> tuple[Encoded, ...]:
    """The embeddings of every prompt, on the CPU, in the dtype of the settings.

    before: is told of the pipeline and the number of each prompt that is encoded next.
    The text encoders run in the dtype that their files have: in float32 T5-XXL alone is 19 GB.
    """
    index = _index(folder)
    signature = read_signature(index.pipeline)
    if hasattr(sys.modules[index.pipeline.__module__], "is_ftfy_available"):
        require("ftfy")  # which such a pipeline calls even where it is not there
    others = [name for name in index.named("") if not name.startswith((*TEXT, "processor"))]
    given = dict.fromkeys(others) | _text_encoders(index, settings)
    pipe = _load(index, given).to(settings.device)
    encoded = []
    for place, prompt in enumerate(prompts):
        before(pipe, place)
        encoded.append(_encode(pipe, signature, prompt, settings))
    del pipe, given
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
    if component not in index.components:
        raise CalibrationError(
            f"{folder}: {index.pipeline.__name__} has no {component}; only diffusion transformers"
            " can be calibrated"
        )
    experts = {
        name: _expert(index, name, settings)
        for name in index.named("transformer")
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
    signature = read_signature(type(base))
    pipe = copy.copy(base)
    pipe.scheduler = copy.deepcopy(base.scheduler)
    height, width = _size(base, settings)

    def step(_pipe: Any, _index: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return values

    optional = {
        "height": height,
        "width": width,
        "num_frames": settings.frames,
        "max_sequence_length": settings.max_sequence_length,
        signature.guidance(base.transformer.config): prompt.guidance,
        "callback_on_step_end": step,
        "image": _picture(prompt, signature),
    }
    options = {k: v for k, v in optional.items() if v is not None and k in signature.call}

    def draw() -> Tensor:
        try:
            latents: Tensor = pipe(
                **_mapped(encoded, lambda tensor: tensor.to(settings.device)),
                **options,
                num_inference_steps=settings.steps,
                generator=torch.Generator("cpu").manual_seed(prompt.seed or 0),
                output_type="latent",
                return_dict=False,
            )[0]
        except ValueError as error:  # how pipelines refuse sizes and other options
            raise CalibrationError(f"{signature.name}: {error}") from error
        return latents

    return draw


def _index(folder: Path) -> _Index:
    diffusers = require("diffusers")
    path = folder / "model_index.json"
    try:
        content = json.loads(path.read_bytes())
        components = {
            name: (value[0], value[1])
            for name, value in content.items()
            if isinstance(value, list) and value[0] is not None
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
    for name in index.components:
        if name not in given:
            _check_present(index, name)
    try:
        return index.pipeline.from_pretrained(index.folder, local_files_only=True, **given)  # type: ignore[attr-defined]
    except ImportError as error:
        raise CalibrationError(f"{index.folder}: needs another package: {error}") from error
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{index.folder}: cannot be loaded: {error}") from error


def _encode(
    pipe: Any, signature: Signature, prompt: Prompt, settings: CalibrationSettings
) -> Encoded:
    """One prompt through encode_prompt, and its negative too where that is a call of its own."""
    if prompt.negative_prompt is not None and not signature.takes_negative:
        raise CalibrationError(
            f"{signature.name} takes no negative prompt; remove it from '{prompt.prompt}'"
        )
    dtype = getattr(torch, settings.dtype)
    negative = prompt.negative_prompt
    if negative is None and signature.guided and (prompt.guidance is None or prompt.guidance > 1):
        negative = EMPTY

    def call(text: str, prefix: str = "") -> dict[str, Any]:
        required = [
            name
            for name, parameter in signature.encode.items()
            if parameter.default is parameter.empty and name != "self"
            and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]  # fmt: skip
        optional = {
            "device": settings.device,
            "max_sequence_length": settings.max_sequence_length or _text_length(pipe, signature),
            "negative_prompt": negative,
            "image": _picture(prompt, signature),
        }
        options = {k: v for k, v in optional.items() if v is not None and k in signature.encode}
        with torch.no_grad():
            values = pipe.encode_prompt(**dict.fromkeys(required) | options | {"prompt": text})
        values = values if isinstance(values, tuple) else (values,)
        named = zip(signature.returns, values, strict=True)
        return {prefix + name: value for name, value in named if value is not None}

    found = call(prompt.prompt)
    if negative is not None and signature.separate_negative:
        found |= call(negative, prefix="negative_")
    return {
        name: _mapped(value, lambda t: t.to("cpu", dtype if t.is_floating_point() else None))
        for name, value in found.items()
        if name in signature.call
    }


def _text_length(pipe: Any, signature: Signature) -> int | None:
    """Tokens of text: the pipeline's own default, or fewer if its tokenizers are made for fewer."""
    lengths = [
        part.model_max_length
        for name, part in pipe.components.items()
        if name.startswith("tokenizer") and hasattr(part, "model_max_length")
    ]
    own = signature.text_length
    return own if own is None or not lengths else int(min(own, max(lengths)))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same value, with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(item, change) for item in value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    return value


def _picture(prompt: Prompt, signature: Signature) -> Any:
    if prompt.image is None:
        if signature.wants_picture:
            raise CalibrationError(
                f"{signature.name} starts from a picture; give each prompt an 'image' in a .jsonl"
                f" file, also '{prompt.prompt}'"
            )
        return None
    if "image" not in signature.call:
        raise CalibrationError(
            f"{signature.name} takes no picture; remove 'image' from '{prompt.prompt}'"
        )
    try:
        picture = require("PIL", "Image").open(prompt.image)
        return picture.convert("RGB")
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{prompt.image}: cannot be read as a picture: {error}") from None


def _size(pipe: Any, settings: CalibrationSettings) -> tuple[int | None, int | None]:
    """Height and width: as asked, else what the VAE was made for, else the pipeline's own."""
    config = getattr(getattr(pipe, "vae", None), "config", {})
    size = config.get("sample_size")
    high, wide = size if isinstance(size, list | tuple) else (size, size)
    return settings.height or high, settings.width or wide
