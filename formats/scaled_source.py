"""8-bit weights of anybody, read as what they stand for: casts, and codes with scales beside them.

    <layer>.weight    F8_E4M3, F8_E5M2 [N, ...]     the values themselves where no scale is there
    <layer>.weight    F8_E4M3, F8_E5M2, I8 [N, ...] times a scale of any of these names:
        scale_weight        Kijai, Comfy-Org        [] or [1], or one for each row
        weight_scale        vLLM, LightX2V, NVIDIA  [], [1], [N], [N, 1], or one for each block
                                                 [N/b, K/c], [N/b, 1, K/c, 1]
        weight_scale_inv    DeepSeek, SGLang        the same, multiplied with despite its name
    <layer>.pre_quant_scale           modelopt      [K]: what the input is multiplied with before
    scaled_fp8, <layer>.scale_input, input_scale    say nothing of the weights

Rows are read one by one, so that no weight is in memory as a whole. Torch-free until read.

Source: ComfyUI comfy/utils.py (convert_old_quants); ComfyUI-WanVideoWrapper fp8_optimization.py;
vllm model_executor/layers/quantization/fp8.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from dqconvert.formats.container import Derived
from dqconvert.formats.gguf_source import LOST
from dqconvert.formats.source import Source, kept_dtypes, notes_of
from dqconvert.quantizers.spec import FLOAT_DTYPES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
SMOOTH, ZERO = "pre_quant_scale", "weight_zero_point"
"""What else may belong to a weight: factors of its columns, and zeros, which are not read."""

UNREAD = ("scale_input", "input_scale", "scaled_fp8", "comfy_quant")
"""Tensors, or ends of names, that say nothing of the weights."""

CODES = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
"""Dtypes that stand for numbers without a scale, and their codes."""

BLOCKS = (16, 32, 64, 128, 256)
"""Sides of blocks that may be cut off at the end."""


class Rescaled(Derived):
    """A checkpoint whose 8-bit tensors are multiplied with their scales, or widened.

    They are read in F32 and kept in BF16, which holds each value of a cast.
    """

    def __init__(self, source: Source) -> None:
        self.source: Source = source
        self._scales = {
            name: scale
            for name, info in source.infos.items()
            if info.dtype in (*CODES, "I8") and (scale := _scale(name, source.infos))
        }
        self._smooth = {
            name: smooth
            for name in self._scales
            if (smooth := _beside(name, SMOOTH)) in source.infos
            and source.infos[smooth].shape == source.infos[name].shape[1:]
        }

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What is read, without the scales."""
        used = {*self._scales.values(), *self._smooth.values()}
        return {
            name: TensorInfo(self._dtype(name, info), info.shape)
            for name, info in self.source.infos.items()
            if name not in used and name.rpartition(".")[2] not in UNREAD
        }

    def _dtype(self, name: str, info: TensorInfo) -> str:
        return "F32" if name in self._scales or info.dtype in CODES else info.dtype

    @cached_property
    def kept(self) -> Mapping[str, str]:
        """Codes and scales have no more than 16 bits to give."""
        return {**kept_dtypes(self.source), **dict.fromkeys(self._changed, "BF16")}

    @cached_property
    def _changed(self) -> frozenset[str]:
        infos = self.source.infos
        return frozenset(name for name, info in self.infos.items() if info != infos[name])

    @property
    def notes(self) -> tuple[str, ...]:
        """That the weights were quantized before, and as what."""
        infos = self.source.infos
        found = Counter(infos[name].dtype for name in self._scales)
        casts = Counter(
            info.dtype for n, info in infos.items() if n in self.infos and n not in self._scales
        )
        types = [f"{count} {dtype} with scales" for dtype, count in found.items()]
        types += [f"{casts[dtype]} {dtype} without scales" for dtype in CODES if casts[dtype]]
        lost = (f"{LOST} ({', '.join(types)}): what they lost stays lost",) if types else ()
        return (*notes_of(self.source), *lost)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or its rows start .. stop, in fresh memory; SourceError if bytes lack."""
        from dqconvert.quantizers.codes import decode

        tensor, info = self.source.read(name, rows), self.source.infos[name]
        if name not in self._changed:
            return tensor
        tensor = decode(tensor, CODES[info.dtype]) if info.dtype in CODES else tensor.float()
        if name not in self._scales:
            return tensor
        scale = self.source.read(self._scales[name]).float()
        tensor = _scaled(tensor, scale, (rows[0] if rows else 0, info.shape))
        if name in self._smooth:
            tensor *= self.source.read(self._smooth[name]).float()
        return tensor

    def fill(self, name: str, out: Tensor, rows: tuple[int, int] | None = None) -> None:
        """The same into a contiguous tensor of its dtype and size; SourceError if bytes lack."""
        if name in self._changed:
            out.copy_(self.read(name, rows))
        else:
            self.source.fill(name, out, rows)


def has_bytes(source: Source) -> bool:
    """Whether a checkpoint has weights that Rescaled reads."""
    infos = source.infos
    return any(
        info.dtype in CODES or (info.dtype == "I8" and _scale(name, infos))
        for name, info in infos.items()
        if not name.endswith(UNREAD)
    )


def _beside(name: str, leaf: str) -> str:
    return f"{name.rpartition('.')[0]}.{leaf}"


def _scale(name: str, infos: Mapping[str, TensorInfo]) -> str:
    """The tensor with the scales of a weight, "" where it has none that fit it."""
    layer, _, leaf = name.rpartition(".")
    if leaf != "weight" or _beside(name, ZERO) in infos:
        return ""
    shape = infos[name].shape
    names = (f"{layer}.{suffix}" for suffix in SCALES)
    found = (one for one in names if one in infos and infos[one].dtype in FLOAT_DTYPES)
    return next((one for one in found if _block(infos[one].shape, shape)), "")


def _block(scale: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns of a weight that share a scale, None where shapes do not fit.

    modelopt spreads scales of blocks as [N/b, 1, K/c, 1].
    """
    if len(scale) == 4 and scale[1] == scale[3] == 1:
        scale = scale[::2]
    if scale in ((), (1,)) or all(n == 1 for n in scale):
        return shape[0], -1
    if scale == shape[:1] or (scale[0] == shape[0] and all(n == 1 for n in scale[1:])):
        return 1, -1
    if len(scale) != 2 or len(shape) != 2:
        return None
    sides = [_side(count, size) for count, size in zip(scale, shape, strict=True)]
    return (sides[0], sides[1]) if all(sides) else None


def _side(count: int, size: int) -> int:
    """How many of size share one of count scales, 0 where nothing fits."""
    if count and size % count == 0:
        return size // count
    return next((side for side in BLOCKS if -(-size // side) == count), 0)


def _scaled(part: Tensor, scale: Tensor, place: tuple[int, tuple[int, ...]]) -> Tensor:
    """Rows of a weight [n, ...] fp32 times their scales. place: the first row, the whole shape."""
    import torch

    start, shape = place
    block = _block(tuple(scale.shape), shape)
    assert block is not None
    rows, columns = block
    if scale.numel() == 1:
        return part.mul_(scale.reshape(()))
    if columns < 0:
        own = scale.reshape(-1)[start : start + len(part)]
        return part.mul_(own.reshape(-1, *[1] * (part.ndim - 1)))
    index = torch.arange(start, start + len(part)) // rows
    scale = scale.flatten(1)
    return part.mul_(scale[index].repeat_interleave(columns, dim=1)[:, : part.shape[1]])
