"""Checkpoints that torch.save wrote (see pickle_header.py), read lazily; no code is ever run."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dqconvert.formats import pickle_header
from dqconvert.formats.container import Container
from dqconvert.formats.pickle_header import PickleHeader

if TYPE_CHECKING:
    from torch import Tensor

ENDINGS = (".pt", ".pth", ".ckpt", ".bin")


class PickleSource(Container):
    """Files of torch.save as one checkpoint; see Container."""

    @staticmethod
    def header(path: Path) -> PickleHeader:
        """See pickle_header.read."""
        return pickle_header.read(path)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Which of several state dicts was taken."""
        found = (h for h in self._headers.values() if isinstance(h, PickleHeader))
        return tuple(note for head in found for note in pickle_header.keys(head))

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """See Container; elements that lie out of order are put in order."""
        if not self._strides(name):
            return super().read(name, rows)
        whole = self._ordered(name)
        return (whole if rows is None else whole[slice(*rows)]).contiguous()

    def fill(self, name: str, out: Tensor, rows: tuple[int, int] | None = None) -> None:
        """See Container."""
        if self._strides(name):
            out.copy_(self.read(name, rows))
        else:
            super().fill(name, out, rows)

    def _strides(self, name: str) -> tuple[int, ...]:
        head = self._headers[self.where(name)]
        assert isinstance(head, PickleHeader)
        return head.strides.get(self.prefix + name, ())

    def _ordered(self, name: str) -> Tensor:
        import torch

        from dqconvert.quantizers.tensors import TORCH_DTYPES

        info, strides = self.infos[name], self._strides(name)
        span = 1 + sum((n - 1) * step for n, step in zip(info.shape, strides, strict=True))
        flat = torch.empty(span, dtype=TORCH_DTYPES[info.dtype])
        super().fill(name, flat, None)
        return flat.as_strided(info.shape, strides)
