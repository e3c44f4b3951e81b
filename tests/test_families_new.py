"""Tiny models of the families in tests/models, planned for every target, packed and unpacked."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dqconvert.converter.canonical import CanonicalSource
from dqconvert.converter.detect import open_canonical
from dqconvert.converter.families import families
from dqconvert.converter.options import PlanOptions, runs
from dqconvert.converter.plan import Plan, make_plan
from dqconvert.formats.targets import targets
from dqconvert.quantizers.errors import PlanError
from dqconvert.quantizers.schemes import scheme, schemes

torch.set_num_threads(1)
HERE = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
MODELS = checkpoints.FAMILY_MODELS
PAIRS = [
    (name, target)
    for name in MODELS
    for target in targets()
    if runs(targets()[target], families()[name])
]
ROUNDTRIPS = ("lightx2v", "comfyui", "vllm", "diffusers")
"""Targets that hold int8, the first that runs a family is tried."""


def headers(name: str) -> tuple[CanonicalSource, dict[str, Any], dict[str, int]]:
    """A tiny model without its bytes, its config, and how many weights each tensor has."""
    config = MODELS[name]["CONFIGS"][0]
    model = checkpoints.meta_model(config)
    source = open_canonical(checkpoints.Memory(model), Path("memory.safetensors"), config=config)
    said = {**source.family.config_of(source.infos), **config}
    return source, said, {key: tensor.numel() for key, tensor in model.items()}


def plan_of(name: str, target: str, only: str = "") -> tuple[Plan, dict[str, int]] | None:
    """The plan in the first scheme that a target takes and the widths allow."""
    source, config, counts = headers(name)
    for one in [scheme(only)] if only else schemes().values():
        if target in one.targets and targets()[target].accepts(one) is None:
            options = PlanOptions(calibrated=True, bits=5.0 if one.menu else None)
            try:
                return make_plan(source, targets()[target], one, options, ("m", config)), counts
            except PlanError as error:
                assert re.search("multiple|divides|do not make groups|--bits", str(error))
    return None


@pytest.mark.parametrize(("name", "target"), PAIRS)
def test_a_plan_holds_every_weight_once_and_says_its_bytes(name: str, target: str) -> None:
    found = plan_of(name, target)
    if found is None:
        pytest.skip("too narrow")
    plan, counts = found
    family = families()[name]
    counts = {tensor: n for tensor, n in counts.items() if family.carries(target, tensor)}
    whole = {f"{module}.weight" for layer in plan.layers if layer.form for module in layer.modules}
    seen = [tensor for layer in plan.layers for tensor in layer.sources]
    assert set(seen) == counts.keys()
    assert all(seen.count(one) == 1 or f"{one.rpartition('.')[0]}.weight" in whole for one in seen)
    packed = 0
    for layer in plan.layers:
        if layer.form is None:
            kept = sum(counts[tensor] for tensor in layer.sources)
            assert sum(info.numel for info in layer.outputs.values()) == kept
            sizes = [
                info.numel * {"BF16": 2, "F32": 4}[info.dtype] for info in layer.outputs.values()
            ]
            assert layer.nbytes == sum(sizes), layer.name
            continue
        rows, columns = layer.form.shape
        packed += rows * columns
        extra = layer.nbytes * 8 / (rows * columns)
        assert layer.form.spec.bits <= extra < 2.2 * layer.form.spec.bits + 6, layer.name
    assert packed == sum(counts[name] for name in whole)


@pytest.mark.parametrize("name", [name for name, target in PAIRS if target == "vllm"])
def test_int8_takes_a_byte_for_a_weight_and_four_for_a_row(name: str) -> None:
    """Everything else as it was: 2 bytes."""
    found = plan_of(name, "vllm", "int8")
    assert found is not None
    plan, counts = found
    linears = [layer for layer in plan.layers if layer.form]
    rows = sum(layer.form.shape[0] for layer in linears if layer.form)
    weights = sum(counts[f"{module}.weight"] for layer in linears for module in layer.modules)
    assert plan.nbytes == 2 * (sum(counts.values()) - weights) + weights + 4 * rows


FLUX = [
    *(f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"),
    "transformer_blocks.0.attn.to_add_out",
]
LIGHTX2V = {
    "flux2": [
        *FLUX,
        *(
            f"transformer_blocks.0.{stream}.linear_{side}"
            for stream in ("ff", "ff_context")
            for side in ("in", "out")
        ),
        *(f"single_transformer_blocks.0.attn.{name}" for name in ("to_qkv_mlp_proj", "to_out")),
        *(f"double_stream_modulation_{stream}.linear" for stream in ("img", "txt")),
        "single_stream_modulation.linear",
        *(
            f"time_guidance_embed.{kind}_embedder.linear_{number}"
            for kind in ("timestep", "guidance")
            for number in (1, 2)
        ),
        *("x_embedder", "context_embedder", "norm_out.linear", "proj_out"),
    ],
    "longcat_image": [
        *FLUX,
        *(
            f"transformer_blocks.0.{stream}.net.{layer}"
            for stream in ("ff", "ff_context")
            for layer in ("0.proj", "2")
        ),
        *(f"transformer_blocks.0.{norm}.linear" for norm in ("norm1", "norm1_context")),
        *(f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"),
        *(
            f"single_transformer_blocks.0.{name}"
            for name in ("norm.linear", "proj_mlp", "proj_out")
        ),
        *(f"time_embed.timestep_embedder.linear_{number}" for number in (1, 2)),
        *("x_embedder", "context_embedder", "norm_out.linear", "proj_out"),
    ],
    "ernie_image": [
        *(f"layers.0.self_attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "linear_fc2")),
        *(f"time_embedding.linear_{number}" for number in (1, 2)),
        *("text_proj", "adaLN_modulation.1", "final_norm.linear", "final_linear"),
    ],
}
"""What LightX2V's weights/*.py give the scheme's type to, of the first block of each kind."""


@pytest.mark.parametrize("name", LIGHTX2V)
def test_lightx2v_gets_every_linear_that_its_loader_wants(name: str) -> None:
    found = plan_of(name, "lightx2v", "int8")
    assert found is not None
    others = re.compile(r"(blocks|layers)\.[1-9]")
    layers = {layer for layer in found[0].context.layers if not others.search(layer)}
    assert layers == set(LIGHTX2V[name])


@pytest.mark.parametrize(
    ("name", "number", "variant", "kind"),
    [
        ("flux", 0, "guidance", "FluxPipeline"),
        ("flux", 1, "schnell", "FluxPipeline"),
        ("flux", 4, "fill", "FluxFillPipeline"),
        ("flux", 5, "control", "FluxControlPipeline"),
        ("flux2", 0, "guidance", "Flux2Pipeline"),
        ("flux2", 1, "klein", "Flux2KleinPipeline"),
        ("flux3", 0, "base", "Flux3ModularPipeline"),
        ("flux3", 1, "distilled", "Flux3DistilledModularPipeline"),
    ],
)
def test_headers_tell_variants(name: str, number: int, variant: str, kind: str) -> None:
    import diffusers

    config = MODELS[name]["CONFIGS"][number]
    infos = checkpoints.infos_of(checkpoints.meta_model(config))
    family = families()[name]
    assert family.variant(infos, config) == variant
    assert family.pipelines.get(variant, family.pipelines[""]) == kind
    assert all(hasattr(diffusers, one) for one in family.pipelines.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """For each family a tiny model on the disk, in the names in which checkpoints come first."""
    place: Path = tmp_path_factory.mktemp("models")
    for name, known in MODELS.items():
        config = known["CONFIGS"][0]
        meta = checkpoints.meta_model(config)
        model = {key: tensor * 0.05 for key, tensor in checkpoints.filled(meta).items()}
        family = families()[name]
        first, _ = checkpoints.write_dialect(family, family.sources[0], model)
        (place / name).mkdir()
        save_file({k: t.contiguous() for k, t in first.items()}, place / name / "m.safetensors")
        if family.sources[0] == "diffusers":
            (place / name / "config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize("name", MODELS)
def test_what_was_packed_comes_back_under_the_names_of_its_source(
    folder: Path, tmp_path: Path, name: str
) -> None:
    source = folder / name / "m.safetensors"
    target = next(one for one in ROUNDTRIPS if (name, one) in PAIRS)
    kind = "fp8" if target == "diffusers" else "int8"
    packed, plain = tmp_path / "packed", tmp_path / "plain.safetensors"
    checkpoints.done("convert", source, "--scheme", kind, "--target", target, "--output", packed)
    checkpoints.done("dequantize", packed, "--output", plain)
    before, after = load_file(source), load_file(plain)
    assert after.keys() == before.keys()
    changed = 0
    for key, tensor in before.items():
        assert after[key].shape == tensor.shape
        error = (after[key].float() - tensor.float()).abs().max()
        assert error < 0.01, key
        changed += bool(error)
    assert changed
