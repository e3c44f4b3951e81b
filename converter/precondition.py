"""Fold and center in a model: which tensors change, and what is kept to say how.

The family's table of folds says where. A precondition is applied where tensors and statistics are
read, so every scheme and target gets it without knowing. Torch is needed only to read.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqconvert.converter.canonical import CanonicalSource, DerivedSource
from dqconvert.converter.family import Family, Fold, fill, match
from dqconvert.quantizers.errors import OutputError, SourceError

if TYPE_CHECKING:
    from torch import Tensor

    from dqconvert.converter.reopen import Reopened
    from dqconvert.quantizers.precondition import Transform
    from dqconvert.quantizers.tensors import LayerStats

FILE = "dqconvert.precondition"
KEY = "dqconvert_precondition"
"""The vectors' file, in the output folder, and the key of the weights' metadata that names it. It
is a safetensors file, but is not called one: LightX2V loads every such file of a folder."""

INLINE = 4 << 20
"""Vectors of at most so many characters are in the metadata too, fp32 in base64: readers parse
the whole header, and exact vectors of a large model would be most of it."""


@dataclass(frozen=True, slots=True)
class Place:
    """A fold of the family's table in one block, its columns as numbers.

    name: the first consumer's, by which it is known; start, stop: the columns.
    """

    fold: Fold
    index: str
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The first of the consumers."""
        return self.consumers[0]

    @property
    def consumers(self) -> tuple[str, ...]:
        """The linears that read the input."""
        return tuple(fill(one, self.index) for one in self.fold.consumers)

    @property
    def values(self) -> tuple[str, ...]:
        """The linears whose outputs attention averages into the input."""
        return tuple(fill(one, self.index) for one in self.fold.values)

    @property
    def modulation(self) -> str | None:
        """The linear that makes shift and scale of the input."""
        return fill(self.fold.modulation, self.index) if self.fold.modulation else None

    @property
    def producers(self) -> tuple[str, ...]:
        """The linears whose rows change."""
        return (self.modulation,) if self.modulation else self.values

    def rows(self, chunk: int) -> slice:
        """The rows of a chunk of the modulation."""
        width = self.stop - self.start
        return slice(chunk * width, (chunk + 1) * width)


def places(source: CanonicalSource) -> list[Place]:
    """Every input of a model that can take a fold, in the order of its tensors."""
    found = []
    for name, info in source.infos.items():
        module = name.removesuffix(".weight")
        place = _place(module, source.family, source.hidden) if module != name else None
        if place is None:
            continue
        place = replace(place, stop=info.shape[1]) if place.stop < 0 else place
        if all(f"{one}.weight" in source.infos for one in (*place.consumers, *place.producers)):
            found.append(place)
    return found


def _place(module: str, family: Family, hidden: int) -> Place | None:
    """The place that is known by a linear; stop is -1 where that is all its columns."""
    for fold in family.folds:
        index = match(fold.consumers[0], module)
        if index is not None:
            ends = (
                hidden if end == "hidden" else -1 if end is None else end for end in fold.columns
            )
            start, stop = map(int, ends)
            return Place(fold, index, start, stop)
    return None


class Precondition:
    """Transforms by place, applied to tensors by their canonical names."""

    def __init__(self, chosen: Sequence[tuple[Place, Transform]]) -> None:
        self.chosen = tuple(chosen)

    @property
    def kinds(self) -> dict[str, str]:
        """What each place got: "fold", "center" or "fold+center"."""
        return {place.name: _kind(transform) for place, transform in self.chosen}

    @property
    def inverse(self) -> Precondition:
        """What takes it back."""
        return Precondition([(place, transform.inverse) for place, transform in self.chosen])

    def consumed(self, module: str) -> tuple[Place, Transform] | None:
        """The place that a linear reads its input from, if there is a transform."""
        return self._consumers.get(module)

    def produced(self, module: str) -> list[tuple[Place, Transform]]:
        """The places whose input a linear makes."""
        return self._producers.get(module, [])

    def transformed(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """A canonical tensor as it becomes, fp32 where it changes; read gives the ones that are."""
        from dqconvert.quantizers import precondition as exact

        tensor = read(name)
        module, _, leaf = name.rpartition(".")
        found = self.consumed(module)
        if found is not None:
            place, transform = found
            if leaf == "weight":
                tensor = exact.consumer_weight(tensor, transform, place.start)
            elif transform.center is not None:
                weight = read(f"{module}.weight")
                tensor = exact.consumer_bias(tensor, weight, transform, place.start)
        for place, transform in self.produced(module):
            tensor = _produced(tensor, leaf, place, transform)
        return tensor

    @cached_property
    def _consumers(self) -> Mapping[str, tuple[Place, Transform]]:
        return {one: pair for pair in self.chosen for one in pair[0].consumers}

    @cached_property
    def _producers(self) -> Mapping[str, list[tuple[Place, Transform]]]:
        found: dict[str, list[tuple[Place, Transform]]] = {}
        for pair in self.chosen:
            for one in pair[0].producers:
                found.setdefault(one, []).append(pair)
        return found


class PreconditionedSource(DerivedSource):
    """A checkpoint as if it had been written with the fold: same names, shapes and dtypes."""

    def __init__(self, inner: CanonicalSource, precondition: Precondition) -> None:
        super().__init__(inner)
        self.precondition = precondition

    def read(self, name: str) -> Tensor:
        """A canonical tensor; fp32 where the fold changes it."""
        return self.precondition.transformed(name, self.inner.read)

    def stack(self, names: Sequence[str], rows: tuple[int, int] | None = None) -> Tensor:
        """Canonical tensors stacked on rows, or rows start .. stop of the stack."""
        import torch

        modules = {name.rpartition(".")[0] for name in names}
        if not any(self.precondition.consumed(m) or self.precondition.produced(m) for m in modules):
            return self.inner.stack(names, rows)
        whole = torch.cat([self.read(name) for name in names])
        return whole if rows is None else whole[slice(*rows)]


class PreconditionedStats(Mapping[str, "LayerStats"]):
    """Statistics by site, of the inputs as they become."""

    def __init__(
        self, inner: Mapping[str, LayerStats], precondition: Precondition, family: Family
    ) -> None:
        self._inner = inner
        self._moved: dict[str, tuple[Place, Transform]] = {}
        for place, transform in precondition.chosen:
            for consumer in place.consumers:
                self._moved[site_of(consumer, family)] = place, transform

    def __getitem__(self, site: str) -> LayerStats:
        from dqconvert.quantizers.precondition import statistics

        found = self._inner[site]
        if site not in self._moved:
            return found
        place, transform = self._moved[site]
        return statistics(found, transform, place.start)

    def __iter__(self) -> Iterator[str]:
        return iter(self._inner)

    def __len__(self) -> int:
        return len(self._inner)


def site_of(consumer: str, family: Family) -> str:
    """The linear at which the input of a linear was observed."""
    found = family.linear(consumer)
    return consumer if found is None else fill(found[0].site or found[0].name, found[1])


def metadata(precondition: Precondition) -> dict[str, str]:
    """What the weights' metadata say: the kinds, the file, and the vectors if they are short."""
    vectors = {
        name: base64.b64encode(vector.contiguous().numpy().tobytes()).decode()
        for name, vector in _vectors(precondition).items()
    }
    said: dict[str, Any] = {"version": 1, "file": FILE, "kinds": precondition.kinds}
    if sum(map(len, vectors.values())) <= INLINE:
        said["vectors"] = vectors
    return {KEY: json.dumps(said)}


def save(folder: Path, precondition: Precondition) -> None:
    """Write the vectors: `NAME.smooth` and `NAME.center`, fp32, by the first consumer's name."""
    from safetensors.torch import save as encoded

    found = encoded(_vectors(precondition), {"format": "pt", "version": "1"})
    try:
        (folder / FILE).write_bytes(found)
    except OSError as error:
        raise OutputError(f"{folder / FILE}: {error.strerror}") from error


def load(found: Reopened) -> Precondition | None:
    """The precondition of a quantized file, None if it has none.

    Raises SourceError where the vectors are lost or do not fit the model.
    """
    import torch

    text = found.source.metadata.get(KEY)
    if text is None:
        return None
    file = found.root / FILE
    try:
        said = json.loads(text)
        kinds = dict(said["kinds"])
        inline = said.get("vectors")
        if inline is None:
            vectors = _read(file)
        else:
            vectors = {
                name: torch.frombuffer(bytearray(base64.b64decode(one)), dtype=torch.float32)
                for name, one in inline.items()
            }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{found.path}: metadata {KEY} is broken ({error})") from error
    return Precondition(_matched(found, kinds, vectors))


def _matched(
    found: Reopened, kinds: Mapping[str, str], vectors: Mapping[str, Tensor]
) -> list[tuple[Place, Transform]]:
    """Places and vectors together; every one must have its own."""
    from dqconvert.quantizers.precondition import Transform

    chosen, names = [], found.names()
    for name in kinds:
        place = _place(name, found.family, found.hidden)
        smooth = vectors.get(f"{name}.smooth")
        if place is None or smooth is None or f"{name}.weight" not in names:
            raise SourceError(f"{found.path}: metadata {KEY}: {name} is no input of the model")
        if place.stop < 0:
            place = replace(place, stop=place.start + len(smooth))
        center = vectors.get(f"{name}.center")
        lengths = {len(one) for one in (smooth, center) if one is not None}
        if lengths != {place.stop - place.start} or not bool((smooth > 0).all()):
            raise SourceError(f"{found.path}: the vectors of {name} do not fit the model")
        chosen.append((place, Transform(smooth, center)))
    return chosen


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise SourceError(
            f"{file}: cannot be read ({error}); it says how the weights were folded, and belongs "
            "beside them"
        ) from error
    return found


def _vectors(precondition: Precondition) -> dict[str, Tensor]:
    found = {}
    for place, transform in precondition.chosen:
        found[f"{place.name}.smooth"] = transform.smooth.float()
        if transform.center is not None:
            found[f"{place.name}.center"] = transform.center.float()
    return found


def _kind(transform: Transform) -> str:
    folded = bool((transform.smooth != 1).any())
    parts = ["fold"] * folded + ["center"] * (transform.center is not None)
    return "+".join(parts) or "fold"


def _produced(tensor: Tensor, leaf: str, place: Place, transform: Transform) -> Tensor:
    """The rows of a modulation or value linear that make one place's input, changed."""
    from dqconvert.quantizers import precondition as exact

    if place.modulation is None:
        change = exact.producer_weight if leaf == "weight" else exact.shift_bias
        return change(tensor, transform)
    chunks = {place.fold.shift: exact.shift_bias, place.fold.scale: exact.scale_bias}
    tensor = tensor.clone() if tensor.element_size() >= 4 else tensor.float()
    for chunk, bias in chunks.items():
        rows = place.rows(chunk)
        tensor[rows] = (exact.producer_weight if leaf == "weight" else bias)(
            tensor[rows], transform
        )
    return tensor
