"""Where the canonical linears of a quantized file lie: in which packed layers, in which rows.

A layer may hold several linears stacked on rows, and a linear's columns may be split over layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dqconvert.converter.family import stacked_rows
from dqconvert.converter.reopen import PackedLayer, Reopened

Piece = tuple[PackedLayer, int]
"""A packed layer that holds columns of a canonical linear, and the place of that in it."""


class Pieces(Mapping[str, list[Piece]]):
    """The pieces of each packed linear by its canonical name, in the order of their columns."""

    def __init__(self, found: Reopened) -> None:
        self.found = found
        self._pieces: dict[str, list[Piece]] = {}
        for layer in found.layers:
            for place, module in enumerate(layer.modules):
                self._pieces.setdefault(module, []).append((layer, place))
        for pieces in self._pieces.values():
            pieces.sort(key=_starts_late)

    def __getitem__(self, module: str) -> list[Piece]:
        return self._pieces[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def rows(self, piece: Piece) -> tuple[int, int]:
        """Rows start, stop of its layer that are a linear's."""
        layer, place = piece
        return stacked_rows(layer.entry, place, self.found.hidden, layer.form.shape[0])

    def shape(self, name: str) -> tuple[int, ...]:
        """[N, K] of the weight of a packed linear, [N] of its bias."""
        module, _, leaf = name.rpartition(".")
        start, stop = self.rows(self[module][-1])
        width = sum(layer.form.shape[1] for layer, _ in self[module])
        return (stop - start,) if leaf == "bias" else (stop - start, width)

    def names(self) -> list[str]:
        """Canonical tensors of the file, without the words on how others are packed."""
        read, kept = self.found.numbers.infos, self.found.kept
        return sorted(n for n in self.found.names() if n not in kept or kept[n][0] in read)


def _starts_late(piece: Piece) -> bool:
    """Whether a piece of a split linear begins after its first column."""
    columns = piece[0].entry.columns
    return columns is not None and columns[0] != 0
