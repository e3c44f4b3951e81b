"""Which family a checkpoint is of, and in which dialect, from its headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dqconvert.converter.canonical import CanonicalSource, Infos, Origin, expected, settled
from dqconvert.converter.families import families
from dqconvert.converter.family import Entry, Family, fill, leaves, patterns, stacked_rows
from dqconvert.formats.source import Source
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.spec import FLOAT_DTYPES, TensorInfo


def open_canonical(source: Source, path: Path, part: str = "") -> CanonicalSource:
    """Recognise the family and the dialect of a checkpoint from its headers.

    part: only tensors that begin with it are looked at. Raises SourceError if it is no transformer
    of a known family, incomplete, or already quantized.
    """
    if part and not any(name.startswith(part) for name in source.infos):
        raise SourceError(f"{path}: no tensor's name begins with {part}")
    for family in families().values():
        for prefix in (*family.prefixes, ""):
            unread = tuple(prefix + name for name in family.unread)
            ours = (n for n in source.infos if n.startswith(prefix) and n.startswith(part))
            names = [name for name in ours if not name.startswith(unread)]
            for dialect in family.sources:
                origins = _origins(source.infos, names, prefix, family, dialect)
                if _is_of(family, origins):
                    found = CanonicalSource(source, family, dialect, origins)
                    _check(found, names, path)
                    return found
    some = ", ".join(list(source.infos)[:3])
    known = ", ".join(family.title for family in families().values())
    raise SourceError(
        f"{path}: not a diffusion transformer that is known (its tensors: {some} ...); "
        f"known families: {known}"
    )


def _is_of(family: Family, names: Mapping[str, object]) -> bool:
    """Whether canonical names are those of the family and of no other that is built upon it."""
    known = all(name in names for name in family.signature)
    return known and not any(name in names for name in family.foreign)


def _origins(
    infos: Infos, names: Sequence[str], prefix: str, family: Family, dialect: str
) -> dict[str, Origin]:
    """Where each canonical tensor lies; names that the table does not know are left out."""
    short = {name.removeprefix(prefix): name for name in names}
    if not family.dialects[dialect]:
        if not short.keys() >= set(family.signature):
            return {}  # another family, whose blocks are not ours to count
        required, optional = expected(family, short)
        known = required | optional
        return {name: Origin(full) for name, full in short.items() if name in known}
    table = {leaf.theirs: leaf for entry in family.dialects[dialect] for leaf in leaves(entry)}
    matched = [
        (full, table[pattern], index)
        for name, full in short.items()
        for pattern, index in patterns(name)
        if pattern in table
    ]
    hidden = next(
        (infos[name].shape[0] for name, leaf, _ in matched if leaf.ours == (family.hidden,)), 0
    )
    held = [fill(leaf.ours[0], index) for _, leaf, index in matched]
    return {
        ours: origin
        for name, leaf, index in matched
        for ours, origin in _split(name, infos[name], settled(leaf, index, held), index, hidden)
    }


def _split(
    name: str, info: TensorInfo, leaf: Entry, index: str, hidden: int
) -> Iterable[tuple[str, Origin]]:
    """The canonical tensors inside one tensor of a dialect."""
    if len(leaf.ours) == 1:
        view = leaf.view[1] if leaf.view else None
        yield fill(leaf.ours[0], index), Origin(name, swap=bool(leaf.swap), view=view)
        return
    if leaf.frames:
        for frame, ours in enumerate(leaf.ours):
            yield fill(ours, index), Origin(name, frame=frame)
        return
    for place, ours in enumerate(leaf.ours):
        start, stop = stacked_rows(leaf, place, hidden, info.shape[0])
        if stop > start:
            yield fill(ours, index), Origin(name, (start, stop))


def _check(found: CanonicalSource, names: Sequence[str], path: Path) -> None:
    """Complete, nothing unknown, all tensors floating point."""
    title = found.family.title
    for name, info in found.infos.items():
        if info.dtype not in FLOAT_DTYPES:
            raise SourceError(
                f"{found.where(name)} is {info.dtype}: the checkpoint is already quantized; "
                "give the 16 or 32 bit original"
            )
    required, _ = expected(found.family, found.infos)
    missing = sorted(required - found.infos.keys())
    if missing:
        raise SourceError(
            f"{path}: an incomplete {title} checkpoint; {len(missing)} tensors are missing, "
            f"the first is {missing[0]}; download it again"
        )
    used = {origin.tensor for origin in found.origins.values()}
    unknown = [name for name in names if name not in used]
    if unknown:
        raise SourceError(
            f"{path}: {len(unknown)} tensors are not part of {title}, the first is {unknown[0]}; "
            "is it already quantized, or another model?"
        )
