"""Calibration of further pipelines: against plain hooks on diffusers' own calls of them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from dqconvert.calibration import store
from dqconvert.calibration.pipeline import encode
from dqconvert.calibration.prompts import Prompt
from dqconvert.calibration.settings import CalibrationSettings
from dqconvert.converter.job import Job
from dqconvert.converter.prepare import prepare
from dqconvert.quantizers.errors import CalibrationError

torch.set_num_threads(1)
HERE = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
done, refused = checkpoints.done, checkpoints.refused
BUILDERS: dict[str, Any] = {
    name: build
    for kind in ("images", "videos", "others")
    for name, build in runpy.run_path(str(HERE / f"tiny_pipelines_{kind}.py"))["BUILDERS"].items()
}
PICTURES = ("flux_fill", "wan_i2v")
NAMES = (
    "sd3",
    "flux2_klein",
    "chroma",
    "flux_fill",
    "krea2",
    "sdxl",
    "wan_i2v",
    "hunyuan_video",
    "hunyuan_video15",
    "ernie_image",
)
STEPS, SIZE, FRAMES = 2, 32, 5
TEXTS = ("a cat", "two dogs")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DQCONVERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("dqconvert.converter.statistics.FRAMES", FRAMES)


def built(name: str, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BUILDERS[name]().save_pretrained(folder / name)
    Image.effect_noise((48, 32), 90).convert("RGB").save(folder / "picture.png")
    lines = [{"prompt": text, "image": "picture.png"} for text in TEXTS]
    (folder / "pictures.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "prompts.txt").write_text("\n".join(TEXTS))
    return folder / name


def prompts_of(name: str, folder: Path) -> Path:
    return folder / ("pictures.jsonl" if name in PICTURES else "prompts.txt")


def stock(place: Path, sites: list[str], size: int) -> dict[str, Tensor]:
    """The inputs of modules in the pipeline's own calls."""
    import diffusers
    from diffusers.utils import logging

    logging.set_verbosity_error()
    pipe = diffusers.DiffusionPipeline.from_pretrained(place)
    pipe.set_progress_bar_config(disable=True)
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    inputs: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Any:
        def take(_module: Any, args: Any, named: Any) -> None:
            x = args[0] if args else next(iter(named.values()))
            inputs.setdefault(name, []).append(x.reshape(-1, x.shape[-1]).double())

        return take

    for site in sites:
        model.get_submodule(site).register_forward_pre_hook(hook(site), with_kwargs=True)
    picture = Image.open(place.parent / "picture.png").convert("RGB")
    said: dict[str, Any] = {"image": picture} if place.name in PICTURES else {}
    said |= {"mask_image": Image.new("L", (48, 32), 255)} if place.name == "flux_fill" else {}
    said |= {"num_frames": FRAMES} if place.name.startswith(("wan", "hunyuan")) else {}
    for seed, text in enumerate(TEXTS):
        pipe(
            prompt=text,
            height=size,
            width=size,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            **said,
        )
    return {name: torch.cat(rows) for name, rows in inputs.items()}


@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_those_of_the_pipelines_own_calls(name: str, tmp_path: Path) -> None:
    """Of every linear, with guidance as it comes."""
    place = built(name, tmp_path)
    size = 2 * SIZE if name == "hunyuan_video15" else SIZE
    common = ("--calib-steps", STEPS, "--size", f"{size}x{size}", "-q")
    done("calibrate", place, "--calib", prompts_of(name, tmp_path), *common)
    job = Job(str(place), "bnb-int8", "diffusers", calib=prompts_of(name, tmp_path))
    (path,) = (tmp_path / "cache").glob("*.safetensors")
    stats = store.LazyStats(path, path.stem)
    inputs = stock(place, list(stats), size)
    assert stats.keys() == inputs.keys()
    planned = prepare(job).plan.layers
    assert {layer.site for layer in planned if layer.form} <= stats.keys()
    for site, x in inputs.items():
        found = stats[site]
        assert found.count == len(x), site
        assert torch.equal(found.absmax.double(), x.abs().amax(0)), site
        torch.testing.assert_close(found.mean_square.double(), x.square().mean(0))


def test_a_pipeline_that_starts_from_a_picture_says_so(tmp_path: Path) -> None:
    settings = CalibrationSettings(steps=1, height=SIZE, width=SIZE, frames=FRAMES)
    for name in ("wan_i2v", "flux_fill"):
        place = built(name, tmp_path)
        with pytest.raises(CalibrationError, match=r"picture[;,] give each prompt an 'image'"):
            encode(place, [Prompt("a cat")], settings)
        (one,) = encode(place, [Prompt("a cat", image=str(tmp_path / "picture.png"))], settings)
        assert one.values


def test_layers_that_never_ran_are_quantized_without_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the experts of a mixture, some may get no token."""
    from dqconvert.calibration import collect as module

    real, site = module.collect, "transformer_blocks.0.ff.net.2"

    def without(*args: Any) -> Any:
        return {name: one for name, one in real(*args).items() if name != site}

    monkeypatch.setattr(module, "collect", without)
    place = built("chroma", tmp_path)
    common = ("--calib", tmp_path / "prompts.txt", "--calib-steps", 1, "--size", "32x32")
    words = (place, *common, "-o", tmp_path / "out", "--precondition", "auto")
    said = json.loads(done(*words, "--scheme", "bnb-int8", "--target", "diffusers", "--json"))
    errors = {layer["name"]: layer["output_error"] for layer in said["layers"]}
    assert [name for name, error in errors.items() if error is None] == [site]
    assert any("1 layers never ran on these prompts" in note for note in said["notes"])
    words = (place, *common, "-o", tmp_path / "static")
    assert "needs the range" in refused(
        tmp_path / "static", *words, "--scheme", "fp8-tensor", "--target", "comfyui"
    )
