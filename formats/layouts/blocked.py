"""Weights in small blocks with scales of their own, NVFP4 and MX, as their runtimes store them.

    weight          e2m1: U8 [N', K'/2] nibbles; e3m2: U8 [N', 3K'/4]; e4m3: F8_E4M3 or U8 [N', K']
    weight_scale    linear: [N', K'/block]; swizzled: [ceil128(N'), ceil4(K'/block)]
    weight_scale_2  F32 one value, NVFP4 only: amax/2688, or its inverse
    input_scale     F32 one value, where calibrated: amax/2688 of the input, or its inverse
    alpha           F32 one value: weight_scale_2 · input_scale, for runtimes that want the product
    smooth          BF16 [K]: what the runtime multiplies the input by
    bias            [N]

w = code · weight_scale · weight_scale_2. N' and K' are N and K filled up with zeros to multiples
of `pad`. Swizzled scales are in cuBLAS' 128x4 tiles: for the scale in row r and column c

    flat = ((r//128) · (C/4) + c//4) · 512 + (r%32) · 16 + ((r%128)//32) · 4 + c%4

Neither the order of nibbles nor the swizzle can be told from a file, and a wrong one loads.

Sources: comfy_kitchen/tensor/nvfp4.py and mxfp8.py, modelopt NVFP4QTensor, compressed-tensors
nvfp4-pack-quantized, LightX2V common/ops/mm/mm_weight.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dqconvert.formats.form import PackedForm
from dqconvert.formats.layouts import beside
from dqconvert.quantizers.spec import CODES, QuantSpec, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from dqconvert.quantizers.tensors import QuantizedTensor

TILE_ROWS, TILE_COLS = 128, 4
"""Scales in a tile of the swizzle."""


@dataclass(frozen=True, slots=True)
class BlockScaled:
    """See the module docstring.

    weight, scale, tensor_scale, input_scale, alpha, smooth: suffixes, "" where the layout has no
    such tensor. codes: dtype of stored codes, F8_E4M3 or U8; scales: dtype of stored scales,
    F8_E4M3, F8_E8M0 or U8 for the bytes of either. high_first: the even column of two nibbles is
    the high one. swizzled: see the module. divisors: the runtime divides by tensor_scale and
    multiplies the input by input_scale (2688/amax). one: shape of a single value, () or (1,).
    pad: N and K are filled up to multiples of these.
    """

    weight: str = "weight"
    scale: str = "weight_scale"
    tensor_scale: str = ""
    input_scale: str = ""
    alpha: str = ""
    smooth: str = ""
    codes: str = "U8"
    scales: str = "F8_E4M3"
    high_first: bool = False
    swizzled: bool = False
    divisors: bool = False
    one: tuple[int, ...] = ()
    pad: tuple[int, int] = (1, 1)

    def problem(self, form: PackedForm) -> str | None:
        """See formats/layouts."""
        room = [name for name in ("input_scale", "smooth") if getattr(self, name)]
        reasons = beside.surplus(form, room)
        spec, block = form.spec, form.spec.tile[1]
        if CODES[spec.code].exponent == 0 or spec.tile[0] != 1 or block < 1 or spec.zero_point:
            reasons.append(f"{spec.code} in tiles of {spec.tile} is no block format")
        elif self.filled(form.shape)[1] % block or (form.shape[1] % block and not spec.ragged):
            reasons.append(f"{form.shape[1]} input channels do not divide into blocks of {block}")
        if (spec.tensor_scale is None) != (not self.tensor_scale and not self.alpha):
            reasons.append(f"{spec.code} with scales in {spec.scale} and {spec.tensor_scale}")
        if self.alpha and not form.input_scale:
            reasons.append("the runtime needs the range of the input")
        return "; ".join(reasons) or None

    def promise(self, form: PackedForm) -> dict[str, TensorInfo]:
        """See formats/layouts."""
        n, k = self.filled(form.shape)
        single = TensorInfo("F32", self.one)
        infos = {
            self.weight: TensorInfo(self.codes, (n, k * CODES[form.spec.code].bits // 8)),
            self.scale: TensorInfo(self.scales, self.scale_shape(form)),
        }
        if self.tensor_scale:
            infos[self.tensor_scale] = single
        if form.input_scale:
            infos[self.input_scale] = single
        if self.alpha:
            infos[self.alpha] = single
        if form.smooth:
            infos[self.smooth] = TensorInfo("BF16", form.shape[1:])
        return infos | beside.promise_bias(form)

    def filled(self, shape: tuple[int, int]) -> tuple[int, int]:
        """N', K': the shape with its padding."""
        return _up(shape[0], self.pad[0]), _up(shape[1], self.pad[1])

    def scale_shape(self, form: PackedForm) -> tuple[int, int]:
        """Shape of the stored scales."""
        n, k = self.filled(form.shape)
        groups = k // form.spec.tile[1]
        return (_up(n, TILE_ROWS), _up(groups, TILE_COLS)) if self.swizzled else (n, groups)

    def pack(self, form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
        """See formats/layouts."""
        import torch

        from dqconvert.quantizers.tensors import TORCH_DTYPES

        scale = q.scale.contiguous().view(torch.uint8)
        scale = to_blocked(scale) if self.swizzled else _fill(scale, self.scale_shape(form))
        tensors = {
            self.weight: self._packed(q).view(TORCH_DTYPES[self.codes]),
            self.scale: scale.view(TORCH_DTYPES[self.scales]),
        }
        tensors |= self._singles(form, q)
        if (q.smooth is not None) != form.smooth:
            raise ValueError("the form and the result disagree on a smooth vector")
        if q.smooth is not None:
            tensors[self.smooth] = (1 / q.smooth.float()).to(torch.bfloat16)
        return tensors | beside.pack_bias(form, q)

    def unpack(self, form: PackedForm, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
        """See formats/layouts. Bytes are taken as such, whatever one-byte dtype they have."""
        import torch

        from dqconvert.quantizers.tensors import TORCH_DTYPES, QuantizedTensor

        (n, k), spec = form.shape, form.spec
        rows, groups = self.filled(form.shape)[0], self.filled(form.shape)[1] // spec.tile[1]
        stored = tensors[self.scale].contiguous().view(torch.uint8)
        scale = from_blocked(stored, rows, groups) if self.swizzled else stored
        scale = scale.reshape(rows, groups)[:n, : -(-k // spec.tile[1])].contiguous()
        codes = self._codes(spec, tensors[self.weight].view(torch.uint8))[:n, :k].contiguous()
        smooth = tensors.get(self.smooth)
        static = self._single(tensors, self.input_scale)
        second = self._single(tensors, self.tensor_scale)
        if second is None and static is not None and self.alpha:
            second = tensors[self.alpha].float().reshape(()) / static
        return QuantizedTensor(
            spec=spec,
            codes=codes.view(torch.float8_e4m3fn) if spec.code == "e4m3" else codes,
            scale=scale.view(TORCH_DTYPES[spec.scale]),
            tensor_scale=None if second is None else second.view(1),
            bias=tensors.get("bias"),
            smooth=None if smooth is None else 1 / smooth.float(),
            shift=form.shift,
            input_scale=static,
        )

    def _singles(self, form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
        """The scales of the tensor and of its input."""
        static = beside.static_scale(form, q)
        found = {}
        if self.tensor_scale:
            found[self.tensor_scale] = self._turned(beside.one_scale(q.tensor_scale))
        if static is not None:
            found[self.input_scale] = self._turned(static)
        if self.alpha and static is not None:
            found[self.alpha] = beside.one_scale(q.tensor_scale) * static
        return {name: value.reshape(self.one).clone() for name, value in found.items()}

    def _single(self, tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
        found = tensors.get(name)
        return None if found is None else self._turned(found.float().reshape(()))

    def _turned(self, scale: Tensor) -> Tensor:
        return 1 / scale if self.divisors else scale

    def _packed(self, q: QuantizedTensor) -> Tensor:
        """Codes as the file has them, uint8; in blocks of rows, which stay in cache."""
        import torch

        codes = q.codes.contiguous().view(torch.uint8)
        n, k = self.filled((codes.shape[0], codes.shape[1]))
        bits = CODES[q.spec.code].bits
        if bits == 8:
            return _fill(codes, (n, k))
        packed = codes.new_empty((n, k * bits // 8))
        for start, stop in q.spec.row_blocks((n, k)):
            rows = _fill(codes[start:stop], (stop - start, k))
            packed[start:stop] = self._bytes(q.spec, rows)
        return packed

    def _bytes(self, spec: QuantSpec, codes: Tensor) -> Tensor:
        from dqconvert.formats.layouts.nibbles import pack_nibbles, pack_sixes

        return pack_sixes(codes) if spec.code == "e3m2" else pack_nibbles(codes, self.high_first)

    def _codes(self, spec: QuantSpec, packed: Tensor) -> Tensor:
        from dqconvert.formats.layouts.nibbles import unpack_nibbles, unpack_sixes

        if CODES[spec.code].bits == 8:
            return packed
        if spec.code == "e3m2":
            return unpack_sixes(packed)
        return unpack_nibbles(packed, packed.dtype, self.high_first)


def to_blocked(scale: Tensor) -> Tensor:
    """One-byte scales [R, C] to [ceil128(R), ceil4(C)] in 128x4 tiles, filled up with zeros."""
    rows, cols = _up(scale.shape[0], TILE_ROWS), _up(scale.shape[1], TILE_COLS)
    # (tiles_r, quarter, row, tiles_c, column) -> (tiles_r, tiles_c, row, quarter, column)
    tiles = _fill(scale, (rows, cols)).reshape(rows // 128, 4, 32, cols // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, cols)


def from_blocked(blocked: Tensor, rows: int, cols: int) -> Tensor:
    """The first rows and columns of scales in 128x4 tiles, of any shape: [rows, cols]."""
    tiles = blocked.reshape(_up(rows, TILE_ROWS) // 128, _up(cols, TILE_COLS) // 4, 32, 4, 4)
    whole = tiles.permute(0, 3, 2, 1, 4)
    return whole.reshape(_up(rows, TILE_ROWS), _up(cols, TILE_COLS))[:rows, :cols]


def _fill(tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    """The tensor in the corner of zeros of that shape; itself where it has it."""
    if tuple(tensor.shape) == shape:
        return tensor
    filled = tensor.new_zeros(shape)
    filled[: tensor.shape[0], : tensor.shape[1]] = tensor
    return filled


def _up(extent: int, multiple: int) -> int:
    return -(-extent // multiple) * multiple
