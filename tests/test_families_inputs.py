"""What families say of their linears' inputs and folds, tried on diffusers' own small models."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dqconvert.converter.families import families
from dqconvert.converter.family import Fold, depth, fill
from dqconvert.quantizers.precondition import Transform

torch.set_num_threads(1)
HERE = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
tiny = SimpleNamespace(**runpy.run_path(str(HERE / "tiny_models.py")))
SINGLE = ("kandinsky5",)
RUNNABLE = [
    pytest.param(families()[name], config, id=f"{name}-{number}")
    for name, known in checkpoints.FAMILY_MODELS.items()
    for number, config in enumerate(known["CONFIGS"])
    if config["_class_name"] in known["INPUTS"]
]


@pytest.mark.parametrize(("family", "config"), RUNNABLE)
def test_linears_with_one_site_read_one_tensor(family: Any, config: Any) -> None:
    """All linears of the table run but experts without a token; behind a GELU all is above -0.2."""
    model = tiny.build(config, torch.float32)
    inputs: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if family.linear(name):
            module.register_forward_pre_hook(
                lambda _, found, name=name: inputs.setdefault(name, []).append(found[0].clone())
            )
    tiny.forward(model)
    modules = {name for name, module in model.named_modules() if family.linear(name)}
    assert inputs.keys() <= modules
    assert all(".experts." in name for name in modules - inputs.keys())
    hidden = model.state_dict()[family.hidden]
    for name, found in inputs.items():
        row, index = family.linear(name)
        site = inputs[fill(row.site or row.name, index)]
        assert len(found) == len(site)
        assert all(torch.equal(one, two) for one, two in zip(found, site, strict=True))
        if row.gelu is None:
            continue
        tail = torch.cat([one.flatten(0, -2) for one in found])[:, _first(row.gelu, hidden) :]
        assert tail.min() > -0.2


def _first(gelu: int | str, hidden: Tensor) -> int:
    return gelu if isinstance(gelu, int) else int(hidden.shape[0])


def _whole(fold: Fold) -> bool:
    return fold.columns == (0, None)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        one
        for one in RUNNABLE
        if any(_whole(fold) for fold in one.values[0].folds)
        and one.values[0].name != "wan_animate"  # Wan's folds, in a model that is slow
    ],
)
def test_folds_change_nothing(family: Any, config: Any) -> None:
    """All at once that take whole inputs, with random smooth vectors and centers.

    In float64, but for models that compute some things in float32 whatever they are in.
    """
    single = family.name in SINGLE
    model = tiny.build(config, torch.float32 if single else torch.float64)
    before = tiny.forward(model)
    state = dict(model.state_dict())
    rng = torch.Generator().manual_seed(2)
    for fold in filter(_whole, family.folds):
        blocks = fold.consumers[0].split(".{i}")[0]
        for index in range(depth(state, blocks)):
            first = fill(fold.consumers[0], str(index))
            if f"{first}.weight" not in state:
                continue
            size = state[f"{first}.weight"].shape[1]
            smooth, center = torch.randn(2, size, generator=rng, dtype=model.dtype)
            tiny.fold_into(state, fold, str(index), Transform(torch.exp(0.5 * smooth), center))
    assert any(state[name] is not tensor for name, tensor in model.state_dict().items())
    model.load_state_dict(state, strict=True)
    assert (tiny.forward(model) - before).norm() < (1e-4 if single else 1e-9) * before.norm()
