"""One prompt's call of a pipeline: its options, and its errors as the user is told of them.

encode_prompt is what the call is cut at. While it is recorded, the call runs as it is up to the
first use of a denoiser, which is there in outline only; when it is played, encode_prompt returns
what it returned then, call by call.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dqconvert.calibration.prompts import Prompt
from dqconvert.calibration.require import require
from dqconvert.calibration.settings import CalibrationSettings
from dqconvert.calibration.signature import Signature, read_signature
from dqconvert.quantizers.errors import CalibrationError

EMPTY = " "
"""The negative prompt of those who have none to give, as Qwen-Image's own examples write it."""

AS_GIVEN = {"use_pe": False, "enable_prompt_rewrite": False}
"""Options under which a pipeline does not let a language model rewrite the prompt."""

STATEFUL = ("scheduler", "guider", "ocr_guider")
"""Components that change during a call."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """What one prompt's encode_prompt returned, call by call, on the CPU; length: its tokens."""

    values: tuple[Any, ...]
    length: int | None


class Reached(BaseException):
    """The call has come to a denoiser. No Exception, so that no library swallows it."""


class Outline:
    """Stands where a denoiser will be: its config and attributes, in the dtype that it will have.

    To call it raises Reached.
    """

    def __init__(self, model: nn.Module, settings: CalibrationSettings) -> None:
        self._model = model
        self.dtype = getattr(torch, settings.dtype)
        self.device = torch.device(settings.device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **named: Any) -> Any:
        raise Reached


@dataclass(frozen=True, slots=True)
class Call:
    """The call of a pipeline for a prompt. component: what the pipeline calls the denoiser."""

    base: Any
    prompt: Prompt
    settings: CalibrationSettings
    component: str

    def record(self, length: int | None) -> Encoded:
        """Run up to the first use of a denoiser; what encode_prompt returned."""
        pipe = self._pipe()
        values: list[Any] = []
        encode_prompt = pipe.encode_prompt
        dtype = getattr(torch, self.settings.dtype)

        def recorded(*args: Any, **named: Any) -> Any:
            result = encode_prompt(*args, **named)
            wide = mapped(result, lambda t: t.to("cpu", dtype if t.is_floating_point() else None))
            values.append(wide)
            return result

        pipe.encode_prompt = recorded
        with contextlib.suppress(Reached):
            self._run(pipe, length, lambda: None)
        return Encoded(tuple(values), length)

    def play(self, encoded: Encoded, on_step: Callable[[], None]) -> Tensor:
        """The whole call, for which nothing is encoded: the latents."""
        pipe = self._pipe()
        values = iter(encoded.values)

        def played(*_args: Any, **_named: Any) -> Any:
            value = next(values, None)
            if value is None:
                raise CalibrationError(
                    f"{type(pipe).__name__} cannot be calibrated: it encodes text while it draws"
                )
            return mapped(value, lambda tensor: tensor.to(self.settings.device))

        pipe.encode_prompt = played
        if "callback_on_step_end" not in read_signature(type(pipe)).call:
            pipe.scheduler.__class__ = _counting(type(pipe.scheduler), on_step)
        latents: Tensor = self._run(pipe, encoded.length, on_step)[0]
        return latents

    def _pipe(self) -> Any:
        """The pipeline with what changes during a call copied."""
        pipe = copy.copy(self.base)
        for name in STATEFUL:
            if getattr(pipe, name, None) is not None:
                object.__setattr__(pipe, name, copy.deepcopy(getattr(pipe, name)))
        return pipe

    def _run(self, pipe: Any, length: int | None, on_step: Callable[[], None]) -> Any:
        signature = read_signature(type(pipe))
        options = self._options(pipe, signature, length, on_step)
        lacking = [name for name in signature.required if name not in options]
        if lacking and lacking[0] != signature.picture:
            raise CalibrationError(
                f"{signature.name} needs '{lacking[0]}', which a file of prompts cannot give;"
                " choose a scheme without calibration"
            )
        if lacking:
            raise self._refused(signature, f"{signature.name} starts from a picture;")
        try:
            return pipe(**options)
        except ValueError as error:  # how pipelines refuse sizes and other options
            said = f"{signature.name}: {error}"
            raise self._refused(signature, f"{said}; if it starts from a picture,", said) from error
        except (AttributeError, TypeError) as error:  # how some find that there is no picture
            if signature.picture is None or self.prompt.image is not None:
                raise
            raise self._refused(signature, f"{signature.name} starts from a picture;") from error

    def _refused(self, signature: Signature, words: str, alone: str = "") -> CalibrationError:
        """The error of a call that may lack a picture; alone: of one that does not."""
        if signature.picture is None or self.prompt.image is not None:
            return CalibrationError(alone)
        return CalibrationError(
            f"{words} give each prompt an 'image' in a .jsonl file, also '{self.prompt.prompt}'"
        )

    def _options(
        self, pipe: Any, signature: Signature, length: int | None, on_step: Callable[[], None]
    ) -> dict[str, Any]:
        height, width = _size(pipe, self.settings)
        config = getattr(pipe, self.component).config

        def step(_pipe: Any, _index: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
            on_step()
            return values

        optional = {
            "negative_prompt": self._negative(signature),
            "height": height,
            "width": width,
            # What is asked for is not to become the nearest of the sizes of training.
            "use_resolution_binning": False if self.settings.height else None,
            "num_frames": self.settings.frames,
            "max_sequence_length": length,
            signature.guidance(config): self.prompt.guidance,
            "callback_on_step_end": step,
            **AS_GIVEN,
            **_pictures(self.prompt, signature, config),
        }
        return {k: v for k, v in optional.items() if v is not None and k in signature.call} | {
            "prompt": self.prompt.prompt,
            "num_inference_steps": self.settings.steps,
            "generator": torch.Generator("cpu").manual_seed(self.prompt.seed or 0),
            "output_type": "latent",
            "return_dict": False,
        }

    def _negative(self, signature: Signature) -> str | None:
        negative, guidance = self.prompt.negative_prompt, self.prompt.guidance
        if negative is not None and not signature.takes_negative:
            raise CalibrationError(
                f"{signature.name} takes no negative prompt; remove it from '{self.prompt.prompt}'"
            )
        if negative is None and signature.guided and (guidance is None or guidance > 1):
            return EMPTY
        return negative


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same value, with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(mapped(item, change) for item in value)
    if isinstance(value, Mapping):
        return {key: mapped(item, change) for key, item in value.items()}
    return value


def _counting(scheduler: type, on_step: Callable[[], None]) -> type:
    """A scheduler's class that tells of each step: for pipelines that call nobody back."""

    def step(self: Any, *args: Any, **named: Any) -> Any:
        on_step()
        return scheduler.step(self, *args, **named)  # type: ignore[attr-defined]

    step.__wrapped__ = scheduler.step  # type: ignore[attr-defined] # pipelines read its parameters
    return type(scheduler.__name__, (scheduler,), {"step": step})


def _pictures(prompt: Prompt, signature: Signature, config: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt's picture, under every name under which it is asked for; no part is kept."""
    if prompt.image is None:
        return {}
    name = signature.picture
    if name is None:
        raise CalibrationError(
            f"{signature.name} takes no picture; remove 'image' from '{prompt.prompt}'"
        )
    module = require("PIL", "Image")
    try:
        picture = module.open(prompt.image).convert("RGB")
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{prompt.image}: cannot be read as a picture: {error}") from None
    ends = bool(config.get("pos_embed_seq_len"))  # Wan between a first and a last picture
    return {
        name: picture,
        "mask_image": module.new("L", picture.size, 255),
        "last_image": picture if ends else None,
    }


def _size(pipe: Any, settings: CalibrationSettings) -> tuple[int | None, int | None]:
    """Height and width: as asked, else what the VAE was made for, else the pipeline's own."""
    config = getattr(getattr(pipe, "vae", None), "config", {})
    size = config.get("sample_size")
    high, wide = size if isinstance(size, list | tuple) else (size, size)
    return settings.height or high, settings.width or wide
