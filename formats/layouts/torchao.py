"""Weights as torchao's tensor subclasses: plain tensors, and JSON in the header that joins them.

    Int8Tensor      <layer>._weight_qdata I8 [N, K]       _weight_scale F32 [N, 1]
                    <layer>._weight_zero_point I8 [N, 1]  zeros
    Float8Tensor    <layer>._weight_qdata F8_E4M3 [N, K]  _weight_scale F32 [N, 1] or [N/128, K/128]
    NVFP4Tensor     <layer>._weight_qdata U8 [N, K/2]     low nibble first
                    <layer>._weight_scale F8_E4M3 [N, K/16]   _weight_per_tensor_scale F32 []
    all             <layer>.bias

The metadata has `tensor_names`, a JSON list of every logical tensor of the file (<layer>.weight,
not its parts), and a JSON object under each of these names: {"_type": "Tensor"} where it is one.
A weight whose entry has no act_quant_kwargs multiplies in 16 bit. Files of others may have one
scale [1, 1] of e4m3, and NVFP4 without a scale of the tensor or with swizzled ones (blocked.py).

Source: torchao/prototype/safetensors (safetensors_support.py, safetensors_utils.py) and the
attributes of the tensor subclasses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dqconvert.formats.form import PackedForm
from dqconvert.formats.layouts import Layout
from dqconvert.formats.layouts.blocked import BlockScaled
from dqconvert.formats.layouts.scaled import Scaled
from dqconvert.quantizers.schemes.blocks import NVFP4
from dqconvert.quantizers.schemes.plain8 import FP8_BLOCK, FP8_ROW, FP8_TENSOR, INT8_ROW
from dqconvert.quantizers.spec import QuantSpec, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from dqconvert.quantizers.tensors import QuantizedTensor

SECOND = "per_tensor_scale"
QDATA, SCALE, ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"

SPECS = {
    ("int8", INT8_ROW.tile): (INT8_ROW, "Int8Tensor"),
    ("e4m3", FP8_ROW.tile): (FP8_ROW, "Float8Tensor"),
    ("e4m3", FP8_BLOCK.tile): (FP8_BLOCK, "Float8Tensor"),
    ("e2m1", NVFP4.tile): (NVFP4, "NVFP4Tensor"),
}
"""Format and subclass by code and tile."""

READ = (
    *SPECS.values(),
    (FP8_TENSOR, "Float8Tensor"),
    (replace(NVFP4, tensor_scale=None), "NVFP4Tensor"),
)
"""The same of everything that is understood."""

DYNAMIC = (INT8_ROW, FP8_ROW)
"""Formats that can quantize their inputs, in files that the serializer of torchao reads."""

PLAIN = {"_type": "Tensor"}
"""The entry of an unquantized tensor."""

_BFLOAT16 = {"_type": "torch.dtype", "_data": "bfloat16"}
_PER_ROW = {"_type": "PerRow", "_data": {"dim": -1}}
_AUTO = {"_type": "KernelPreference", "_data": "AUTO"}
_MM_CONFIG = {
    "_type": "Float8MMConfig",
    "_data": {"emulate": False, "use_fast_accum": True, "pad_inner_dim": False},
}

NAMES = {
    "Int8Tensor": ["zero_point", "qdata", "scale"],
    "Float8Tensor": ["qdata", "scale"],
    "NVFP4Tensor": [SECOND, "qdata", "scale"],
}
"""The parts of each subclass."""

ACTIVATIONS: Mapping[str, Any] = {
    "Int8Tensor": {
        "_type": "QuantizeTensorToInt8Kwargs",
        "_data": {
            "granularity": _PER_ROW,
            "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
            "reduce_range": False,
        },
    },
    "Float8Tensor": {
        "_type": "QuantizeTensorToFloat8Kwargs",
        "_data": {
            "float8_dtype": {"_type": "torch.dtype", "_data": "float8_e4m3fn"},
            "granularity": _PER_ROW,
            "mm_config": None,
            "hp_value_lb": None,
            "hp_value_ub": None,
            "kernel_preference": _AUTO,
        },
    },
}
"""How a subclass is told to quantize its inputs, a scale per row."""


@dataclass(frozen=True, slots=True)
class TorchAo:
    """A Layout, and the entry of a weight in the metadata.

    dynamic: inputs are quantized too; swizzled: scales of NVFP4 are, which is read alone.
    """

    dynamic: bool
    swizzled: bool = False

    def problem(self, form: PackedForm) -> str | None:
        """See formats/layouts."""
        if (form.spec.code, form.spec.tile) not in SPECS:
            return f"torchao has no tensor for {form.spec.code} in tiles of {form.spec.tile}"
        reason = self._bytes(form).problem(form)
        reasons = [] if reason is None else [reason]
        spec, subclass = SPECS[form.spec.code, form.spec.tile]
        if form.spec != spec:
            reasons.append(f"{subclass} has other scales than {form.spec}")
        if form.input_scale:
            reasons.append("activations are scaled as they come; there is no static scale")
        if spec == FP8_BLOCK and (form.shape[0] % 128 or form.shape[1] % 128):
            # it would divide the extents by the grid, and call the result a tile
            reasons.append(f"needs extents that are multiples of 128; {form.shape} are not")
        if self.dynamic and spec == FP8_ROW and (form.shape[0] % 16 or form.shape[1] % 16):
            reasons.append(f"the product needs multiples of 16; {form.shape} are not")
        if self.dynamic and spec not in DYNAMIC:
            reasons.append(f"{subclass} in tiles of {form.spec.tile} is read for weights alone")
        return "; ".join(reasons) or None

    def promise(self, form: PackedForm) -> dict[str, TensorInfo]:
        """See formats/layouts."""
        infos = self._bytes(form).promise(form)
        if form.spec.code == "int8":
            infos[ZERO] = TensorInfo("I8", (form.shape[0], 1))
        return infos

    def pack(self, form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
        """See formats/layouts."""
        import torch

        tensors = self._bytes(form).pack(form, q)
        if form.spec.code == "int8":
            tensors[ZERO] = torch.zeros_like(tensors[SCALE], dtype=torch.int8)
        return tensors

    def unpack(self, form: PackedForm, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
        """See formats/layouts. ValueError on zero points, which symmetric weights have none of."""
        if ZERO in tensors and bool(tensors[ZERO].any()):
            raise ValueError(f"{ZERO}: not zero, but the weight is symmetric")
        return self._bytes(form).unpack(form, tensors)

    def entry(self, form: PackedForm) -> dict[str, Any]:
        """What the metadata says of the weight, in the words of torchao's own serializer."""
        subclass = next(name for spec, name in READ if spec == form.spec)
        dynamic = self.dynamic and not form.full_precision
        tile = list(form.spec.tile_of(form.shape))
        data: dict[str, Any] = {"act_quant_kwargs": ACTIVATIONS[subclass] if dynamic else None}
        if subclass == "NVFP4Tensor":
            data |= {"block_size": tile[1], "orig_dtype": _BFLOAT16}
            data |= {"is_swizzled_scales": self.swizzled, "use_triton_kernel": False}
        else:
            data |= {"block_size": tile, "dtype": _BFLOAT16}
        if subclass == "Int8Tensor":
            data["reduce_range"] = False
        if subclass == "Float8Tensor":
            data["kernel_preference"] = _AUTO
            data["mm_config"] = _MM_CONFIG if dynamic else None
        named = [name for name in NAMES[subclass] if form.spec.tensor_scale or name != SECOND]
        return {"_type": subclass, "_data": data, "_tensor_data_names": named}

    def _bytes(self, form: PackedForm) -> Layout:
        """The layout without what is torchao's own."""
        if form.spec.code != "e2m1":
            return Scaled(weight=QDATA, scale=SCALE, one=(1, 1))
        second = f"_weight_{SECOND}" if form.spec.tensor_scale else ""
        return BlockScaled(weight=QDATA, scale=SCALE, tensor_scale=second, swizzled=self.swizzled)


def read_form(entry: Mapping[str, Any], shape: tuple[int, ...]) -> PackedForm | None:
    """A weight's form, bias aside, from its entry and the shape of its qdata; None if it is none.

    The first that the class has where its entry fits none of them; full_precision where its inputs
    are not quantized.
    """
    subclass, data, names = (entry.get(key) for key in ("_type", "_data", "_tensor_data_names"))
    specs: list[QuantSpec] = [spec for spec, name in READ if name == subclass]
    if not specs or len(shape) != 2 or not isinstance(data, Mapping):
        return None
    whole = (shape[0], shape[1] * 8 // specs[0].bits)
    block = data.get("block_size")
    block = [1, block] if isinstance(block, int) else block
    second = isinstance(names, list) and SECOND in names
    fitting = (
        spec
        for spec in specs
        if block == [*spec.tile_of(whole)] and second == (spec.tensor_scale is not None)
    )
    plain = data.get("act_quant_kwargs") is None
    return PackedForm(next(fitting, specs[0]), whole, bias=False, full_precision=plain)


def is_swizzled(entry: Mapping[str, Any]) -> bool:
    """Whether the scales lie in cuBLAS' tiles."""
    data = entry.get("_data")
    return isinstance(data, Mapping) and data.get("is_swizzled_scales") is True
