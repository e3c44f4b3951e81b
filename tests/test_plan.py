"""Plans of the real FLUX.1 models, from headers alone, and everything that a plan refuses.

The tensor lists are written out here from nunchaku's own files, not taken from our tables.
"""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dqconvert.converter.detect import open_canonical
from dqconvert.converter.options import PlanOptions
from dqconvert.converter.plan import Plan, make_plan
from dqconvert.formats.targets import target
from dqconvert.quantizers.errors import PlanError
from dqconvert.quantizers.schemes import scheme
from dqconvert.quantizers.spec import TensorInfo

torch.set_num_threads(1)
checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))
PATH = Path("flux.safetensors")
REAL = {"dev": {}, "schnell": checkpoints.SCHNELL}
D, MLP, RANK = 3072, 12288, 32
UNQUANTIZED = (
    "x_embedder",
    "context_embedder",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "time_text_embed.text_embedder.linear_1",
    "time_text_embed.text_embedder.linear_2",
    "norm_out.linear",
    "proj_out",
)
GUIDANCE = tuple(f"time_text_embed.guidance_embedder.linear_{i}" for i in (1, 2))
DOUBLE = {
    "qkv_proj": (3 * D, D),
    "qkv_proj_context": (3 * D, D),
    "out_proj": (D, D),
    "out_proj_context": (D, D),
    "mlp_fc1": (MLP, D),
    "mlp_fc2": (D, MLP),
    "mlp_context_fc1": (MLP, D),
    "mlp_context_fc2": (D, MLP),
}
SINGLE = {"qkv_proj": (3 * D, D), "mlp_fc1": (MLP, D), "out_proj": (D, D), "mlp_fc2": (D, MLP)}


@cache
def headers(model: str) -> Any:
    return checkpoints.meta_model(checkpoints.flux_config(**REAL[model]))


def plan_of(
    tensors: Any, scheme_name: str, target_name: str, options: PlanOptions | None = None
) -> Plan:
    source = open_canonical(checkpoints.Memory(tensors), PATH)
    identity = ("flux1-dev", source.family.config_of(source.infos))
    options = options or PlanOptions()
    return make_plan(source, target(target_name), scheme(scheme_name), options, identity)


def bf16(*shape: int) -> TensorInfo:
    return TensorInfo("BF16", shape)


def svdquant(name: str, shape: tuple[int, int], nvfp4: bool) -> dict[str, TensorInfo]:
    n, k = shape
    found = {
        "qweight": TensorInfo("I8", (n, k // 2)),
        "smooth": bf16(k),
        "smooth_orig": bf16(k),
        "lora_down": bf16(k, RANK),
        "lora_up": bf16(n, RANK),
        "bias": bf16(n),
    }
    if not nvfp4:
        return found | {"wscales": bf16(k // 64, n)}
    second = {"wcscales": bf16(n)} if "qkv" in name else {"wtscale": bf16(1)}
    return found | {"wscales": TensorInfo("F8_E4M3", (k // 16, n))} | second


def modulation(chunks: int) -> dict[str, TensorInfo]:
    n = chunks * D
    return {
        "qweight": TensorInfo("I32", (n // 4, D // 2)),
        "wscales": bf16(D // 64, n),
        "wzeros": bf16(D // 64, n),
        "bias": bf16(n),
    }


def nunchaku_list(model: str, nvfp4: bool) -> dict[str, TensorInfo]:
    """All tensors of a FLUX.1 file of nunchaku's, in the names of version 1."""
    norm = {"weight": bf16(128)}
    double = {name: svdquant(name, shape, nvfp4) for name, shape in DOUBLE.items()}
    double |= dict.fromkeys(("norm_q", "norm_k", "norm_added_q", "norm_added_k"), norm)
    double |= dict.fromkeys(("norm1.linear", "norm1_context.linear"), modulation(6))
    single = {name: svdquant(name, shape, nvfp4) for name, shape in SINGLE.items()}
    single |= {"norm_q": norm, "norm_k": norm, "norm.linear": modulation(3)}
    found = {
        f"{blocks}.{i}.{layer}.{leaf}": info
        for blocks, count, layers in (
            ("transformer_blocks", 19, double),
            ("single_transformer_blocks", 38, single),
        )
        for i in range(count)
        for layer, tensors in layers.items()
        for leaf, info in tensors.items()
    }
    for name in UNQUANTIZED + (GUIDANCE if model == "dev" else ()):
        for leaf in ("weight", "bias"):
            found[f"{name}.{leaf}"] = TensorInfo(
                "BF16", tuple(headers(model)[f"{name}.{leaf}"].shape)
            )
    return found


@pytest.mark.parametrize(
    ("model", "name", "count"),
    [
        ("dev", "svdquant-w4a4", 2604),
        ("dev", "svdquant-nvfp4", 2604 + 19 * 8 + 38 * 4),
        ("schnell", "svdquant-w4a4", 2600),
        ("schnell", "svdquant-nvfp4", 2600 + 19 * 8 + 38 * 4),
    ],
)
def test_nunchaku_has_its_tensors_and_no_other(model: str, name: str, count: int) -> None:
    plan = plan_of(headers(model), name, "nunchaku")
    expected = nunchaku_list(model, name.endswith("nvfp4"))
    assert len(expected) == count
    assert dict(plan.outputs) == expected
    assert plan.nbytes == sum(info.nbytes for info in expected.values())
    assert plan.source_bytes == sum(2 * tensor.numel() for tensor in headers(model).values())


def test_nunchaku_layers_share_smooth_vectors_as_its_kernels_do() -> None:
    plan = plan_of(headers("dev"), "svdquant-w4a4", "nunchaku")
    groups = [tuple(layer.name for layer in group) for group in plan.groups]
    shared = {names for names in groups if len(names) > 1}
    block, single = "transformer_blocks.{}", "single_transformer_blocks.{}"
    pairs = {
        frozenset(f"{block.format(i)}.{n}" for n in ("out_proj", "out_proj_context"))
        for i in range(19)
    } | {frozenset(f"{single.format(i)}.{n}" for n in ("qkv_proj", "mlp_fc1")) for i in range(38)}
    assert {frozenset(names) for names in shared} == pairs
    sites = {layer.name: layer.site for layer in plan.layers if layer.form}
    assert sites["transformer_blocks.3.qkv_proj_context"] == "transformer_blocks.3.attn.add_q_proj"
    assert sites["single_transformer_blocks.7.mlp_fc1"] == "single_transformer_blocks.7.attn.to_q"
    assert sites["single_transformer_blocks.7.mlp_fc2"] == "single_transformer_blocks.7.proj_out"


@pytest.mark.parametrize("name", ["svdquant-w4a4", "svdquant-nvfp4"])
def test_only_inputs_behind_a_gelu_are_shifted(name: str) -> None:
    plan = plan_of(headers("dev"), name, "nunchaku")
    shifts = {layer.name: layer.form.shift for layer in plan.layers if layer.form}
    behind = {layer for layer in shifts if re.search(r"mlp(_context)?_fc2$", layer)}
    assert len(behind) == 2 * 19 + 38
    shift = 0.171875 if name == "svdquant-w4a4" else 0.0
    assert all(value == (shift if layer in behind else 0.0) for layer, value in shifts.items())


def test_a_split_linear_gives_each_column_to_one_layer() -> None:
    plan = plan_of(headers("dev"), "svdquant-w4a4", "nunchaku")
    layers = {layer.name: layer for layer in plan.layers}
    out = layers["single_transformer_blocks.0.out_proj"]
    fc2 = layers["single_transformer_blocks.0.mlp_fc2"]
    assert (out.columns, fc2.columns) == ((0, D), (D, D + MLP))
    assert (out.carries_bias, fc2.carries_bias) == (False, True)
    assert out.sources == fc2.sources and out.group != fc2.group


@pytest.mark.parametrize("name", ["int8", "fp8-tensor"])
def test_comfyui_has_original_names_and_fused_linears(name: str) -> None:
    """All tensors of the original dialect, and three more for each linear of a block."""
    plan = plan_of(headers("dev"), name, "comfyui")
    plain = checkpoints.infos_of(checkpoints.original(headers("dev")))
    linears = {
        key.removesuffix(".weight")
        for key, info in plain.items()
        if re.match(r"(double|single)_blocks\..*\.weight$", key) and len(info.shape) == 2
    }
    assert len(linears) == 19 * 10 + 38 * 3
    extra = {f"{layer}.{leaf}" for layer in linears for leaf in ("weight_scale", "comfy_quant")}
    assert plan.outputs.keys() == plain.keys() | extra
    dtype = {"int8": "I8", "fp8-tensor": "F8_E4M3"}[name]
    for layer in linears:
        n, k = plain[f"{layer}.weight"].shape
        assert plan.outputs[f"{layer}.weight"] == TensorInfo(dtype, (n, k))
        scale = (n, 1) if name == "int8" else ()
        assert plan.outputs[f"{layer}.weight_scale"] == TensorInfo("F32", scale)
    kept = plain.keys() - {f"{layer}.weight" for layer in linears}
    assert all(plan.outputs[key] == plain[key] for key in kept)
    assert plan.context.layers.keys() == linears


@pytest.mark.parametrize("name", ["svdquant-w4a4", "svdquant-nvfp4"])
def test_diffusers_has_its_own_names_and_lists_every_module(name: str) -> None:
    from diffusers import FluxTransformer2DModel

    plan = plan_of(headers("dev"), name, "diffusers")
    with torch.device("meta"):
        model = FluxTransformer2DModel(**checkpoints.flux_config())
    linears = {
        key for key, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "blocks." in key
    }  # fmt: skip
    config = target("diffusers").config(plan.context)
    assert config is not None
    said = config["quantization_config"]
    modulation_names = {key for key in linears if ".norm" in key}
    assert set(said["awq_w4a16"]["targets"]) == modulation_names
    assert set(said["svdq_w4a4"]["targets"]) == linears - modulation_names
    assert len(said["svdq_w4a4"]["targets"]) == len(linears - modulation_names)
    assert said["svdq_w4a4"]["rank"] == RANK
    assert plan.context.layers.keys() == linears
    packed = {key for key in plan.outputs if key.rpartition(".")[0] in linears}
    assert {key.rpartition(".")[0] for key in packed} == linears
    rest = {k: t for k, t in headers("dev").items() if k.rpartition(".")[0] not in linears}
    assert plan.outputs.keys() - packed == rest.keys()


def test_calibration_adds_static_scales_where_the_runtime_uses_them() -> None:
    plan = plan_of(headers("dev"), "fp8-tensor", "comfyui", PlanOptions(calibrated=True))
    scaled = {n.removesuffix(".input_scale") for n in plan.outputs if n.endswith(".input_scale")}
    modulated = {n for n, form in plan.context.layers.items() if form.splits}
    assert len(modulated) == 2 * 19 + 38
    assert scaled == plan.context.layers.keys() - modulated


@pytest.mark.parametrize(("name", "runtime"), checkpoints.PAIRS)
def test_the_order_of_a_file_decides_nothing(name: str, runtime: str) -> None:
    model = checkpoints.meta_model(checkpoints.flux_config(**checkpoints.SMALL))
    plans = [
        plan_of(tensors, name, runtime)
        for tensors in (
            model,
            dict(reversed(model.items())),
            dict(sorted(model.items())),
            checkpoints.original(model),
            dict(sorted(checkpoints.original(model, "model.diffusion_model.").items())),
        )
    ]
    assert len({tuple(plan.outputs.items()) for plan in plans}) == 1
    assert len({tuple(layer.sources for layer in plan.layers) for plan in plans}) == 1
    assert all(plan.context == plans[0].context for plan in plans)


SCRIPT = """
import sys, time
from dqconvert.converter.cli import main
start = time.perf_counter()
main(["flux.safetensors", "--scheme", "svdquant-w4a4", "--dry-run"], standalone_mode=False)
print("seconds", time.perf_counter() - start)
print("heavy", [name for name in ("torch", "diffusers", "transformers") if name in sys.modules])
"""


def test_planning_a_real_model_takes_no_torch_and_no_time(tmp_path: Path) -> None:
    checkpoints.sparse(tmp_path / PATH, checkpoints.infos_of(headers("dev")))
    before = checkpoints.tree(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env=checkpoints.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    lines = run.stdout.splitlines()
    assert lines[-1] == "heavy []"
    assert float(lines[-2].split()[1]) < 1.0
    assert "2604 tensors" in run.stdout
    assert checkpoints.tree(tmp_path) == before


# ------------------------------------------------------------------ what a plan refuses


def problems(scheme_name: str, target_name: str, options: PlanOptions, **changes: Any) -> Any:
    model = checkpoints.meta_model(checkpoints.flux_config(**checkpoints.SMALL | changes))
    with pytest.raises(PlanError) as caught:
        plan_of(model, scheme_name, target_name, options)
    found = caught.value.problems
    assert str(caught.value).startswith(f"{len(found)} problem(s); nothing was written\n  - ")
    assert str(caught.value).count("\n") == len(found) == len(set(found))
    return found


THIN = {"num_attention_heads": 3, "attention_head_dim": 64, "axes_dims_rope": (8, 28, 28)}


def test_every_layer_that_does_not_divide_is_listed() -> None:
    """Width 192: a multiple of 64, so that modulation fits, and none of 128."""
    found = problems("svdquant-w4a4", "nunchaku", PlanOptions(), **THIN)
    layers = [f"transformer_blocks.{i}.{name}" for i in range(2) for name in DOUBLE]
    layers += [f"single_transformer_blocks.{i}.{name}" for i in range(3) for name in SINGLE]
    assert sorted(problem.split(":")[0] for problem in found) == sorted(layers)
    assert all("multiples of 128" in problem and "192" in problem for problem in found)


def test_keeping_and_dividing_are_reported_together() -> None:
    keep = r"^transformer_blocks\.0\.attn\.to_q$|single_transformer_blocks\.1\.proj_out"
    found = problems("svdquant-w4a4", "nunchaku", PlanOptions(keep=keep), **THIN)
    assert any("multiples of 128" in problem for problem in found)
    kept = [problem for problem in found if "--keep" in problem]
    assert any(p.startswith("transformer_blocks.0.attn.to_q.weight") for p in kept)
    assert any(p.startswith("single_transformer_blocks.1.proj_out.weight") for p in kept)


def test_all_wrong_options_are_reported_together() -> None:
    found = problems("svdquant-w4a4", "comfyui", PlanOptions(rank=24, keep="(["))
    assert len(found) == 3
    text = "\n".join(found)
    assert "target comfyui cannot hold scheme svdquant-w4a4" in text
    assert "--target nunchaku or diffusers" in text
    assert "--rank 24: must be a positive multiple of 16" in text
    assert "--keep ([: not a regular expression" in text


@pytest.mark.parametrize(
    ("name", "runtime", "options", "text"),
    [
        ("int8", "nunchaku", PlanOptions(), "cannot hold scheme int8"),
        ("svdquant-nvfp4", "diffusers", PlanOptions(rank=0), "--rank 0"),
        ("svdquant-nvfp4", "diffusers", PlanOptions(rank=-16), "--rank -16"),
        ("fp8-tensor", "comfyui", PlanOptions(rank=16), "has no low-rank branch"),
        ("int8", "comfyui", PlanOptions(keep="*"), "not a regular expression"),
        ("int8", "comfyui", PlanOptions(keep="."), "leaves nothing to quantize"),
        ("svdquant-w4a4", "diffusers", PlanOptions(keep="."), "leaves nothing to quantize"),
    ],
)
def test_each_refusal_says_why(name: str, runtime: str, options: PlanOptions, text: str) -> None:
    (found,) = problems(name, runtime, options)
    assert text in found


@pytest.mark.parametrize("rank", [16, 32, 128])
def test_a_rank_is_the_width_of_every_branch(rank: int) -> None:
    model = checkpoints.meta_model(checkpoints.flux_config(**checkpoints.SMALL))
    plan = plan_of(model, "svdquant-w4a4", "nunchaku", PlanOptions(rank=rank))
    downs = [info.shape[1] for name, info in plan.outputs.items() if name.endswith(".lora_down")]
    assert set(downs) == {rank} and plan.context.rank == rank


def test_a_kept_linear_stays_as_it_is() -> None:
    """A fused linear is kept whole if one of its parts matches."""
    model = checkpoints.meta_model(checkpoints.flux_config(**checkpoints.SMALL))
    plan = plan_of(model, "int8", "comfyui", PlanOptions(keep=r"transformer_blocks\.0\.attn\.to_k"))
    kept = {layer.name for layer in plan.layers if layer.reason == "--keep"}
    assert kept == {"double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"}
    assert plan.outputs["double_blocks.0.img_attn.qkv.weight"] == bf16(768, 256)
