"""Preconditioned conversions: the same function everywhere, chosen only where it helps."""

from __future__ import annotations

import copy
import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dqconvert.converter import precondition
from dqconvert.converter import precondition_choice as choice
from dqconvert.converter import precondition_notes as notes
from dqconvert.converter.canonical import CanonicalSource
from dqconvert.converter.detect import open_canonical
from dqconvert.converter.job import Job
from dqconvert.converter.precondition import Place, Precondition, PreconditionedSource, places
from dqconvert.converter.prepare import prepare
from dqconvert.converter.reopen import reopen
from dqconvert.converter.statistics import statistics
from dqconvert.converter.work import Recipe
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.precondition import Transform
from dqconvert.quantizers.recipe import RecipeOptions

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


STEPS = ("--calib-steps", 2, "--size", "32x32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline with loud channels, two prompts, and a cache of statistics."""
    found: Path = tmp_path_factory.mktemp("preconditioned")
    weights = checkpoints.tiny_pipeline(found / "tiny") / "transformer" / checkpoints.WEIGHTS
    state = load_file(weights)
    rng = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if ".norm" in name and name.endswith("linear.bias"):
            tensor += 0.5 * torch.randn(tensor.shape, generator=rng)
            tensor[::29] = 12.0
        if name.endswith("attn.to_v.bias"):
            tensor += torch.randn(tensor.shape, generator=rng)
    save_file(state, weights, {"format": "pt"})
    (found / "prompts.txt").write_text("a cat\ntwo dogs\n")
    return found


@pytest.fixture(autouse=True)
def cache(request: Any, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if "folder" in request.fixturenames:
        home = request.getfixturevalue("folder")
        monkeypatch.setenv("DQCONVERT_CACHE", str(home / "cache"))


def convert(folder: Path, out: Path, scheme: str, *words: Any) -> dict[str, Any]:
    calib = ("--calib", folder / "prompts.txt", *STEPS)
    said: dict[str, Any] = json.loads(
        done(folder / "tiny", "--scheme", scheme, "-o", out, *calib, *words, "--json")
    )
    return said


@pytest.mark.parametrize(("scheme", "target"), [("int8", "comfyui"), ("svdquant-w4a4", "nunchaku")])
def test_a_preconditioned_output_says_so_and_verifies(
    folder: Path, tmp_path: Path, scheme: str, target: str
) -> None:
    goal = ("--target", target)
    plain = convert(folder, tmp_path / "plain", scheme, *goal)
    said = convert(folder, tmp_path / "out", scheme, *goal, "--precondition", "auto")
    assert plain["precondition"] == {} and len(said["precondition"]) >= 5
    assert {"fold", "center", "fold+center"} >= set(said["precondition"].values())
    assert any("rebase-lora" in note for note in said["notes"])

    verify = ("verify", tmp_path / "out", "--against", folder / "tiny", "--json")
    seen = json.loads(done(*verify))
    assert seen["problems"] == []
    made = {
        row["name"]: row["output_error"] for row in said["layers"] if ".norm" not in row["name"]
    }
    for row in seen["layers"]:
        if row["name"] in made:
            assert row["output_error"] == pytest.approx(made[row["name"]], rel=0.05, abs=1e-3)

    found = reopen(tmp_path / "out")
    (key,) = (key for key in found.source.metadata if key == precondition.KEY)
    assert json.loads(found.source.metadata[key])["file"] == "dqconvert.precondition"
    loaded = precondition.load(found)
    assert loaded is not None and loaded.kinds == said["precondition"]
    with safe_open(tmp_path / "out" / "dqconvert.precondition", "pt") as file:
        for place, transform in loaded.chosen:
            assert torch.equal(file.get_tensor(f"{place.name}.smooth"), transform.smooth)
            assert int(transform.smooth.numel()) == 128


def test_dequantizing_undoes_it(folder: Path, tmp_path: Path) -> None:
    """What comes back is close to the original, not to the folded weights.

    Biases take back what the quantized weights make of the center, which keeps the function.
    """
    convert(folder, tmp_path / "out", "int8", "--precondition", "auto")
    done("dequantize", tmp_path / "out", "-o", tmp_path / "back.safetensors")
    back, original = (
        load_file(tmp_path / "back.safetensors"),
        checkpoints.weights_of(folder / "tiny"),
    )
    for name, tensor in original.items():
        off = (back[name].float() - tensor.float()).norm() / tensor.float().norm()
        assert float(off) < 0.05 or (name.endswith("bias") and float(off) < 2), name


def test_vectors_that_are_too_long_for_the_header_lie_in_the_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precondition, "INLINE", 100)
    out = tmp_path / "out"
    said = convert(folder, out, "int8", "--precondition", "fold")
    assert set(said["precondition"].values()) == {"fold"}
    found = reopen(out)
    assert "vectors" not in json.loads(found.source.metadata[precondition.KEY])
    loaded = precondition.load(found)
    assert loaded is not None and loaded.kinds == said["precondition"]
    (out / "dqconvert.precondition").unlink()
    with pytest.raises(SourceError, match="belongs beside them"):
        precondition.load(reopen(out))


@pytest.mark.parametrize("text", ["{", "[]", '{"kinds": {"no.such": "fold"}, "vectors": {}}'])
def test_broken_metadata_are_one_error(folder: Path, tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    convert(folder, out, "int8")
    (file,) = out.glob("*.safetensors")
    save_file(load_file(file), file, {"format": "pt", precondition.KEY: text})
    with pytest.raises(SourceError, match=precondition.KEY):
        precondition.load(reopen(out))
    assert checkpoints.dqconvert("verify", out, "--against", folder / "tiny").exit_code == 1


def test_without_prompts_it_is_refused(folder: Path, tmp_path: Path) -> None:
    words = (folder / "tiny", "--scheme", "int8", "-o", tmp_path / "out", "--precondition", "auto")
    result = checkpoints.dqconvert(*words)
    assert result.exit_code == 1 and "--precondition auto needs activations" in result.stderr


def test_a_center_needs_biases_and_a_fold_that_of_the_modulation(
    folder: Path, tmp_path: Path
) -> None:
    """A header cannot grow a bias: inputs whose linears have none are only folded."""
    tiny = tmp_path / "tiny"
    shutil.copytree(folder / "tiny", tiny)
    state = checkpoints.weights_of(tiny)
    source = opened(state)
    work = work_of(folder, tiny, tmp_path)
    for place in places(source):
        kinds = {precondition._kind(one) for one in candidates(place, work)}
        assert kinds == {"fold", "center", "fold+center"}
    place = next(place for place in places(source) if place.name.endswith("0.attn.to_q"))
    work = replace(work, source=without(work.source, f"{place.name}.bias"))
    assert {precondition._kind(one) for one in candidates(place, work)} == {"fold"}
    work = replace(work, source=without(work.source, f"{place.modulation}.bias"))
    assert candidates(place, work) == []


def without(source: CanonicalSource, name: str) -> CanonicalSource:
    found = copy.copy(source)
    found.infos = {one: info for one, info in source.infos.items() if one != name}
    return found


def work_of(folder: Path, tiny: Path, tmp_path: Path) -> Recipe:
    job = Job(
        str(tiny),
        "int8",
        calib=folder / "prompts.txt",
        calib_steps=2,
        size=(32, 32),
        output=tmp_path / "out",
    )
    prepared = prepare(job)
    assert prepared.calibration is not None
    stats = statistics(prepared.calibration, prepared.model, prepared.source, lambda _: None)
    return Recipe(prepared.plan, prepared.source, stats, RecipeOptions())


def candidates(place: Place, work: Recipe) -> list[Transform]:
    readers = [choice._Reader(layer, place, work) for layer in choice.readers_of(place, work)]
    return list(choice._candidates(place, readers, work, "auto"))


def test_nothing_is_kept_that_does_not_help(folder: Path, tmp_path: Path) -> None:
    """Of every place, what is chosen errs less than what there was; the advice says as much."""
    work = work_of(folder, folder / "tiny", tmp_path)
    outcomes = choice.choose(work, "auto", lambda done, total: None)
    assert len(outcomes) == 7
    assert all(one.after <= one.before for one in outcomes)
    assert any(one.after < 0.5 * one.before for one in outcomes)
    found = choice.precondition_of(outcomes)
    assert found is not None and notes.gain(outcomes) > 1
    advice = notes.advice(work, [])
    assert advice is not None and "--precondition auto would take about" in advice
    better = replace(
        work,
        source=PreconditionedSource(work.source, found),
        stats=precondition.PreconditionedStats(work.stats, found, work.source.family),
    )
    assert notes.gain(choice.choose(better, "auto", lambda done, total: None)) < 1
    assert notes.advice(better, []) is None


def test_awq_folds_by_itself_and_says_what_it_left_out(folder: Path, tmp_path: Path) -> None:
    said = convert(folder, tmp_path / "out", "awq-w4a16", "--target", "comfyui")
    assert said["options"]["precondition"] == "fold"
    assert set(said["precondition"].values()) == {"fold"}
    (note,) = (note for note in said["notes"] if "AWQ scale" in note)
    assert "double_blocks.0.img_mlp.2" in note and "img_attn.qkv" not in note
