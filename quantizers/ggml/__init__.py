"""ggml's block types: weights to blocks and back, byte for byte as ggml does it.

blocks.py joins two ways to compute the same bytes: compiled/ (numba, the processor) and plain/
(torch, any device; what is left where numba is not installed).
"""
