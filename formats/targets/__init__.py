"""The runtimes. This folder is the registry: a module here is a target. Torch-free until packing.

A target module holds

    NAME, SUMMARY               its name on the command line; one line for `list`
    DIALECT                     the family's naming dialect that it writes
    KEEP_DTYPE                  dtype of tensors that stay unquantized, None to keep each as found
    ROLES                       {role of a linear: "weight" | "modulation"}; others are kept
    PARTIAL                     whether single linears may stay unquantized
    FOLDER                      folder of the weights and the config inside the output, "" for none
    accepts(scheme)             None, or why the runtime has no layout for this scheme
    layouts(scheme)             names of its layouts for this scheme, the default first
    adapt(scheme, layout)       the scheme as the runtime needs it (dtypes of scales, activations)
    static(scheme, layout)      a static activation scale: "never", "optional" (written when
                                calibrated) or "required"
    problem(form)               None, or why this layer cannot be packed
    shift(form)                 the constant that the runtime adds to inputs behind a GELU
    rows(form)                  whether packing it in blocks of rows, multiples of 128 but the
                                last, gives the same bytes
    activation(form, scheme)    what the runtime makes of the layer's inputs, None: nothing
    promise(form)               {suffix: TensorInfo} of a packed layer, without torch
    pack(form, q), unpack(form, tensors)      logical result <-> {suffix: tensor}
    recognize(infos, metadata, config)        Recognized or None: is this one of my files?
    filename(context), metadata(context), config(context)

and, only where a runtime wants it,

    misnamed(name, recognized)  None, or what is wrong with a file's name
    files(context, names)       {file: names of its tensors} where there are several
    extras(context)             {name: TensorInfo} of tensors that belong to no layer
    extra_tensors(context)      {name: tensor} of them
    kept(name, info)            dtype of a tensor that stays unquantized, in the place of KEEP_DTYPE
    fitting(spec, shape)        the weight format that a shape can have in the place of another
    fatal(infos, forms)         what is wrong with a file for anybody, a line each
    ARCHITECTURE                the metadata's key that says the family's architecture
    PROVENANCE, KEYS            how metadata begins that only says who made a file, and what of it
                                says more than that
    SETTINGS                    {name: allowed values}: what the user may say of this target alone
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.quantizers.errors import UnknownName
from dqconvert.quantizers.spec import QuantSpec, Scheme, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from dqconvert.quantizers.tensors import QuantizedTensor

Infos = Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Recognized:
    """A file that a target wrote: its packed layers by name, and what it says of itself.

    forms lack what only the family knows (splits, shift, parts): the converter adds them.
    problems: what is wrong with the file, one line each, naming the tensor; loading: those of them
    that are the runtime's alone, and leave no doubt what the weights are. extras: tensors that
    belong to the file as a whole.
    """

    scheme: str | None
    rank: int
    forms: Mapping[str, PackedForm]
    problems: tuple[str, ...] = field(default=())
    extras: tuple[str, ...] = ()
    loading: tuple[str, ...] = ()


class Target(Protocol):
    """See the module docstring."""

    NAME: str
    SUMMARY: str
    DIALECT: str
    KEEP_DTYPE: str | None
    ROLES: Mapping[str, str]
    PARTIAL: bool
    FOLDER: str

    def accepts(self, scheme: Scheme) -> str | None: ...

    def layouts(self, scheme: Scheme) -> tuple[str, ...]: ...

    def adapt(self, scheme: Scheme, layout: str) -> Scheme: ...

    def static(self, scheme: Scheme, layout: str) -> str: ...

    def problem(self, form: PackedForm) -> str | None: ...

    def shift(self, form: PackedForm) -> float: ...

    def rows(self, form: PackedForm) -> bool: ...

    def activation(self, form: PackedForm, scheme: Scheme) -> QuantSpec | None: ...

    def promise(self, form: PackedForm) -> dict[str, TensorInfo]: ...

    def pack(self, form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]: ...

    def unpack(self, form: PackedForm, tensors: Mapping[str, Tensor]) -> QuantizedTensor: ...

    def recognize(
        self, infos: Infos, metadata: Mapping[str, str], config: Mapping[str, Any]
    ) -> Recognized | None: ...

    def filename(self, context: FileContext) -> str: ...

    def metadata(self, context: FileContext) -> dict[str, str]: ...

    def config(self, context: FileContext) -> dict[str, Any] | None: ...


@cache
def targets() -> Mapping[str, Target]:
    """All targets by name."""
    found: dict[str, Target] = {}
    for module in pkgutil.iter_modules(__path__):
        target: Any = importlib.import_module(f"{__name__}.{module.name}")
        if module.name.startswith("_"):
            continue
        if target.NAME in found:
            raise ValueError(f"two targets are called '{target.NAME}'")
        found[target.NAME] = target
    return MappingProxyType(dict(sorted(found.items())))


def target(name: str) -> Target:
    """The target of that name; UnknownName with near names otherwise."""
    try:
        return targets()[name]
    except KeyError:
        raise UnknownName("target", name, targets()) from None


def fitted(runtime: Target, spec: QuantSpec, shape: tuple[int, int]) -> QuantSpec:
    """The weight format that a target gives to a weight of this shape; most take any as it is."""
    fitting = getattr(runtime, "fitting", None)
    found: QuantSpec = fitting(spec, shape) if fitting else spec
    return found


def recognize(
    infos: Infos, metadata: Mapping[str, str], config: Mapping[str, Any]
) -> tuple[Target, Recognized] | None:
    """The target that a file was written for, and what it made of it; None for plain files."""
    for found in targets().values():
        recognized = found.recognize(infos, metadata, config)
        if recognized is not None:
            return found, recognized
    return None
