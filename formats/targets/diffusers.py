"""diffusers >= 0.42: what `from_pretrained` or `from_single_file` of a model class loads.

    diffusion_pytorch_model.safetensors, config.json with a "quantization_config"

under the names of the model's own modules, so q, k and v stand apart. The layout decides who
quantizes, and that is a Loader (formats/loaders): nunchaku_lite, torchao, bitsandbytes, auto-round;
BFL reads single files, and layerwise casting is no quantizer at all. Text encoders are models of
transformers, which reads torchao's and bitsandbytes' folders alike, under a name of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dqconvert.formats import svdq
from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.loaders import RUNTIME, Loader, transformers_models
from dqconvert.formats.loaders.auto_round import AutoRound
from dqconvert.formats.loaders.bfl import Bfl
from dqconvert.formats.loaders.bitsandbytes import BitsAndBytes
from dqconvert.formats.loaders.layerwise import Layerwise
from dqconvert.formats.loaders.nunchaku_lite import NunchakuLite
from dqconvert.formats.loaders.torchao import TorchAoLoader
from dqconvert.formats.recognition import Infos
from dqconvert.formats.targets import Recognized
from dqconvert.quantizers.errors import PlanError
from dqconvert.quantizers.spec import QuantSpec, Scheme, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from dqconvert.quantizers.tensors import QuantizedTensor

NAME = "diffusers"
SUMMARY = "model folder or single file for diffusers >= 0.42"
DIALECT = "diffusers"
KEEP_DTYPE = "BF16"
ROLES = {"attention": "weight", "mlp": "weight", "modulation": "modulation"}
PARTIAL = True
FOLDER = ""

LOADERS: tuple[Loader, ...] = (
    NunchakuLite(),
    TorchAoLoader(),
    BitsAndBytes(),
    AutoRound(),
    Bfl(),
    Layerwise(),
)
"""In the order in which their layouts are offered."""

TRANSFORMERS = (TorchAoLoader, BitsAndBytes)
"""Those whose files transformers reads as well, for text encoders."""

_BY_LAYOUT = {"": LOADERS[0]} | {name: loader for loader in LOADERS for name in loader.names}


def accepts(scheme: Scheme) -> str | None:
    """See formats/targets."""
    if layouts(scheme):
        return None
    if "lowrank" in scheme.steps:
        return svdq.accepts(scheme)
    if "rotate" in scheme.steps:
        return "no loader of diffusers rotates the inputs"
    if "smooth" in scheme.steps:
        return "no loader of diffusers divides the inputs by a smooth vector"
    if scheme.weight.scale == "F8_E8M0":
        return "diffusers reads MX formats for Blackwell alone, where nothing here could check them"
    if scheme.weight.code in ("e4m3", "e5m2"):
        return "diffusers' loaders of fp8 read e4m3 with a scale per row or per 128x128 block"
    return f"diffusers has no loader for {scheme.weight.code} in tiles of {scheme.weight.tile}"


def layouts(scheme: Scheme) -> tuple[str, ...]:
    """See formats/targets."""
    return tuple(name for loader in LOADERS for name in loader.layouts(scheme))


def adapt(scheme: Scheme, layout: str) -> Scheme:
    """See formats/targets."""
    return _BY_LAYOUT[layout].adapt(scheme, layout)


def static(scheme: Scheme, layout: str) -> str:
    """See formats/targets."""
    return _BY_LAYOUT[layout].static(scheme, layout)


def problem(form: PackedForm) -> str | None:
    """See formats/targets."""
    if form.parts != 1:
        return f"modules stay apart here; the layer stacks {form.parts}"
    return _loader(form).problem(form)


def shift(form: PackedForm) -> float:
    """Nothing is added to inputs: activations are always quantized with their sign."""
    return 0.0


def rows(form: PackedForm) -> bool:
    """See formats/targets."""
    return _loader(form).rows(form)


def activation(form: PackedForm, scheme: Scheme) -> QuantSpec | None:
    """See formats/targets."""
    return _loader(form).activation(form, scheme)


def promise(form: PackedForm) -> dict[str, TensorInfo]:
    """See formats/targets."""
    return _loader(form).layout(form).promise(form)


def pack(form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
    """See formats/targets."""
    return _loader(form).layout(form).pack(form, q)


def unpack(form: PackedForm, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    """See formats/targets."""
    return _loader(form).layout(form).unpack(form, tensors)


def recognize(
    infos: Infos, metadata: Mapping[str, str], config: Mapping[str, Any]
) -> Recognized | None:
    """Files of any loader; at most one takes a file for its own."""
    if metadata.get(RUNTIME, NAME) != NAME:
        return None
    found = (loader.recognize(infos, metadata, config) for loader in LOADERS)
    return next((one for one in found if one is not None), None)


def filename(context: FileContext) -> str:
    """See formats/targets. transformers has a name of its own for them."""
    name = _loader_of(context).filename(context)
    return transformers_models.FILE if transformers_models.is_one(context) else name


def metadata(context: FileContext) -> dict[str, str]:
    """See formats/targets. PlanError where layers want different loaders."""
    return _loader_of(context).metadata(context)


def config(context: FileContext) -> dict[str, Any] | None:
    """The model's config, with the quantization_config of a loader that reads one."""
    if transformers_models.is_one(context):
        context = transformers_models.renamed(context)
    section = _loader_of(context).section(context)
    said = {} if section is None else {"quantization_config": section}
    return {**context.config, **said}


def _loader(form: PackedForm) -> Loader:
    return _BY_LAYOUT[form.layout]


def _loader_of(context: FileContext) -> Loader:
    loader = _BY_LAYOUT[context.layout]
    others = [name for name, form in context.layers.items() if _loader(form) is not loader]
    if others:
        raise PlanError(
            f"{name}: diffusers has one quantizer for a model; the layout "
            f"{context.layers[name].layout} cannot stand beside {context.layout}"
            for name in others
        )
    if transformers_models.is_one(context) and not isinstance(loader, TRANSFORMERS):
        raise PlanError(
            [
                f"layout {context.layout}: transformers, which loads this model, cannot read it; "
                "it reads bitsandbytes (bnb-nf4, bnb-int8) and torchao (int8, fp8)"
            ]
        )
    return loader
