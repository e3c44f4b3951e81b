"""What a user may change of a plan: schemes layer by layer, groups, zero points."""

from __future__ import annotations

import json
import runpy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dqconvert.converter.detect import open_canonical
from dqconvert.converter.options import PlanOptions
from dqconvert.converter.plan import LayerPlan, make_plan
from dqconvert.formats.targets import target
from dqconvert.quantizers.errors import PlanError
from dqconvert.quantizers.schemes import scheme

torch.set_num_threads(1)
checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))
done, refused = checkpoints.done, checkpoints.refused


@cache
def source() -> Any:
    tensors = checkpoints.meta_model(checkpoints.flux_config(**checkpoints.SMALL))
    return open_canonical(checkpoints.Memory(tensors), Path("flux.safetensors"))


def planned(scheme_name: str, runtime: str, **options: Any) -> dict[str, LayerPlan]:
    """Quantized layers by their canonical linears, a stack by the first."""
    said = PlanOptions(**options)
    plan = make_plan(
        source(), target(runtime), scheme(scheme_name), said, ("flux", checkpoints.flux_config())
    )
    return {layer.modules[0]: layer for layer in plan.layers if layer.form}


def code_of(layer: LayerPlan) -> str:
    assert layer.form is not None
    return layer.form.spec.code


def test_an_override_reaches_the_linears_that_match_and_no_other() -> None:
    layers = planned("int8", "comfyui", overrides=((r"\.ff\.", "fp8-tensor"),))
    assert {code_of(layer) for name, layer in layers.items() if ".ff." in name} == {"e4m3"}
    assert {code_of(layer) for name, layer in layers.items() if ".ff." not in name} == {"int8"}


def test_the_first_override_that_matches_wins() -> None:
    overrides = ((r"\.ff\.", "fp8-tensor"), ("transformer_blocks", "mxfp8"))
    layers = planned("int8", "comfyui", overrides=overrides)
    assert layers["transformer_blocks.0.ff.net.2"].scheme == target("comfyui").adapt(
        scheme("fp8-tensor"), "comfy-quant"
    )
    assert {code_of(layer) for layer in layers.values()} == {"e4m3"}


def test_an_override_counts_more_than_what_was_measured() -> None:
    found = planned("convrot-mixed", "comfyui")
    choices = dict.fromkeys(
        (module for layer in found.values() for module in layer.modules), "convrot-int8"
    )
    layers = planned(
        "convrot-mixed", "comfyui", choices=choices, overrides=((r"\.ff\.", "fp8-tensor"),)
    )
    for name, layer in layers.items():
        assert code_of(layer) == ("e4m3" if ".ff." in name else "int8")


@pytest.mark.parametrize(
    ("name", "runtime", "options", "text"),
    [
        ("int8", "comfyui", {"overrides": (("zzz", "mxfp8"),)}, "matches no linear"),
        ("int8", "comfyui", {"overrides": (("(", "mxfp8"),)}, "not a regular expression"),
        ("int8", "comfyui", {"overrides": (("ff", "fp8-block128"),)}, "cannot hold scheme"),
        ("int8", "comfyui", {"overrides": (("ff", "gptq-w4a16"),)}, "learns from activations"),
        ("int8", "diffusers", {"overrides": (("ff", "bnb-nf4"),)}, "one quantizer for a model"),
        ("fp8", "vllm", {"overrides": (("attn", "int8"),)}, "one format for all layers"),
        ("fp8", "vllm", {"overrides": (("attn", "nvfp4"),)}, "one format for all layers"),
        ("mxfp8", "sglang", {"overrides": (("attn", "fp8-block128"),)}, "one format for all"),
        (
            "gptq-w4a16",
            "vllm",
            {"overrides": (("attn", "awq-w4a16"),), "group_size": 64, "calibrated": True},
            "one format for all layers",
        ),
        ("int8", "comfyui", {"group_size": 64}, "are fixed"),
        ("int8", "comfyui", {"zero_points": True}, "is symmetric"),
        ("gptq-w4a16", "comfyui", {"group_size": 48, "calibrated": True}, "32, 64 or 128"),
    ],
)
def test_each_refusal_says_why(name: str, runtime: str, options: Any, text: str) -> None:
    with pytest.raises(PlanError, match=text):
        planned(name, runtime, **options)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("runtime", ["comfyui", "vllm"])
def test_groups_and_zero_points_are_as_asked_for(group: int, runtime: str) -> None:
    for zero in (False, True):
        layers = planned(
            "gptq-w4a16", runtime, group_size=group, zero_points=zero, calibrated=True
        ).values()
        forms = [layer.form for layer in layers if layer.form]
        assert {form.spec.tile for form in forms} == {(1, group)}
        assert {form.spec.zero_point for form in forms} == {zero}


def test_words_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    legacy = ("m", "--scheme", "fp8-tensor", "--legacy", "--layout", "header")
    assert "--legacy means --layout scaled-fp8" in refused(tmp_path, *legacy, code=2)
    override = ("m", "--scheme", "int8", "--override", "ff=int9")
    assert "no scheme is called 'int9'; did you mean int8" in refused(tmp_path, *override, code=2)


def test_a_mix_spares_its_share_of_what_was_left_to_it(tmp_path: Path) -> None:
    pipeline, out = checkpoints.tiny_pipeline(tmp_path / "tiny"), tmp_path / "out"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    words = ("--calib", prompts, "--calib-steps", 1, "--size", "64x64", "--rounding", "rtn")
    mix = ("--scheme", "convrot-mixed", "--override", r"\.ff\.=fp8-tensor")
    done(pipeline, *mix, *words, "-o", out)
    weights: dict[str, int] = {}
    for layer in json.loads((out / "dqconvert.json").read_text())["layers"]:
        rows, columns = layer["shape"]
        weights[layer["scheme"]] = weights.get(layer["scheme"], 0) + rows * columns
    left = weights["convrot-int8"] + weights["convrot-mixed"]
    assert weights["fp8-tensor"] > 0
    assert 0 < weights["convrot-int8"] <= 0.2 * left
