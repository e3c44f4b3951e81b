"""IQ2_S, IQ2_XS and IQ2_XXS: points of 8 levels out of 3, a sign per weight, 4 bits of scale.

    iq2_s     2 bytes  fp16 d                    iq2_xs    2 bytes  fp16 d
             32 bytes  points' low 8 bits                 64 bytes  32 x 16 bits: a point in 9,
             32 bytes  signs                                        above it 7 signs
              8 bytes  points' high 2 bits                 8 bytes  scales of 16 weights
              8 bytes  scales of 16 weights
                                                 iq2_xxs   2 bytes  fp16 d
                                                          64 bytes  8 x 4 points in bytes, then
                                                                    4 x 7 signs and a scale

w = d (scale + ½) / 4 · ± value: quantize_row_iq2_*_impl and dequantize_row_iq2_* of
ggml-quants.c. XS and XXS have no way without importance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqconvert.quantizers.ggml.plain.codebook import codebook, shared
from dqconvert.quantizers.ggml.plain.lanes import dequantizer, quantizer
from dqconvert.quantizers.ggml.plain.magnitude_search import Search, solve
from dqconvert.quantizers.ggml.plain.packing import halves, join, split
from dqconvert.quantizers.ggml.plain.sign_fields import (
    even_signs,
    from_little,
    little,
    multiply,
    nibbles,
    sevens,
    signs,
    split_nibbles,
    split_sevens,
)

_S = Search("iq2_s", 16, (9, 0.1), 1e-8, offset=0.25)
_XS = Search("iq2_xs", 16, (9, 0.1), 1e-15, spread=1, even=True)
_XXS = Search("iq2_xxs", 32, (6, 0.1), 1e-15, spread=1, even=True, guess=True)


def _pack_s(blocks: Tensor, importance: Tensor | None) -> Tensor:
    found = solve(_S, blocks, importance)
    high = join((found.points >> 8).unflatten(1, (8, 4)).transpose(1, 2), 2)
    scale = found.step(0.9875)
    parts = (scale, found.points & 255, found.signs, high, nibbles(found.codes()))
    return torch.cat([part.to(torch.uint8) for part in parts], 1)


def _pack_xs(blocks: Tensor, importance: Tensor | None) -> Tensor:
    found = solve(_XS, blocks, importance).wiped()
    words = little(found.points | (found.signs & 127) << 9, 2)
    return torch.cat([found.step(), words, nibbles(found.codes())], 1)


def _pack_xxs(blocks: Tensor, importance: Tensor | None) -> Tensor:
    found = solve(_XXS, blocks, importance).wiped()
    words = little(sevens(found.signs, found.codes()), 4)
    pairs = found.points.to(torch.uint8).view(-1, 8, 4), words.view(-1, 8, 4)
    return torch.cat([found.step(), torch.cat(pairs, 2).flatten(1)], 1)


def _weights_s(blocks: Tensor) -> Tensor:
    device = blocks.device
    scale, low, sign, high, codes = blocks.split((2, 32, 32, 8, 8), 1)
    points = low.int() | split(high, 2).transpose(1, 2).flatten(1).int() << 8
    values = codebook("iq2_s", device).values[points]
    return multiply(_scales(scale, split_nibbles(codes)), values, signs(device)[sign.int()])


def _weights_xs(blocks: Tensor) -> Tensor:
    device = blocks.device
    scale, words, codes = blocks.split((2, 64, 8), 1)
    both = from_little(words, 2)
    values = codebook("iq2_xs", device).values[both & 511]
    return multiply(_scales(scale, split_nibbles(codes)), values, even_signs(device)[both >> 9])


def _weights_xxs(blocks: Tensor) -> Tensor:
    device = blocks.device
    scale, words = blocks.split((2, 64), 1)
    points, rest = words.unflatten(1, (8, 8)).split(4, 2)
    sign, codes = split_sevens(from_little(rest.flatten(1), 4))
    values = codebook("iq2_xxs", device).values[points.flatten(1).int()]
    return multiply(_scales(scale, codes), values, even_signs(device)[sign])


def _scales(scale: Tensor, codes: Tensor) -> Tensor:
    """Of sub-blocks [n, subs], from fp16 bytes [n, 2] and codes [n, subs]."""
    return halves(scale) * (codes + 0.5) * 0.25


QUANTIZERS = {
    "iq2_s": quantizer(shared(_pack_s, _S.numbers), 256),
    "iq2_xs": quantizer(shared(_pack_xs, _XS.numbers), 256),
    "iq2_xxs": quantizer(shared(_pack_xxs, _XXS.numbers), 256),
}
DEQUANTIZERS = {
    "iq2_s": dequantizer(_weights_s, 82),
    "iq2_xs": dequantizer(_weights_xs, 74),
    "iq2_xxs": dequantizer(_weights_xxs, 66),
}
