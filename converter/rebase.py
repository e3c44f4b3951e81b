"""`dqconvert rebase-lora`: a LoRA of the original weights, for weights folded and centered.

With x' = (x - mu) / s at a linear's input, and rows divided by s where x is made:

    consumers    A' = A diag(s), and the bias grows by B A mu
    producers    B' = B / s on the rows of shift, scale or values

Where the bias is read: ComfyUI (comfy/lora.py) and LightX2V add `X.diff_b` as it is; PEFT and
nunchaku scale `X.lora_B.bias` like B, and load it only under diffusers' names. DoRA and other
adapters that are no plain product cannot be rewritten.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dqconvert.converter.canonical import entries_of
from dqconvert.converter.family import Entry, fill, stacked_rows
from dqconvert.converter.lora.keys import encoder_of, parse
from dqconvert.converter.lora.names import Names
from dqconvert.converter.pieces import Pieces
from dqconvert.converter.precondition import Place, Precondition, load
from dqconvert.converter.reopen import Reopened, reopen
from dqconvert.quantizers.errors import OutputError, PlanError, SourceError
from dqconvert.quantizers.precondition import Transform
from dqconvert.quantizers.spec import TensorInfo

ROLES = {
    "down": "down",
    "up": "up",
    "alpha": "alpha",
    "up_bias": "bias",
    "diff_b": "difference",
}
"""What of a LoRA can be rewritten."""

PEFT = ("diffusers", "nunchaku")
"""Dialects of runtimes that read a bias under diffusers' names only."""


@dataclass(slots=True)
class Delta:
    """The LoRA of one module. parts: canonical linears stacked on its rows; tensors: by role."""

    base: str
    parts: tuple[str, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """alpha / rank, 1 without an alpha."""
        alpha = self.tensors.get("alpha")
        return 1.0 if alpha is None else float(alpha) / max(self.tensors["down"].shape[0], 1)


@dataclass(frozen=True, slots=True)
class Moved:
    """A delta as it becomes. down: [r, K]; up: [N, r]; bias: [N], as it is added, or None.

    grown: the part of bias that a center makes, None without.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None
    grown: Tensor | None
    factors: Tensor
    rows: Mapping[str, slice]


def rebase(lora: Path, onto: Path, output: Path, overwrite: bool = False) -> Path:
    """Write the LoRA for the preconditioned file or folder; returns its path.

    Raises PlanError with every key that cannot be rewritten.
    """
    if output.suffix != ".safetensors":
        raise OutputError(f"{output}: must end in .safetensors")
    if output.exists() and not overwrite:
        raise OutputError(f"{output}: exists; choose another -o, or give --overwrite")
    found = reopen(onto)
    precondition = load(found)
    if precondition is None:
        raise SourceError(f"{onto}: was not preconditioned; the LoRA fits it as it is")
    tensors, metadata = _read(lora)
    result = rebased(tensors, found, precondition)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.contiguous().clone() for name, tensor in result.items()},
            output,
            {**metadata, "dqconvert_rebased": found.path.name},
        )
    except OSError as error:
        raise OutputError(f"{output}: {error.strerror}") from error
    return output


def rebased(
    tensors: Mapping[str, Tensor], found: Reopened, precondition: Precondition
) -> dict[str, Tensor]:
    """The tensors of a LoRA for the preconditioned weights; fp32 where they change."""
    names = Names(found.family, _infos(found))
    deltas, rest = _deltas(tensors, names, precondition)
    moved, problems = [], []
    for delta in deltas:
        try:
            moved.append((delta, _moved(delta, precondition, found.hidden)))
        except (RuntimeError, ValueError, IndexError) as error:
            problems.append(f"{delta.base}: its shapes do not fit the model ({error})")
    if problems:
        raise PlanError(problems)
    if found.dialect in PEFT and any(new.grown is not None for _, new in moved):
        for delta, new in moved:
            rest.update(_peft(delta, new))
        return rest
    grown: dict[str, Tensor] = {}
    for delta, new in moved:
        rest.update(_kept(delta, new))
        if new.grown is not None and "difference" not in delta.keys:
            grown |= {part: new.grown[rows] for part, rows in new.rows.items()}
    for name, bias in _differences(grown, found):
        rest[name] = rest[name].float() + bias if name in rest else bias
    return rest


def _moved(delta: Delta, precondition: Precondition, hidden: int) -> Moved:
    down, up = delta.tensors["down"].float(), delta.tensors["up"].float()
    if down.shape[0] != up.shape[1]:
        raise ValueError(f"ranks {down.shape[0]} and {up.shape[1]}")
    total, stacked = up.shape[0], Entry(delta.base, delta.parts)
    rows = {
        part: slice(*stacked_rows(stacked, place, hidden, total))
        for place, part in enumerate(delta.parts)
    }
    factors, grown = torch.ones(total), None
    for part, cut in rows.items():
        for place, transform in precondition.produced(part):
            for chunk in _produced(place, cut):
                factors[chunk] *= transform.smooth
    consumed = precondition.consumed(delta.parts[0])  # stacked linears read one input
    if consumed is not None:
        down, grown = _consumed(down, up, *consumed)
    if grown is not None:
        grown = grown * delta.scale / factors
    bias = grown
    for role, scale in (("bias", delta.scale), ("difference", 1.0)):
        if role in delta.tensors:
            own = delta.tensors[role].float() * scale / factors
            bias = own if bias is None else bias + own
    return Moved(down, up / factors[:, None], bias, grown, factors, rows)


def _consumed(
    down: Tensor, up: Tensor, place: Place, transform: Transform
) -> tuple[Tensor, Tensor | None]:
    """A diag(s), and B A mu."""
    cut = slice(place.start, place.stop)
    part, grown = down[:, cut], None
    if transform.center is not None:
        grown = up @ (part @ transform.center)
    down = down.clone()
    down[:, cut] = part * transform.smooth
    return down, grown


def _produced(place: Place, rows: slice) -> list[slice]:
    """The rows of a module, which begins at a row of its own, that make a place's input."""
    if place.modulation is None:
        return [rows]
    chunks = (place.rows(n) for n in (place.fold.shift, place.fold.scale))
    return [slice(rows.start + chunk.start, rows.start + chunk.stop) for chunk in chunks]


def _kept(delta: Delta, new: Moved) -> Iterator[tuple[str, Tensor]]:
    """A delta under its own keys; what did not change keeps its bytes."""
    fresh = {"down": new.down, "up": new.up}
    for role in ("bias", "difference"):
        if role in delta.tensors:
            fresh[role] = delta.tensors[role].float() / new.factors
    if new.grown is not None and "difference" in fresh:
        fresh["difference"] = fresh["difference"] + new.grown
    for role, key in delta.keys.items():
        old = delta.tensors[role]
        same = role not in fresh or torch.equal(fresh[role], old.float())
        yield key, old if same else fresh[role]


def _peft(delta: Delta, new: Moved) -> Iterator[tuple[str, Tensor]]:
    """A delta under diffusers' names, one for each canonical linear, alpha multiplied into B.

    Every one gets a bias, since PEFT makes them for all linears or for none.
    """
    for part, rows in new.rows.items():
        up = new.up[rows]
        yield f"transformer.{part}.lora_A.weight", new.down
        yield f"transformer.{part}.lora_B.weight", up * delta.scale
        bias = torch.zeros(up.shape[0]) if new.bias is None else new.bias[rows]
        yield f"transformer.{part}.lora_B.bias", bias


def _differences(grown: Mapping[str, Tensor], found: Reopened) -> Iterator[tuple[str, Tensor]]:
    """`X.diff_b` in the runtime's own names, of all linears that are stacked there."""
    infos = _infos(found)
    for entry, index in entries_of(found.family, found.dialect, infos):
        parts = [fill(ours, index).removesuffix(".*") for ours in entry.ours]
        if not any(part in grown for part in parts):
            continue
        name = fill(entry.theirs, index).removesuffix(".*")
        sizes = {part: len(grown[part]) for part in parts if part in grown}
        missing = [part for part in parts if part not in grown]
        sizes |= {part: _rows(part, found) for part in missing}
        bias = [grown.get(part, torch.zeros(sizes[part])) for part in parts]
        yield f"diffusion_model.{name}.diff_b", torch.cat(bias)


def _rows(module: str, found: Reopened) -> int:
    """Output channels of a canonical linear."""
    pieces, name = Pieces(found), f"{module}.weight"
    return (pieces.shape(name) if module in pieces else found.info_of(name).shape)[0]


def _infos(found: Reopened) -> dict[str, TensorInfo]:
    """The canonical tensors by name; nothing here asks for their shapes."""
    return dict.fromkeys(sorted(found.names()), TensorInfo("BF16", ()))


def _deltas(
    tensors: Mapping[str, Tensor], names: Names, precondition: Precondition
) -> tuple[list[Delta], dict[str, Tensor]]:
    """The LoRA by module, and what nothing folds. PlanError on keys that cannot be placed."""
    deltas: dict[str, Delta] = {}
    rest: dict[str, Tensor] = {}
    problems = []
    for key, tensor in tensors.items():
        base, role = parse(key) or (key, "")
        if encoder_of(key) is not None:
            rest[key] = tensor
        elif role not in ROLES:
            owner = names.owner(key)
            folded = owner and any(
                precondition.consumed(m) or precondition.produced(m) for m in owner
            )
            if owner and not folded:
                rest[key] = tensor
            else:
                problems.append(f"{key}: is no plain LoRA of a linear that is known")
        else:
            home = names.tensors.get(f"{names.module(base)}.weight")
            if home is None:
                problems.append(f"{key}: the model has no such linear")
                continue
            delta = deltas.setdefault(base, Delta(base, home.modules))
            delta.tensors[ROLES[role]], delta.keys[ROLES[role]] = tensor, key
    for base, delta in list(deltas.items()):
        if not {"down", "up"} <= delta.tensors.keys():
            problems.append(f"{base}: holds {', '.join(delta.keys)} alone; half of it is missing")
    if problems:
        raise PlanError(problems)
    return list(deltas.values()), rest


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise SourceError(f"{path}: no LoRA in safetensors ({error})") from error
