"""Released models by their recorded headers: recognised, planned for every target, right bytes."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dqconvert.converter.detect import open_canonical, unknown
from dqconvert.converter.families import families
from dqconvert.converter.options import PlanOptions, runs
from dqconvert.converter.plan import make_plan
from dqconvert.formats.targets import targets
from dqconvert.quantizers.errors import PlanError
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import DTYPE_BITS

HERE = Path(__file__).parent
sizes = SimpleNamespace(**runpy.run_path(str(HERE.parent / "tools" / "sizes.py")))
headers = SimpleNamespace(**runpy.run_path(str(HERE.parent / "tools" / "headers.py")))
RECORDED = sorted((HERE / "data" / "headers").glob("*.json"))
OPTIONS = PlanOptions(calibrated=True)
every_model = pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)

WEIGHTS = {
    "flux1-dev": 11_901_408_320,
    "flux1-schnell": 11_891_178_560,
    "qwen-image": 20_430_401_088,
    "sd3.5-large": 8_056_627_520 + 192 * 192 * 2432,  # the table of positions is no parameter
    "wan2.1-t2v-1.3b": 1_418_996_800,
    "wan2.1-t2v-14b": 14_288_491_584,
    "z-image-turbo": 6_154_908_736,
}
"""Parameters as the authors' own model pages count them."""


@every_model
def test_it_is_recognised_and_nothing_is_unknown(path: Path) -> None:
    recorded = sizes.Recorded(path)
    found = open_canonical(recorded, path)
    assert path.stem in found.family.aliases
    assert unknown(found) == []
    assert found.infos.keys() == recorded.infos.keys()
    implied = found.family.config_of(found.infos)
    for key, value in recorded.config.items():
        if key in implied and key not in found.family.assumed:
            assert implied[key] == value, key


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_header_has_as_many_weights_as_the_model(name: str) -> None:
    infos = sizes.Recorded(HERE / "data" / "headers" / f"{name}.json").infos
    assert sum(info.numel for info in infos.values()) == WEIGHTS[name]


def first_plan(goal: Any, source: Any, config: Any) -> Any:
    """In the first scheme that the target takes and the model's widths allow."""
    for scheme in schemes().values():
        plain = goal.NAME in scheme.targets and not (scheme.menu or scheme.mixes)
        if plain and goal.accepts(scheme) is None:
            try:
                return make_plan(source, goal, scheme, OPTIONS, ("m", config))
            except PlanError as error:
                assert re.search("no multiple of|do not make groups", str(error))
    raise AssertionError(f"no scheme for {goal.NAME}")


def plans(path: Path) -> Iterator[tuple[Any, Any]]:
    """The plan for every target that runs the family."""
    recorded = sizes.Recorded(path)
    source = open_canonical(recorded, path)
    config = {**source.family.config_of(source.infos), **recorded.config}
    for goal in targets().values():
        if runs(goal, source.family):
            yield source, first_plan(goal, source, config)


@every_model
def test_every_target_plans_every_weight_once(path: Path) -> None:
    """Kept tensors have as many weights as before, packed ones the bits of their code and more."""
    found = 0
    for source, plan in plans(path):
        found += 1
        kept = packed = 0
        for layer in plan.layers:
            if layer.form is None:
                kept += sum(info.numel for info in layer.outputs.values())
            else:
                packed += layer.form.shape[0] * layer.form.shape[1]
                extra = layer.nbytes * 8 / (layer.form.shape[0] * layer.form.shape[1])
                assert layer.form.spec.bits <= extra < 2.2 * layer.form.spec.bits + 4, layer.name
        total = sum(info.numel for info in source.infos.values())
        biases = total - kept - packed
        assert 0 <= biases < 0.01 * total
        assert plan.nbytes == sum(info.nbytes for info in plan.outputs.values())
        assert all(info.dtype in DTYPE_BITS or info.nbytes for info in plan.outputs.values())
    assert found


def test_rows_of_blocks_are_undone() -> None:
    shapes = {f"a.{i}.b.0.weight": (2, 3) for i in (0, 1, 2, 5, 7, 8)} | {"c": (), "d.1.e": (4,)}
    rows = headers.packed(shapes)
    assert headers.unpacked(rows) == shapes
    assert len(rows) == 5


def test_every_alias_of_a_recorded_family_is_known() -> None:
    names = {alias for family in families().values() for alias in family.aliases}
    assert {path.stem for path in RECORDED} <= names
