"""IQ3_S and IQ3_XXS: points of 4 levels out of 8, a sign per weight, 4 bits of scale per 32.

    iq3_s     2 bytes  fp16 d                    iq3_xxs   2 bytes  fp16 d
             64 bytes  points' low 8 bits                 64 bytes  points
              8 bytes  points' high bit                   32 bytes  8 x 4 times 7 signs and a scale
             32 bytes  signs
              4 bytes  scales

w = d (2 scale + 1) · ± value, in iq3_xxs d (scale + ½) / 2 · ± value: quantize_row_iq3_*_impl and
dequantize_row_iq3_* of ggml-quants.c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqconvert.quantizers.ggml.plain.codebook import codebook, shared
from dqconvert.quantizers.ggml.plain.lanes import dequantizer, quantizer
from dqconvert.quantizers.ggml.plain.magnitude_search import Search, solve
from dqconvert.quantizers.ggml.plain.packing import halves
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

_S = Search("iq3_s", 32, (9, 0.2), 1e-45, whole=True)
_XXS = Search("iq3_xxs", 32, (15, 0.2), 1e-8, even=True)


def _pack_s(blocks: Tensor, importance: Tensor | None) -> Tensor:
    """Low bits and signs of the sub-blocks that are not 0 come first, as ggml writes them.

    It does not move on where it meets 32 zeros, but readers do: a block in which weights follow
    such zeros comes back wrong. High bits and scales stand where they should.
    """
    found = solve(_S, blocks, importance)
    order = torch.argsort(~found.filled, dim=1, stable=True)[..., None]
    points, sign = (of.unflatten(1, (8, -1)) for of in (found.points, found.signs))
    bits = torch.arange(8, device=blocks.device)
    parts = (
        found.step(1.033),
        (points & 255).take_along_dim(order, 1).flatten(1),
        ((points >> 8) << bits).sum(-1),
        sign.take_along_dim(order, 1).flatten(1),
        nibbles(found.codes()),
    )
    return torch.cat([part.to(torch.uint8) for part in parts], 1)


def _pack_xxs(blocks: Tensor, importance: Tensor | None) -> Tensor:
    found = solve(_XXS, blocks, importance).wiped()
    scale = found.step(1.0125)
    words = little(sevens(found.signs, found.codes()), 4)
    return torch.cat([scale, found.points.to(torch.uint8), words], 1)


def _weights_s(blocks: Tensor) -> Tensor:
    device = blocks.device
    scale, low, high, sign, codes = blocks.split((2, 64, 8, 32, 4), 1)
    bits = (high.int()[..., None] >> torch.arange(8, device=device)) & 1
    values = codebook("iq3_s", device).values[low.int() | bits.int().flatten(1) << 8]
    scales = halves(scale) * (2 * split_nibbles(codes) + 1)
    return multiply(scales, values, signs(device)[sign.int()])


def _weights_xxs(blocks: Tensor) -> Tensor:
    device = blocks.device
    scale, points, words = blocks.split((2, 64, 32), 1)
    sign, codes = split_sevens(from_little(words, 4))
    values = codebook("iq3_xxs", device).values[points.int()]
    return multiply(halves(scale) * (codes + 0.5) * 0.5, values, even_signs(device)[sign])


QUANTIZERS = {
    "iq3_s": quantizer(shared(_pack_s, _S.numbers), 256),
    "iq3_xxs": quantizer(shared(_pack_xxs, _XXS.numbers), 256),
}
DEQUANTIZERS = {"iq3_s": dequantizer(_weights_s, 110), "iq3_xxs": dequantizer(_weights_xxs, 98)}
