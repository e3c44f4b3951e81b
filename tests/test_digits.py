"""The embedded demo model: its size, its planted outliers, and that it draws what it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from digits import flow, judge, plant, words
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[1] / "converter" / "data" / "flux-digits"
WEIGHTS = FOLDER / "transformer" / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return FluxPipeline.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    state: dict[str, Tensor] = load_file(WEIGHTS)
    return state


def velocity(transformer: Any, seed: int) -> Tensor:
    """One forward pass on random inputs of the pipeline's shapes."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    with torch.no_grad():
        result: Tensor = transformer(
            hidden_states=noise(3, 16, 16),
            encoder_hidden_states=noise(3, 16, 64),
            pooled_projections=noise(3, 64),
            timestep=torch.tensor([0.1, 0.5, 1.0]),
            img_ids=flow.image_ids(),
            txt_ids=torch.zeros(16, 3),
            return_dict=False,
        )[0]
    return result


def test_size() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000


def test_prompts() -> None:
    lines = (FOLDER / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert lines == words.calibration_prompts()
    assert len(set(lines)) == 32
    for word in words.DIGITS:
        assert any(word in line for line in lines)


def test_stored_dtypes(stored: dict[str, Tensor]) -> None:
    for name, value in stored.items():
        assert value.dtype == (torch.bfloat16 if value.ndim > 1 else torch.float32), name


def test_linears_suit_every_tile(pipe: Any) -> None:
    linears = judge.block_linears(pipe.transformer)
    assert len(linears) == 12 + 3 * 5
    for name, linear in linears.items():
        assert linear.in_features % 128 == 0 and linear.out_features % 128 == 0, name


def test_planting_round_trip(stored: dict[str, Tensor]) -> None:
    planting = plant.load(FOLDER / "planting.json")
    untouched = plant.unplant(stored, planting)
    again = plant.plant(untouched, planting)
    changed = [name for name in stored if not torch.equal(stored[name], untouched[name])]
    assert any(name.endswith("weight") for name in changed)
    for name, value in stored.items():
        if value.ndim > 1:
            assert torch.equal(again[name], value), name
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-5)


def test_planting_covers_every_site(stored: dict[str, Tensor]) -> None:
    planting = plant.load(FOLDER / "planting.json")
    assert sorted(planting) == sorted(site.name for site in plant.sites(stored))
    for channels in planting.values():
        assert min(channels.exponents) == -2 and max(channels.exponents) in (3, 4)
        assert 1 <= sum(offset != 0 for offset in channels.offsets) <= 4


def test_planting_file(tmp_path: Path) -> None:
    planting = plant.draw({"a": torch.rand(256), "b": torch.rand(256)}, seed=3)
    plant.save(planting, tmp_path / "p.json")
    assert plant.load(tmp_path / "p.json") == planting
    assert plant.draw({"a": torch.rand(256), "b": torch.rand(256)}, seed=3) != planting


def test_planting_keeps_the_function(stored: dict[str, Tensor]) -> None:
    """With the stored planting taken out, and with another one put into random weights."""
    model: Any = flow.build_transformer()
    model.load_state_dict(stored)
    planted = velocity(model, 1)
    model.load_state_dict(plant.unplant(stored, plant.load(FOLDER / "planting.json")))
    plain = velocity(model, 1)
    assert (planted - plain).norm() <= 1e-4 * plain.norm()

    torch.manual_seed(5)
    state = {name: 0.05 * torch.randn_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    plain = velocity(model, 2)
    rms = {site.name: 0.5 + torch.rand(256) for site in plant.sites(state)}
    model.load_state_dict(plant.plant(state, plant.draw(rms, seed=5)))
    planted = velocity(model, 2)
    assert (planted - plain).norm() <= 1e-4 * plain.norm()


@pytest.mark.parametrize("length", [16, 512])
def test_draws_what_it_is_asked(pipe: Any, length: int) -> None:
    asked = [3, 5, 7, 8]
    prompts = [f"a handwritten {words.DIGITS[digit]}" for digit in asked]
    images = judge.draw(pipe, prompts, seed=2, length=length)
    assert judge.read(images) == asked


def test_naive_int4_breaks_it(pipe: Any) -> None:
    """The point of the planting: plain W4A4 loses the pictures of the same noise."""
    prompts = words.calibration_prompts()[:10]
    reference = judge.draw(pipe, prompts, seed=3)
    broken: Any = FluxPipeline.from_pretrained(FOLDER, local_files_only=True)
    judge.break_naively(broken.transformer)
    assert judge.psnr(judge.draw(broken, prompts, seed=3), reference) < 26
