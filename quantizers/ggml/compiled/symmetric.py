"""Q6_K and Q3_K of ggml-quants.c: super-blocks of 256 weights, a scale for each 16 of them.

Both fit a scale to each sub-block, round the scales to multiples of a common d, and round the
weights again by what the file will say. A sub-block whose d * scale is 0 keeps the levels of its
fit. symmetric_q6 and symmetric_q3 have the layouts.
"""

from __future__ import annotations

import numpy as np

from dqconvert.quantizers.ggml.compiled.floats import halves
from dqconvert.quantizers.ggml.compiled.symmetric_blocks import coded, room
from dqconvert.quantizers.ggml.compiled.symmetric_decode import DEQUANTIZERS
from dqconvert.quantizers.ggml.compiled.symmetric_descent import descent
from dqconvert.quantizers.ggml.compiled.symmetric_q3 import encode as encode3
from dqconvert.quantizers.ggml.compiled.symmetric_q3 import encode_weighted, scales
from dqconvert.quantizers.ggml.compiled.symmetric_q6 import encode as encode6
from dqconvert.quantizers.ggml.compiled.symmetric_search import Bytes, Floats

__all__ = ["DEQUANTIZERS", "QUANTIZERS"]

_NONE = np.empty((0, 256), np.float32)


def _q6_k(rows: Floats, out: Bytes) -> None:
    _q6_k_weighted(rows, _NONE, out)


def _q6_k_weighted(rows: Floats, importance: Floats, out: Bytes) -> None:
    blocks, weights = rows.reshape(-1, 256), importance.reshape(-1, 256)
    encode6(blocks, weights, out.reshape(-1, 210), room(), coded(), halves())


def _q3_k(rows: Floats, out: Bytes) -> None:
    encode3(rows.reshape(-1, 256), out.reshape(-1, 110), room(), descent(), coded(), halves())


def _q3_k_weighted(rows: Floats, importance: Floats, out: Bytes) -> None:
    blocks, weights = rows.reshape(-1, 256), importance.reshape(-1, 256)
    encode_weighted(blocks, weights, out.reshape(-1, 110), room(), coded(), scales())


QUANTIZERS = {"q3_k": (_q3_k, _q3_k_weighted), "q6_k": (_q6_k, _q6_k_weighted)}
