"""Calibration of the pipelines besides FLUX: against diffusers' own runs, and in conversions."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dqconvert.calibration.collect import Subject, collect
from dqconvert.calibration.prompts import Prompt
from dqconvert.calibration.settings import CalibrationSettings, Site
from dqconvert.calibration.signature import read_signature
from dqconvert.converter.families import families
from dqconvert.converter.job import Job
from dqconvert.converter.prepare import prepare
from dqconvert.quantizers.errors import CalibrationError, MissingExtra
from dqconvert.quantizers.tensors import LayerStats

torch.set_num_threads(1)
HERE = Path(__file__).parent
tiny = SimpleNamespace(**runpy.run_path(str(HERE / "tiny_pipelines.py")))
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
done, refused = checkpoints.done, checkpoints.refused

SETTINGS = CalibrationSettings(steps=3, height=32, width=32, frames=5, rows=8)
PROMPTS = (Prompt("a cat"), Prompt("two dogs", seed=11, negative_prompt="blurry"))
SITES = {
    "qwen_image": (
        "transformer_blocks.0.img_mod.1",
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.add_q_proj",
        "transformer_blocks.0.txt_mlp.net.2",
    ),
    "wan": (
        "blocks.0.attn1.to_q",
        "blocks.1.attn2.to_k",
        "blocks.1.attn2.to_out.0",
        "blocks.1.ffn.net.2",
    ),
    "z_image": (
        "noise_refiner.0.adaLN_modulation.0",
        "context_refiner.0.attention.to_q",
        "layers.0.feed_forward.w2",
        "all_final_layer.2-1.linear",
    ),
}
RUNS = [
    ("qwen_image", "transformer"),
    ("wan", "transformer"),
    ("wan_two_experts", "transformer"),
    ("wan_two_experts", "transformer_2"),
    ("z_image", "transformer"),
]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every tiny pipeline under its name, two prompts, and room for the cache."""
    folder: Path = tmp_path_factory.mktemp("pipelines")
    for name in tiny.BUILDERS:
        tiny.build_tiny(name, folder / name)
    (folder / "prompts.txt").write_text("a cat\ntwo dogs\n")
    return folder


@pytest.fixture(autouse=True)
def cache(pipelines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DQCONVERT_CACHE", str(pipelines / "cache"))


def sites_of(name: str) -> tuple[Site, ...]:
    return tuple(Site(site, site) for site in SITES[name.removesuffix("_two_experts")])


def subject_of(pipeline: Path, component: str = "transformer") -> Subject:
    tensors = load_file(pipeline / component / checkpoints.WEIGHTS)

    def weights(prefix: str) -> Mapping[str, Tensor]:
        return {name: t for name, t in tensors.items() if name.startswith(prefix)}

    config = json.loads((pipeline / component / "config.json").read_text())
    family = families()[pipeline.name.removesuffix("_two_experts")]
    blocks = tuple(name for name in family.blocks if weights(f"{name}."))
    return Subject(pipeline, config, weights, blocks, component)


def stock(pipeline: Path, component: str, settings: CalibrationSettings) -> dict[str, Tensor]:
    """The inputs of the sites in diffusers' own calls, made as its examples make them."""
    import diffusers
    from diffusers.utils import logging

    logging.set_verbosity_error()
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    inputs: dict[str, list[Tensor]] = {}
    for site in sites_of(pipeline.name):
        getattr(pipe, component).get_submodule(site.module).register_forward_pre_hook(
            lambda _, args, name=site.name: inputs.setdefault(name, []).append(
                args[0].reshape(-1, args[0].shape[-1]).float()
            )
        )
    video = {"num_frames": settings.frames} if pipeline.name.startswith("wan") else {}
    default = " " if pipeline.name == "qwen_image" else None
    for prompt in settings.chosen(PROMPTS):
        pipe(
            prompt.prompt,
            negative_prompt=prompt.negative_prompt or default,
            height=settings.height,
            width=settings.width,
            num_inference_steps=settings.steps,
            generator=torch.Generator().manual_seed(prompt.seed or 0),
            output_type="latent",
            **video,
        )
    return {name: torch.cat(rows).double() for name, rows in inputs.items()}


def assert_same(found: Mapping[str, LayerStats], inputs: Mapping[str, Tensor]) -> None:
    """Every row was seen once, and each held row is one of them, bit for bit."""
    assert found.keys() == inputs.keys()
    for name, x in inputs.items():
        stats = found[name]
        assert stats.count == len(x), name
        assert torch.equal(stats.absmax.double(), x.abs().amax(0)), name
        torch.testing.assert_close(stats.mean.double(), x.mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(stats.mean_square.double(), x.square().mean(0))
        held = stats.rows.double()
        assert len(held) and all((x == row).all(1).any() for row in held), name
        assert stats.second_moment is not None
        both = stats.second_moment.double() * (len(x) - len(held)) + held.T @ held
        exact = x.T @ x
        torch.testing.assert_close(both, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize(("name", "component"), RUNS)
def test_statistics_are_those_of_the_stock_pipelines_inputs(
    pipelines: Path, name: str, component: str
) -> None:
    """With guidance as it comes: both passes of a step, 512 tokens of Wan's text, each expert."""
    subject = subject_of(pipelines / name, component)
    found = collect(subject, sites_of(name), PROMPTS, SETTINGS)
    assert_same(found, stock(pipelines / name, component, SETTINGS))


@pytest.mark.parametrize("name", ["qwen_image", "wan", "z_image"])
def test_without_guidance_a_step_is_one_pass(pipelines: Path, name: str) -> None:
    """As distilled models run, by a prompt's own word or by the settings."""
    subject, sites = subject_of(pipelines / name), sites_of(name)[:1]

    def rows(settings: CalibrationSettings, prompt: Prompt) -> int:
        return collect(subject, sites, [prompt], settings)[sites[0].name].count

    off = CalibrationSettings(steps=1, height=32, width=32, frames=5, guidance=0.0)
    on = CalibrationSettings(steps=1, height=32, width=32, frames=5)
    both = rows(on, Prompt("a cat"))
    assert both == 2 * rows(off, Prompt("a cat")) == rows(off, Prompt("a cat", guidance=3.0))


def test_an_expert_in_bfloat16_keeps_what_must_be_wide(pipelines: Path) -> None:
    from dqconvert.calibration.denoiser import fill, skeleton
    from dqconvert.calibration.pipeline import open_denoiser

    subject = subject_of(pipelines / "wan_two_experts", "transformer_2")
    settings = CalibrationSettings(steps=1, dtype="bfloat16")
    model = skeleton(subject.config)
    fill(model, subject.weights, settings)
    pipe = open_denoiser(subject.pipeline_dir, model, settings, "transformer_2")
    assert pipe.transformer_2 is model
    ours, theirs = (m.state_dict() for m in (model, pipe.transformer))
    assert {k: t.dtype for k, t in ours.items()} == {k: t.dtype for k, t in theirs.items()}
    assert len({t.dtype for t in theirs.values()}) == 2


PRECONDITIONED, NEAREST = ("--precondition", "auto"), ("--rounding", "rtn")
CONVERSIONS = [
    ("qwen_image", "nvfp4", "lightx2v", PRECONDITIONED),
    ("qwen_image", "fp8-tensor", "lightx2v", ()),
    ("qwen_image", "convrot-mixed", "comfyui", ()),
    ("qwen_image", "awq-w4a16", "diffusers", PRECONDITIONED),
    ("wan", "nvfp4", "lightx2v", ()),
    ("wan", "fp8-tensor", "lightx2v", PRECONDITIONED),
    ("wan", "convrot-mixed", "comfyui", ()),
    ("wan", "awq-w4a16", "diffusers", ()),
    ("wan", "svdquant-w4a4", "diffusers", ("--rank", 16)),
    ("wan_two_experts", "fp8-tensor", "lightx2v", ("--component", "transformer_2")),
    ("z_image", "nvfp4", "lightx2v", NEAREST),
    ("z_image", "fp8-tensor", "lightx2v", NEAREST),
]


@pytest.mark.parametrize(("name", "scheme", "target", "words"), CONVERSIONS)
def test_calibrated_conversions_are_sound(
    pipelines: Path, tmp_path: Path, name: str, scheme: str, target: str, words: tuple[Any, ...]
) -> None:
    out, model = tmp_path / "out", pipelines / name
    common = ("--calib", pipelines / "prompts.txt", "--calib-steps", 3, "--size", "32x32")
    said = json.loads(
        done(model, "--scheme", scheme, "--target", target, "-o", out, *common, *words, "--json")
    )
    made = {row["name"]: row["output_error"] for row in said["layers"]}
    assert all(error is not None and error > 0 for error in made.values())
    seen = json.loads(done("verify", out, "--against", model, "--json"))
    assert seen["problems"] == []
    errors = {layer["name"]: layer["output_error"] for layer in seen["layers"]}
    assert errors == pytest.approx(made, rel=0.05, abs=1e-4)
    folds = families()[name.removesuffix("_two_experts")].folds
    assert bool(said["precondition"]) <= bool(folds)
    if name == "qwen_image" and "--precondition" in words:
        assert said["precondition"]
    assert any("17 frames, 32x32" in note for note in said["notes"]) == name.startswith("wan")


def planned(model: Path, prompts: Path, **words: Any) -> Any:
    return prepare(Job(str(model), "nvfp4", "lightx2v", calib=prompts, **words))


def test_what_is_chosen_for_the_user_is_said(pipelines: Path, tmp_path: Path) -> None:
    """Videos are short and small, models made without guidance run without, experts are named."""
    prompts = pipelines / "prompts.txt"
    wan = planned(pipelines / "wan_two_experts", prompts)
    settings = wan.calibration.settings
    assert (settings.frames, settings.height, settings.width) == (17, 256, 416)
    assert any("17 frames, 256x416" in note for note in wan.notes)
    assert any("transformer of two" in note for note in wan.notes)
    second = planned(pipelines / "wan_two_experts", prompts, component="transformer_2")
    assert second.calibration.key != wan.calibration.key
    assert any("transformer_2 of two" in note for note in second.notes)
    plain = planned(pipelines / "z_image", prompts)
    assert plain.calibration.settings.guidance is None and not plain.notes
    turbo = shutil.copytree(pipelines / "z_image", tmp_path / "Z-Image-Turbo")
    fast = planned(turbo, prompts)
    assert fast.calibration.settings.guidance == 0 and "without guidance" in fast.notes[0]


def test_sizes_that_a_pipeline_refuses_are_one_error(pipelines: Path) -> None:
    prompts = pipelines / "prompts.txt"
    for name, words in (("wan", "divisible by 16"), ("z_image", "divisible by 16")):
        command = ("calibrate", pipelines / name, "--calib", prompts, "--size", "24x24", "-q")
        assert words in refused(pipelines / name, *command)


def test_a_missing_expert_is_named(pipelines: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pipelines / "wan_two_experts", tmp_path / "wan_two_experts")
    shutil.rmtree(folder / "transformer_2")
    with pytest.raises(CalibrationError, match=r"transformer_2: this part .* is missing"):
        collect(subject_of(folder), sites_of("wan"), PROMPTS, SETTINGS)


def test_a_pipeline_that_cleans_its_text_needs_ftfy(
    pipelines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ftfy", None)
    with pytest.raises(MissingExtra, match="ftfy"):
        collect(subject_of(pipelines / "wan"), sites_of("wan"), PROMPTS, SETTINGS)


def test_what_pipelines_want_is_read_from_their_code() -> None:
    import diffusers

    def read(name: str) -> Any:
        return read_signature(getattr(diffusers, name))

    guided = ["QwenImagePipeline", "QwenImageEditPipeline"]
    plain = ["FluxPipeline", "WanPipeline", "ZImagePipeline"]
    assert [read(name).guided for name in guided + plain] == [True] * 2 + [False] * 3
    assert list(read("WanImageToVideoPipeline").required) == ["image"]
    assert read("FluxControlPipeline").picture == "control_image"
    assert not any(read(name).picture for name in plain)
    assert read("WanPipeline").text_length == read("FluxPipeline").text_length == 512
