"""8-bit weights with plain scales: one of the tensor, one per row, or one per block.

    <layer>.weight         I8, F8_E4M3 or F8_E5M2 [N, K]
    <layer>.weight_scale   F32; per tensor [] or [1], per row [N, 1] or [N], blocks of b rows and
                           c columns [ceil(N/b), ceil(K/c)]; none where all scales are 1
    <layer>.input_scale    F32, static range of the inputs, where there is one; shape as per tensor
    <layer>.bias           as it was

w = weight · weight_scale, also where a runtime calls the scale weight_scale_inv.

Source: LightX2V lightx2v/common/ops/mm/mm_weight.py; vllm model_executor/layers/quantization
(fp8.py, modelopt.py); sglang multimodal_gen/runtime/layers/quantization/fp8.py; compressed-tensors
src/compressed_tensors/compressors (naive_quantized).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dqconvert.formats.form import PackedForm
from dqconvert.quantizers.spec import ALL, FLOAT_DTYPES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from dqconvert.quantizers.tensors import QuantizedTensor

CODES = {"int8": "I8", "e4m3": "F8_E4M3", "e5m2": "F8_E5M2"}
"""Dtype of each code in the file."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """A Layout. scale: suffix of the weight's scales; one: shape of a single scale, () or (1,);
    column: scales per row are [N, 1], else [N]; static: suffix of the static scale of inputs;
    weight: suffix of the codes.

    Scales are F32 in the file whatever spec.scale is: narrower ones come back exactly.
    """

    scale: str = "weight_scale"
    one: tuple[int, ...] = ()
    column: bool = True
    static: str = "input_scale"
    weight: str = "weight"

    def problem(self, form: PackedForm) -> str | None:
        """See formats/layouts."""
        reasons = []
        spec = form.spec
        if spec.code not in CODES or spec.tensor_scale or spec.zero_point:
            reasons.append(f"codes are {', '.join(CODES)} with one level of scales")
        elif spec.scale not in FLOAT_DTYPES:
            reasons.append(f"scales in {spec.scale}")
        try:
            spec.grid(form.shape)
        except ValueError as error:
            reasons.append(str(error))
        if form.rank or form.smooth or form.rotation or form.shift:
            reasons.append("room for codes and scales alone")
        if form.bias_dtype not in FLOAT_DTYPES:
            reasons.append(f"a bias in {form.bias_dtype}")
        return "; ".join(reasons) or None

    def promise(self, form: PackedForm) -> dict[str, TensorInfo]:
        """See formats/layouts."""
        infos = {self.weight: TensorInfo(CODES[form.spec.code], form.shape)}
        if not form.spec.unit:
            infos[self.scale] = TensorInfo("F32", self._scale_shape(form))
        if form.input_scale:
            infos[self.static] = TensorInfo("F32", self.one)
        if form.bias:
            infos["bias"] = TensorInfo(form.bias_dtype, (form.shape[0],))
        return infos

    def pack(self, form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
        """See formats/layouts. ValueError where the result lacks what the form promises."""
        from dqconvert.quantizers.tensors import TORCH_DTYPES

        if (q.input_scale is not None) != form.input_scale:
            raise ValueError("the form and the result disagree on a static activation scale")
        if (q.bias is not None) != form.bias:
            raise ValueError("the form and the result disagree on a bias")
        tensors = {self.weight: q.codes.contiguous()}
        if not form.spec.unit:
            tensors[self.scale] = q.scale.float().reshape(self._scale_shape(form)).contiguous()
        if q.input_scale is not None:
            tensors[self.static] = q.input_scale.float().reshape(self.one)
        if q.bias is not None:
            tensors["bias"] = q.bias.to(TORCH_DTYPES[form.bias_dtype]).contiguous()
        return tensors

    def unpack(self, form: PackedForm, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
        """See formats/layouts. Takes scales of any float dtype, and [1] for []."""
        import torch

        from dqconvert.quantizers.tensors import TORCH_DTYPES, QuantizedTensor

        grid, dtype = form.spec.grid(form.shape), TORCH_DTYPES[form.spec.scale]
        static = tensors.get(self.static) if form.input_scale else None
        if form.spec.unit:
            scale = torch.ones(grid, dtype=dtype, device=tensors[self.weight].device)
        else:
            scale = tensors[self.scale].to(dtype).reshape(grid)
        return QuantizedTensor(
            spec=form.spec,
            codes=tensors[self.weight],
            scale=scale,
            bias=tensors.get("bias"),
            input_scale=None if static is None else static.float().reshape(()),
        )

    def _scale_shape(self, form: PackedForm) -> tuple[int, ...]:
        if form.spec.tile == (ALL, ALL):
            return self.one
        if form.spec.tile == (1, ALL) and not self.column:
            return form.shape[:1]
        return form.spec.grid(form.shape)
