"""Encoders are observed while the pipeline encodes: the oracle runs transformers' model by hand."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dqconvert.calibration.encoders import _module, observe_encoder
from dqconvert.calibration.prompts import Prompt
from dqconvert.calibration.settings import CalibrationSettings, Site
from dqconvert.converter.language import GATE, QKV
from dqconvert.quantizers.errors import CalibrationError

torch.set_num_threads(1)
HERE = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
models = SimpleNamespace(**runpy.run_path(str(HERE / "language_models.py")))

DIGITS = HERE.parents[0] / "converter" / "data" / "flux-digits"
PROMPTS = (Prompt("a handwritten seven"), Prompt("a thin four"))
SETTINGS = CalibrationSettings(steps=1)
T5 = "encoder.block.0.layer.1.DenseReluDense.wi_0"
CLIP = "text_model.encoder.layers.0.mlp.fc1"


def inputs_of(module: Any, run: Any) -> Tensor:
    """All rows that a module is given."""
    rows: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _m, args: rows.append(args[0].double()))
    with torch.no_grad():
        run()
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in rows])


def by_hand(component: str) -> Tensor:
    """The inputs of one linear, from the encoder and its tokenizer alone."""
    import transformers

    if component == "text_encoder":
        model = transformers.CLIPTextModel.from_pretrained(DIGITS / component, dtype="auto")
        tokenizer: Any = transformers.CLIPTokenizer.from_pretrained(DIGITS / "tokenizer")
        module = dict(model.named_modules()).get(CLIP.removeprefix("text_model."))
        module = module or model.get_submodule(CLIP)
    else:
        model = transformers.T5EncoderModel.from_pretrained(DIGITS / component, dtype="auto")
        tokenizer = transformers.T5TokenizerFast.from_pretrained(DIGITS / "tokenizer_2")
        module = model.get_submodule(T5)

    def run() -> None:
        for prompt in PROMPTS:
            length = tokenizer.model_max_length
            said = tokenizer(
                prompt.prompt, padding="max_length", max_length=length, return_tensors="pt"
            )
            model(said.input_ids)

    return inputs_of(module, run)


@pytest.mark.parametrize(("component", "site"), [("text_encoder", CLIP), ("text_encoder_2", T5)])
def test_statistics_are_those_of_the_pipelines_text(component: str, site: str) -> None:
    told: list[tuple[int, int]] = []
    found = observe_encoder(
        DIGITS / component,
        (Site(site, site), Site("lm_head", "lm_head")),
        PROMPTS,
        SETTINGS,
        lambda done, total: told.append((done, total)),
    )
    assert found.keys() == {site} and told == [(0, 2), (1, 2), (2, 2)]
    rows, stats = by_hand(component), found[site]
    assert stats.count == len(rows)
    torch.testing.assert_close(stats.absmax.double(), rows.abs().amax(0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        stats.mean_square.double(), rows.square().mean(0), rtol=1e-3, atol=1e-5
    )


def test_an_encoder_that_is_not_there_is_refused() -> None:
    with pytest.raises(CalibrationError, match="without a text_encoder_9"):
        observe_encoder(DIGITS / "text_encoder_9", (Site(T5, T5),), PROMPTS[:1], SETTINGS)


@pytest.mark.parametrize(
    ("class_name", "head"),
    [("Qwen3Model", 32), ("Mistral3ForConditionalGeneration", 128), ("Qwen3VLModel", 32)],
)
def test_modules_are_found_behind_every_root(class_name: str, head: int) -> None:
    """Not those of the vision tower, which are called alike."""
    whole = class_name.replace("Qwen3Model", "Qwen3ForCausalLM")
    whole = whole.replace("Qwen3VLModel", "Qwen3VLForConditionalGeneration")
    with torch.device("meta"):
        model = models.build(models.text_config(whole, head), class_name)
    modules = dict(model.named_modules())
    for name in (QKV[0], GATE):
        module: Any = _module(modules, name.replace("{i}", "1"))
        assert module.in_features == 128
    assert _module(modules, "model.layers.7.mlp.gate_proj") is None


def test_encoders_are_calibrated_from_the_command_line(tmp_path: Path, monkeypatch: Any) -> None:
    """GPTQ's output error is below that of rounding, and static scales are written."""
    monkeypatch.setenv("DQCONVERT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("a handwritten seven\na thin four\n")
    words = ("convert", "flux-digits", "--component", "text_encoder_2")
    words = (*words, "--calib", tmp_path / "prompts.txt")
    errors = {}
    for rounding in ("gptq", "rtn"):
        out = tmp_path / rounding
        kind = ("--scheme", "gguf-q4_0", "--target", "gguf", "--rounding", rounding)
        checkpoints.done(*words, *kind, "--output", out)
        layers = json.loads((out / "dqconvert.json").read_text())["layers"]
        errors[rounding] = sum(layer["output_error"] for layer in layers)
    assert errors["gptq"] < errors["rtn"]
    out = tmp_path / "static"
    checkpoints.done(*words, "--scheme", "fp8-tensor", "--target", "comfyui", "--output", out)
    (file,) = out.glob("*.safetensors")
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        assert "encoder.block.0.layer.0.SelfAttention.q.input_scale" in opened.keys()  # noqa: SIM118


def test_image_encoders_are_not_observed(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\n")
    words = ("convert", "flux-digits", "--component", "image_encoder", "--scheme", "int8")
    said = checkpoints.refused(tmp_path / "o", *words, "--calib", tmp_path / "prompts.txt")
    assert "observes transformers and text encoders" in said
