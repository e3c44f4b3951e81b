"""What a family is: the tables that join a model's names, dialects and roles. Torch-free.

Canonical names are the diffusers ones. Patterns hold `{i}` for a block index and may end in `.*`
for the leaves weight and bias.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from typing import Any

from dqconvert.quantizers.spec import TensorInfo

LEAVES = ("weight", "bias")
LAST = "last"
HIDDEN, EQUAL, GROUPED = "hidden", "equal", "grouped"
Shape = tuple[int, ...]
Infos = Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Entry:
    """One module, or one tensor, of a dialect and the canonical ones that it is made of.

    ours: stacked on rows, in this order, as share says. columns: the input channels start .. stop
    of a single canonical linear, "hidden" and None allowed; its bias goes to the entry that reaches
    the last column. swap: the two halves of the rows change places, LAST: in the last block alone.
    bias: whether the leaves of `.*` are weight and bias, or weight alone. frames: ours are joined
    along the third dimension, one frame each, instead. share: how many rows each of ours has:
    HIDDEN, all but the last the model's hidden size; EQUAL, all alike; GROUPED, the first the
    hidden size and the others the rest alike, as in grouped-query attention. view: shapes of
    theirs and of the one of ours, -1 for one size each, where they differ in nothing else. turn:
    ours take turns on the rows, so many at a time (those of one attention head).
    """

    theirs: str
    ours: tuple[str, ...]
    columns: tuple[int | str, int | str | None] | None = None
    swap: bool | str = False
    bias: bool = True
    frames: bool = False
    share: str = HIDDEN
    view: tuple[Shape, Shape] | None = None
    turn: int = 0


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear inside a block, or one outside that some runtime quantizes.

    role: "attention", "mlp" or "modulation"; "embedder" before the blocks, "final" behind them.
    shares: label, within the block, of the linears that share one smooth vector. site: the linear
    whose input is observed for it (None: its own). gelu: input channel from which the input comes
    out of a GELU. splits: chunks of a modulation linear.
    """

    name: str
    role: str
    shares: str = ""
    site: str | None = None
    gelu: int | str | None = None
    splits: int = 0


@dataclass(frozen=True, slots=True)
class Fold:
    """Linears whose common input x can be exchanged for (x - center) / smooth, exactly.

    consumers: the linears that read x, all of them; columns: input channels start .. stop that x
    fills, "hidden" and None allowed. Behind a norm with adaLN, x = (1 + scale) norm(h) + shift:
    modulation is the linear that makes shift and scale, which are the chunks of those numbers of
    its rows, each as wide as x. Behind attention: values are the linears whose outputs attention
    averages.
    """

    consumers: tuple[str, ...]
    modulation: str | None = None
    shift: int = 0
    scale: int = 1
    values: tuple[str, ...] = ()
    columns: tuple[int | str, int | str | None] = (0, None)


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """A model family, as data.

    What it is:
        title: for people; aliases: {short name: Hub id}; licenses: {alias: licence}
        task: for model cards, "" of an encoder; video: whether it makes videos
        classes: what config.json may call the models, () where nothing else has such tensors
        variant(infos, config): which of the family's models it is, in a word such as "edit", ""
            where there is only one

    How it is told:
        signature: canonical tensors that only this family has together
        foreign: those that tell another family, which has all of the signature as well
        hidden: canonical tensor whose rows are the hidden size; blocks: the module lists of blocks
        optional: modules that some variants lack; scattered: that some blocks have and others lack;
            cut: that the last block lacks
        config_of(infos): the config that the shapes imply; assumed: keys of it that only hold for
            released models, which a config.json may deny

    How tensors are called:
        dialects: {name: entries}; a name that no entry mentions stays as it is
        sources: the dialects that checkpoints come in; the first lists every tensor, an empty one
            is the identity
        sharded: {dialect: the one of a checkpoint in several files}, where names do not tell
        prefixes: what all-in-one checkpoints put before the names
        unread: beginnings of names in checkpoints that no runtime reads
        passengers: {beginning of names that are another part of the model: targets whose files hold
            them too}; vital: those of them without which such a file does not run
        spellings: {target: dialects that it may be written in}, where that depends on the class of
            the model; spelling(class): the one

    What is quantized:
        linears: of the blocks; outside: others, which some policy names
        sensitive: linears that mixed schemes keep at the better format without calibration
        folds: where the model itself can hold a smooth vector and a center

    What runtimes want:
        facts(dialect, config): what one is told beside the tensors
        policies: {target or layout: {role, linear or pattern of linears: treatment or None}},
            where a loader of this family differs from the target's ROLES; the nearest word counts
        layouts: {target: those of its layouts that its loader of this family reads}, the default
            first; names that differ are in a dialect of their own, "<target>-<layout>"
        unrun: targets whose runtime has no code for it, though it has names for them
        architecture: what GGUF files call it, "" where no reader of them knows it
        tokens: canonical token embedding whose tokenizer a GGUF file holds
        vocabulary: tensor in which ComfyUI's files hold the tokenizer

    How it is calibrated:
        pipelines: {variant: diffusers' pipeline class}, the row "" for variants without one
        encoders: {component of the pipeline: the family of its weights}
        fields: of a line of prompts, those that the pipelines take
        unguided: in the names of models that are made to run without guidance
    """

    name: str
    title: str
    aliases: Mapping[str, str]
    licenses: Mapping[str, str]
    signature: tuple[str, ...]
    hidden: str
    blocks: tuple[str, ...]
    linears: tuple[Linear, ...]
    dialects: Mapping[str, tuple[Entry, ...]]
    config_of: Callable[[Infos], dict[str, Any]]
    facts: Callable[[str, Mapping[str, Any]], dict[str, Any]]
    task: str = "text-to-image"
    video: bool = False
    classes: tuple[str, ...] = ()
    variant: Callable[[Infos, Mapping[str, Any]], str] = lambda infos, config: ""

    foreign: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    scattered: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    sources: tuple[str, ...] = ("original", "diffusers")
    sharded: Mapping[str, str] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ("model.diffusion_model.",)
    unread: tuple[str, ...] = ()
    passengers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    vital: tuple[str, ...] = ()
    spellings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    spelling: Callable[[str], str] = lambda name: "transformers"

    outside: tuple[Linear, ...] = ()
    sensitive: tuple[str, ...] = ()
    folds: tuple[Fold, ...] = ()

    policies: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    layouts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unrun: tuple[str, ...] = ()
    architecture: str = ""
    tokens: str = ""
    vocabulary: str = ""

    pipelines: Mapping[str, str] = field(default_factory=dict)
    encoders: Mapping[str, str] = field(default_factory=dict)
    fields: tuple[str, ...] = ("prompt", "negative_prompt")
    unguided: tuple[str, ...] = ()

    def dialect_of(self, target: str, dialect: str, own: str = "") -> str:
        """The naming that a target writes: one of its own if the family has it, else its usual.

        own: the class of a model of transformers, whose modules' names are written.
        """
        spellings = self.spellings.get(target)
        if spellings is not None:
            return self.spelling(own)
        return target if target in self.dialects else dialect

    def carries(self, target: str, name: str) -> bool:
        """Whether a target's file holds a tensor of the checkpoint, if it is of another part."""
        starts = (start for start in self.passengers if name.startswith(start))
        return all(target in self.passengers[start] for start in starts)

    def layout_dialect(self, dialect: str, layout: str) -> str:
        """The naming of one layout: one of its own if the family has it, else the dialect."""
        own = f"{dialect}-{layout}"
        return own if own in self.dialects else dialect

    def linear(self, name: str, outside: bool = False) -> tuple[Linear, str] | None:
        """The table row of a canonical linear and its block index, or None.

        outside: look among those outside the blocks as well.
        """
        for row in (*self.linears, *(self.outside if outside else ())):
            index = match(row.name, name)
            if index is not None:
                return row, index
        return None


def match(pattern: str, name: str) -> str | None:
    """The block index of a name under a pattern ("" if it has none), or None."""
    found = _expression(pattern).fullmatch(name)
    if found is None:
        return None
    return found[1] if found.groups() else ""


def patterns(name: str) -> Iterator[tuple[str, str]]:
    """Every pattern that a name matches as a whole, with its block index: match, the other way."""
    yield name, ""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal() and len(part) < 10:
            yield ".".join((*parts[:place], "{i}", *parts[place + 1 :])), part


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(re.escape("{i}"), r"(\d{1,9})"))


def depth(names: Iterable[str], blocks: str) -> int:
    """How many blocks of a module list the names know: the highest index plus one."""
    found = (
        match(f"{blocks}.{{i}}", ".".join(name.split(".")[: blocks.count(".") + 2]))
        for name in names
    )
    return max((int(index) + 1 for index in found if index), default=0)


def stacked_rows(entry: Entry, place: int, hidden: int, total: int) -> tuple[int, int]:
    """Rows start, stop of one of the stacked tensors of an entry, whose rows are total."""
    count = len(entry.ours)
    first = total // count if entry.share == EQUAL else hidden
    rest = hidden
    if entry.share != HIDDEN and count > 1:
        rest = (total - first) // (count - 1)
    start = 0 if place == 0 else first + (place - 1) * rest
    return start, total if place == count - 1 else start + (rest if place else first)


def viewed(shape: Shape, view: Shape) -> Shape:
    """A shape as a view has it: its -1 is what the other sizes leave."""
    free = prod(shape) // max(-prod(view), 1)
    return tuple(free if size < 0 else size for size in view)


def fill(pattern: str, index: str) -> str:
    """A pattern with its block index."""
    return pattern.replace("{i}", index)


def single(value: float) -> float:
    """A number as a float32 has it, which is what files say of models."""
    found: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return found


def leaves(entry: Entry) -> list[Entry]:
    """An entry for `.*` as one entry for each leaf; others as they are."""
    if not entry.theirs.endswith(".*"):
        return [entry]
    return [
        replace(
            entry,
            theirs=entry.theirs[:-1] + leaf,
            ours=tuple(name[:-1] + leaf for name in entry.ours),
        )
        for leaf in (LEAVES if entry.bias else LEAVES[:1])
    ]
