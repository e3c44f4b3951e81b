"""Preconditioned conversions: the same function everywhere, chosen only where it helps."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dqconvert.converter import precondition
from dqconvert.converter.canonical import CanonicalSource, open_canonical
from dqconvert.converter.precondition import Place, Precondition, PreconditionedSource, places
from dqconvert.converter.reopen import reopen
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.precondition import Transform

torch.set_num_threads(1)
HERE = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
flux = SimpleNamespace(**runpy.run_path(str(HERE / "test_precondition.py")))
done = checkpoints.done


def opened(tensors: dict[str, Tensor], dialect: str = "diffusers") -> CanonicalSource:
    if dialect == "original":
        tensors = checkpoints.original(tensors)
    found: CanonicalSource = open_canonical(checkpoints.Memory(tensors), Path("flux.safetensors"))
    return found


def random_precondition(source: CanonicalSource, dtype: torch.dtype) -> Precondition:
    chosen = [
        (place, flux.random_transform(seed, dtype, center=True))
        for seed, place in enumerate(places(source))
    ]
    return Precondition(chosen)


@pytest.mark.parametrize("dialect", ["diffusers", "original"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_preconditioned_checkpoint_is_the_same_function(
    dialect: str, dtype: torch.dtype, limit: float
) -> None:
    model = flux.build_flux(dtype)
    before = flux.run(model)
    source = opened({k: v.clone() for k, v in model.state_dict().items()}, dialect)
    chosen = random_precondition(source, dtype)
    assert len(chosen.chosen) == 14, "two double blocks of five inputs, two single ones of two"
    moved = PreconditionedSource(source, chosen)
    state = {name: moved.read(name) for name in moved.infos}
    changed = [name for name, tensor in state.items() if not torch.equal(tensor, source.read(name))]
    assert len(changed) == 2 * 2 * (12 + 6), "weight and bias of 12 and 6 linears a block"
    model.load_state_dict(state)
    after = flux.run(model)
    assert float((after - before).norm() / before.norm()) < limit

    back = PreconditionedSource(opened(state), chosen.inverse)
    for name in source.infos:
        assert torch.allclose(back.read(name), source.read(name), rtol=1e-4, atol=1e-5), name
