"""gguf-auto: of all mixes of a size, the one whose layers err least, as reports give errors."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dqconvert.converter import allotment
from dqconvert.converter.job import Job
from dqconvert.converter.layers import problem_of
from dqconvert.converter.plan import LayerPlan, Plan
from dqconvert.converter.prepare import Prepared, prepare
from dqconvert.quantizers import recipe
from dqconvert.quantizers.errors import PlanError
from dqconvert.quantizers.recipe import RecipeOptions
from dqconvert.quantizers.spec import TensorInfo
from dqconvert.quantizers.tensors import LayerStats

torch.set_num_threads(1)
checkpoints = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).with_name("checkpoints.py")), run_name="checkpoints")
)
done = checkpoints.done

FIXED = (
    *("q2_k", "q3_k", "q3_k_s", "q3_k_m", "q3_k_l", "iq4_xs", "q4_0", "q4_k", "q4_k_s", "q4_k_m"),
    *("iq4_nl", "q4_1", "q5_0", "q5_k", "q5_k_s", "q5_k_m", "q5_1", "q6_k", "q8_0"),
)
"""Every type and mix that each of the three readers decodes."""


def prepared(folder: Path, scheme: str, **words: Any) -> Prepared:
    job = Job("flux-digits", scheme, output=folder / "out", overwrite=True, workers=2, **words)
    return prepare(job)


def allotted(folder: Path, bits: float | None, **words: Any) -> Prepared:
    return allotment.allot(prepared(folder, "gguf-auto", bits=bits, **words), {}, lambda _: None)


def quantized(plan: Plan) -> list[LayerPlan]:
    return [layer for layer in plan.layers if layer.form]


def bits_of(plan: Plan) -> float:
    """Of a weight, in the layers that are quantized."""
    forms = [layer.form for layer in quantized(plan) if layer.form]
    sizes = [TensorInfo(form.spec.code.upper(), form.shape).nbytes for form in forms]
    return 8 * sum(sizes) / sum(rows * columns for rows, columns in (f.shape for f in forms))


class Errors:
    """Squared weight error of each layer under each type, measured once."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], float] = {}

    def total(self, found: Prepared) -> float:
        return sum(self.of(layer, found) for layer in quantized(found.plan))

    def of(self, layer: LayerPlan, found: Prepared) -> float:
        assert layer.form is not None and layer.scheme is not None
        key = (layer.name, layer.form.spec.code)
        if key not in self.known:
            problem = problem_of(layer, found.source, {})
            (q,) = recipe.quantize_group([problem], layer.scheme, RecipeOptions(rounding="mse"))
            self.known[key] = recipe.weight_error(q, problem.weight) ** 2
        return self.known[key]


@pytest.fixture(scope="module")
def errors() -> Errors:
    return Errors()


@pytest.mark.parametrize("name", FIXED)
def test_no_fixed_mix_errs_less_at_its_size(name: str, tmp_path: Path, errors: Errors) -> None:
    fixed = prepared(tmp_path, f"gguf-{name}")
    size = bits_of(fixed.plan)
    auto = allotted(tmp_path, size)
    assert 0.99 * size < bits_of(auto.plan) <= size
    assert errors.total(auto) <= errors.total(fixed) * (1 + 1e-6)
    if 2.7 < size < 8.5:  # at the ends there is nothing to choose
        assert errors.total(auto) < 0.98 * errors.total(fixed)


def test_more_bits_never_err_more(tmp_path: Path, errors: Errors) -> None:
    sums = [errors.total(allotted(tmp_path, bits)) for bits in (2.625, 3, 4.1, 4.5, 5.3, 7, 8.5)]
    assert sums == sorted(sums, reverse=True)


def test_the_note_counts_the_types(tmp_path: Path) -> None:
    found = allotted(tmp_path, None)
    (note,) = found.found
    counts: dict[str, int] = {}
    for layer in quantized(found.plan):
        assert layer.form is not None
        code = layer.form.spec.code.upper()
        counts[code] = counts.get(code, 0) + 1
    size, _, types = note.partition(" bits of a weight: ")
    said = dict(reversed(one.split()) for one in types.partition(";")[0].split(", "))
    assert float(size) == pytest.approx(bits_of(found.plan), abs=0.005)
    assert {code: int(count) for code, count in said.items()} == counts and len(counts) > 2
    assert note.endswith("--calib goes by those of outputs")


def test_beyond_the_largest_type_all_have_it(tmp_path: Path) -> None:
    found = allotted(tmp_path, 12)
    (note,) = found.found
    assert {layer.form.spec.code for layer in quantized(found.plan) if layer.form} == {"q8_0"}
    assert note.startswith("8.50 bits of a weight: 19 Q8_0, the largest there are")


def test_what_is_too_small_is_refused_with_the_least(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"--bits: these layers take 2\.63 at least"):
        allotted(tmp_path, 2.5)


def test_the_users_word_stands(tmp_path: Path) -> None:
    """Its layers have their type, and the others meet the budget among themselves."""
    words: dict[str, Any] = {"overrides": (("attn", "gguf-q8_0"),), "keep": "norm"}
    plan = allotted(tmp_path, 4, **words).plan
    forms = {layer.name: layer.form for layer in quantized(plan) if layer.form}
    given = {name for name in forms if "attn" in name or "linear1" in name}
    assert len(given) == 7 and {forms[name].spec.code for name in given} == {"q8_0"}
    assert not [name for name in forms if "mod" in name]
    others = tuple(layer for layer in plan.layers if layer.form and layer.name not in given)
    assert 3.9 < bits_of(replace(plan, layers=others)) <= 4


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (256, {"q2_k", "q3_k", "iq4_xs", "q4_k", "q4_1", "q5_k", "q5_1", "q6_k", "q8_0"}),
        (320, {"iq4_nl", "q4_1", "q5_0", "q5_1", "q8_0"}),
        (260, {"f16"}),
    ],
)
def test_a_width_allows_what_its_blocks_divide(
    width: int, expected: set[str], tmp_path: Path
) -> None:
    plan = prepared(tmp_path, "gguf-auto").plan
    layer = quantized(plan)[0]
    assert layer.form is not None and layer.scheme is not None
    form = replace(layer.form, shape=(16, width))
    spec = plan.target.fitting(form.spec, form.shape)  # type: ignore[attr-defined]
    outputs = {"weight": TensorInfo(spec.code.upper(), form.shape)}
    scheme = replace(layer.scheme, weight=spec)
    menu = allotment._menu(replace(layer, form=form, outputs=outputs, scheme=scheme), plan)
    assert {one.weight.code for one in menu.values()} == expected
    for size, one in menu.items():
        assert size == TensorInfo(one.weight.code.upper(), form.shape).nbytes


class Inputs(Mapping[str, LayerStats]):
    """White inputs of linears of some width, but zeros where their name holds a word."""

    def __init__(self, silent: str, widths: Mapping[str, int]) -> None:
        self.silent, self.widths = silent, widths

    def __getitem__(self, site: str) -> LayerStats:
        rows = torch.randn(64, self.widths[site], generator=torch.Generator().manual_seed(0))
        rows *= self.silent not in site
        square = rows.square().mean(0)
        return LayerStats(64, rows.abs().amax(0), rows.mean(0), square, None, rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self.widths)

    def __len__(self) -> int:
        return len(self.widths)


def test_outputs_decide_where_inputs_are_known(tmp_path: Path) -> None:
    """What never hears anything has the smallest type, and leaves its bits to the others."""
    found = prepared(tmp_path, "gguf-auto", bits=4.0)
    silent = "single_transformer_blocks.1"
    widths = {layer.site: layer.form.shape[1] for layer in quantized(found.plan) if layer.form}
    refined = allotment.allot(found, Inputs(silent, widths), lambda _: None)
    layers = quantized(refined.plan)
    codes = {layer.name: layer.form.spec.code for layer in layers if layer.form}
    unheard = {layer.name for layer in layers if silent in layer.site}
    assert len(unheard) == 3 and {codes[name] for name in unheard} == {"q2_k"}
    assert "q2_k" not in {codes[name] for name in codes.keys() - unheard}
    assert "--calib" not in refined.found[0]


def test_rows_at_equal_distances_stand_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = allotted(tmp_path, 4.3)
    monkeypatch.setattr(allotment, "ROWS", 128)
    assert Errors().total(allotted(tmp_path, 4.3)) < 1.01 * Errors().total(whole)


def test_end_to_end(tmp_path: Path) -> None:
    """The note travels into the manifest, and verify finds the file sound."""
    words = ("--scheme", "gguf-auto", "--bits", 3.44, "-o", tmp_path / "out", "--json")
    said = json.loads(done("flux-digits", *words))
    assert any(note.startswith("3.4") for note in said["notes"])
    assert "sound" in done("verify", tmp_path / "out", "--against", "flux-digits")
    (tmp_path / "out" / "dqconvert.json").unlink()
    assert "sound" in done("verify", tmp_path / "out")
