"""Qwen-Image, Wan and Z-Image: diffusers judges names and folds, LightX2V's loader the layers."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dqconvert.converter import detect
from dqconvert.converter.detect import open_canonical
from dqconvert.converter.families import families
from dqconvert.converter.family import depth, fill
from dqconvert.converter.options import PlanOptions
from dqconvert.converter.plan import Plan, make_plan
from dqconvert.converter.resolve import Model
from dqconvert.converter.statistics import config_of
from dqconvert.formats.targets import targets
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.precondition import Transform
from dqconvert.quantizers.schemes import schemes

torch.set_num_threads(1)
HERE = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
configs = SimpleNamespace(**runpy.run_path(str(HERE / "configs.py")))
tiny = SimpleNamespace(**runpy.run_path(str(HERE / "tiny_models.py")))
Memory, meta_model = checkpoints.Memory, checkpoints.meta_model

PATH = Path("memory.safetensors")
PREFIXES = ["", "model.diffusion_model."]
REFUSED = r"not a diffusion transformer that is known|: nearly "
SMALL = [
    pytest.param(families()[name], config, id=f"{name}-{number}")
    for name, some in configs.CONFIGS.items()
    for number, config in enumerate(some)
    if checkpoints.small(config)
]
RUNNABLE = [
    one
    for one in SMALL
    if one.values[1]["_class_name"] in tiny.INPUTS and not one.values[1].get("siglip_feat_dim")
]
REAL = {
    "qwen_image": configs.qwen_image_config(),
    "wan": configs.wan_config(),
    "wan-i2v": configs.wan_config(**configs.I2V),
    "z_image": configs.z_image_config(),
}


def original(family: Any, tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    found, _ = checkpoints.write_dialect(family, "original", tensors)
    return {prefix + name: tensor for name, tensor in found.items()}


def read_all(source: Any) -> dict[str, Tensor]:
    return {name: source.read(name) for name in source.infos}


def plan_of(name: str, target: str) -> Plan:
    """The first scheme of a target, for a real model."""
    config = REAL[name]
    source = open_canonical(Memory(meta_model(config)), PATH)
    for scheme in schemes().values():
        if target in scheme.targets and targets()[target].accepts(scheme) is None:
            options = PlanOptions(calibrated=True)
            return make_plan(source, targets()[target], scheme, options, (name, config))
    raise AssertionError(f"no scheme for {target}")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("number", [0, 1])
def test_diffusers_reads_wan_alike(number: int, prefix: str) -> None:
    from diffusers.loaders.single_file_utils import (
        convert_wan_transformer_to_diffusers as convert,
    )

    model = checkpoints.filled(meta_model(configs.CONFIGS["wan"][number]), columns=2)
    checkpoint = original(families()["wan"], model, prefix)
    ours = read_all(open_canonical(Memory(checkpoint), PATH))
    assert checkpoints.same_tensors(ours, convert(dict(checkpoint)))
    assert checkpoints.same_tensors(ours, model)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_diffusers_reads_z_image_alike(prefix: str) -> None:
    """ComfyUI's files have a norm besides that nothing uses."""
    from diffusers.loaders.single_file_utils import (
        convert_z_image_transformer_checkpoint_to_diffusers as convert,
    )

    model = checkpoints.filled(meta_model(configs.CONFIGS["z_image"][0]), columns=2)
    checkpoint = original(families()["z_image"], model, prefix)
    checkpoint[f"{prefix}norm_final.weight"] = torch.ones(256).bfloat16()
    ours = read_all(open_canonical(Memory(checkpoint), PATH))
    assert checkpoints.same_tensors(ours, convert(dict(checkpoint)))
    assert checkpoints.same_tensors(ours, model)


def test_a_mark_of_comfyui_is_not_read() -> None:
    model = checkpoints.filled(meta_model(configs.CONFIGS["qwen_image"][0]), columns=2)
    marked = model | {"__index_timestep_zero__": torch.zeros(0)}
    assert checkpoints.same_tensors(read_all(open_canonical(Memory(marked), PATH)), model)


@pytest.mark.parametrize("mine", checkpoints.CONFIGS)
def test_no_family_takes_another_for_its_own(mine: str, monkeypatch: Any) -> None:
    model = meta_model(checkpoints.CONFIGS[mine][0])
    for dialect in families()[mine].sources:
        theirs, _ = checkpoints.write_dialect(families()[mine], dialect, model)
        for name, family in families().items():
            monkeypatch.setattr(detect, "families", lambda family=family: {"only": family})
            if name == mine:
                assert open_canonical(Memory(theirs), PATH).family is family
                continue
            with pytest.raises(SourceError, match=REFUSED):
                open_canonical(Memory(theirs), PATH)


@pytest.mark.parametrize(("family", "config"), RUNNABLE)
def test_a_model_that_went_through_its_first_names_computes_the_same(
    family: Any, config: Any
) -> None:
    model = tiny.build(config, torch.float32)
    before = tiny.forward(model)
    state = dict(model.state_dict())
    back = read_all(open_canonical(Memory(original(family, state)), PATH))
    for tensor in model.parameters():
        tensor.data.zero_()
    model.load_state_dict(back, strict=True)
    assert torch.equal(tiny.forward(model), before)
    assert before.isfinite().all() and before.std() > 0


@pytest.mark.parametrize(("family", "config"), RUNNABLE)
def test_what_is_said_of_inputs(family: Any, config: Any) -> None:
    """Linears with one site read one tensor; only behind a GELU nothing is below -0.2."""
    model = tiny.build(config, torch.float32)
    inputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if family.linear(name):
            module.register_forward_pre_hook(
                lambda _, found, name=name: inputs.setdefault(name, found[0].clone())
            )
    tiny.forward(model)
    modules = {name for name, _ in model.named_modules() if family.linear(name)}
    assert inputs.keys() == modules
    for name, found in inputs.items():
        row, index = family.linear(name)
        assert torch.equal(found, inputs[fill(row.site or row.name, index)])
        assert (found.min() > -0.2) == (row.gelu == 0)


@pytest.mark.parametrize(("family", "config"), [one for one in RUNNABLE if one.values[0].folds])
def test_folds_change_nothing(family: Any, config: Any) -> None:
    """In float64, all of them at once, with random smooth vectors and centers."""
    model = tiny.build(config, torch.float64)
    before = tiny.forward(model)
    state = dict(model.state_dict())
    rng = torch.Generator().manual_seed(2)
    for fold in family.folds:
        for index in range(depth(state, family.blocks[0])):
            size = state[f"{fill(fold.consumers[0], str(index))}.weight"].shape[1]
            smooth = torch.exp(torch.randn(size, generator=rng, dtype=torch.float64))
            center = torch.randn(size, generator=rng, dtype=torch.float64)
            tiny.fold_into(state, fold, str(index), Transform(smooth, center))
    changed = [name for name, tensor in model.state_dict().items() if state[name] is not tensor]
    assert changed
    model.load_state_dict(state, strict=True)
    assert (tiny.forward(model) - before).norm() < 1e-9 * before.norm()


QWEN = [
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{stream}_mlp.{name}" for stream in ("img", "txt") for name in ("net.0.proj", "net.2")),
    *("img_mod.1", "txt_mod.1"),
]
WAN = [f"{kind}_attn.{name}" for kind in ("self", "cross") for name in "qkvo"] + ["ffn.0", "ffn.2"]
IMAGE = ["cross_attn.k_img", "cross_attn.v_img"]
Z = [
    *(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"feed_forward.{name}" for name in ("w1", "w2", "w3")),
]
ADALN = ["adaLN_modulation.0"]


def blocks(name: str, count: int, layers: list[str]) -> set[str]:
    return {f"{name}.{i}.{layer}" for i in range(count) for layer in layers}


LIGHTX2V = {
    "qwen_image": blocks("transformer_blocks", 60, QWEN),
    "wan": blocks("blocks", 40, WAN),
    "wan-i2v": blocks("blocks", 40, WAN + IMAGE),
    "z_image": blocks("layers", 30, Z + ADALN)
    | blocks("noise_refiner", 2, Z + ADALN)
    | blocks("context_refiner", 2, Z)
    | {f"all_final_layer.2-1.{name}" for name in ("adaLN_modulation.1", "linear")},
}
"""What LightX2V's classes build with a quantized linear, measured by instantiating them."""


@pytest.mark.parametrize("name", LIGHTX2V)
def test_lightx2v_gets_the_layers_that_its_loader_wants(name: str) -> None:
    plan = plan_of(name, "lightx2v")
    assert set(plan.context.layers) == LIGHTX2V[name]


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("target", sorted(targets()))
def test_real_models_fit_every_target_that_runs_them(name: str, target: str) -> None:
    """No layer is refused, nothing is lost, and kept tensors keep their shape."""
    family = families()[name.split("-")[0]]
    if targets()[target].DIALECT not in family.dialects:
        return
    plan = plan_of(name, target)
    model = meta_model(REAL[name])
    sources = [tensor for layer in plan.layers for tensor in layer.sources]
    assert sorted(sources) == sorted(model)
    for layer in plan.layers:
        if layer.form is None:
            counts = sum(info.numel for info in layer.outputs.values())
            assert counts == sum(model[tensor].numel() for tensor in layer.sources)


@pytest.mark.parametrize(
    ("name", "target", "kept"),
    [
        ("qwen_image", "comfyui", {"transformer_blocks.0.img_mod.1"}),
        ("z_image", "comfyui", {f"layers.{i}.adaLN_modulation.0" for i in range(30)}),
        ("wan", "comfyui", {"head.head", "text_embedding.0", "time_projection.1"}),
        ("qwen_image", "diffusers", {"img_in", "norm_out.linear", "proj_out"}),
    ],
)
def test_layers_that_a_runtime_keeps(name: str, target: str, kept: set[str]) -> None:
    plan = plan_of(name, target)
    assert kept <= set(plan.context.kept)
    assert kept.isdisjoint(plan.context.layers)


def test_a_config_may_deny_what_shapes_do_not_tell() -> None:
    """Norms over all heads of Wan at once say nothing of how many there are."""
    config = {**configs.CONFIGS["wan"][0], "num_attention_heads": 4, "attention_head_dim": 64}
    source = open_canonical(Memory(meta_model(config)), PATH)
    said = config_of(Model("wan", PATH, None, config), source)
    assert (said["num_attention_heads"], said["attention_head_dim"]) == (4, 64)
    with pytest.raises(SourceError, match="ffn_dim"):
        config_of(Model("wan", PATH, None, {**config, "ffn_dim": 5}), source)
