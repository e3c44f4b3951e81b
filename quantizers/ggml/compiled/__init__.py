"""Kernels compiled by numba for the processor: one sub-block in each lane of its vectors.

A module here holds

    QUANTIZERS      {code: (plain, weighted)}; None where ggml has no such way
        plain(rows, out)                  rows [N, K] fp32, out [N, row bytes] uint8
        weighted(rows, importance, out)   importance [K] fp32
    DEQUANTIZERS    {code: function(blocks, out)}: [N, row bytes] uint8 to [N, K] fp32

over contiguous numpy arrays. ggml's x86-64 library is built without FMA and adds floats one after
the other, so nothing here may contract or reorder: a lane adds its own numbers in ggml's order,
and the lanes stand side by side.
"""
