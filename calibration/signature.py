"""What a diffusers pipeline takes and gives, read from its code instead of a table of models.

    encode_prompt   the parameters it has, and the names of what it returns
    __call__        which of those it takes back, and which options it knows

diffusers' pipelines end encode_prompt with `return prompt_embeds, pooled_prompt_embeds, ...`: the
local names are those of __call__'s parameters. What __call__ does not know (FLUX's text_ids, which
it makes itself) is dropped.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dqconvert.quantizers.errors import CalibrationError


@dataclass(frozen=True, slots=True)
class Signature:
    """name: of the pipeline class; call, encode: parameters; returns: names of encode's values."""

    name: str
    call: Mapping[str, inspect.Parameter]
    encode: Mapping[str, inspect.Parameter]
    returns: tuple[str, ...]

    @property
    def separate_negative(self) -> bool:
        """Whether a negative prompt is encoded by a second call of encode_prompt."""
        return "negative_prompt" not in self.encode and "negative_prompt_embeds" in self.call

    @property
    def takes_negative(self) -> bool:
        """Whether the pipeline knows negative prompts at all."""
        return "negative_prompt" in self.encode or "negative_prompt_embeds" in self.call

    @property
    def guided(self) -> bool:
        """Whether it is made for guidance that it leaves out where no negative prompt is given.

        Others encode an empty one by themselves.
        """
        strength = self.call.get("true_cfg_scale")
        return strength is not None and bool(strength.default > 1)

    @property
    def wants_picture(self) -> bool:
        """Whether it cannot do without a picture: encode_prompt looks at it, or it is required."""
        picture = self.call.get("image")
        return picture is not None and ("image" in self.encode or picture.default is picture.empty)

    @property
    def text_length(self) -> int | None:
        """Tokens of text: the default of __call__, which encode_prompt's may contradict (Wan)."""
        found = (names.get("max_sequence_length") for names in (self.call, self.encode))
        return next((p.default for p in found if p and isinstance(p.default, int)), None)

    def guidance(self, config: Mapping[str, Any]) -> str:
        """The option that the guidance strength belongs to.

        Distilled models have an input for it. Others run twice a step, under true_cfg_scale
        where guidance_scale is reserved for the distilled ones.
        """
        distilled = bool(config.get("guidance_embeds"))
        return (
            "guidance_scale"
            if distilled or "true_cfg_scale" not in self.call
            else ("true_cfg_scale")
        )


def read_signature(pipeline: type) -> Signature:
    """The signature of a pipeline class that can be given embeddings."""
    call = inspect.signature(pipeline.__call__).parameters
    encode = getattr(pipeline, "encode_prompt", None)
    names = () if encode is None else _returned(encode)
    taken = [name for name in names if name in call]
    if encode is None or not any("prompt_embeds" in name for name in taken):
        raise CalibrationError(
            f"{pipeline.__name__} cannot be calibrated: it does not take the prompt embeddings that"
            " its encode_prompt returns; choose a scheme without calibration"
        )
    parameters = inspect.signature(encode).parameters
    return Signature(pipeline.__name__, call, parameters, names)


def _returned(function: Any) -> tuple[str, ...]:
    """Names in the last return statement, "" for what has none."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    body = ast.parse(source).body[0]
    returns = [node.value for node in getattr(body, "body", []) if isinstance(node, ast.Return)]
    if not returns:
        return ()
    last = returns[-1]
    values = last.elts if isinstance(last, ast.Tuple) else [last]
    return tuple(value.id if isinstance(value, ast.Name) else "" for value in values)
