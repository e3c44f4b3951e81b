"""GGUF checkpoints (see gguf_header.py for their bytes), as they are and as plain numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dqconvert.formats import gguf_header
from dqconvert.formats.container import Container, Derived
from dqconvert.formats.header import Header
from dqconvert.quantizers.spec import BLOCK, BLOCKS, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


LOST = "made from quantized weights"


class GGUFSource(Container):
    """GGUF files as one checkpoint; see Container.

    Infos have ggml's block types and the shapes of the weights; what is read of a tensor of
    blocks are its bytes, uint8 [..., row bytes].
    """

    @staticmethod
    def header(path: Path) -> Header:
        """See gguf_header.read."""
        return gguf_header.read(path)


class Decoded(Derived):
    """A GGUF checkpoint whose tensors of blocks are decoded to F32; others stay as they are."""

    def __init__(self, source: GGUFSource) -> None:
        self.source: GGUFSource = source

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What is read, in file order."""
        return {
            name: TensorInfo("F32", info.shape) if info.dtype in BLOCKS else info
            for name, info in self.source.infos.items()
        }

    @cached_property
    def kept(self) -> Mapping[str, str]:
        """What decoded tensors are worth where they stay unquantized: no format has more digits."""
        return {n: "BF16" for n, info in self.source.infos.items() if info.dtype in BLOCKS}

    @property
    def notes(self) -> tuple[str, ...]:
        """That the weights were quantized before, and as what."""
        found = decoded_types(self)
        types = ", ".join(f"{count} {dtype}" for dtype, count in found.items())
        return (f"{LOST} ({types}): what they lost stays lost",) if found else ()

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or its rows start .. stop, in fresh memory; SourceError if bytes lack."""
        import torch

        info = self.source.infos[name]
        if info.dtype not in BLOCKS:
            return self.source.read(name, rows)
        out = torch.empty(
            info.shape if rows is None else (rows[1] - rows[0], *info.shape[1:]),
            dtype=torch.float32,
        )
        self.fill(name, out, rows)
        return out

    def fill(self, name: str, out: Tensor, rows: tuple[int, int] | None = None) -> None:
        """The same into a contiguous tensor of its dtype and size; SourceError if bytes lack."""
        info = self.source.infos[name]
        if info.dtype not in BLOCKS:
            self.source.fill(name, out, rows)
            return
        if len(info.shape) == 1:  # its rows are weights, which cannot be read one by one
            start, stop = rows or (0, info.shape[0])
            out.copy_(self._decoded(name, None)[start:stop])
            return
        start, stop = rows or (0, info.shape[0])
        for first, last in _pieces(info, start, stop):
            out[first - start : last - start] = self._decoded(name, (first, last))

    def _decoded(self, name: str, rows: tuple[int, int] | None) -> Tensor:
        from dqconvert.quantizers.ggml.blocks import dequantize

        stored = self.source.read(name, rows)
        info = self.source.infos[name]
        flat = stored.reshape(-1, stored.shape[-1]) if stored.numel() else stored.new_empty(0, 0)
        return dequantize(flat, info.dtype.lower()).reshape(*stored.shape[:-1], info.shape[-1])


def decoded_types(source: object) -> Mapping[str, int]:
    """How many tensors of a checkpoint are decoded from each block type; none of other sources."""
    infos = source.source.infos if isinstance(source, Decoded) else {}
    return Counter(info.dtype for info in infos.values() if info.dtype in BLOCKS)


def _pieces(info: TensorInfo, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Rows start .. stop in pieces of about BLOCK weights."""
    step = max(1, BLOCK * info.shape[0] // max(info.numel, 1))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)
