"""What the plan tells a target of one packed layer, and of the whole file. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dqconvert.quantizers.spec import QuantSpec, Scheme


@dataclass(frozen=True, slots=True)
class PackedForm:
    """Everything that fixes the tensors of one packed layer.

    spec: weight format; shape: [N, K]; bias: whether the layer has one; rank: of the low-rank
    branch, 0 for none; parts: source linears stacked on N; splits: chunks of an adaLN
    modulation linear (6 or 3), 0 for all others; shift: constant that the runtime adds to the
    input before it quantizes; input_scale: whether a static activation scale is written;
    bias_dtype: of the bias, where the runtime leaves the choice. layout: one of the target's
    layouts for this scheme; rotation: group of channels that the runtime rotates, 0 for none;
    smooth: whether the layer carries a smooth vector; full_precision: the runtime multiplies in
    16 bit instead of quantizing the input.
    """

    spec: QuantSpec
    shape: tuple[int, int]
    bias: bool = True
    rank: int = 0
    parts: int = 1
    splits: int = 0
    shift: float = 0.0
    input_scale: bool = False
    bias_dtype: str = "BF16"
    layout: str = ""
    rotation: int = 0
    smooth: bool = False
    full_precision: bool = False

    @property
    def label(self) -> str:
        """The format in a word, for people: int4+lowrank, int8+rotation."""
        return (
            f"{self.spec.code}{'+rotation' if self.rotation else ''}"
            f"{'+lowrank' if self.rank else ''}"
        )


@dataclass(frozen=True, slots=True)
class FileContext:
    """What a target needs for a file's name, its metadata and its config.

    model: short name for file names ("flux1-dev"); rank: of the low-rank branches; config: the
    diffusers config of the transformer; layers: packed layers by their name in the file; facts:
    what this runtime wants to be told of the family (such as its class names; ComfyUI: metadata of
    the file, and tensors: {name: values} that stand for a config); kept: linears of the file that
    stay unquantized, by name; layout: of the target's layouts the one chosen; settings: what the
    user said of this target alone, such as {"kernel": "q8f"}; names: of all tensors of the file;
    provenance: what a file may say of where it comes from, by GGUF's keys; library: whose model it
    is, "transformers" for text encoders that it loads.
    """

    model: str
    scheme: Scheme
    rank: int
    config: Mapping[str, Any]
    layers: Mapping[str, PackedForm]
    facts: Mapping[str, Any] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    layout: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    library: str = "diffusers"
