"""What a model's tensors may be called in a LoRA: by every dialect of its family. Torch-free.

Names with underscores for all dots are looked up among all known names, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from dqconvert.converter.canonical import Infos, composed_info, entries_of
from dqconvert.converter.family import Entry, Family, fill, leaves, patterns
from dqconvert.converter.lora.keys import ENCODER_PREFIXES, FLAT, PREFIXES, SECOND
from dqconvert.quantizers.spec import TensorInfo

_DOUBLE, _SINGLE = "double_blocks.{i}.processor", "single_blocks.{i}.processor"
_OURS, _OURS_SINGLE = "transformer_blocks.{i}.attn", "single_transformer_blocks.{i}"

ALIASES = (
    Entry(f"{_DOUBLE}.qkv_lora1.*", tuple(f"{_OURS}.to_{x}.*" for x in "qkv")),
    Entry(f"{_DOUBLE}.qkv_lora2.*", tuple(f"{_OURS}.add_{x}_proj.*" for x in "qkv")),
    Entry(f"{_DOUBLE}.proj_lora1.*", (f"{_OURS}.to_out.0.*",)),
    Entry(f"{_DOUBLE}.proj_lora2.*", (f"{_OURS}.to_add_out.*",)),
    Entry(f"{_SINGLE}.qkv.*", tuple(f"{_OURS_SINGLE}.attn.to_{x}.*" for x in "qkv")),
    Entry(f"{_SINGLE}.proj.*", (f"{_OURS_SINGLE}.proj_out.*",)),
    Entry("single_blocks.{i}.linear1_qkv.*", tuple(f"{_OURS_SINGLE}.attn.to_{x}.*" for x in "qkv")),
)
"""Modules that only LoRA files have names for: xlabs' attention processors of FLUX, whose qkv of a
single block are the first rows of linear1 (diffusers loaders/lora_conversion_utils.py and
comfy/lora.py).
"""


@dataclass(frozen=True, slots=True)
class Home:
    """A tensor as some dialect has it: its row of the table and its canonical parts."""

    leaf: Entry
    parts: tuple[str, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """The canonical modules of its parts."""
        return tuple(part.rpartition(".")[0] for part in self.parts)

    @property
    def plain(self) -> bool:
        """Whether its rows are those of its parts, one after another."""
        return not (self.leaf.swap or self.leaf.frames or self.leaf.view)

    def info(self, infos: Infos) -> TensorInfo:
        """Dtype and shape, from those of its parts."""
        return composed_info(self.leaf, [infos[part] for part in self.parts])

    def rows(self, infos: Infos) -> Iterator[tuple[str, int, int]]:
        """Each part with its rows start .. stop."""
        start = 0
        for part in self.parts:
            stop = start + (infos[part].shape or (1,))[0]
            yield part, start, stop
            start = stop


class Names:
    """The tensors of a model by the names of all dialects of its family.

    Shapes are not looked at. Dialects that cut linears into columns are left out: their files are
    packed, and no LoRA is written in them.
    """

    def __init__(self, family: Family, infos: Mapping[str, TensorInfo]) -> None:
        self._family, self._infos = family, infos
        self.tensors: Mapping[str, Home] = dict(self._all())

    def _all(self) -> Iterator[tuple[str, Home]]:
        """Canonical names last: they win."""
        tables = [name for name in self._family.dialects if self._family.dialects[name]]
        tables = [name for name in tables if name not in self._family.sources] + [
            name for name in reversed(self._family.sources) if name in tables
        ]
        yield from self._aliases()
        for dialect in tables:
            if not any(entry.columns for entry in self._family.dialects[dialect]):
                yield from self._homes(entries_of(self._family, dialect, self._infos))
        for name in self._infos:
            yield name, Home(Entry(name, (name,)), (name,))

    def _aliases(self) -> Iterator[tuple[str, Home]]:
        rows: dict[str, list[Entry]] = {}
        for leaf in (leaf for entry in ALIASES for leaf in leaves(entry)):
            rows.setdefault(leaf.ours[0], []).append(leaf)
        for name in self._infos:
            for pattern, index in patterns(name):
                yield from self._homes((leaf, index) for leaf in rows.get(pattern, ()))

    def _homes(self, entries: Iterable[tuple[Entry, str]]) -> Iterator[tuple[str, Home]]:
        for entry, index in entries:
            for leaf in leaves(entry):
                parts = tuple(fill(ours, index) for ours in leaf.ours)
                if all(part in self._infos for part in parts):
                    yield fill(leaf.theirs, index), Home(leaf, parts)

    @cached_property
    def _flat(self) -> Mapping[str, str]:
        """Names of modules and tensors by what they are with underscores for all dots."""
        found: dict[str, str] = {}
        for name in self.tensors:
            module = name.removesuffix(".weight").removesuffix(".bias")
            found[module.replace(".", "_")] = module
        return found

    def module(self, base: str) -> str | None:
        """The module, or the tensor, that a LoRA calls so, under a dialect's own name."""
        for name in _stripped(base):
            for guess in (name, name.replace(".processor.", "."), f"{name}.0"):
                known = (guess, f"{guess}.weight", f"{guess}.modulation")
                if not self.tensors.keys().isdisjoint(known):
                    return guess
        flat = FLAT.sub("", base, count=1)
        return self._flat.get(flat) if flat != base or "." not in base else None

    def tensor(self, key: str) -> Home | None:
        """The tensor that a key names as it is, behind whatever prefix."""
        key = key.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        found = (self.tensors.get(name) for name in _stripped(key))
        return next((home for home in found if home is not None), None)

    def owner(self, key: str) -> tuple[str, ...] | None:
        """The canonical modules that a key belongs to, whatever its last words say."""
        words = key.split(".")
        for count in range(len(words) - 1, 0, -1):
            module = self.module(".".join(words[:count]))
            home = self.tensors.get(f"{module}.weight") if module else None
            if home is not None:
                return home.modules
        return None


def _stripped(base: str) -> Iterator[str]:
    """A name without more and more of what may stand before it."""
    yield base
    encoder = ENCODER_PREFIXES.match(base)
    while encoder is not None:
        base = base[encoder.end() :]
        yield base
        encoder = ENCODER_PREFIXES.match(base)
    prefix = next((p for p in (SECOND, *PREFIXES) if base.startswith(p)), None)
    while prefix is not None:
        base = base.removeprefix(prefix)
        yield base
        prefix = next((p for p in PREFIXES if base.startswith(p)), None)
