"""IQ3_S and IQ3_XXS: 3.4375 and 3.0625 bits per weight on grids of 4.

Layout (block_iq3_s and block_iq3_xxs of ggml-common.h), 256 weights in sub-blocks of 32:

    iq3_s       110 bytes   half d, 64 low bytes of points, 8 bytes of their 9th bits, 32 sign
                            bytes, 4 bytes of scales: x = d (2 scale + 1) value sign
    iq3_xxs      98 bytes   half d, 64 points, 8 words of four 7-bit signs and, highest, a scale:
                            x = d (scale + ½) / 2 value sign

Algorithm: quantize_row_iq3_s_impl and quantize_row_iq3_xxs_impl of ggml-quants.c. The first one
does not move on past a sub-block of zeros: points and signs of those behind it come to stand one
sub-block too early, and mean other weights. Its bytes are the measure here, so ours do too.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from dqconvert.quantizers.ggml.compiled.floats import halves
from dqconvert.quantizers.ggml.compiled.lattice import (
    BLOCK,
    REDO_ALL,
    REDO_OFF,
    Rule,
    Tools,
    Work,
    steps,
    work,
)
from dqconvert.quantizers.ggml.compiled.magnitudes import (
    by_blocks,
    nibble,
    put_scale,
    solve,
)
from dqconvert.quantizers.ggml.compiled.neighbours import lattice
from dqconvert.quantizers.ggml.compiled.spelling import (
    Bytes,
    Floats,
    half,
    put_word,
    spell_quad,
    word,
)
from dqconvert.quantizers.ggml.grids import grid, signs
from dqconvert.quantizers.ggml.jit import kernel

_RULES = {
    "iq3_s": Rule(
        sub=32,
        dims=4,
        base=8,
        steps=steps(15, 0.2, 9),
        tries=19,
        redo=REDO_ALL,
        sign=255,
        least=np.float32(1e-45),
        spread=np.float32(2),
    ),
    "iq3_xxs": Rule(
        sub=32,
        dims=4,
        base=8,
        steps=steps(15, 0.2, 15),
        tries=31,
        redo=REDO_OFF,
        sign=127,
        least=np.float32(1e-8),
        spread=np.float32(2),
    ),
}


def _plain(code: str, rows: Floats, out: Bytes) -> None:
    _weighted(code, rows, np.empty(0, np.float32), out)


def _weighted(code: str, rows: Floats, importance: Floats, out: Bytes) -> None:
    rule = _RULES[code]
    blocks, counts = by_blocks(rows, importance)
    run = _quantize_s if code == "iq3_s" else _quantize_xxs
    run((lattice(code), rule, work(rule)), blocks, counts, out.reshape(len(blocks), -1))


@kernel
def _quantize_s(tools: Tools, blocks: Floats, importance: Floats, out: Bytes) -> None:
    for block in range(len(blocks)):
        solve(tools, blocks[block], importance[block % len(importance)])
        _pack_s(tools[2], out[block])


@kernel
def _pack_s(work: Work, block: Bytes) -> None:
    inverse = put_scale(block, work, np.float32(1.033))
    block[2:] = 0
    slot = 0
    for part in range(8):
        if work.peaks[part] > np.float32(0):
            _pack_part_s(work, block, part, slot)
            slot += 1
        if inverse > np.float32(0):
            block[106 + part // 2] |= nibble(work, inverse, part) << 4 * (part % 2)


@kernel
def _pack_part_s(work: Work, block: Bytes, part: int, slot: int) -> None:
    for i in range(8):
        point = work.chosen[8 * part + i]
        block[2 + 8 * slot + i] = point & 255
        block[66 + part] |= (point >> 8) << i
    for i in range(4):
        block[74 + 4 * slot + i] = work.signs[4 * part + i]


@kernel
def _quantize_xxs(tools: Tools, blocks: Floats, importance: Floats, out: Bytes) -> None:
    for block in range(len(blocks)):
        solve(tools, blocks[block], importance[block % len(importance)])
        _pack_xxs(tools[2], out[block])


@kernel
def _pack_xxs(work: Work, block: Bytes) -> None:
    inverse = put_scale(block, work, np.float32(1.0125))
    if not inverse > np.float32(0):
        block[:] = 0
        return
    for i in range(64):
        block[2 + i] = work.chosen[i]
    for part in range(8):
        put_word(block, 66 + 4 * part, work, part, inverse)


def _dequantize(code: str, blocks: Bytes, out: Floats) -> None:
    out = out.reshape(-1, BLOCK)
    read = _read_s if code == "iq3_s" else _read_xxs
    read(blocks.reshape(len(out), -1), grid(code).values, (halves(), signs()), out)


@kernel
def _read_s(blocks: Bytes, values: Floats, tables: tuple[Floats, Bytes], out: Floats) -> None:
    for n in range(len(blocks)):
        block = blocks[n]
        d = half(block, tables[0])
        for quad in range(64):
            scale = (block[106 + quad // 16] >> 4 * (quad // 8 % 2)) & 15
            high = (np.int64(block[66 + quad // 8]) >> quad % 8) & 1
            step = d * np.float32(2 * scale + 1)
            sign = block[74 + quad // 2] >> 4 * (quad % 2)
            spell_quad(
                out[n, 4 * quad : 4 * quad + 4], values[block[2 + quad] | high << 8], step, sign
            )


@kernel
def _read_xxs(blocks: Bytes, values: Floats, tables: tuple[Floats, Bytes], out: Floats) -> None:
    halves, signs = tables
    for n in range(len(blocks)):
        block = blocks[n]
        d = half(block, halves)
        for quad in range(64):
            bits = word(block, 66 + quad // 8 * 4)
            step = d * (np.float32(0.5) + np.float32(bits >> 28)) * np.float32(0.5)
            sign = signs[(bits >> 7 * (quad // 2 % 4)) & 127] >> 4 * (quad % 2)
            spell_quad(out[n, 4 * quad : 4 * quad + 4], values[block[2 + quad]], step, sign)


QUANTIZERS = {code: (partial(_plain, code), partial(_weighted, code)) for code in _RULES}
DEQUANTIZERS = {code: partial(_dequantize, code) for code in _RULES}
