"""Every family's original names, judged by diffusers' own single-file converters."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dqconvert.converter.detect import open_canonical
from dqconvert.converter.families import families

torch.set_num_threads(1)
HERE = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
tiny = SimpleNamespace(**runpy.run_path(str(HERE / "tiny_models.py")))
Memory, FAMILY_MODELS = checkpoints.Memory, checkpoints.FAMILY_MODELS

CONVERTED = [
    pytest.param(name, config, id=f"{name}-{number}")
    for name, known in FAMILY_MODELS.items()
    for number, config in enumerate(known.get("WIDE", known["CONFIGS"]))
    if known["CONVERTER"]
]
RUNNABLE = [
    pytest.param(name, config, id=f"{name}-{number}")
    for name, known in FAMILY_MODELS.items()
    for number, config in enumerate(known["CONFIGS"])
    if config["_class_name"] in known["INPUTS"]
]


def in_original_names(name: str, model: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    found, _ = checkpoints.write_dialect(families()[name], "original", model)
    return {prefix + key: tensor for key, tensor in found.items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(("name", "config"), CONVERTED)
def test_diffusers_reads_original_names_alike(name: str, config: Any, prefix: str) -> None:
    from diffusers.loaders import single_file_utils

    known = FAMILY_MODELS[name]
    wide = "WIDE" in known
    model = checkpoints.filled(checkpoints.meta_model(config), columns=2 if wide else None)
    checkpoint = in_original_names(name, model, prefix)
    found = open_canonical(Memory(checkpoint), Path("memory.safetensors"))
    assert (found.family.name, found.dialect) == (name, "original")
    ours = {key: found.read(key) for key in found.infos}
    rest = {key.removeprefix(prefix): tensor for key, tensor in checkpoint.items()}
    rest = known.get("PREPARE", lambda rest: rest)(rest)
    theirs = getattr(single_file_utils, known["CONVERTER"])(rest, config=config)
    assert checkpoints.same_tensors(ours, {k: t for k, t in theirs.items() if t is not None})
    assert checkpoints.same_tensors(ours, model)


@pytest.mark.parametrize(("name", "config"), RUNNABLE)
def test_a_model_read_from_original_names_computes_the_same(name: str, config: Any) -> None:
    model = tiny.build(config, torch.float32)
    before = tiny.forward(model)
    assert bool(before.isfinite().all()) and bool(before.std() > 0)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    dialect = "original" if "original" in families()[name].sources else "diffusers"
    theirs, _ = checkpoints.write_dialect(families()[name], dialect, state)
    found = open_canonical(Memory(theirs), Path("memory.safetensors"))
    for tensor in model.parameters():
        tensor.data.zero_()
    model.load_state_dict({key: found.read(key) for key in found.infos})
    assert torch.equal(tiny.forward(model), before)
