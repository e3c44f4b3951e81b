"""Which family a checkpoint is of, and in which dialect, from its headers alone. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from dqconvert.converter import generic
from dqconvert.converter.canonical import CanonicalSource, Infos, Origin, expected, settled
from dqconvert.converter.families import families
from dqconvert.converter.family import (
    Entry,
    Family,
    fill,
    leaves,
    match,
    patterns,
    stacked_rows,
)
from dqconvert.formats.source import Source
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.spec import FLOAT_DTYPES, TensorInfo

WRAPPERS = ("", "transformer.", "diffusion_model.", "model.", "module.", "_orig_mod.", "net.")
"""What training code and runtimes put before all names, beside the families' own prefixes."""

NESTED = 3
"""How many of them may stand one behind the other."""

OTHERS = (
    "vae.",
    "first_stage_model.",
    "text_encoder",
    "conditioner.",
    "cond_stage_model.",
    "image_encoder.",
    "audio_vae.",
    "vocoder.",
    "model_ema.",
)
"""How the names of other components, and of copies, begin in all-in-one checkpoints."""

EXTRA_STATE = "._extra_state"
"""How the names end of what Transformer Engine keeps for itself beside the weights."""

DIFFUSERS = "diffusers"
"""The dialect in which models of two classes may have the same names."""

NEAR = 0.75
"""The share of a family's signature from which a checkpoint is nearly of it."""

NAMED = 4
"""How many tensors an error names."""


@dataclass(frozen=True)
class _Reading:
    """A checkpoint read as one family in one dialect, behind one prefix.

    short: the names in the file by those without the prefix.
    """

    source: Source
    family: Family
    dialect: str
    prefix: str
    short: Mapping[str, str]

    def likeness(self) -> float:
        """The share of the family's signature that the names hold."""
        found = _witnesses(self.family, self.dialect)
        return sum(any(name in self.short for name in one) for one in found) / len(found)

    @cached_property
    def origins(self) -> Mapping[str, Origin]:
        """Where each canonical tensor lies; names that the table does not know are left out."""
        return _origins(self.source.infos, self.short, self.family, self.dialect)

    @cached_property
    def explained(self) -> int:
        """How many of the names the family knows, whatever is missing beside them."""
        known = _known(self.family, self.dialect)
        return sum(any(one in known for one, _ in patterns(name)) for name in self.short)

    @property
    def lacks(self) -> list[str]:
        """Tensors of the signature that are not there, by the first of their names."""
        needed = _witnesses(self.family, self.dialect)
        return [min(theirs) for theirs in needed if theirs.isdisjoint(self.short.keys())]

    @property
    def fits(self) -> bool:
        """Whether the canonical names are those of the family and of none built upon it."""
        if self.likeness() < 1:
            return False
        held = self.origins
        known = all(name in held for name in self.family.signature)
        return known and not any(name in held for name in self.family.foreign)

    @property
    def missing(self) -> list[str]:
        """Canonical tensors that a model of this depth must have, and the checkpoint has not."""
        required, _ = expected(self.family, self.origins)
        return sorted(required - self.origins.keys())

    @cached_property
    def unknown(self) -> Mapping[str, str]:
        """Tensors that the family does not know, by name without the prefix."""
        used = {origin.tensor for origin in self.origins.values()}
        unread = (*self.family.unread, *OTHERS)
        rest = {k: name for k, name in self.short.items() if name not in used}
        return {
            k: name
            for k, name in rest.items()
            if not (k.startswith(unread) or k.endswith(EXTRA_STATE))
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that the family knows."""
        infos = self.source.infos
        return sum(infos[name].nbytes for name in {at.tensor for at in self.origins.values()})


def open_canonical(
    source: Source, path: Path, part: str = "", config: Mapping[str, Any] | None = None
) -> CanonicalSource:
    """Recognise the family and the dialect of a checkpoint from its headers.

    part: only tensors that begin with it are looked at; config: of a diffusers model, with which
    one of no known family can be told by its names. Tensors that the family does not know keep
    their names. Raises SourceError if it is no transformer, incomplete, or already quantized.
    """
    names = [name for name in source.infos if name.startswith(part)]
    if part and not names:
        raise SourceError(f"{path}: no tensor's name begins with {part}")
    readings = list(_readings(source, names))
    fitting = (one for one in readings if one.fits)
    found = max(fitting, key=lambda one: (one.nbytes, -len(one.prefix)), default=None)
    another = found and found.dialect == DIFFUSERS and is_another(found.family, config)
    family = by_names(source.infos, config) if found is None or another else None
    if family is not None:
        return _opened(
            _Reading(source, family, family.sources[0], "", {name: name for name in names}), path
        )
    others = [one for one in readings if not one.fits]
    near = _nearest(others) if found is None or found.unknown else []
    if found is not None and all(one.explained <= found.explained for one in near):
        return _opened(found, path)
    raise SourceError(f"{path}: {_difference(near, names)}{_hint(source)}")


def is_another(family: Family, config: Mapping[str, Any] | None) -> bool:
    """Whether a config.json names a class of models that this family does not have."""
    said = (config or {}).get("_class_name")
    return bool(said and family.classes) and said not in family.classes


def by_names(infos: Infos, config: Mapping[str, Any] | None) -> Family | None:
    """A family made for a checkpoint whose class no table has; None for classes of known ones."""
    said = (config or {}).get("_class_name")
    known = any(said in family.classes for family in families().values())
    return None if known else generic.family_of(infos, config or {})


def unknown(source: CanonicalSource) -> list[str]:
    """Tensors of a checkpoint that its family does not know, which are kept as they are."""
    required, optional = expected(source.family, source.infos)
    return [name for name in source.infos if name not in required and name not in optional]


def _readings(source: Source, names: Sequence[str]) -> Iterator[_Reading]:
    """Every way to read the names that holds some of a family's signature."""
    behind = {
        prefix: {n.removeprefix(prefix): n for n in names if n.startswith(prefix)}
        for prefix in _prefixes(names)
    }
    for family in families().values():
        for prefix, held in behind.items():
            # Encoders spell their own prefixes, by which one is told from another.
            if prefix and prefix not in family.prefixes and not family.task:
                continue
            for dialect in family.sources:
                reading = _Reading(source, family, dialect, prefix, held)
                if reading.likeness():
                    yield reading


def _prefixes(names: Sequence[str]) -> list[str]:
    """What names begin with that may stand before a model's own names, also several in a row."""
    own = (prefix for family in families().values() for prefix in family.prefixes)
    words = [word for word in dict.fromkeys((*own, *WRAPPERS)) if word]
    found, last = [""], [""]
    for _ in range(NESTED):
        longer = (prefix + word for prefix in last for word in words)
        last = [prefix for prefix in longer if any(name.startswith(prefix) for name in names)]
        found += last
    return list(dict.fromkeys(found))


@cache
def _witnesses(family: Family, dialect: str) -> tuple[frozenset[str], ...]:
    """For each tensor of the signature, the names that it may have in a dialect."""
    rows = [leaf for entry in family.dialects[dialect] for leaf in leaves(entry)]
    found = []
    for name in family.signature:
        pairs = ((row, match(ours, name)) for row in rows for ours in row.ours)
        theirs = {fill(row.theirs, index) for row, index in pairs if index is not None}
        found.append(frozenset(theirs or {name}))
    return tuple(found)


def _opened(reading: _Reading, path: Path) -> CanonicalSource:
    """The checkpoint, checked: complete, floating point, and nothing strange beside a linear."""
    family, infos = reading.family, reading.source.infos
    for origin in reading.origins.values():
        if infos[origin.tensor].dtype not in FLOAT_DTYPES:
            raise SourceError(
                f"{reading.source.where(origin.tensor)}: tensor {origin.tensor} is "
                f"{infos[origin.tensor].dtype}: the checkpoint is already quantized, in a way that "
                "is not known; give the 16 or 32 bit original"
            )
    missing = reading.missing
    if missing:
        raise SourceError(
            f"{path}: an incomplete {family.title} checkpoint; {len(missing)} tensors are missing, "
            f"the first is {missing[0]}; download it again"
            + (f"; unknown beside them: {some(reading.unknown)}" if reading.unknown else "")
        )
    modules = {origin.tensor.rpartition(".")[0] for origin in reading.origins.values()}
    beside = [
        name
        for name in reading.unknown.values()
        if name.rpartition(".")[0] in modules - {""} or _uncountable(name)
    ]
    if beside:
        raise SourceError(
            f"{path}: {len(beside)} tensors are not part of {family.title}, the first is "
            f"{beside[0]}; is it already quantized, or another model?"
        )
    kept = {name: Origin(full) for name, full in reading.unknown.items()}
    held = reading.origins
    if len(reading.source.files) > 1 and reading.dialect in family.sharded:
        held = replace(reading, dialect=family.sharded[reading.dialect]).origins
    return CanonicalSource(reading.source, family, reading.dialect, {**kept, **held})


def _uncountable(name: str) -> bool:
    """Whether a name numbers something that nobody could have so many of."""
    return any(part.isdecimal() and len(part) > 9 for part in name.split("."))


def _nearest(readings: Sequence[_Reading]) -> list[_Reading]:
    """The readings that explain the most, of those that are nearly of their families."""
    near = [one for one in readings if one.likeness() >= NEAR or len(one.lacks) < 2]
    most = max((one.explained for one in near), default=0)
    return [one for one in near if one.explained == most]


def _difference(near: Sequence[_Reading], names: Sequence[str]) -> str:
    """Why no family fits: how the nearest differ, or what there is."""
    if near:
        return "; or ".join({one.family.name: _short_of(one) for one in near}.values())
    known = ", ".join(family.title for family in families().values())
    return (
        f"not a diffusion transformer that is known (its tensors: {some(names)}); "
        f"known families: {known}"
    )


def _short_of(near: _Reading) -> str:
    """What a checkpoint has and lacks that makes it none of a family."""
    other = [near.origins[name].tensor for name in near.family.foreign if name in near.origins]
    parts = [f"it lacks {some(near.lacks)}"] if near.lacks else []
    parts += [f"it has {some(other)}, which tells another model"] if other else []
    rest = list(near.unknown.values())
    parts += [f"{len(rest)} of its tensors are not known there: {some(rest)}"] if rest else []
    return f"nearly {near.family.title} in {near.dialect} names, but {'; '.join(parts)}"


def _hint(source: Source) -> str:
    """What to do about a file that is quantized, where that may be why it is not known."""
    if all(info.dtype in FLOAT_DTYPES for info in source.infos.values()):
        return ""
    return "; it is quantized: if a config.json came with it, put it beside the file"


def some(names: Iterable[str]) -> str:
    """The first few names, as a list."""
    names = list(names)
    return ", ".join(names[:NAMED]) + (" ..." if len(names) > NAMED else "")


def _origins(
    infos: Infos, short: Mapping[str, str], family: Family, dialect: str
) -> dict[str, Origin]:
    if not family.dialects[dialect]:
        if not short.keys() >= set(family.signature):
            return {}  # another family, whose blocks are not ours to count
        required, optional = expected(family, short)
        known = required | optional
        return {name: Origin(full) for name, full in short.items() if name in known}
    table = _table(family, dialect)
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


@cache
def _table(family: Family, dialect: str) -> Mapping[str, Entry]:
    """The rows of a dialect by its names."""
    return {leaf.theirs: leaf for entry in family.dialects[dialect] for leaf in leaves(entry)}


@cache
def _known(family: Family, dialect: str) -> frozenset[str]:
    """Patterns of all names of a dialect: those of its rows, and of what has no row there."""
    rows = [leaf for entry in family.dialects[dialect] for leaf in leaves(entry)]
    whole = [leaf for entry in family.dialects[family.sources[0]] for leaf in leaves(entry)]
    renamed = {ours for leaf in rows for ours in leaf.ours}
    same = {ours for leaf in whole for ours in leaf.ours} - renamed
    return frozenset(same | {leaf.theirs for leaf in rows})


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
        if leaf.turn:
            yield fill(ours, index), Origin(name, turn=(place, len(leaf.ours), leaf.turn))
            continue
        start, stop = stacked_rows(leaf, place, hidden, info.shape[0])
        if stop > start:
            yield fill(ours, index), Origin(name, (start, stop))
