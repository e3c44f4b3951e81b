"""The quantizers of diffusers: how each of them wants a file to be. Torch-free until packing.

diffusers chooses one for a model folder by the "quant_method" of its config, so all layers of a
file have one loader, though not always one layout. The bytes of a layer are a Layout's
(formats/layouts); here is what stands around them: which schemes fit, the config, the metadata,
and how a file is recognized again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.layouts import Layout
from dqconvert.formats.recognition import Infos, differences
from dqconvert.formats.targets import Recognized
from dqconvert.quantizers.spec import QuantSpec, Scheme

TARGET = "diffusers"
RUNTIME = "runtime"
"""Where the header says which runtime the file is for, since some of them share a config."""


class Loader:
    """One quantizer of diffusers. What is alike for most of them is written here.

    names: of its layouts; every loader has its own.
    """

    names: tuple[str, ...]

    def layouts(self, scheme: Scheme) -> tuple[str, ...]:
        """Names of the layouts that hold this scheme, the default first; none where none does."""
        raise NotImplementedError

    def layout(self, form: PackedForm) -> Layout:
        """The bytes of a layer."""
        raise NotImplementedError

    def section(self, context: FileContext) -> dict[str, Any] | None:
        """The "quantization_config" of config.json. PlanError where the loader cannot be told."""
        raise NotImplementedError

    def recognize(
        self, infos: Infos, metadata: Mapping[str, str], config: Mapping[str, Any]
    ) -> Recognized | None:
        """See formats/targets."""
        raise NotImplementedError

    def adapt(self, scheme: Scheme, layout: str) -> Scheme:
        """See formats/targets."""
        return scheme

    def static(self, scheme: Scheme, layout: str) -> str:
        """See formats/targets."""
        return "never"

    def problem(self, form: PackedForm) -> str | None:
        """See formats/targets."""
        if form.full_precision:
            return "the loader decides itself whether it quantizes inputs"
        return self.layout(form).problem(form)

    def rows(self, form: PackedForm) -> bool:
        """See formats/targets."""
        return False

    def activation(self, form: PackedForm, scheme: Scheme) -> QuantSpec | None:
        """See formats/targets."""
        return None if form.full_precision else scheme.activation

    def filename(self, context: FileContext) -> str:
        """The name that `from_pretrained` looks for."""
        return "diffusion_pytorch_model.safetensors"

    def metadata(self, context: FileContext) -> dict[str, str]:
        """What diffusers demands of a safetensors header, and the runtime."""
        return {"format": "pt", RUNTIME: TARGET}


def section_of(config: Mapping[str, Any], method: str) -> Mapping[str, Any] | None:
    """The config's "quantization_config" if its "quant_method" is that one."""
    said = config.get("quantization_config")
    if not isinstance(said, Mapping) or said.get("quant_method") != method:
        return None
    return said


def with_bias(form: PackedForm, layer: str, infos: Infos) -> PackedForm:
    """The form with the bias that the header has. What no model computes in counts as BF16."""
    bias = infos.get(f"{layer}.bias")
    known = bias is not None and bias.dtype in ("F32", "F16", "BF16")
    dtype = bias.dtype if bias is not None and known else "BF16"
    return replace(form, bias=bias is not None, bias_dtype=dtype)


def checked(loader: Loader, layer: str, form: PackedForm, infos: Infos) -> list[str]:
    """What a recognized layer lacks or has otherwise than its loader needs."""
    reason = loader.problem(form)
    if reason is not None:
        first = next((name for name in infos if name.startswith(f"{layer}.")), layer)
        return [f"{first}: {reason}"]
    return differences(layer, loader.layout(form).promise(form), infos)


def is_plain(metadata: Mapping[str, str], config: Mapping[str, Any]) -> bool:
    """Whether neither config nor header has a word on how the file is quantized."""
    return "quantization_config" not in config and not set(metadata) - {"format", RUNTIME}
