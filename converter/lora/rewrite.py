"""`--lora-mode branch` on a file that is there: its low-rank branches grow, nothing is requantized.

Every tensor but the branches, the biases that a LoRA changes, and the unquantized tensors that it
changes goes over byte by byte.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dqconvert.converter import precondition
from dqconvert.converter.canonical import compose, settled
from dqconvert.converter.family import match
from dqconvert.converter.job import Job
from dqconvert.converter.lora.apply import cap_problems, loras_of, record
from dqconvert.converter.lora.branch import factors, fits, joined, rank_in, total_rank, touching
from dqconvert.converter.lora.match import Loras, Patch, refusal
from dqconvert.converter.lora.merged import MergedSource
from dqconvert.converter.prepare import check_apart
from dqconvert.converter.regroup import PackedSource
from dqconvert.converter.reopen import PackedLayer, Reopened, reopen
from dqconvert.converter.resolve import read_json
from dqconvert.formats.folder import MANIFEST, OutputFolder
from dqconvert.formats.targets import Target
from dqconvert.formats.writer import StreamWriter
from dqconvert.quantizers.errors import OutputError, PlanError, SourceError
from dqconvert.quantizers.spec import TensorInfo
from dqconvert.quantizers.tensors import TORCH_DTYPES

REBASED = "dqconvert_rebased"
"""What rebase-lora writes into a LoRA for preconditioned weights."""


@dataclass(frozen=True)
class _Change:
    """A file and what LoRAs do to it.

    inside: patches that go into branches; beside: those of unquantized tensors and of biases;
    left: the reason by module, of what --lora-partial leaves out.
    """

    found: Reopened
    source: PackedSource
    loras: Loras
    total: int
    cap: int | None
    inside: tuple[Patch, ...] = ()
    beside: tuple[Patch, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)

    @property
    def branches(self) -> list[PackedLayer]:
        """The layers that have a branch."""
        return [layer for layer in self.found.layers if layer.form.rank]

    @property
    def target(self) -> Target:
        """Whose file it is."""
        return self.found.target


@dataclass(frozen=True)
class Rewriting:
    """A file and its LoRAs, all checked: what will be written where."""

    job: Job
    output: Path
    name: str
    change: _Change
    infos: Mapping[str, TensorInfo]

    @property
    def summary(self) -> dict[str, Any]:
        """What would be done, in numbers and words."""
        change, source = self.change, self.change.found.source
        return {
            "output": str(self.output),
            "file": self.name,
            "rank": {"before": change.found.recognized.rank, "after": change.total},
            "bytes": {
                "before": sum(info.nbytes for info in source.infos.values()),
                "after": sum(info.nbytes for info in self.infos.values()),
            },
            "modules": {
                "branch": sorted({m for patch in change.inside for m in patch.home.modules}),
                "merged": sorted({part for patch in change.beside for part in patch.home.parts}),
                "left out": {**change.loras.skipped, **change.left},
            },
            "notes": list(change.loras.notes),
        }


def plan_rewrite(job: Job) -> Rewriting:
    """Decide all of it; nothing is written.

    Raises PlanError with every module of the LoRAs that has no place in such a file.
    """
    found = reopen(Path(job.model))
    change = _planned(found, job)
    output = job.output or Path(f"{found.root.name}-lora")
    OutputFolder(output, job.overwrite).check()
    check_apart(output, [*found.source.files, *(path for path, _ in job.loras)])
    name = _renamed(found.path.name, found.recognized.rank, change.total)
    return Rewriting(job, output, name, change, _infos(change))


def rewrite(wish: Rewriting) -> Path:
    """Write a job's file once more with its LoRAs in the branches; returns the folder."""
    job, output, name, change = wish.job, wish.output, wish.name, wish.change
    found, infos = change.found, wish.infos
    with OutputFolder(output, job.overwrite) as folder:
        place = folder / found.path.relative_to(found.root).with_name(name)
        try:
            _copy(found, folder)
            place.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{output}: {error.strerror}") from error
        with StreamWriter(place, infos, _ranked(found.source.metadata, change)) as writer:
            for key, tensor in _tensors(change):
                writer.write(key, tensor)
        _describe(folder, place, change, job)
    return output


def _planned(found: Reopened, job: Job) -> _Change:
    """Where every patch goes, or one error."""
    problems = [*found.problems(), *cap_problems(job.rank_cap, job.lora_mode)]
    problems += [] if job.loras else ["--lora-mode branch: there is no --lora"]
    if not found.recognized.rank:
        problems.append(f"{found.path.name}: has no low-rank branches; only SVDQuant's files do")
    if len(found.source.files) > 1:
        problems.append(f"{found.path.name}: is one of several files, which is not supported here")
    if problems:
        raise PlanError(problems)
    source = PackedSource(found)
    given = replace(job, component=found.manifest.component)
    loras = loras_of(given, source)
    folded = found.source.metadata.get(precondition.KEY) is not None
    if folded and not all(REBASED in file.source.metadata for file in loras.files):
        raise SourceError(f"{found.path}: was preconditioned; `dqconvert rebase-lora` comes first")
    branches = {module for layer in found.layers if layer.form.rank for module in layer.modules}
    inside = tuple(patch for patch in loras.patches if fits(patch, branches))
    rest = [patch for patch in loras.patches if patch not in inside]
    left = {patch.base: why for patch in rest if (why := _why_not(patch, source)) is not None}
    if left and not job.lora_partial:
        hint = "--lora-partial leaves these out; a conversion of the original model merges them"
        raise refusal(left, hint)
    inside = tuple(patch for patch in inside if patch.base not in left)
    beside = tuple(patch for patch in rest if patch.base not in left)
    if not inside and not beside:
        raise PlanError(["nothing of the LoRA has a place in this file"])
    most = max(rank_in(inside, layer.modules) for layer in found.layers if layer.form.rank)
    total = total_rank(found.recognized.rank, most, job.rank_cap)
    return _Change(found, source, loras, total, job.rank_cap, inside, beside, left)


def _why_not(patch: Patch, source: PackedSource) -> str | None:
    """Why what is no part of a branch cannot be merged either; None where it can."""
    packed = [part for part in patch.home.parts if part.rpartition(".")[0] in source.pieces]
    if not packed:
        return None
    pieces = [piece for part in packed for piece in source.pieces[part.rpartition(".")[0]]]
    if all(part.endswith(".bias") for part in packed) and all(
        layer.form.bias and layer.form.rank for layer, _ in pieces
    ):
        return None
    name = packed[0]
    if any(not layer.form.rank for layer, _ in pieces):
        return f"{name} is quantized and has no branch"
    return f"{name} is quantized, and this is no product of two matrices that a branch could hold"


def _infos(change: _Change) -> dict[str, TensorInfo]:
    """The header of the new file."""
    infos = dict(change.found.source.infos)
    for layer in change.branches:
        infos |= {
            f"{layer.name}.{suffix}": replace(infos[f"{layer.name}.{suffix}"], shape=info.shape)
            for suffix, info in _grown(change, layer).items()
        }
    return infos


def _grown(change: _Change, layer: PackedLayer) -> dict[str, TensorInfo]:
    """The tensors of a layer whose shape depends on the rank, as they become."""
    wide = replace(layer.form, rank=change.total)
    other = replace(layer.form, rank=layer.form.rank + 16)  # where the rank stays
    before, after = change.target.promise(layer.form), change.target.promise(other)
    names = [name for name in before if before[name] != after[name]]
    return {name: change.target.promise(wide)[name] for name in names}


def _tensors(change: _Change) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the new file."""
    done: set[str] = set()
    for layer in change.branches:
        for suffix, tensor in _layer(change, layer).items():
            key = f"{layer.name}.{suffix}"
            done.add(key)
            yield key, tensor.to(TORCH_DTYPES[change.found.source.infos[key].dtype])
    for name, tensor in _kept(change):
        done.add(name)
        yield name, tensor
    for name in change.found.source.infos:
        if name not in done:
            yield name, change.found.source.read(name)


def _layer(change: _Change, layer: PackedLayer) -> dict[str, Tensor]:
    """What changes of one layer: its branch, and its bias where a LoRA has one."""
    q = change.found.unpack(layer)
    columns = _columns(change, layer)
    product = factors(change.inside, layer.modules, change.source.infos, columns)
    q = replace(q, lowrank=joined(q, product, change.total, change.cap))
    names = list(_grown(change, layer))
    added = _bias(change, layer)
    if added is not None:
        bias = torch.zeros_like(added) if q.bias is None else q.bias.float()
        q = replace(q, bias=bias + added)
        names.append("bias")
    packed = change.target.pack(replace(layer.form, rank=change.total), q)
    return {name: packed[name] for name in names}


def _columns(change: _Change, layer: PackedLayer) -> tuple[int, int] | None:
    """The input channels of a layer that is part of a linear."""
    if layer.entry.columns is None:
        return None
    ends = []
    for end in layer.entry.columns:
        whole = change.source.infos[f"{layer.modules[0]}.weight"].shape[1]
        ends.append(whole if end is None else change.found.hidden if end == "hidden" else int(end))
    return ends[0], ends[1]


def _bias(change: _Change, layer: PackedLayer) -> Tensor | None:
    """What LoRAs add to a layer's bias [N] fp32; that of a cut linear is with its last piece."""
    patches = touching(change.beside, layer.modules)
    last = all(change.source.pieces[module][-1][0] is layer for module in layer.modules)
    if not patches or not last:
        return None
    merged = MergedSource(_Zeros(change.source), change.loras, patches)
    return torch.cat([merged.read(f"{module}.bias") for module in layer.modules])


class _Zeros(PackedSource):
    """Zeros in the shapes of a file: what is merged into them is the difference alone."""

    def __init__(self, inner: PackedSource) -> None:
        self.__dict__.update(vars(inner))

    def read(self, name: str) -> Tensor:
        """Zeros, fp32."""
        return torch.zeros(self.infos[name].shape)


def _kept(change: _Change) -> Iterator[tuple[str, Tensor]]:
    """Unquantized tensors with their LoRAs, in the file's own naming and dtype."""
    merged = MergedSource(change.source, change.loras, change.beside)
    theirs: dict[str, list[str]] = {}
    for name, (key, _) in change.found.kept.items():
        theirs.setdefault(key, []).append(name)
    for key, names in theirs.items():
        if merged.shares.keys().isdisjoint(names):
            continue
        leaf = change.found.kept[names[0]][1]
        leaf = settled(leaf, match(leaf.ours[0], names[0]) or "", change.found.names())
        dtype = TORCH_DTYPES[change.found.source.infos[key].dtype]
        yield key, compose(leaf, [merged.read(name) for name in names]).to(dtype)


def _renamed(name: str, rank: int, total: int) -> str:
    """nunchaku's files have the rank in their name."""
    return re.sub(rf"(?<=_r){rank}(?=-)", str(total), name, count=1)


def _ranked(said: Mapping[str, Any], change: _Change) -> dict[str, Any]:
    """Metadata or a config with the new rank where it says the old one."""
    before = change.found.recognized.rank

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: change.total if key == "rank" and one == before else walk(one)
                for key, one in value.items()
            }
        return value

    found = dict(said)
    text = found.get("quantization_config")
    if isinstance(text, str):
        found["quantization_config"] = json.dumps(walk(json.loads(text)))
    elif text is not None:
        found["quantization_config"] = walk(text)
    return found


def _copy(found: Reopened, folder: Path) -> None:
    """Everything beside the weights; a lone file has nothing of its own beside it."""
    if not (found.root / MANIFEST).exists():
        config = found.path.parent / "config.json"
        if found.config and config.exists():
            place = folder / config.relative_to(found.root)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(config, place)
        return
    for name in [*read_json(found.root / MANIFEST).get("files", {}), MANIFEST, "README.md"]:
        path = found.root / name
        if path.is_file() and path != found.path:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def _describe(folder: Path, weights: Path, change: _Change, job: Job) -> None:
    """Manifest, config and card say what became of them."""
    config = weights.parent / "config.json"
    if config.exists():
        config.write_text(json.dumps(_ranked(read_json(config), change), indent=2) + "\n")
    path = folder / MANIFEST
    said = read_json(path) if path.exists() else {}
    rows = record(change.loras, job.lora_partial, sorted(change.left))
    said["loras"] = [*said.get("loras", []), *rows]
    said.setdefault("options", {})
    said["options"] |= {"rank": change.total, "lora_mode": "branch", "rank_cap": change.cap}
    touched = {layer.name for layer in change.branches}
    for row in said.get("layers", []):
        if row.get("name") in touched:
            row |= {"weight_error": None, "output_error": None}
    if "output" in said:
        size = sum(one.stat().st_size for one in (weights, config) if one.exists())
        said["output"] |= {"folder": str(job.output or folder.name), "bytes": size}
    notes = [*change.loras.notes]
    notes += [f"{len(change.left)} modules of the LoRA were left out"] if change.left else []
    said["notes"] = [*said.get("notes", []), *notes]
    card = folder / "README.md"
    if card.exists():
        lines = (
            f"LoRA in the low-rank branch: {row['file']}, strength {row['strength']:g}."
            for row in rows
        )
        card.write_text(card.read_text().rstrip() + "\n\n" + "\n".join(lines) + "\n")
    said["files"] = {
        one.relative_to(folder).as_posix(): {"bytes": one.stat().st_size, "sha256": _digest(one)}
        for one in sorted(folder.rglob("*"))
        if one.is_file() and one not in (path, card)
    }
    path.write_text(json.dumps(said, indent=2) + "\n")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
