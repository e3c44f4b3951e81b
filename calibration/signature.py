"""What a diffusers pipeline takes, read from its code instead of a table of models."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dqconvert.quantizers.errors import CalibrationError

PICTURES = ("image", "control_image")
"""What pipelines call the picture that they start from."""


@dataclass(frozen=True, slots=True)
class Signature:
    """name: of the pipeline class; call, encode: parameters of __call__ and encode_prompt."""

    name: str
    call: Mapping[str, inspect.Parameter]
    encode: Mapping[str, inspect.Parameter]

    @property
    def takes_negative(self) -> bool:
        """Whether the pipeline knows negative prompts at all."""
        return "negative_prompt" in self.call

    @property
    def guided(self) -> bool:
        """Whether it is made for guidance that it leaves out where no negative prompt is given.

        Others encode an empty one by themselves.
        """
        strength = self.call.get("true_cfg_scale")
        return strength is not None and bool((strength.default or 0) > 1)

    @property
    def picture(self) -> str | None:
        """The parameter of __call__ that takes a picture."""
        return next((name for name in PICTURES if name in self.call), None)

    @property
    def required(self) -> Iterator[str]:
        """Parameters of __call__ that have no default."""
        for name, parameter in self.call.items():
            named = parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name != "self"
            if named and parameter.default is parameter.empty:
                yield name

    @property
    def text_length(self) -> int | None:
        """Tokens of text: the default of __call__, which encode_prompt's may contradict (Wan)."""
        found = (names.get("max_sequence_length") for names in (self.call, self.encode))
        return next((p.default for p in found if p and isinstance(p.default, int)), None)

    def guidance(self, config: Mapping[str, Any]) -> str:
        """The option that the guidance strength belongs to.

        Distilled models have an input for it, whose option may have a name of its own. Others run
        twice a step, under true_cfg_scale where guidance_scale is reserved for the distilled ones.
        """
        distilled = bool(config.get("guidance_embeds"))
        if distilled and "distilled_guidance_scale" in self.call:
            return "distilled_guidance_scale"
        if distilled or "true_cfg_scale" not in self.call:
            return "guidance_scale"
        return "true_cfg_scale"


def read_signature(pipeline: type) -> Signature:
    """The signature of a pipeline class that encodes its prompts in a method of its own."""
    encode = getattr(pipeline, "encode_prompt", None)
    if encode is None:
        raise CalibrationError(
            f"{pipeline.__name__} cannot be calibrated: it does not encode its prompts by an"
            " encode_prompt; choose a scheme without calibration"
        )
    parameters = inspect.signature(encode).parameters
    call = inspect.signature(pipeline.__call__).parameters
    return Signature(pipeline.__name__, call, parameters)
