"""What a packed linear has beside its codes: a bias; and why it may have too much. Torch-free."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from dqconvert.formats.form import PackedForm
from dqconvert.quantizers.spec import FLOAT_DTYPES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from dqconvert.quantizers.tensors import QuantizedTensor

EXTRAS = {
    "rank": "a low-rank branch",
    "shift": "an input that the runtime shifts",
    "rotation": "a rotated weight",
    "smooth": "a smooth vector",
    "input_scale": "a static activation scale",
}
"""What a form may have that most layouts have no room for."""


def surplus(form: PackedForm, room: Collection[str] = ()) -> list[str]:
    """What a layout with room for these extras alone cannot hold, a reason each."""
    found = [
        f"no room for {what}"
        for name, what in EXTRAS.items()
        if name not in room and getattr(form, name)
    ]
    if form.bias_dtype not in FLOAT_DTYPES:
        found.append(f"a bias in {form.bias_dtype}")
    return found


def promise_bias(form: PackedForm) -> dict[str, TensorInfo]:
    """The bias [N], where there is one."""
    return {"bias": TensorInfo(form.bias_dtype, form.shape[:1])} if form.bias else {}


def pack_bias(form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
    """The bias in the dtype that the form wants."""
    from dqconvert.quantizers.tensors import TORCH_DTYPES

    if (q.bias is not None) != form.bias:
        raise ValueError("the form and the result disagree on a bias")
    if q.bias is None:
        return {}
    return {"bias": q.bias.to(TORCH_DTYPES[form.bias_dtype]).contiguous()}


def static_scale(form: PackedForm, q: QuantizedTensor) -> Tensor | None:
    """The static activation scale [] in fp32, where the form wants one."""
    if (q.input_scale is not None) != form.input_scale:
        raise ValueError("the form and the result disagree on a static activation scale")
    return None if q.input_scale is None else q.input_scale.float().reshape(())


def one_scale(scale: Tensor | None) -> Tensor:
    """A tensor-wide scale [] in fp32; ValueError where rows have their own."""
    if scale is None:
        raise ValueError("the result lacks the scale of the tensor")
    if bool((scale != scale.flatten()[0]).any()):
        raise ValueError("the layout has one scale for the tensor; the result has one for each row")
    return scale.flatten()[0].float().reshape(())
