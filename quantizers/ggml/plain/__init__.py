"""The same in torch, over many blocks at once: any device, no compiler.

A module here holds

    QUANTIZERS      {code: function(rows, importance)}: [N, K] fp32, [K] fp32 or None for ggml's
                    way without, to blocks [N, row bytes] uint8
    DEQUANTIZERS    {code: function(blocks)}: to [N, K] fp32

On the processor the bytes are ggml's; sums are numpy's there, which adds rows in order. Elsewhere
too wherever the device divides and adds as IEEE 754 says, which is not promised: the error is the
same.
"""
