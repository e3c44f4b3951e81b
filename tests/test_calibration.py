"""Calibration end to end, on a tiny FLUX: against the stock pipeline, and against float64."""

from __future__ import annotations

import importlib.util
import json
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dqconvert.calibration.collect import Subject, collect, collecting
from dqconvert.calibration.denoiser import blocks_of, fill, skeleton
from dqconvert.calibration.lockstep import Lockstep, Resident
from dqconvert.calibration.pipeline import drawing, encode, open_denoiser
from dqconvert.calibration.prompts import Prompt
from dqconvert.calibration.require import require
from dqconvert.calibration.settings import CalibrationSettings, Site
from dqconvert.calibration.signature import read_signature
from dqconvert.quantizers.errors import CalibrationError, MissingExtra
from dqconvert.quantizers.tensors import LayerStats

HERE = Path(__file__).parent
FIELDS = ("absmax", "mean", "mean_square", "second_moment", "rows")
SETTINGS = CalibrationSettings(steps=2, rows=8, guidance=2.5, max_sequence_length=16)
PROMPTS = (Prompt("a cat"), Prompt("two dogs", seed=11), Prompt("a cat"))
SITES = (
    Site("txt.qkv", "transformer_blocks.1.attn.add_q_proj"),
    Site("img.qkv", "transformer_blocks.0.attn.to_q"),
    Site("mod", "transformer_blocks.0.norm1.linear"),
    Site("single.out", "single_transformer_blocks.0.proj_out"),
    Site("last", "proj_out"),
)


def tiny_flux() -> Any:
    spec = importlib.util.spec_from_file_location("tiny_flux", HERE / "tiny_flux.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("calibration") / "flux"
    built: Path = tiny_flux().build_tiny_pipeline(where, head_dim=32, layers=2)
    return built


def subject_of(folder: Path, change: Callable[[dict[str, Tensor]], object] = len) -> Subject:
    tensors = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    change(tensors)

    def weights(prefix: str) -> Mapping[str, Tensor]:
        return {name: t for name, t in tensors.items() if name.startswith(prefix)}

    config = json.loads((folder / "transformer" / "config.json").read_text())
    return Subject(folder, config, weights, ("transformer_blocks", "single_transformer_blocks"))


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    return subject_of(folder)


@pytest.fixture(scope="module")
def stats(subject: Subject) -> dict[str, LayerStats]:
    return collect(subject, SITES, PROMPTS, SETTINGS)


class Stock:
    """diffusers' own pipeline, one prompt after another, with the inputs of the sites on record."""

    def __init__(self, folder: Path) -> None:
        from diffusers import FluxPipeline

        pipe = FluxPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        self.inputs: dict[str, list[Tensor]] = {site.name: [] for site in SITES}
        for site in SITES:
            pipe.transformer.get_submodule(site.module).register_forward_pre_hook(
                lambda _, args, name=site.name: self.inputs[name].append(
                    args[0].reshape(-1, args[0].shape[-1]).clone()
                )
            )
        self.latents = [
            pipe(
                prompt.prompt,
                height=32,
                width=32,
                num_inference_steps=2,
                guidance_scale=2.5,
                max_sequence_length=16,
                generator=torch.Generator().manual_seed(prompt.seed),
                output_type="latent",
                return_dict=False,
            )[0]
            for prompt in SETTINGS.chosen(PROMPTS)
        ]


@pytest.fixture(scope="module")
def stock(folder: Path) -> Stock:
    return Stock(folder)


def drawings(subject: Subject, model: nn.Module) -> list[Callable[[], Tensor]]:
    chosen = SETTINGS.chosen(PROMPTS)
    encoded = encode(subject.pipeline_dir, chosen, SETTINGS)
    pipe = open_denoiser(subject.pipeline_dir, model, SETTINGS)
    return [
        drawing(pipe, prompt, embeds, SETTINGS)
        for prompt, embeds in zip(chosen, encoded, strict=True)
    ]


def test_latents_in_lockstep_are_those_of_the_stock_pipeline(
    subject: Subject, stock: Stock
) -> None:
    """Bit for bit, alone and side by side, and every block is entered once a step."""
    model = skeleton(subject.config)
    fill(model, subject.weights, SETTINGS)
    alone = [draw() for draw in drawings(subject, model)]
    entered: list[str] = []

    class Counting(Resident):
        def enter(self, name: str, module: object) -> None:
            assert module is model.get_submodule(name)
            entered.append(name)

    blocks = blocks_of(model, subject.blocks)
    lockstep = Lockstep[nn.Module](blocks, Counting())
    for name, block in blocks.items():
        block.register_forward_pre_hook(lambda _, __, name=name: lockstep.arrive(name))
    together = lockstep.run(drawings(subject, model))
    for index in range(3):
        assert torch.equal(alone[index], stock.latents[index])
        assert torch.equal(together[index], stock.latents[index])
    assert not torch.equal(together[0], together[2]), "equal prompts have noise of their own"
    order = ["transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0"]
    assert entered == order * 2


@pytest.mark.parametrize("site", [site.name for site in SITES])
def test_statistics_are_those_of_the_stock_pipelines_inputs(
    stats: dict[str, LayerStats], stock: Stock, site: str
) -> None:
    found, x = stats[site], torch.cat(stock.inputs[site]).double()
    assert found.count == len(x)
    assert torch.equal(found.absmax.double(), x.abs().amax(0))
    torch.testing.assert_close(found.mean.double(), x.mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.mean_square.double(), x.square().mean(0), rtol=1e-5, atol=0)
    held = found.rows.double()
    assert len(held) == min(8, len(x) // 8 or 1)
    assert all((x == row).all(1).any() for row in held), "held rows are inputs, bit for bit"
    assert found.second_moment is not None
    both = found.second_moment.double() * (len(x) - len(held)) + held.T @ held
    torch.testing.assert_close(both, x.T @ x, rtol=1e-5, atol=1e-5 * float((x.T @ x).abs().max()))


def test_calibrating_again_gives_the_same_bits(
    subject: Subject, stats: dict[str, LayerStats]
) -> None:
    again = collect(subject, SITES[::-1], PROMPTS, SETTINGS)
    assert set(again) == set(stats)
    for site in stats:
        assert again[site].count == stats[site].count
        for field in FIELDS:
            assert torch.equal(getattr(again[site], field), getattr(stats[site], field))


def test_progress_counts_the_steps_of_all_prompts(subject: Subject) -> None:
    seen: list[tuple[int, int]] = []
    settings = CalibrationSettings(2, samples=2, moments=False, max_sequence_length=16)
    found = collect(
        subject, SITES[:1], PROMPTS, settings, lambda done, total: seen.append((done, total))
    )
    assert seen == [(2, 4), (4, 4)], "both prompts end a step in the pass of the same block"
    assert found["txt.qkv"].second_moment is None


def test_a_progress_that_raises_or_a_closed_generator_stops_it(subject: Subject) -> None:
    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(subject, SITES, PROMPTS, SETTINGS, fail)
    steps = collecting(subject, SITES, PROMPTS, SETTINGS)
    assert next(steps) == (3, 6)
    steps.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("lockstep")]


def test_bfloat16_and_a_size_of_ones_own(subject: Subject) -> None:
    settings = CalibrationSettings(
        1, height=64, width=32, samples=1, dtype="bfloat16", max_sequence_length=16
    )
    found = collect(subject, SITES[1:2], PROMPTS, settings)["img.qkv"]
    assert found.count == 8, "4 x 2 tokens of 16 pixels"
    assert torch.equal(found.rows, found.rows.bfloat16().float())


def test_a_negative_prompt_is_run_where_guidance_is_true(folder: Path) -> None:
    """FLUX without its guidance input: guidance means two passes a step."""
    from diffusers import FluxTransformer2DModel

    subject = subject_of(folder)
    config = {**subject.config, "guidance_embeds": False}
    model = FluxTransformer2DModel.from_config(config)
    plain = Subject(
        folder,
        config,
        lambda prefix: {k: v for k, v in model.state_dict().items() if k.startswith(prefix)},
        subject.blocks,
    )
    prompts = [Prompt("a cat", negative_prompt="a dog"), Prompt("a cat")]
    found = collect(plain, SITES[1:2], prompts, SETTINGS)["img.qkv"]
    assert found.count == 4 * 2 * (2 + 1), "tokens, steps, and passes of the two prompts"


def test_nothing_is_said_and_nothing_stays_switched(
    subject: Subject, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    from diffusers.utils import logging

    before = logging.get_verbosity()
    collect(subject, SITES[:1], PROMPTS[:1], SETTINGS)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert logging.get_verbosity() == before


def break_weight(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].fill_(value)


def test_activations_that_overflow_name_site_and_prompt(folder: Path) -> None:
    broken = subject_of(folder, break_weight("transformer_blocks.0.attn.to_q.weight", float("nan")))
    with pytest.raises(CalibrationError, match=r"txt\.qkv: prompt 1 \('a cat'\) feeds it NaN"):
        collect(broken, SITES[:1], PROMPTS, SETTINGS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("x_embedder.weight"), "x_embedder.weight is missing"),
        (lambda t: t.update({"x_embedder.w": torch.ones(1)}), "x_embedder.w is unknown"),
        (lambda t: t.update({"proj_out.bias": torch.ones(3)}), r"proj_out.bias is \(3,\), not"),
        (lambda t: t.clear(), "is missing; .* more"),
    ],
)
def test_a_checkpoint_that_does_not_fit(
    folder: Path, change: Callable[[dict[str, Tensor]], object], words: str
) -> None:
    with pytest.raises(CalibrationError, match=f"does not fit FluxTransformer2DModel.*{words}"):
        collect(subject_of(folder, change), SITES, PROMPTS, SETTINGS)


def test_an_unknown_class_list_or_module(subject: Subject, folder: Path) -> None:
    other = Subject(folder, {"_class_name": "NoModel"}, subject.weights, ())
    with pytest.raises(CalibrationError, match=r"'NoModel'.*pip install -U diffusers"):
        collect(other, SITES, PROMPTS, SETTINGS)
    other = Subject(folder, subject.config, subject.weights, ("blocks",))
    with pytest.raises(CalibrationError, match="no list of blocks 'blocks'"):
        collect(other, SITES, PROMPTS, SETTINGS)
    with pytest.raises(CalibrationError, match=r"no module 'proj_uot'.*mean 'proj_out'"):
        collect(subject, [*SITES, Site("x", "proj_uot")], PROMPTS, SETTINGS)
    with pytest.raises(ValueError, match="same name"):
        collect(subject, [SITES[0], SITES[0]], PROMPTS, SETTINGS)


def test_folders_that_are_no_pipeline(subject: Subject, folder: Path, tmp_path: Path) -> None:
    def attempt(index: str | None, keep: tuple[str, ...] = ()) -> str:
        where = tmp_path / "pipe"
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir()
        for name in keep:
            shutil.copytree(folder / name, where / name)
        if index is not None:
            (where / "model_index.json").write_text(index)
        moved = Subject(where, subject.config, subject.weights, subject.blocks)
        with pytest.raises(CalibrationError) as caught:
            collect(moved, SITES, PROMPTS, SETTINGS)
        return str(caught.value)

    text = (folder / "model_index.json").read_text()
    assert "whole pipeline folder" in attempt(None)
    assert "whole pipeline folder" in attempt("[]")
    assert "'NoPipeline'" in attempt(text.replace("FluxPipeline", "NoPipeline"))
    assert "DDPMPipeline cannot be calibrated" in attempt('{"_class_name": "DDPMPipeline"}')
    assert "text_encoder: cannot be loaded" in attempt(text)
    encoders = ("text_encoder", "text_encoder_2")
    rest = (*encoders, "scheduler")
    assert "tokenizer: this part of the pipeline is missing" in attempt(text, rest)
    rest = (*rest, "tokenizer", "tokenizer_2")
    assert "vae: this part of the pipeline is missing" in attempt(text, rest)


def test_a_picture_for_a_pipeline_that_takes_none(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"FluxPipeline takes no picture.*'a cat'"):
        collect(subject, SITES, [Prompt("a cat", image=str(tmp_path / "x.png"))], SETTINGS)


def test_what_a_pipeline_takes_is_read_from_its_code() -> None:
    import diffusers

    names = ("FluxPipeline", "QwenImagePipeline", "WanPipeline", "StableDiffusion3Pipeline")
    assert all(read_signature(getattr(diffusers, name)).takes_negative for name in names)
    assert not read_signature(diffusers.Flux2KleinPipeline).takes_negative


def test_guidance_goes_to_the_option_that_works() -> None:
    import diffusers

    qwen = read_signature(diffusers.QwenImagePipeline)
    assert qwen.guidance({}) == qwen.guidance({"guidance_embeds": False}) == "true_cfg_scale"
    assert qwen.guidance({"guidance_embeds": True}) == "guidance_scale"
    assert read_signature(diffusers.WanPipeline).guidance({}) == "guidance_scale"


def test_a_missing_package_is_named() -> None:
    with pytest.raises(MissingExtra, match=r"'no_such_package'.*dqconvert\[calibration\]"):
        require("no_such_package", "utils")


def test_the_default_digits_pipeline_calibrates() -> None:
    """On the committed model, where it exists: a few hundred rows a site, all finite."""
    folder = HERE.parent / "converter" / "data" / "flux-digits"
    if not (folder / "model_index.json").exists():
        pytest.skip("flux-digits is not built yet")
    subject = subject_of(folder)
    site = Site("x", "transformer_blocks.0.attn.to_q")
    settings = CalibrationSettings(1, max_sequence_length=16)
    found = collect(subject, [site], [Prompt("a handwritten seven")], settings)["x"]
    assert found.count > 0 and bool(found.mean_square.isfinite().all())
