"""Checkpoints for the tests of the converter: in memory, from headers alone, or on disk."""

from __future__ import annotations

import json
import os
import runpy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from dqconvert.converter.canonical import CanonicalSource, compose, entries_of, swap_halves
from dqconvert.converter.cli import main
from dqconvert.converter.families import families
from dqconvert.converter.family import Entry, Family, fill, leaves
from dqconvert.converter.opening import open_model
from dqconvert.formats import header
from dqconvert.formats.targets import targets
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import TensorInfo
from dqconvert.quantizers.tensors import DTYPE_NAMES

HERE = Path(__file__).parent
WEIGHTS = "diffusion_pytorch_model.safetensors"


def pairs(calibrated: bool) -> list[tuple[str, str]]:
    """(scheme, target) of all that FLUX can be converted to, with prompts or without."""
    found = []
    for scheme in schemes().values():
        for name in scheme.targets:
            runtime = targets().get(name)
            if name == "gguf" or runtime is None or runtime.accepts(scheme):
                continue
            required = runtime.static(scheme, runtime.layouts(scheme)[0]) == "required"
            if calibrated or not (required or scheme.calibrated):
                found.append((scheme.name, name))
    dialects = families()["flux"].dialects
    return [pair for pair in found if targets()[pair[1]].DIALECT in dialects]


PAIRS, CALIBRATED = pairs(calibrated=False), pairs(calibrated=True)
"""Every scheme with every target that takes it, but for GGUF: see test_gguf_*.py."""


class Memory:
    """A Source whose tensors are at hand; those of the meta device make a header without bytes."""

    metadata: Mapping[str, str] = {}
    files = (Path("memory.safetensors"),)

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self.infos = infos_of(tensors)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        tensor = self.tensors[name]
        return (tensor if rows is None else tensor[slice(*rows)]).clone()

    def fill(self, name: str, out: Tensor, rows: tuple[int, int] | None = None) -> None:
        out.copy_(self.read(name, rows))

    def where(self, name: str) -> Path:
        return self.files[0]


def infos_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    return {k: TensorInfo(DTYPE_NAMES[t.dtype], tuple(t.shape)) for k, t in tensors.items()}


def flux_config(**changes: Any) -> dict[str, Any]:
    """The config of FLUX.1-dev, with changes."""
    return {
        "in_channels": 64,
        "out_channels": None,
        "patch_size": 1,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    } | changes


SCHNELL = {"guidance_embeds": False}
SMALL = {"num_layers": 2, "num_single_layers": 3, "num_attention_heads": 2}
NARROW = SMALL | {"attention_head_dim": 64, "axes_dims_rope": (8, 28, 28)}
_CONFIGS = runpy.run_path(str(HERE / "configs.py"))
FAMILY_MODELS = {
    path.stem: runpy.run_path(str(path)) for path in sorted((HERE / "models").glob("*.py"))
}
"""What is known for the tests of one family, by its name: see models/README.md."""
MODELS: dict[str, tuple[dict[str, Any], ...]] = _CONFIGS["CONFIGS"] | {
    name: known["CONFIGS"] for name, known in FAMILY_MODELS.items()
}
ENCODERS, encoder_tensors = _CONFIGS["ENCODERS"], _CONFIGS["encoder_tensors"]
CONFIGS = MODELS
"""Configs to try for each family."""


def meta_model(config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The tensors of diffusers' own model, without their bytes."""
    for known in FAMILY_MODELS.values():
        if "tensors" in known and config in known["CONFIGS"] + tuple(known["REAL"].values()):
            return {name: tensor.to(dtype) for name, tensor in known["tensors"](config).items()}
    if config.get("_class_name") in ENCODERS:
        return {name: tensor.to(dtype) for name, tensor in encoder_tensors(config).items()}
    with torch.device("meta"):
        model = build_model(config)
    return {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}


def small(config: Mapping[str, Any]) -> bool:
    """Whether a config is none of a real model."""
    layers = ("num_layers", "n_layers", "num_hidden_layers", "depth", "layers_per_block")
    return min((config[key] for key in layers if key in config), default=0) < 19


def build_model(config: Mapping[str, Any]) -> Any:
    """diffusers' own model; FLUX where the config names none."""
    import diffusers

    said = {"_class_name": "FluxTransformer2DModel", **config}
    return getattr(diffusers, said.pop("_class_name"))(**said)


def filled(meta: Mapping[str, Tensor], columns: int | None = None) -> dict[str, Tensor]:
    """Random tensors of those shapes, at most so many columns wide, all different."""
    rng = torch.Generator().manual_seed(len(meta))
    found = {}
    for name, tensor in meta.items():
        whole = columns is None or tensor.ndim != 2
        shape = tensor.shape if whole else (tensor.shape[0], columns)
        found[name] = torch.randn(shape, generator=rng).to(tensor.dtype)
    return found


def write_dialect(
    family: Family, dialect: str, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[tuple[Entry, str]]]:
    """Canonical tensors in a dialect, and the rows of the family's table that were used."""
    hidden = tensors[family.hidden].shape[0]
    found: dict[str, Tensor] = {}
    used = []
    for entry, index in entries_of(family, dialect, infos_of(tensors)):
        for leaf in leaves(entry):
            ours = [fill(name, index) for name in leaf.ours]
            if ours[0] not in tensors:
                continue
            parts = [tensors[name] for name in ours]
            if leaf.columns and parts[0].ndim == 2:
                start, stop = (hidden if c == "hidden" else c for c in leaf.columns)
                parts = [part[:, start:stop] for part in parts]
            name = fill(leaf.theirs, index)
            assert name not in found, f"{name} is written twice"
            found[name] = compose(leaf, parts)
            used.append((leaf, index))
    return found, used


def read_dialect(
    tensors: Mapping[str, Tensor], used: Iterable[tuple[Entry, str]], hidden: int
) -> dict[str, Tensor]:
    """Canonical tensors again: the inverse of write_dialect, cut and joined by hand."""
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for leaf, index in used:
        tensor = tensors[fill(leaf.theirs, index)]
        tensor = swap_halves(tensor) if leaf.swap else tensor
        for place, ours in enumerate(leaf.ours):
            if leaf.frames:
                pieces[fill(ours, index)] = [(0, tensor[:, :, place])]
                continue
            if leaf.view is not None:
                pieces[fill(ours, index)] = [(0, tensor.reshape(leaf.view[1]))]
                continue
            first = hidden if leaf.columns and leaf.columns[0] == "hidden" else 0
            piece = (first, _shared(tensor, leaf, hidden)[place] if tensor.ndim else tensor)
            pieces.setdefault(fill(ours, index), []).append(piece)
    found = {}
    for name, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        whole = len(parts) == 1 or parts[0][1].ndim < 2
        found[name] = parts[0][1] if whole else torch.cat([p for _, p in parts], 1)
    return found


def _shared(tensor: Tensor, leaf: Entry, hidden: int) -> Sequence[Tensor]:
    """What each canonical tensor has of the rows."""
    if len(leaf.ours) == 1:
        return [tensor]
    if leaf.turn:
        turns = tensor.unflatten(0, (-1, len(leaf.ours), leaf.turn))
        return [turns[:, place].flatten(0, 1) for place in range(len(leaf.ours))]
    if leaf.share == "equal":
        return tensor.chunk(len(leaf.ours))
    if leaf.share == "grouped":
        return [tensor[:hidden], *tensor[hidden:].chunk(len(leaf.ours) - 1)]
    sizes = [hidden] * (len(leaf.ours) - 1)
    return tensor.split([*sizes, tensor.shape[0] - sum(sizes)])


def original(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """FLUX tensors under their first names."""
    found, _ = write_dialect(families()["flux"], "original", tensors)
    return {prefix + name: tensor for name, tensor in found.items()}


def sparse(path: Path, infos: Mapping[str, TensorInfo]) -> Path:
    """A safetensors file of zeros that takes no room on the disk."""
    start, head = header.encode(infos, {})
    with path.open("wb") as file:
        file.write(start)
        file.truncate(head.size)
    return path


def opened(path: Path) -> CanonicalSource:
    """A checkpoint as canonical weights, with the config.json in its folder."""
    config = path / "config.json"
    return open_model(path, json.loads(config.read_text()) if config.exists() else {})


def off(got: Tensor, exact: Tensor) -> float:
    """The relative error, in float64."""
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def is_linear(name: str, tensor: Tensor) -> bool:
    """Whether a tensor of FLUX is the weight of a linear of its blocks."""
    return tensor.ndim == 2 and "blocks" in name and name.endswith(".weight")


def tiny_pipeline(folder: Path) -> Path:
    """The smallest pipeline whose layers every target takes: width 128, one block of each kind."""
    build = runpy.run_path(str(HERE / "tiny_flux.py"))["build_tiny_pipeline"]
    found: Path = build(folder, hidden_heads=1)
    return found


def weights_of(pipeline: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(pipeline / "transformer" / WEIGHTS)
    return found


def shard(tensors: Mapping[str, Tensor], folder: Path, count: int = 3) -> Path:
    """A sharded checkpoint with its index."""
    folder.mkdir(parents=True)
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(count):
        file = f"{Path(WEIGHTS).stem}-{number + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in names[number::count]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return folder


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Equal in dtype, shape and bytes."""
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (one, two)))


def same_tensors(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(same_bits(one[name], two[name]) for name in one)


def environment(**changes: str) -> dict[str, str]:
    """For a Python process that finds the packages and has two threads at most."""
    ours = {"PYTHONPATH": str(HERE.parent / "tools" / "ns"), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **ours, **changes}


def dqconvert(*words: Any) -> Any:
    """Run the command line in this process; what is not an exit is a bug and is raised."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def done(*words: Any) -> str:
    """What a command that succeeds prints on stdout."""
    result = dqconvert(*words)
    assert result.exit_code == 0, result.stderr
    return str(result.stdout)


def refused(folder: Path, *words: Any, code: int = 1) -> str:
    """The one error of a command that fails and leaves a folder as it was."""
    before = tree(folder)
    result = dqconvert(*words)
    assert result.exit_code == code, result.output
    assert result.stderr.count("Error: ") == 1, result.stderr
    assert "Traceback" not in result.output and not result.stdout
    assert tree(folder) == before
    start = result.stderr.index("Error: ")
    assert code == 2 or start == 0
    return str(result.stderr[start:])


def tree(folder: Path) -> dict[str, int]:
    """Everything below a folder, with sizes."""
    return {
        str(path.relative_to(folder)): path.stat().st_size if path.is_file() else -1
        for path in sorted(folder.rglob("*"))
    }
