"""IQ2_S, IQ2_XS and IQ2_XXS: 2.5625, 2.3125 and 2.0625 bits per weight on grids of 8.

Layout (block_iq2_s, block_iq2_xs and block_iq2_xxs of ggml-common.h), 256 weights in sub-blocks
of 16, in _xxs of 32: x = d (scale + ½) / 4 value sign

    iq2_s       82 bytes    half d, 32 low bytes of points, 32 sign bytes, 8 bytes of the points'
                            2 high bits, 8 bytes of scales
    iq2_xs      74 bytes    half d, 32 words of 9 bits of point and 7 of sign, 8 bytes of scales
    iq2_xxs     66 bytes    half d, 8 times 4 points and a word of four 7-bit signs and, highest,
                            a scale

Algorithm: quantize_row_iq2_s_impl, quantize_row_iq2_xs_impl and quantize_row_iq2_xxs_impl of
ggml-quants.c.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from dqconvert.quantizers.ggml.compiled.floats import halves
from dqconvert.quantizers.ggml.compiled.lattice import (
    BLOCK,
    REDO_ALWAYS,
    REDO_OFF,
    Rule,
    Tools,
    Work,
    fit,
    steps,
    work,
)
from dqconvert.quantizers.ggml.compiled.magnitudes import (
    by_blocks,
    describe,
    nibble,
    put_scale,
    solve,
)
from dqconvert.quantizers.ggml.compiled.neighbours import lattice
from dqconvert.quantizers.ggml.compiled.peaks import fit_peaks
from dqconvert.quantizers.ggml.compiled.spelling import (
    Bytes,
    Floats,
    half,
    put_word,
    spell_octet,
    word,
)
from dqconvert.quantizers.ggml.grids import grid, signs
from dqconvert.quantizers.ggml.jit import kernel

_S = Rule(
    sub=16,
    dims=8,
    base=3,
    steps=steps(5, 0.1, 9),
    tries=19,
    redo=REDO_OFF,
    sign=255,
    least=np.float32(1e-8),
    spread=np.float32(2),
)
_XS = _S._replace(sign=127, least=np.float32(1e-15), spread=np.float32(1))
_XXS = _XS._replace(sub=32, steps=steps(5, 0.1, 6), tries=13, redo=REDO_ALWAYS)
_RULES = {"iq2_s": _S, "iq2_xs": _XS, "iq2_xxs": _XXS}


def _plain(rows: Floats, out: Bytes) -> None:
    _weighted("iq2_s", rows, np.empty(0, np.float32), out)


def _weighted(code: str, rows: Floats, importance: Floats, out: Bytes) -> None:
    rule = _RULES[code]
    blocks, counts = by_blocks(rows, importance)
    run = {"iq2_s": _quantize_s, "iq2_xs": _quantize_xs, "iq2_xxs": _quantize_xxs}[code]
    run((lattice(code), rule, work(rule)), blocks, counts, out.reshape(len(blocks), -1))


@kernel
def _quantize_s(tools: Tools, blocks: Floats, importance: Floats, out: Bytes) -> None:
    for block in range(len(blocks)):
        solve(tools, blocks[block], importance[block % len(importance)])
        _pack_s(tools[2], out[block])


@kernel
def _pack_s(work: Work, block: Bytes) -> None:
    inverse = put_scale(block, work, np.float32(0.9875))
    block[66:] = 0
    for group in range(32):
        point = work.chosen[group]
        block[2 + group] = point & 255
        block[34 + group] = work.signs[group]
        block[66 + group // 4] |= (point >> 8) << 2 * (group % 4)
    if inverse > np.float32(0):
        _put_scales(work, block, 74, inverse)


@kernel
def _put_scales(work: Work, block: Bytes, at: int, inverse: np.float32) -> None:
    for pair in range(8):
        low, high = nibble(work, inverse, 2 * pair), nibble(work, inverse, 2 * pair + 1)
        block[at + pair] = low | high << 4


@kernel
def _quantize_xs(tools: Tools, blocks: Floats, importance: Floats, out: Bytes) -> None:
    for block in range(len(blocks)):
        solve(tools, blocks[block], importance[block % len(importance)])
        _pack_xs(tools[2], out[block])


@kernel
def _pack_xs(work: Work, block: Bytes) -> None:
    inverse = put_scale(block, work, np.float32(1))
    if not inverse > np.float32(0):
        block[:] = 0
        return
    for group in range(32):
        point = work.chosen[group]
        block[2 + 2 * group] = point & 255
        block[3 + 2 * group] = point >> 8 | work.signs[group] << 1
    _put_scales(work, block, 66, inverse)


@kernel
def _quantize_xxs(tools: Tools, blocks: Floats, importance: Floats, out: Bytes) -> None:
    lattice, rule, work = tools
    for block in range(len(blocks)):
        describe(rule, work, blocks[block], importance[block % len(importance)])
        fit_peaks(rule, work)
        fit(lattice, rule, work)
        _pack_xxs(work, out[block])


@kernel
def _pack_xxs(work: Work, block: Bytes) -> None:
    inverse = put_scale(block, work, np.float32(1))
    if not inverse > np.float32(0):
        block[:] = 0
        return
    for part in range(8):
        for i in range(4):
            block[2 + 8 * part + i] = work.chosen[4 * part + i]
        put_word(block, 6 + 8 * part, work, part, inverse)


def _dequantize(code: str, blocks: Bytes, out: Floats) -> None:
    out = out.reshape(-1, BLOCK)
    read = {"iq2_s": _read_s, "iq2_xs": _read_xs, "iq2_xxs": _read_xxs}[code]
    read(blocks.reshape(len(out), -1), grid(code).values, (halves(), signs()), out)


@kernel
def _step(d: np.float32, scale: np.int64) -> np.float32:
    return np.float32(d * (np.float32(0.5) + np.float32(scale)) * np.float32(0.25))


@kernel
def _read_s(blocks: Bytes, values: Floats, tables: tuple[Floats, Bytes], out: Floats) -> None:
    for n in range(len(blocks)):
        block = blocks[n]
        d = half(block, tables[0])
        for group in range(32):
            step = _step(d, (block[74 + group // 4] >> 4 * (group // 2 % 2)) & 15)
            high = (np.int64(block[66 + group // 4]) >> 2 * (group % 4)) & 3
            point = block[2 + group] | high << 8
            spell_octet(out[n, 8 * group : 8 * group + 8], values[point], step, block[34 + group])


@kernel
def _read_xs(blocks: Bytes, values: Floats, tables: tuple[Floats, Bytes], out: Floats) -> None:
    halves, signs = tables
    for n in range(len(blocks)):
        block = blocks[n]
        d = half(block, halves)
        for group in range(32):
            step = _step(d, (block[66 + group // 4] >> 4 * (group // 2 % 2)) & 15)
            high = np.int64(block[3 + 2 * group])
            point = block[2 + 2 * group] | (high & 1) << 8
            spell_octet(out[n, 8 * group : 8 * group + 8], values[point], step, signs[high >> 1])


@kernel
def _read_xxs(blocks: Bytes, values: Floats, tables: tuple[Floats, Bytes], out: Floats) -> None:
    halves, signs = tables
    for n in range(len(blocks)):
        block = blocks[n]
        d = half(block, halves)
        for group in range(32):
            part, place = group // 4, group % 4
            bits = word(block, 6 + 8 * part)
            point = values[block[2 + 8 * part + place]]
            sign = signs[(bits >> 7 * place) & 127]
            spell_octet(out[n, 8 * group : 8 * group + 8], point, _step(d, bits >> 28), sign)


QUANTIZERS = {
    "iq2_s": (_plain, partial(_weighted, "iq2_s")),
    "iq2_xs": (None, partial(_weighted, "iq2_xs")),
    "iq2_xxs": (None, partial(_weighted, "iq2_xxs")),
}
DEQUANTIZERS = {code: partial(_dequantize, code) for code in _RULES}
