"""Kernels compiled by numba for the processor: what is independent stands in its vectors' lanes.

A module here holds

    QUANTIZERS      {code: (plain, weighted)}; None where ggml has no such way
        plain(rows, out)                  rows [N, K] fp32, out [N, row bytes] uint8
        weighted(rows, importance, out)   importance [K] fp32
    DEQUANTIZERS    {code: function(blocks, out)}: [N, row bytes] uint8 to [N, K] fp32

over contiguous numpy arrays, N and K at least 1. ggml's x86-64 library is built without FMA and
adds floats one after the other, so nothing here may contract or reorder: a lane adds its own
numbers in ggml's order. Lanes are sub-blocks side by side; in the IQ types on grids, what is tried
for one sub-block.
"""
