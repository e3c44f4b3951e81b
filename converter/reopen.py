"""A quantized file, opened again from nothing but its own bytes. Torch-free until a layer is read.

The target recognises its layout, the family's table of that dialect says which canonical linears
each packed layer is made of. Every canonical tensor can then be read, dequantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqconvert.converter.canonical import expected, settled, swap_halves
from dqconvert.converter.detect import DIFFUSERS, WRAPPERS, by_names, is_another
from dqconvert.converter.families import families
from dqconvert.converter.family import (
    Entry,
    Family,
    fill,
    leaves,
    match,
    patterns,
    stacked_rows,
    viewed,
)
from dqconvert.converter.manifest_reader import read_manifest
from dqconvert.converter.options import class_of
from dqconvert.converter.resolve import read_json
from dqconvert.formats import comfy_files
from dqconvert.formats.folder import MANIFEST
from dqconvert.formats.form import PackedForm
from dqconvert.formats.gguf_source import Decoded, GGUFSource
from dqconvert.formats.scaled_source import Rescaled
from dqconvert.formats.source import SafetensorsSource
from dqconvert.formats.targets import Recognized, Target, recognize, targets
from dqconvert.formats.unpacking import layer_of
from dqconvert.formats.words import told
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.spec import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from dqconvert.quantizers.tensors import QuantizedTensor


RawSource = SafetensorsSource | GGUFSource
ENDINGS = (".safetensors", ".gguf")


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """A packed layer of a file: its name, its row in the family's table, its form."""

    name: str
    entry: Entry
    index: str
    form: PackedForm

    @property
    def modules(self) -> tuple[str, ...]:
        """The canonical linears that are stacked in it."""
        return tuple(fill(ours, self.index).removesuffix(".*") for ours in self.entry.ours)


class Reopened:
    """A file that one of our targets knows.

    source, target, recognized, family; numbers: the same tensors as what they stand for, layers
    that the target does not know among them; config: the config.json beside it, {} without; root:
    the folder of the output; manifest: what dqconvert.json there says.
    """

    def __init__(
        self,
        source: RawSource,
        target: Target,
        recognized: Recognized,
        family: Family,
        config: Mapping[str, Any],
    ) -> None:
        self.source, self.target = source, target
        self.numbers: Decoded | Rescaled = (
            Decoded(source) if isinstance(source, GGUFSource) else Rescaled(source)
        )
        self.family, self.recognized, self.config = family, recognized, config
        forms = {name: f for name, f in recognized.forms.items() if self._is_linear(name, f)}
        self.recognized = replace(recognized, forms=forms)
        self.path = source.files[0]
        self.root = self.path.parent
        if target.FOLDER and self.root.name == target.FOLDER:
            self.root = self.root.parent
        self.manifest = read_manifest(self.root / MANIFEST)

    @property
    def dialect(self) -> str:
        """The naming that the target writes this family in."""
        layout = next((form.layout for form in self.recognized.forms.values()), "")
        own = class_of(self.config)
        usual = self.family.dialect_of(self.target.NAME, self.target.DIALECT, own)
        return self.family.layout_dialect(usual, layout)

    @property
    def table(self) -> tuple[Entry, ...]:
        """The family's names in that naming."""
        return self.family.dialects[self.dialect]

    @cached_property
    def layers(self) -> tuple[PackedLayer, ...]:
        """All packed layers, with what only the family knows of their forms."""
        return tuple(self._layers())

    @cached_property
    def kept(self) -> Mapping[str, tuple[str, Entry]]:
        """Unquantized canonical tensors: the name in the file and the row of the table."""
        packed, extras = self.recognized.forms.keys(), self.recognized.extras
        table: dict[str, list[Entry]] = {}
        for entry in self.table:
            for leaf in leaves(entry):
                table.setdefault(leaf.theirs, []).append(leaf)
        found: dict[str, tuple[str, Entry]] = {}
        for name in self.source.infos:
            if layer_of(name) in packed or name in extras or name.startswith(self.family.unread):
                continue
            rows = [
                (leaf, index)
                for pattern, index in patterns(name)
                for leaf in table.get(pattern, ())
            ]
            for leaf, index in rows or [(Entry(name, (name,)), "")]:
                for ours in leaf.ours:
                    found[fill(ours, index)] = (name, leaf)
        return found

    @property
    def hidden(self) -> int:
        """The model's hidden size: the rows of one tensor, packed or not."""
        name = self.family.hidden
        if name in self.kept:
            return self.source.infos[self.kept[name][0]].shape[0]
        return next(one.form.shape[0] for one in self.layers if f"{one.modules[0]}.weight" == name)

    def names(self) -> set[str]:
        """Canonical tensors that the file can give."""
        found = set(self.kept)
        for layer in self.layers:
            for module in layer.modules:
                found.add(f"{module}.weight")
                if layer.form.bias:
                    found.add(f"{module}.bias")
        return found

    def likeness(self) -> float:
        """The share of the family's signature that the file holds, less what is another's."""
        table = self.table
        names = set(self.kept)
        for name, form in self.recognized.forms.items():
            entry, index = _row(table, name)
            held = ("weight", "bias") if form.bias else ("weight",)
            names |= {fill(o, index).replace("*", leaf) for o in entry.ours for leaf in held}
        found = [name in names for name in self.family.signature]
        return sum(found) / len(found) - 0.01 * any(name in names for name in self.family.foreign)

    def is_named(self) -> bool:
        """Whether the metadata call the model what this family is called."""
        said = self.source.metadata.get(getattr(self.target, "ARCHITECTURE", ""))
        return bool(said) and said == self.family.architecture

    def missing(self) -> list[str]:
        """Canonical tensors that a model of this depth must have, and the file has not."""
        required, _ = expected(self.family, self.names())
        return sorted(required - self.names())

    def unexpected(self) -> list[str]:
        """Tensors of the file that no model of this family has."""
        required, optional = expected(self.family, self.names())
        others = (name for name in self.kept.keys() - required - optional)
        passengers, target = tuple(self.family.passengers), self.target.NAME
        return sorted(
            self.kept[name][0]
            for name in others
            if not (name.startswith(passengers) and self.family.carries(target, name))
        )

    def unpacked(self) -> list[str]:
        """Canonical linears of blocks that are there, but not quantized."""
        names = (name.removesuffix(".weight") for name in self.kept if name.endswith(".weight"))
        return [name for name in names if self.family.linear(name)]

    def problems(self) -> list[str]:
        """What is wrong with the file by its header and its name."""
        misnamed = getattr(self.target, "misnamed", None)  # of some targets only
        reason = misnamed(self.path.name, self.recognized) if misnamed else None
        named = [f"{self.path.name}: {reason}"] if reason else []
        key = getattr(self.target, "ARCHITECTURE", "")  # what the metadata call the family
        usual = self.family.architecture
        said = self.source.metadata.get(key, usual)
        if said != usual:
            named.append(f"{key}: is {said!r}; readers call this model {usual!r}")
        return [*self.recognized.problems, *named]

    def unreadable(self) -> list[str]:
        """What leaves in doubt what the weights are, and what is missing of them."""
        fatal = getattr(self.target, "fatal", None)  # of targets whose readers want more than we do
        if fatal:
            found = [*fatal(self.source.infos, self.recognized.forms)]
        else:
            loading = set(self.recognized.loading)
            found = [line for line in self.recognized.problems if line not in loading]
        return found + [f"{name}: missing" for name in self.missing()]

    def info_of(self, name: str) -> TensorInfo:
        """What an unquantized canonical tensor is where it stays so."""
        theirs, _ = self.kept[name]
        read = self.numbers.infos[theirs]
        return TensorInfo(self.numbers.kept.get(theirs, read.dtype), self._shape_of(name))

    def _shape_of(self, name: str) -> tuple[int, ...]:
        theirs, leaf = self.kept[name]
        shape = self.source.infos[theirs].shape
        if leaf.view is not None:
            return viewed(shape, leaf.view[1])
        if len(leaf.ours) == 1:
            return shape
        if leaf.frames:
            return (*shape[:2], *shape[3:])
        start, stop = self._rows_of(name)
        return (stop - start, *shape[1:])

    def unpack(self, layer: PackedLayer) -> QuantizedTensor:
        """The logical result of a layer, from its bytes."""
        prefix = f"{layer.name}."
        tensors = {
            name.removeprefix(prefix): self.source.read(name)
            for name in self.source.infos
            if layer_of(name) == layer.name
        }
        return self.target.unpack(layer.form, tensors)

    def read_kept(self, name: str) -> Tensor:
        """An unquantized canonical tensor; SourceError where the file's has no room for it."""
        theirs, leaf = self.kept[name]
        if len(leaf.ours) == 1:
            tensor = self.numbers.read(theirs)
            leaf = settled(leaf, match(leaf.ours[0], name) or "", self.names())
            if leaf.view is not None:
                return tensor.reshape(viewed(tensor.shape, leaf.view[1]))
            return swap_halves(tensor) if leaf.swap else tensor
        if leaf.frames:
            return self.numbers.read(theirs)[:, :, self._place_of(name)].clone()
        return self.numbers.read(theirs, self._rows_of(name))

    def _rows_of(self, name: str) -> tuple[int, int]:
        """The rows of the file's tensor that a stacked unquantized one is."""
        theirs, leaf = self.kept[name]
        shape = self.source.infos[theirs].shape
        place, total = self._place_of(name), shape[0] if shape else 0
        start, stop = stacked_rows(leaf, place, self.hidden, total)
        if not start < stop <= total:
            raise SourceError(f"{theirs}: found {list(shape)}, too few rows to hold {name}")
        return start, stop

    def _place_of(self, name: str) -> int:
        """Which of the tensors that make one of the file's an unquantized one is."""
        ours = self.kept[name][1].ours
        return next(i for i, one in enumerate(ours) if match(one, name) is not None)

    def _is_linear(self, name: str, form: PackedForm) -> bool:
        """Whether a layer is a linear of a block; of GGUF, where anything may be 16 bit or, in
        files of others, of blocks."""
        if not isinstance(self.source, GGUFSource):
            return True
        entry, index = _row(self.table, name)
        module = fill(entry.ours[0], index).removesuffix(".*")
        return self.family.linear(module, outside=form.spec.bits < 16) is not None

    def _layers(self) -> Iterator[PackedLayer]:
        table = self.table
        for name, form in self.recognized.forms.items():
            entry, index = _row(table, name)
            module = fill(entry.ours[0], index).removesuffix(".*")
            row = self.family.linear(module, outside=True)
            if row is None:
                raise SourceError(f"{self.path}: {name} is no linear of {self.family.title}")
            form = replace(form, splits=row[0].splits, parts=len(entry.ours))
            start = entry.columns[0] if entry.columns else 0
            if row[0].gelu == start:
                form = replace(form, shift=self.target.shift(form))
            yield PackedLayer(name, entry, index, form)


def _nearest(readings: Sequence[Reopened]) -> Reopened:
    """The reading that is most like its family; of several alike, the one that explains most."""
    likeness = [one.likeness() + 0.2 * one.is_named() for one in readings]
    alike = [one for one, found in zip(readings, likeness, strict=True) if found == max(likeness)]
    return alike[0] if len(alike) == 1 else min(alike, key=lambda one: len(one.unexpected()))


class NoFamily(SourceError):
    """A file that a target recognises, of a model that no table knows in the target's names."""


def reopen(path: Path) -> Reopened:
    """Open a folder that we wrote, or a quantized file.

    Raises SourceError if it is none that a target knows, or of no known family.
    """
    sources, config = _sources(path)
    known = [
        (source, found)
        for source in sources
        if (found := recognize(source.infos, _said(source, sources[0]), config)) is not None
    ]
    if not known:
        raise SourceError(f"{path}: not a quantized checkpoint that is known")
    target, _ = known[0][1]
    known_families = [
        Reopened(source, goal, recognized, family, config)
        for source, (goal, recognized) in known
        for family in families().values()
        if family.dialect_of(goal.NAME, goal.DIALECT) in family.dialects
    ]
    best = _nearest(known_families)
    if best.likeness() <= 0.5 or (best.dialect == DIFFUSERS and is_another(best.family, config)):
        best = _by_names(known[0][0], *known[0][1], config) or best
    if best.likeness() <= 0.5 or not best.layers:
        raise NoFamily(f"{path}: a {target.NAME} file of no known family")
    if best.family.hidden not in best.names():
        rows = [leaf for entry in best.table for leaf in leaves(entry)]
        theirs = [row.theirs for row in rows if row.ours == (best.family.hidden,)]
        raise SourceError(f"{path}: {(*theirs, best.family.hidden)[0]}: missing from the file")
    return best


def _by_names(
    source: RawSource, target: Target, recognized: Recognized, config: Mapping[str, Any]
) -> Reopened | None:
    """A file in diffusers' names as one of a model that no table knows, None if it cannot be."""
    if target.DIALECT != DIFFUSERS:
        return None
    forms, infos = recognized.forms, {}
    for name, info in source.infos.items():
        layer = layer_of(name)
        if layer in forms:
            infos[f"{layer}.weight"] = TensorInfo("BF16", forms[layer].shape)
            infos |= {f"{layer}.bias": TensorInfo("BF16", (1,))} if forms[layer].bias else {}
        elif name not in recognized.extras:
            infos[name] = info
    family = by_names(infos, config)
    return Reopened(source, target, recognized, family, config) if family else None


def _said(source: RawSource, whole: RawSource) -> Mapping[str, Any]:
    """What the metadata say of the part of an all-in-one checkpoint that is looked at."""
    said = told(source)
    if source is whole:
        return said
    others = whole.infos.keys() - {f"{source.prefix}{name}" for name in source.infos}
    return comfy_files.within(said, others)


def _row(table: tuple[Entry, ...], name: str) -> tuple[Entry, str]:
    for entry in table:
        index = match(entry.theirs.removesuffix(".*"), name)
        if index is not None and entry.theirs.endswith(".*"):
            return entry, index
    return Entry(f"{name}.*", (f"{name}.*",)), ""


def _sources(path: Path) -> tuple[list[RawSource], Mapping[str, Any]]:
    """A file, or the files of a folder, read whole and behind every prefix that names have."""
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    places = (
        path,
        *(path / name for name in sorted({t.FOLDER for t in targets().values()} - {""})),
    )
    found = (tuple(sorted(place.glob(f"*{end}"))) for end in ENDINGS for place in places)
    files = (path,) if path.is_file() else next((some for some in found if some), ())
    if not files:
        raise SourceError(f"{path}: holds no {' or '.join(ENDINGS)} file")
    config = files[0].parent / "config.json"
    kind = GGUFSource if files[0].suffix == ".gguf" else SafetensorsSource
    if kind is GGUFSource and len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise SourceError(f"{path}: holds several checkpoints ({names}); name one of them")
    whole: RawSource = kind(files)
    own = (prefix for family in families().values() for prefix in family.prefixes)
    behind = [
        prefix
        for prefix in dict.fromkeys((*own, *WRAPPERS))
        if prefix and any(name.startswith(prefix) for name in whole.infos)
    ]
    said = read_json(config) if config.exists() else {}
    return [whole, *(kind(files, prefix) for prefix in behind)], said
