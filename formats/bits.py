"""Bytes of SVDQuant linears as the nunchaku kernels read them: each packer beside its inverse.

Logical tensors are natural row-major: codes [N, K], scales [N, G], vectors [N], down [R, K],
up [N, R]. N and K are multiples of 128, R of 16; W4A16 needs N % 4 = K % 64 = 0. Below, rows
are output channels n, columns are input channels k; axes are written slowest first, and a bit
or byte number 0 is the least significant one. All files and words are little-endian.

    W4A4        w[n, k] = code · wscale · (wtscale · wcscale[n] for NVFP4)
                4.25 bits per weight in int4, 4.5 in NVFP4; then down, up and the vectors

    qweight     I8 [N, K/2]; read as u32 [N/128][K/64] tiles of 128 rows x 64 columns, 4096 bytes
                u32 tile[np 8][nl 8][kl 4][npk 2][kpk 2]    nibble r = bits 4r .. 4r + 3, r < 8
                    row 16 np + 8 npk + nl, column 32 kpk + 8 kl + r
                nibble: int4 two's complement, or e2m1 sign << 3 | magnitude index
                (the B fragment of mma.m16n8k64)
    wscales     int4: BF16 [K/64, N]; in memory [N/128][K/64] runs of 128 rows
                f16 run[a 8][c 4][b 2][d 2]                 row 16 a + 8 b + 2 c + d
    vectors     BF16 [N] (bias, wcscales) or [K] (smooth): the same run order with one group
    wscales     NVFP4: F8_E4M3 [K/16, N]; in memory [N/128][K/64] tiles of 128 rows x 4 groups
                f8 tile[l 8][q 4][p 4][j 4]                 row 32 p + 8 q + l, group j
    down        BF16 [K, R]; in memory [K/16][R/16] tiles of 16 x 16
    up          BF16 [N, R]; in memory [N/16][R/16] tiles of 16 x 16
                f16 tile[s 8][t 4][h 2][u 2][e 2]
                    down: rank 8 h + s, column 8 u + 2 t + e
                    up:   row 8 h + s,  rank 8 u + 2 t + e

    W4A16       w[n, k] = nibble · wscale + wzero, wzero = -7 · wscale; 4.5 bits per weight

    qweight     I32 [N/4, K/2]; read as u16 [N/4][K/64] tiles of 4 rows x 64 columns, 128 bytes
                u16 tile[row 4][half 2][j 8]                nibble i = bits 4i .. 4i + 3, i < 4
                    column 32 half + 8 i + j
                nibble: code + 7, in 0 .. 14
    wscales     BF16 [K/64, N] and wzeros alike, bias BF16 [N]: plain row-major
    order       nunchaku's modulation linears store row c D + d of `splits` chunks of D rows as
                row d splits + c, and have 1 added to the bias of their scale chunks (c = 1, 4)

The inverses are derived from the same shapes and orders, so they cannot disagree; codes are
(un)packed in blocks of 128 rows that stay in cache. tests/test_bits.py holds every formula
above against a slow loop and against the bytes of the reference exporter.

Source: deepcompressor/backend/nunchaku/utils.py and backend/tinychat/utils.py for the layouts,
nunchaku src/kernels/zgemm and src/kernels/awq/gemv_awq.cu for their readers.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 128
"""Rows of a W4A4 tile, and of a block that is packed at once."""

AWQ_ZERO = 7
"""What is added to a symmetric code so that it is stored unsigned."""

Axes = tuple[tuple[int, ...], tuple[int, ...]]
"""A natural tensor's shape split into lanes, and the order of these axes in memory."""


def _shuffle(natural: Tensor, axes: Axes) -> Tensor:
    shape, order = axes
    return natural.reshape(shape).permute(order).contiguous()


def _unshuffle(packed: Tensor, axes: Axes) -> Tensor:
    shape, order = axes
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return packed.reshape([shape[axis] for axis in order]).permute(inverse).contiguous()


# W4A4: codes


def _word_axes(k: int) -> Axes:
    # (np, npk, nl, tiles_k, kpk, kl) -> (tiles_k, np, nl, kl, npk, kpk)
    return (8, 2, 8, k // 64, 2, 4), (3, 0, 2, 5, 1, 4)


def pack_codes(codes: Tensor) -> Tensor:
    """int8 or uint8 codes [N, K] to qweight int8 [N, K/2]; only their low four bits count."""
    n, k = codes.shape
    axes = _word_axes(k)
    packed = codes.new_empty((n // ROWS, ROWS * k // 8), dtype=torch.int32)
    for words, rows in zip(packed, codes.view(torch.uint8).split(ROWS), strict=True):
        pairs = (rows[:, 0::2] & 15) | (rows[:, 1::2] << 4)
        words.copy_(_shuffle(pairs.contiguous().view(torch.int32), axes).flatten())
    return packed.view(torch.int8).view(n, k // 2)


def unpack_codes(qweight: Tensor, dtype: torch.dtype) -> Tensor:
    """qweight int8 [N, K/2] to codes [N, K]: int8 extends the sign, uint8 does not."""
    n, k = qweight.shape[0], qweight.shape[1] * 2
    axes = _word_axes(k)
    codes = qweight.new_empty((n, k // 2, 2), dtype=dtype)
    for rows, tiles in zip(codes.split(ROWS), qweight.split(ROWS), strict=True):
        words = tiles.flatten().clone().view(torch.int32)  # a view of a file may be unaligned
        pairs = _unshuffle(words, axes).view(dtype).view(ROWS, k // 2)
        rows[..., 0] = (pairs << 4) >> 4
        rows[..., 1] = pairs >> 4
    return codes.view(n, k)


# W4A4: scales and vectors


def _group_axes(n: int, groups: int) -> Axes:
    # (tiles_n, a, b, c, d, groups) -> (tiles_n, groups, a, c, b, d)
    return (n // 128, 8, 2, 4, 2, groups), (0, 5, 1, 3, 2, 4)


def pack_group_scales(scale: Tensor) -> Tensor:
    """16-bit scales [N, G] to wscales [G, N], a nominal shape: memory is [N/128, G, 128]."""
    n, groups = scale.shape
    return _shuffle(scale, _group_axes(n, groups)).view(groups, n)


def unpack_group_scales(wscales: Tensor) -> Tensor:
    """wscales [G, N] to scales [N, G]."""
    groups, n = wscales.shape
    return _unshuffle(wscales, _group_axes(n, groups)).view(n, groups)


def pack_vector(vector: Tensor) -> Tensor:
    """A 16-bit value per channel [N] to the order of the lanes [N]."""
    return _shuffle(vector, _group_axes(len(vector), 1)).flatten()


def unpack_vector(packed: Tensor) -> Tensor:
    """The inverse of pack_vector."""
    return _unshuffle(packed, _group_axes(len(packed), 1)).flatten()


def _micro_axes(n: int, groups: int) -> Axes:
    # (tiles_n, p, q, l, tiles_k, j) -> (tiles_n, tiles_k, l, q, p, j)
    return (n // 128, 4, 4, 8, groups // 4, 4), (0, 4, 3, 2, 1, 5)


def pack_micro_scales(scale: Tensor) -> Tensor:
    """float8_e4m3fn scales [N, K/16] to wscales [K/16, N], a nominal shape."""
    n, groups = scale.shape
    return _shuffle(scale, _micro_axes(n, groups)).view(groups, n)


def unpack_micro_scales(wscales: Tensor) -> Tensor:
    """wscales [K/16, N] to scales [N, K/16]."""
    groups, n = wscales.shape
    return _unshuffle(wscales, _micro_axes(n, groups)).view(n, groups)


# W4A4: low-rank branch


def _down_axes(rank: int, k: int) -> Axes:
    # (tiles_r, h, s, tiles_k, u, t, e) -> (tiles_k, tiles_r, s, t, h, u, e)
    return (rank // 16, 2, 8, k // 16, 2, 4, 2), (3, 0, 2, 5, 1, 4, 6)


def pack_down(down: Tensor) -> Tensor:
    """16-bit down [R, K] to [K, R]."""
    rank, k = down.shape
    return _shuffle(down, _down_axes(rank, k)).view(k, rank)


def unpack_down(packed: Tensor) -> Tensor:
    """The inverse of pack_down."""
    k, rank = packed.shape
    return _unshuffle(packed, _down_axes(rank, k)).view(rank, k)


def _up_axes(n: int, rank: int) -> Axes:
    # (tiles_n, h, s, tiles_r, u, t, e) -> (tiles_n, tiles_r, s, t, h, u, e)
    return (n // 16, 2, 8, rank // 16, 2, 4, 2), (0, 3, 2, 5, 1, 4, 6)


def pack_up(up: Tensor) -> Tensor:
    """16-bit up [N, R] to [N, R]."""
    n, rank = up.shape
    return _shuffle(up, _up_axes(n, rank)).view(n, rank)


def unpack_up(packed: Tensor) -> Tensor:
    """The inverse of pack_up."""
    n, rank = packed.shape
    return _unshuffle(packed, _up_axes(n, rank)).view(n, rank)


# W4A16


def pack_awq_codes(codes: Tensor) -> Tensor:
    """Symmetric int8 codes [N, K] in -7 .. 7 to qweight int32 [N/4, K/2].

    Raises ValueError on a code below -7: stored unsigned it would wrap to the other end.
    """
    n, k = codes.shape
    if codes.numel() and int(codes.min()) < -AWQ_ZERO:
        raise ValueError(f"W4A16 codes begin at {-AWQ_ZERO}; found {int(codes.min())}")
    packed = codes.new_empty((n // 4, k // 64, 4, 2, 8), dtype=torch.int16)
    for tiles, rows in zip(packed.split(ROWS // 4), codes.split(ROWS), strict=True):
        stored = (rows + AWQ_ZERO).to(torch.int16).reshape(-1, 4, k // 64, 2, 4, 8)
        one, two, three, four = stored.unbind(dim=-2)
        tiles.copy_((one | two << 4 | three << 8 | four << 12).transpose(1, 2))
    return packed.view(n // 4, k).view(torch.int32)


def unpack_awq_codes(qweight: Tensor) -> Tensor:
    """qweight int32 [N/4, K/2] to int8 codes [N, K], the stored ones less 7."""
    n, k = qweight.shape[0] * 4, qweight.shape[1] * 2
    codes = qweight.new_empty((n, k), dtype=torch.int8)
    packed = qweight.contiguous().view(torch.int16).view(n // 4, k // 64, 4, 2, 8)
    for rows, tiles in zip(codes.split(ROWS), packed.split(ROWS // 4), strict=True):
        words = tiles.transpose(1, 2)
        parts = torch.stack([(words >> 4 * i) & 15 for i in range(4)], dim=-2)
        rows.copy_(parts.to(torch.int8).view(-1, k) - AWQ_ZERO)
    return codes


def awq_zeros(scale: Tensor) -> Tensor:
    """What the kernel adds to nibble · scale, in the dtype of the scales."""
    return (scale.float() * -AWQ_ZERO).to(scale.dtype)


def interleave_chunks(rows: Tensor, splits: int) -> Tensor:
    """Rows [splits · D, ...] stored chunk by chunk to rows in which chunks alternate."""
    return rows.reshape(splits, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def separate_chunks(rows: Tensor, splits: int) -> Tensor:
    """The inverse of interleave_chunks."""
    return rows.reshape(-1, splits, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def _scale_chunks(bias: Tensor, splits: int) -> Tensor:
    # (shift, scale, gate) once or twice: 1 where the chunk is a scale
    return (torch.arange(splits, device=bias.device) % 3 == 1).repeat_interleave(
        len(bias) // splits
    )


def add_ones(bias: Tensor, splits: int) -> Tensor:
    """bf16 bias [N], with 1 added to the chunks that are adaLN scales: (1 + scale) · x.

    Computed in fp32 and rounded once, which equals bf16 addition for a bf16 bias.
    """
    return (bias.float() + _scale_chunks(bias, splits)).to(torch.bfloat16)


def remove_ones(bias: Tensor, splits: int) -> Tensor:
    """The inverse of add_ones, up to what its rounding took."""
    return (bias.float() - _scale_chunks(bias, splits).float()).to(bias.dtype)
