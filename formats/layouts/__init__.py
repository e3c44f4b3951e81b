"""Byte layouts that several runtimes share: a target is a choice of layouts and a config.

A layout turns a form and a logical result into the tensors of one layer, by suffix, and back.
What differs between two runtimes (a suffix, the order of nibbles, whether scales are swizzled) is
a field of the layout, so that one packer serves both. Torch-free until packing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from dqconvert.formats.form import PackedForm
from dqconvert.quantizers.spec import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from dqconvert.quantizers.tensors import QuantizedTensor


class Layout(Protocol):
    """problem: None, or why a layer cannot be packed; promise: {suffix: TensorInfo}, bias included;
    pack and unpack: logical result <-> {suffix: tensor}, inverse of each other.
    """

    def problem(self, form: PackedForm) -> str | None: ...

    def promise(self, form: PackedForm) -> dict[str, TensorInfo]: ...

    def pack(self, form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]: ...

    def unpack(self, form: PackedForm, tensors: Mapping[str, Tensor]) -> QuantizedTensor: ...
