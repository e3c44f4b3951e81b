"""Weights [N, K] to rows of ggml blocks [N, row bytes] and back.

Bytes equal those of ggml's x86-64 library (ggml-quants.c), which has two ways for most types: one
without an importance matrix, as llama-quantize writes files, and one with, as
stable-diffusion.cpp does with ones for want of a better one.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dqconvert.quantizers.errors import DataError
from dqconvert.quantizers.ggml import jit
from dqconvert.quantizers.spec import BLOCKS, CODES, NEEDS_IMPORTANCE, QuantSpec
from dqconvert.quantizers.tensors import QuantizedTensor

MODULES = {
    "legacy": ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"),
    "ternary": ("tq1_0", "tq2_0", "mxfp4"),
    "kquants": ("q2_k", "q4_k", "q5_k"),
    "symmetric": ("q3_k", "q6_k"),
    "iq4": ("iq4_nl", "iq4_xs"),
    "iq3": ("iq3_s", "iq3_xxs"),
    "iq2": ("iq2_s", "iq2_xs", "iq2_xxs"),
    "iq1": ("iq1_s", "iq1_m"),
}
"""The modules of compiled/ and plain/, and the codes that each of them knows."""

ONE_WAY = frozenset({"q8_0", "tq1_0", "tq2_0", "mxfp4"})
"""Codes whose bytes no importance changes."""


def quantize(weight: Tensor, code: str, importance: Tensor | None = None) -> Tensor:
    """Rows of blocks [N, row bytes] uint8 of a weight [N, K], any float dtype.

    importance: [K] weights of the squared errors, None for ggml's way without. Raises DataError
    on NaN or infinity, ValueError where blocks do not divide K or importance is needed.
    """
    rows = weight.float().contiguous()
    out = torch.empty((rows.shape[0], row_bytes(code, rows.shape[1])), dtype=torch.uint8)
    if code in NEEDS_IMPORTANCE and importance is None:
        raise ValueError(f"{code} needs an importance matrix")
    if not rows.numel():
        return out.to(rows.device)
    if not math.isfinite(float(torch.stack(torch.aminmax(rows)).abs().amax())):
        raise DataError("holds NaN or infinity")
    if code in ONE_WAY:
        importance = None
    if importance is not None:
        importance = importance.to(rows).contiguous()
    if not _compiles(code, rows):
        found: Tensor = _table("plain", code, "QUANTIZERS")(rows, importance)
        return found
    plain, weighted = _table("compiled", code, "QUANTIZERS")
    if importance is None:
        plain(rows.numpy(), out.numpy())
    else:
        weighted(rows.numpy(), importance.numpy(), out.numpy())
    return out


def dequantize(blocks: Tensor, code: str) -> Tensor:
    """The weight [N, K] fp32 that rows of blocks [N, row bytes] uint8 stand for."""
    weights, size = BLOCKS[code.upper()]
    blocks = blocks.contiguous()
    shape = (blocks.shape[0], blocks.shape[1] // size * weights)
    if not blocks.numel():
        return torch.empty(shape, device=blocks.device)
    if not _compiles(code, blocks):
        found: Tensor = _table("plain", code, "DEQUANTIZERS")(blocks)
        return found
    out = torch.empty(shape)
    _table("compiled", code, "DEQUANTIZERS")(blocks.numpy(), out.numpy())
    return out


def result(weight: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> QuantizedTensor:
    """The same as a logical result; ones for an importance matrix where ggml insists on one."""
    if importance is None and spec.code in NEEDS_IMPORTANCE:
        importance = torch.ones(weight.shape[1])
    return wrap(quantize(weight, spec.code, importance), spec)


def wrap(blocks: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """Rows of blocks [N, row bytes] as a logical result, which has no scales beside them."""
    return QuantizedTensor(spec, blocks, blocks.new_empty((len(blocks), 0), dtype=torch.float32))


def row_bytes(code: str, columns: int) -> int:
    """Bytes of a row; ValueError where blocks do not divide it."""
    weights, size = BLOCKS[code.upper()]
    if columns % weights:
        raise ValueError(f"{code} needs blocks of {weights}; {columns} does not divide")
    return columns // weights * size


def is_block(code: str) -> bool:
    """Whether a code is one of ggml's block types."""
    return CODES[code].block > 0


def _compiles(code: str, tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and jit.available()


@cache
def _table(way: str, code: str, table: str) -> Any:
    """What a module of compiled/ or plain/ has for a code."""
    name = next(name for name, codes in MODULES.items() if code in codes)
    module = importlib.import_module(f"dqconvert.quantizers.ggml.{way}.{name}")
    found: Mapping[str, Callable[..., Any]] = getattr(module, table)
    return found[code]
