"""What each tensor of a LoRA file changes: all are placed, or named in an error. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

from dqconvert.converter.canonical import CanonicalSource, Infos
from dqconvert.converter.lora.files import LoraFile
from dqconvert.converter.lora.keys import SECOND, TEXT, encoder_of, parse
from dqconvert.converter.lora.names import Home, Names
from dqconvert.converter.resolve import TRANSFORMER
from dqconvert.quantizers.adapters import (
    PARTS,
    Adapter,
    Shape,
    columnwise,
    extent,
    kind_of,
    missing,
    rank_of,
)
from dqconvert.quantizers.errors import PlanError, SourceError

if TYPE_CHECKING:
    from torch import Tensor

BIAS = "bias"
"""A kind of patch beside those of adapters: what a LoRA's two biases add."""

AT_HAND = 64
"""Adapters that are kept in memory: more than the layers that are in hand at once have."""


@dataclass(frozen=True, eq=False)
class Patch:
    """What one adapter of a file does to one tensor, as some dialect has it.

    base: the module as the file calls it; kind: of the adapter, or BIAS; roles: {role: key};
    extent: rows and columns of the tensor.
    """

    file: LoraFile
    base: str
    kind: str
    roles: Mapping[str, str]
    home: Home
    extent: tuple[int, int]

    @property
    def strength(self) -> float:
        """What the whole is multiplied by; a new weight is taken as it is, or not at all, as
        ComfyUI and diffusers do."""
        said = self.file.spec.strength
        return float(said != 0) if self.kind == "set" else said

    @property
    def rank(self) -> int | None:
        """Of a plain product of two matrices; None for everything else."""
        plain = self.kind == "lora" and not {"mid", "magnitude"} & self.roles.keys()
        return rank_of(self.kind, self.shapes) if plain else None

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shapes of its tensors by role."""
        infos = self.file.source.infos
        return {role: infos[key].shape for role, key in self.roles.items()}

    @property
    def adapter(self) -> Adapter:
        """Its tensors and their scale; of the last patches in use they are at hand."""
        return _adapter(self)

    def add(self, whole: Tensor, start: int, stop: int) -> None:
        """Add a plain product to rows start .. stop of a weight, [rows, K] fp32, in place."""
        found = self.adapter
        up = found.tensors["up"].flatten(1)[start:stop].float()
        whole.addmm_(up, found.tensors["down"].flatten(1), alpha=found.scale * self.strength)

    def added(self, base: Tensor | None, start: int, stop: int) -> Tensor:
        """What is added to rows start .. stop, [rows, K] fp32. base: those rows, for some kinds."""
        if self.kind == BIAS:
            return self._bias()[start:stop, None] * self.strength
        return self._some(start, stop).added(base, *self._place(start, stop)) * self.strength

    def _some(self, start: int, stop: int) -> Adapter:
        """A difference as large as the model is read as it is needed."""
        if self.kind not in ("diff", "set") or len(self.shapes[self.kind]) < 2:
            return self.adapter
        rows = self.file.source.read(self.roles[self.kind], (start, stop))
        _check_finite(self, self.kind, rows)
        return Adapter(self.kind, {self.kind: rows})

    def _place(self, start: int, stop: int) -> tuple[int, int]:
        read = self.kind in ("diff", "set") and len(self.shapes[self.kind]) >= 2
        return (0, stop - start) if read else (start, stop)

    def _bias(self) -> Tensor:
        """scale · (up b_down + b_up), [N] fp32."""
        t, scale = self.adapter.tensors, self.adapter.scale
        up = t["up"].flatten(1).float()
        found = up @ t["down_bias"].float() if "down_bias" in t else up.new_zeros(up.shape[0])
        return scale * (found + t["up_bias"].float() if "up_bias" in t else found)


@lru_cache(maxsize=AT_HAND)
def _adapter(patch: Patch) -> Adapter:
    """down, which all blocks of rows need, in fp32; the rest as the file has it."""
    source = patch.file.source
    tensors = {role: source.read(key) for role, key in patch.roles.items() if role != "alpha"}
    for role, tensor in tensors.items():
        _check_finite(patch, role, tensor)
    if "down" in tensors:
        tensors["down"] = tensors["down"].float()
    rank = rank_of("lora" if patch.kind == BIAS else patch.kind, patch.shapes)
    scale = patch.file.scale(patch.base, rank, patch.roles.get("alpha"))
    return Adapter(patch.kind, tensors, scale)


def _check_finite(patch: Patch, role: str, tensor: Tensor) -> None:
    """SourceError that names the file and the tensor."""
    numbers = tensor.float() if tensor.element_size() == 1 else tensor  # torch has none for fp8
    if not bool(numbers.isfinite().all()):
        raise SourceError(
            f"{patch.file.path}: tensor {patch.roles[role]} holds NaN or infinity; its training "
            "failed, or the file is damaged"
        )


@dataclass(slots=True)
class Matching:
    """What a file's tensors do to a model.

    others: how many tensors are of other parts of the pipeline, by part; problems: tensors that
    cannot be used, one line each module.
    """

    patches: list[Patch] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    problems: dict[str, str] = field(default_factory=dict)


def matched(file: LoraFile, names: Names, infos: Infos, component: str = TRANSFORMER) -> Matching:
    """Place every tensor of a file on a model."""
    found = Matching()
    modules: dict[str, dict[str, str]] = {}
    both = any(key.startswith(SECOND) for key in file.source.infos)
    for key in file.source.infos:
        other = _other(key, component, names, both)
        if other is not None:
            found.others[other] += 1
            continue
        home, said = names.tensor(key), parse(key)
        if home is not None:
            _place(found, _Module(file, key, {"set": key}, names, infos), home, "set")
        elif said is None:
            found.problems[key] = "is no part of an adapter that is known"
        elif said[1] in modules.setdefault(said[0], {}):
            found.problems[key] = f"says again what {modules[said[0]][said[1]]} says"
        else:
            modules[said[0]][said[1]] = key
    for base, roles in modules.items():
        _match(found, _Module(file, base, roles, names, infos))
    _check_once(found)
    return found


def _check_once(found: Matching) -> None:
    """A tensor that a file changes under two names would be changed twice."""
    first: dict[tuple[str, ...], str] = {}
    kept = []
    for patch in found.patches:
        base = first.setdefault(patch.home.parts, patch.base)
        if base == patch.base:
            kept.append(patch)
        else:
            found.problems[patch.base] = f"says again what {base} says, under another name"
    found.patches = kept


@dataclass(frozen=True, slots=True)
class _Module:
    """The tensors of one module of a file."""

    file: LoraFile
    base: str
    roles: dict[str, str]
    names: Names
    infos: Infos

    def shapes(self) -> dict[str, Shape]:
        return {role: self.file.source.infos[key].shape for role, key in self.roles.items()}

    def only(self, roles: Sequence[str]) -> _Module:
        """With the tensors of these roles alone."""
        return replace(self, roles={r: k for r, k in self.roles.items() if r in roles})


def _match(found: Matching, module: _Module) -> None:
    """Patches of a module's weight, bias and modulation."""
    name = module.names.module(module.base)
    if name is None:
        found.problems[module.base] = f"the model has no such module ({_some(module.roles)})"
        return
    roles, tensors = module.roles.keys(), module.names.tensors
    beside = {"diff_b", "diff_m", "down_bias", "up_bias"}
    main = module.only([role for role in roles if role not in beside])
    if main.roles.keys() - {"alpha"} or not roles & beside:
        _weight(found, main, tensors.get(f"{name}.weight", tensors.get(name)))
    for role, leaf in (("diff_b", "bias"), ("diff_m", "modulation")):
        if role in roles:
            one = replace(module, roles={"diff": module.roles[role]})
            _place(found, one, tensors.get(f"{name}.{leaf}"), "diff")
    if roles & {"down_bias", "up_bias"}:
        _place(found, module.only(_BIASES), tensors.get(f"{name}.bias"), BIAS)


_BIASES = ("down", "up", "alpha", "down_bias", "up_bias")


def _weight(found: Matching, module: _Module, home: Home | None) -> None:
    alpha = module.shapes().get("alpha", ())
    if prod(alpha) != 1:
        found.problems[module.base] = f"its alpha is {list(alpha)} and no number"
        return
    kind = kind_of(module.roles)
    if kind is None:
        found.problems[module.base] = f"holds {_some(module.roles)}, which make no adapter"
        return
    lost = missing(kind, module.roles)
    if lost:
        found.problems[module.base] = (
            f"holds {_some(module.roles)} alone; half of it is missing: {', '.join(lost)}"
        )
        return
    surplus = module.roles.keys() - {*PARTS[kind], "alpha", "magnitude"}
    if surplus:
        found.problems[module.base] = f"holds {_some(module.roles)}, which do not go together"
        return
    _place(found, module, home, kind)


def _place(found: Matching, module: _Module, home: Home | None, kind: str) -> None:
    """A patch of one tensor, if the shapes fit."""
    if home is None:
        keys = _some(module.roles)
        found.problems[module.base] = f"the model has no bias or modulation there ({keys})"
        return
    shape = home.info(module.infos).shape
    wanted = (shape[0], prod(shape[1:])) if shape else (1, 1)
    try:
        made = _made(kind, module.shapes())
    except (ValueError, KeyError, IndexError) as error:
        found.problems[module.base] = f"its shapes do not go together: {error}"
        return
    if rank_of("lora" if kind == BIAS else kind, module.shapes()) == 0:
        found.problems[module.base] = f"its rank is 0 ({_some(module.roles)})"
        return
    if made != wanted and not (kind in ("diff", "set") and prod(made) == prod(wanted)):
        found.problems[module.base] = (
            f"its shapes do not fit: it makes {list(made)}, the model's {home.leaf.theirs} "
            f"here is {list(shape)}" + (_WIDER if _widens(kind, made, wanted) else "")
        )
        return
    magnitude = module.shapes().get("magnitude")
    if magnitude is not None and prod(magnitude) != shape[columnwise(magnitude)]:
        found.problems[module.base] = (
            f"its magnitudes are {list(magnitude)}, for a weight of {list(wanted)}"
        )
        return
    found.patches.append(Patch(module.file, module.base, kind, module.roles, home, wanted))


_WIDER = (
    ". It widens the model's input, as control LoRAs do; fuse it into the 16-bit model with "
    "diffusers' control pipeline first, and convert what that saves"
)


def _widens(kind: str, made: tuple[int, int], wanted: tuple[int, int]) -> bool:
    """Whether an adapter is of a model with more inputs: a whole number of times as many."""
    more, rest = divmod(made[1], wanted[1])
    return kind == "lora" and made[0] == wanted[0] and more > 1 and not rest


def _made(kind: str, shapes: Mapping[str, Shape]) -> tuple[int, int]:
    if kind != BIAS:
        return extent(kind, shapes)
    rows = shapes["up"][0]
    for role, count in (("up_bias", rows), ("down_bias", shapes["down"][0])):
        if role in shapes and shapes[role] != (count,):
            raise ValueError(f"{role} {list(shapes[role])}, needed [{count}]")
    return rows, 1


def _other(key: str, component: str, names: Names, both: bool) -> str | None:
    """The part of the pipeline that a key belongs to, None where it is the one in hand.

    both: whether the file tells the second expert from the first.
    """
    number, second = encoder_of(key), SECOND.removesuffix(".")
    if component in (TRANSFORMER, second):
        if number is not None:
            return "text_encoder" if number == 1 else f"text_encoder_{number}"
        owner = second if key.startswith(SECOND) else TRANSFORMER
        return owner if both and owner != component else None
    own = int(component.rpartition("_")[2]) if component[-1:].isdigit() else 1
    if number is None:
        said = parse(key)
        known = said is not None and names.module(said[0]) is not None
        return None if known else TRANSFORMER
    if number == own or (number > own and _known(key, names)):
        return None
    return "text_encoder" if number == 1 else f"text_encoder_{number}"


def _known(key: str, names: Names) -> bool:
    said = parse(key)
    return said is not None and TEXT.match(key) is not None and names.module(said[0]) is not None


def _some(roles: Mapping[str, str]) -> str:
    keys = list(roles.values())
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


@dataclass(frozen=True)
class Loras:
    """The LoRAs of a conversion: their files, all that they change, and what is to be said."""

    files: tuple[LoraFile, ...] = ()
    patches: tuple[Patch, ...] = ()
    notes: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> list[tuple[str, int, int, float]]:
        """What tells these LoRAs from others."""
        return [file.identity for file in self.files]


def read(
    files: Sequence[LoraFile], source: CanonicalSource, component: str, partial: bool
) -> Loras:
    """Place all LoRAs on a model. Raises PlanError with every module that cannot be used.

    partial: leave those out instead.
    """
    names = Names(source.family, source.infos) if files else None
    patches: list[Patch] = []
    notes: list[str] = []
    skipped: dict[str, str] = {}
    for file in files:
        assert names is not None
        found = matched(file, names, source.infos, component)
        lost = {f"{file.name}: {base}": why for base, why in found.problems.items()}
        skipped |= lost
        patches += found.patches
        notes += _notes(file, found, partial)
        if found.patches and all(
            p.kind == "set" and p.roles["set"] == p.base for p in found.patches
        ):
            raise PlanError([f"{file.name}: {_CHECKPOINT}"])
        if not found.patches and not (lost and not partial):
            where = f"{source.family.title}'s {component}"
            raise PlanError([f"{file.name}: nothing in it is of {where}"])
    if skipped and not partial:
        raise refusal(skipped, "--lora-partial goes on without these")
    return Loras(tuple(files), tuple(patches), tuple(notes), skipped)


_CHECKPOINT = (
    "holds whole weights alone, so it is a checkpoint and no LoRA; convert it in the model's place"
)


def refusal(problems: Mapping[str, str], hint: str) -> PlanError:
    """One error for all modules that cannot be used; the hint stands at its end."""
    lines = [f"{base}: {why}" for base, why in problems.items()]
    return PlanError([*lines[:-1], f"{lines[-1]}; {hint}"])


def _notes(file: LoraFile, found: Matching, partial: bool) -> Iterator[str]:
    for part, count in found.others.items():
        yield f"{file.name}: {count} tensors are of {part}; --component {part} takes them"
    if found.problems and partial:
        some = ", ".join(list(found.problems)[:3])
        yield f"{file.name}: {len(found.problems)} modules were left out, such as {some}"
