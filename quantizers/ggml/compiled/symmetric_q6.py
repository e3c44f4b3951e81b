"""Q6_K, 210 bytes for 256 weights (ggml-quants.c): x = d * scale[s] * level, levels -32 .. 31.

low[128]     levels + 32, low 4 bits: of each half, weights 0 .. 63 low and 64 .. 127 above
high[64]     high 2 bits: byte l of a half has those of its weights l, l + 32, l + 64, l + 96
scales[16]   int8
d            a half
"""

from __future__ import annotations

import numpy as np

from dqconvert.quantizers.ggml.compiled.floats import put_half
from dqconvert.quantizers.ggml.compiled.symmetric_blocks import (
    SIDE,
    Coded,
    Room,
    load,
    requantize,
    round_scales,
    square,
    tile_of,
)
from dqconvert.quantizers.ggml.compiled.symmetric_search import (
    SMALLEST,
    Bytes,
    Floats,
    levels,
    search,
)
from dqconvert.quantizers.ggml.jit import kernel

_ZERO = np.float32(0)


@kernel
def encode(
    rows: Floats, importance: Floats, out: Bytes, room: Room, group: Coded, halves: Floats
) -> None:
    """Super-blocks [n, 256] to [n, 210]; importance [blocks of a row, 256], none is x^2."""
    coded = tile_of(group, 0)
    for first in range(0, rows.shape[0], SIDE):
        load(rows, first, room.x)
        if importance.shape[0]:
            load(importance, first, room.weights)
        else:
            square(room.x, room.weights)
        search(room.x, room.weights, room.moments, 32, room.found)
        levels(room.x, room.found, 32, coded.kept)
        round_scales(room.found.scale, 128, SMALLEST, coded)
        blocks = rows[first : first + SIDE]
        requantize(blocks, 32, halves, coded, room)
        for b in range(blocks.shape[0]):
            _store(b, coded, room.levels[b], out[first + b])


@kernel
def _store(lane: int, coded: Coded, q: Bytes, block: Bytes) -> None:
    """Super-block `lane` of a tile to its bytes."""
    if coded.d[lane] == _ZERO:
        block[:] = 0
        return
    _pack(q, block)
    for s in range(16):
        block[192 + s] = coded.rounded[s * SIDE + lane] & 255
    put_half(block, 208, coded.d[lane])


@kernel
def _pack(q: Bytes, block: Bytes) -> None:
    """256 levels 0 .. 63 to the first 192 bytes of a block."""
    for half in range(2):
        at = 128 * half
        for j in range(64):
            block[64 * half + j] = (q[at + j] & 15) | (q[at + j + 64] & 15) << 4
        for j in range(32):
            low, high = (q[at + j] >> 4) | (q[at + j + 32] >> 4) << 2, q[at + j + 64] >> 4
            block[128 + 32 * half + j] = low | high << 4 | (q[at + j + 96] >> 4) << 6
