"""A checkpoint under its family's canonical names, whatever dialect it was written in.

The family's table says which rows of which tensor a canonical tensor is; reading slices them out
of the file. The same table, read the other way, composes a dialect's tensors from canonical ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import TYPE_CHECKING

from dqconvert.converter.family import (
    LAST,
    Entry,
    Family,
    Shape,
    depth,
    fill,
    leaves,
    patterns,
    viewed,
)
from dqconvert.formats.source import Source, kept_dtypes, notes_of
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.spec import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

Infos = Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a canonical tensor lies: a tensor of the file, its rows, whether halves swap.

    frame: index in the third dimension, None where the tensor is no slice of it; view: its shape,
    None where it is that of the file; turn: place, count and rows at a time of tensors that take
    turns on the rows.
    """

    tensor: str
    rows: tuple[int, int] | None = None
    swap: bool = False
    frame: int | None = None
    view: Shape | None = None
    turn: tuple[int, int, int] | None = None

    @property
    def plain(self) -> bool:
        """Whether its rows are consecutive rows of the file's tensor."""
        return not self.swap and self.turn is None and self.view is None and self.frame is None


_TURNS = (
    "several files: q, k and v are taken to alternate head by head, as in the authors' shards; "
    "one file is read as stacked"
)


class CanonicalSource:
    """The transformer of a checkpoint, tensors by canonical name.

    infos: in the file's order, each with the dtype that it has where it stays unquantized; what is
    read may be wider. ignored: how many tensors of an all-in-one checkpoint belong to other
    components.
    """

    def __init__(
        self, source: Source, family: Family, dialect: str, origins: Mapping[str, Origin]
    ) -> None:
        self.source, self.family, self.dialect = source, family, dialect
        self.origins = origins
        kept = kept_dtypes(source)
        self.infos: Infos = {name: _info(source.infos, kept, at) for name, at in origins.items()}
        self.ignored = len(source.infos) - len({at.tensor for at in origins.values()})

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of how it is read."""
        turns = any(origin.turn for origin in self.origins.values())
        return (*notes_of(self.source), *([_TURNS] if turns else []))

    @property
    def hidden(self) -> int:
        """The model's hidden size."""
        return self.infos[self.family.hidden].shape[0]

    def read(self, name: str) -> Tensor:
        """A canonical tensor, in fresh memory."""
        origin = self.origins[name]
        if origin.turn is not None:
            return self._turns(name, (0, self.infos[name].shape[0]))
        tensor = self.source.read(origin.tensor, origin.rows)
        if origin.frame is not None:
            return tensor[:, :, origin.frame].clone()
        if origin.view is not None:
            return tensor.reshape(viewed(tensor.shape, origin.view))
        return swap_halves(tensor) if origin.swap else tensor

    def stack(self, names: Sequence[str], rows: tuple[int, int] | None = None) -> Tensor:
        """Canonical tensors stacked on rows, or rows start .. stop of the stack, in one piece."""
        import torch

        from dqconvert.quantizers.tensors import TORCH_DTYPES

        infos = [self.infos[name] for name in names]
        start, stop = rows or (0, sum(info.shape[0] for info in infos))
        dtypes = {self.source.infos[self.origins[name].tensor].dtype for name in names}
        apart = [origin for n in names if not (origin := self.origins[n]).plain]
        if len(dtypes) > 1 or any(origin.turn is None for origin in apart):
            return torch.cat([self.read(name) for name in names])[start:stop]
        whole = torch.empty((stop - start, *infos[0].shape[1:]), dtype=TORCH_DTYPES[dtypes.pop()])
        first = 0
        for name, info in zip(names, infos, strict=True):
            last = first + info.shape[0]
            low, high = max(first, start), min(last, stop)
            if low < high:
                origin = self.origins[name]
                base = (origin.rows[0] if origin.rows else 0) - first
                part = whole[low - start : high - start]
                if origin.turn is not None:
                    part.copy_(self._turns(name, (low - first, high - first)))
                else:
                    self.source.fill(origin.tensor, part, (low + base, high + base))
            first = last
        return whole

    def _turns(self, name: str, rows: tuple[int, int]) -> Tensor:
        """Rows of a tensor that takes turns with others on the rows of one in the file."""
        origin = self.origins[name]
        assert origin.turn is not None
        place, count, size = origin.turn
        low, high = rows[0] // size, -(-rows[1] // size)
        found = self.source.read(origin.tensor, (low * count * size, high * count * size))
        turns: Tensor = found.unflatten(0, (-1, count, size))
        own = turns[:, place].flatten(0, 1)
        return own[rows[0] - low * size : rows[1] - low * size]

    def where(self, name: str) -> str:
        """File and tensor that a canonical tensor comes from, for messages."""
        origin = self.origins[name]
        return f"{self.source.where(origin.tensor)}: tensor {origin.tensor}"


class DerivedSource(CanonicalSource):
    """A checkpoint of which some tensors are read otherwise: same names, shapes and dtypes.

    Subclasses change read and stack, and begin with those of inner.
    """

    def __init__(self, inner: CanonicalSource) -> None:
        self.inner = inner
        self.source, self.family, self.dialect = inner.source, inner.family, inner.dialect
        self.origins, self.infos, self.ignored = inner.origins, inner.infos, inner.ignored

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of what it is made of."""
        return self.inner.notes

    def read(self, name: str) -> Tensor:
        """A canonical tensor, in fresh memory."""
        return self.inner.read(name)

    def stack(self, names: Sequence[str], rows: tuple[int, int] | None = None) -> Tensor:
        """Canonical tensors stacked on rows, or rows start .. stop of the stack, in one piece."""
        return self.inner.stack(names, rows)

    def where(self, name: str) -> str:
        """File and tensor that a canonical tensor comes from, for messages."""
        return self.inner.where(name)


def expected(family: Family, names: Iterable[str]) -> tuple[set[str], set[str]]:
    """Canonical tensors that a model of the family's depth must have, and those that it may.

    An optional module of which one tensor is there must have them all, a scattered one within its
    block. Raises SourceError on more blocks than names, before it would list them.
    """
    names = list(names)
    depths = {blocks: depth(names, blocks) for blocks in family.blocks}
    required: set[str] = set()
    optional: dict[str, set[str]] = {}
    for entry in family.dialects[family.sources[0]]:
        for leaf in leaves(entry):
            for ours in leaf.ours:
                free = (m for m in (*family.scattered, *family.optional) if ours.startswith(m))
                module = next(free, None)
                cut = ours.startswith(family.cut)
                for index in _numbers(ours, depths, len(names))[: -1 if cut else None]:
                    key = module and (fill(module, index) if module in family.scattered else module)
                    whole = optional.setdefault(key, set()) if key else required
                    whole.add(fill(ours, index))
    for whole in optional.values():
        if not whole.isdisjoint(names):
            required |= whole
    return required, {name for whole in optional.values() for name in whole}


def entries_of(
    family: Family, dialect: str, infos: Infos, outside: bool = False
) -> list[tuple[Entry, str]]:
    """Entries of a dialect for a given model, block by block, each with its block index.

    The order depends on names alone: one model makes one file, whatever held it. Canonical
    modules that the dialect does not mention keep their name: one entry each. The leaves that
    exist decide whether an entry for `.*` has a bias. outside: linears outside the blocks are
    modules as well.
    """
    table: dict[str, list[tuple[int, Entry]]] = {}
    for place, entry in enumerate(family.dialects[dialect]):
        for ours in entry.ours:
            table.setdefault(ours, []).append((place, entry))
    found: dict[str, tuple[Entry, str]] = {}
    for name in sorted(infos, key=lambda name: (_place(family, name), name)):
        module = name.rpartition(".")[0]
        ways = [*patterns(name), *((f"{one}.*", index) for one, index in patterns(module))]
        held = [(*row, index) for way, index in ways for row in table.get(way, ())]
        rows = [(entry, index) for _, entry, index in sorted(held, key=itemgetter(0))]
        if not rows:
            linear = family.linear(module, outside)
            own = Entry(f"{module}.*", (f"{module}.*",)) if linear else Entry(name, (name,))
            rows = [(own, "")]
        for entry, index in rows:
            found.setdefault(fill(entry.theirs, index), (settled(entry, index, infos), index))
    return list(found.values())


def settled(entry: Entry, index: str, names: Iterable[str]) -> Entry:
    """An entry as it is in one block of a model with these canonical names."""
    if entry.swap != LAST:
        return entry
    return replace(entry, swap=int(index) == depth(names, entry.ours[0].split(".{i}")[0]) - 1)


def compose(entry: Entry, parts: Sequence[Tensor]) -> Tensor:
    """A dialect's tensor from its canonical parts, already cut to their columns."""
    import torch

    if entry.frames:
        return torch.stack(list(parts), dim=2)
    if entry.turn:
        return torch.stack([p.unflatten(0, (-1, entry.turn)) for p in parts], 1).flatten(0, 2)
    if entry.view is not None:
        return parts[0].reshape(viewed(parts[0].shape, entry.view[0]))
    tensor = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return swap_halves(tensor) if entry.swap else tensor


def swap_halves(tensor: Tensor) -> Tensor:
    """The two halves of the rows, exchanged."""
    return tensor.roll(tensor.shape[0] // 2, 0)


def composed_info(entry: Entry, infos: Sequence[TensorInfo]) -> TensorInfo:
    """What compose makes of tensors with these infos."""
    if entry.view is not None:
        return replace(infos[0], shape=viewed(infos[0].shape, entry.view[0]))
    if len(infos) == 1:
        return infos[0]
    if entry.frames:
        shape = infos[0].shape
        return replace(infos[0], shape=(*shape[:2], len(infos), *shape[2:]))
    rows = sum(info.shape[0] for info in infos)
    return replace(infos[0], shape=(rows, *infos[0].shape[1:]))


def _info(infos: Infos, kept: Mapping[str, str], origin: Origin) -> TensorInfo:
    info = infos[origin.tensor]
    info = replace(info, dtype=kept.get(origin.tensor, info.dtype))
    if origin.frame is not None:
        return replace(info, shape=(*info.shape[:2], *info.shape[3:]))
    if origin.view is not None:
        return replace(info, shape=viewed(info.shape, origin.view))
    if origin.turn is not None:
        return replace(info, shape=(info.shape[0] // origin.turn[1], *info.shape[1:]))
    if origin.rows is None:
        return info
    return replace(info, shape=(origin.rows[1] - origin.rows[0], *info.shape[1:]))


def _place(family: Family, name: str) -> tuple[int, int]:
    """Where a tensor stands in the network: before the blocks, or in which block."""
    for number, blocks in enumerate(family.blocks, start=1):
        if name.startswith(f"{blocks}."):
            return number, int(name.removeprefix(f"{blocks}.").split(".")[0])
    return 0, 0


def _numbers(pattern: str, depths: Mapping[str, int], tensors: int) -> list[str]:
    """The block indices that a pattern is filled with."""
    if "{i}" not in pattern:
        return [""]
    blocks = next(b for b in depths if pattern.startswith(f"{b}.{{i}}"))
    count = depths[blocks]
    if count > tensors:
        raise SourceError(
            f"a tensor of {blocks}.{count - 1}, but only {tensors} tensors; the checkpoint is "
            "incomplete, or its names are broken"
        )
    return [str(i) for i in range(count)]
