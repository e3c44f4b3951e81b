"""Tensors of every dtype and the files that hold them, for the tests of the containers."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch
from torch import Tensor

from dqconvert.formats.writer import StreamWriter
from dqconvert.quantizers.spec import TensorInfo
from dqconvert.quantizers.tensors import TORCH_DTYPES

samples = runpy.run_path(str(Path(__file__).with_name("samples.py")))
infos_of, same = samples["infos_of"], samples["same"]
Infos = dict[str, TensorInfo]


def filled(infos: Infos, seed: int = 0) -> dict[str, Tensor]:
    """Tensors of random bytes (bool: of random truth)."""
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for name, info in infos.items():
        top = 2 if info.dtype == "BOOL" else 256
        raw = torch.randint(top, (info.nbytes,), generator=rng, dtype=torch.uint8)
        found[name] = raw.view(TORCH_DTYPES[info.dtype]).view(info.shape)
    return found


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    with StreamWriter(path, infos_of(tensors), metadata or {}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
