"""nunchaku's files of Qwen-Image, Z-Image and SDXL: what its own Python classes load, and what
the packed numbers are.

tests/data/nunchaku_classes.json: names, dtypes and shapes of the parameters of nunchaku's classes
(version 1.2.0), patched for a rank of 32 on the meta device with the configs of the released
models, and the layers that have act_unsigned; of the U-Net its transformers only.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from dqconvert.converter.detect import open_canonical
from dqconvert.converter.options import PlanOptions
from dqconvert.converter.plan import Plan, make_plan
from dqconvert.converter.reopen import reopen
from dqconvert.formats.form import PackedForm
from dqconvert.formats.targets import target
from dqconvert.quantizers.errors import PlanError
from dqconvert.quantizers.schemes import scheme as scheme_of
from dqconvert.quantizers.schemes.svdquant import INT4_GROUP64, NVFP4_BF16

torch.set_num_threads(1)
HERE = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
configs = SimpleNamespace(**runpy.run_path(str(HERE / "configs.py")))
samples = SimpleNamespace(**runpy.run_path(str(HERE / "samples.py")))
headers = SimpleNamespace(**runpy.run_path(str(HERE.parent / "tools" / "headers.py")))
CLASSES = json.loads((HERE / "data" / "nunchaku_classes.json").read_text())
SCHEMES = {"int4": "svdquant-w4a4", "nvfp4": "svdquant-nvfp4"}
SDXL = checkpoints.FAMILY_MODELS["sdxl"]
REAL = {
    "qwen_image": configs.CONFIGS["qwen_image"][-1],
    "z_image": configs.CONFIGS["z_image"][-1],
    "sdxl": SDXL["REAL"]["sdxl"],
}


@cache
def header(name: str) -> Any:
    model = checkpoints.meta_model(REAL[name])
    return open_canonical(checkpoints.Memory(model), Path("memory.safetensors"))


def plan_of(name: str, precision: str, **options: Any) -> Plan:
    scheme, found = scheme_of(SCHEMES[precision]), PlanOptions(**options)
    identity = ("m", REAL[name])
    return make_plan(header(name), target("nunchaku"), scheme, found, identity)


def renamed(name: str) -> str:
    """What the U-Net's loader makes of a name in its transformers."""
    for old, new in (
        (".lora_down", ".proj_down"),
        (".lora_up", ".proj_up"),
        (".smooth_orig", ".smooth_factor_orig"),
        (".smooth", ".smooth_factor"),
    ):
        if old in name:
            return name.replace(old, new)
    return name


@pytest.mark.parametrize("case", CLASSES)
def test_names_types_and_shapes_are_those_of_nunchakus_classes(case: str) -> None:
    """But for tensor scales: the loaders of transformers take either kind, the U-Net's has one."""
    model, precision = case.split("/")
    name, _, layout = model.partition("-")
    plan = plan_of(name, precision, layout=layout or None)
    needed = headers.unpacked(CLASSES[case]["tensors"])
    found = {k: (info.dtype, *info.shape) for k, info in plan.outputs.items()}
    if name == "sdxl":
        found = {renamed(k): info for k, info in found.items() if ".transformer_blocks." in k}
    else:
        layers = [k.removesuffix(".proj_up") for k in needed if k.endswith(".proj_up")]
        for layer in layers if precision == "nvfp4" else ():
            assert (f"{layer}.wtscale" in found) != (f"{layer}.wcscales" in found)
            found.pop(f"{layer}.wtscale", None)
            found[f"{layer}.wcscales"] = needed[f"{layer}.wcscales"]
    assert found == needed
    rows = CLASSES[case]["unsigned"]
    unsigned = headers.unpacked({row: [] for row in rows})
    assert {k for k, form in plan.context.layers.items() if form.shift} == unsigned.keys()


def test_what_the_loaders_read_beside_the_tensors() -> None:
    for name, word in (
        ("qwen_image", "NunchakuQwenImageTransformer2DModel"),
        ("z_image", "NunchakuZImageTransformer2DModel"),
        ("sdxl", "NunchakuSDXLUNet2DConditionModel"),
    ):
        said = target("nunchaku").metadata(plan_of(name, "int4").context)
        assert said["model_class"] == word
        assert json.loads(said["config"]) == json.loads(json.dumps(REAL[name]))
        assert "skip_refiners" not in json.loads(said["quantization_config"])
    context = plan_of("z_image", "int4", layout="skip-refiners").context
    said = json.loads(target("nunchaku").metadata(context)["quantization_config"])
    assert said["skip_refiners"] is True


def test_layouts_are_those_of_the_family() -> None:
    for name, layout in (("qwen_image", "v1"), ("qwen_image", "skip-refiners"), ("sdxl", "v2")):
        with pytest.raises(PlanError, match="has no such layout"):
            plan_of(name, "int4", layout=layout)


def test_a_qwen_image_that_the_loaders_do_not_build_is_pointed_out() -> None:
    assert "notes" not in plan_of("qwen_image", "int4").context.facts
    pruned = {**REAL["qwen_image"], "num_layers": 40, "zero_cond_t": True}
    (note,) = header("qwen_image").family.facts("nunchaku", pruned)["notes"]
    assert "num_layers 40 (not 60), zero_cond_t True (not False)" in note


@pytest.mark.parametrize("spec", [INT4_GROUP64, NVFP4_BF16], ids=["int4", "nvfp4"])
@pytest.mark.parametrize("parts", [1, 2])
def test_layouts_hold_the_same_bytes_under_other_names(spec: Any, parts: int) -> None:
    runtime = target("nunchaku")
    form = PackedForm(spec, (256, 128), rank=16, parts=parts, layout="v1")
    q = samples.result_of(form, True)
    first = runtime.pack(form, q)
    for layout in ("v2", "unet", "skip-refiners"):
        other = PackedForm(spec, (256, 128), rank=16, parts=parts, layout=layout)
        packed = runtime.pack(other, q)
        named = {renamed(f".{k}")[1:] if layout != "unet" else k: t for k, t in first.items()}
        if layout == "unet" and spec == NVFP4_BF16 and parts == 1:
            named["wcscales"] = named.pop("wtscale").expand(256)
        assert packed.keys() == named.keys()
        assert all(samples.same(packed[k], named[k].contiguous()) for k in named)
        back = runtime.unpack(other, packed)
        assert samples.same(back.tensor_scale, q.tensor_scale)


# Numbers: the layout's formulas (specs of the packer), written as places of each weight


def places(*sizes: int) -> list[Tensor]:
    return list(torch.meshgrid(*(torch.arange(n) for n in sizes), indexing="ij"))


def codes(qweight: Tensor) -> Tensor:
    """[N, K] nibbles of words of eight."""
    n, k = qweight.shape[0], 2 * qweight.shape[1]
    row, col = places(n, k)
    nt, np, npk, nl = row // 128, row // 16 % 8, row // 8 % 2, row % 8
    kt, kpk, kl, r = col // 64, col // 32 % 2, col // 8 % 4, col % 8
    word = ((((nt * (k // 64) + kt) * 8 + np) * 8 + nl) * 4 + kl) * 4 + npk * 2 + kpk
    byte = qweight.view(torch.uint8).flatten()[word * 4 + r // 2].long()
    return byte >> (4 * (r % 2)) & 15


def spread(flat: Tensor, n: int, groups: int) -> Tensor:
    """[N, G] scales, or a vector where G is 1."""
    row, g = places(n, groups)
    a, b, c, d = row % 128 // 16, row // 8 % 2, row // 2 % 4, row % 2
    at = (row // 128 * groups + g) * 128 + a * 16 + c * 4 + b * 2 + d
    return flat.flatten()[at]


def micro(flat: Tensor, n: int, k: int) -> Tensor:
    """[N, K/16] fp8 scales."""
    row, g = places(n, k // 16)
    p, q, lane = row % 128 // 32, row // 8 % 4, row % 8
    at = (((row // 128 * (k // 64) + g // 4) * 8 + lane) * 4 + q) * 16 + p * 4 + g % 4
    return flat.float().flatten()[at]


def branch(tensor: Tensor, down: bool) -> Tensor:
    """[K, R] of down, [N, R] of up."""
    c, r = places(*tensor.shape)
    one, two = (r, c) if down else (c, r)  # of a tile of 16 x 16, the eight rows and the columns
    npk, nl, kpk, kl, e = one // 8 % 2, one % 8, two // 8 % 2, two // 2 % 4, two % 2
    tile = c // 16 * (tensor.shape[1] // 16) + r // 16
    return tensor.flatten()[(tile * 32 + nl * 4 + kl) * 8 + npk * 4 + kpk * 2 + e]


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def linear(layer: Mapping[str, Tensor], x: Tensor, shift: float) -> Tensor:
    """What the runtime computes, but for the rounding of the input."""
    smooth = layer.get("smooth", layer.get("smooth_factor"))
    assert smooth is not None
    code, k = codes(layer["qweight"]), 2 * layer["qweight"].shape[1]
    n = len(code)
    if layer["wscales"].dtype == torch.float8_e4m3fn:
        weight = E2M1[code] * micro(layer["wscales"], n, k).repeat_interleave(16, 1)
        weight *= layer["wtscale"].float() if "wtscale" in layer else 1.0
        if "wcscales" in layer:
            weight *= spread(layer["wcscales"], n, 1).float()
    else:
        weight = torch.where(code > 7, code - 16, code).float()
        weight *= spread(layer["wscales"], n, k // 64).float().repeat_interleave(64, 1)
    down = branch(layer.get("lora_down", layer.get("proj_down")), True).float()  # type: ignore[arg-type]
    up = branch(layer.get("lora_up", layer.get("proj_up")), False).float()  # type: ignore[arg-type]
    y = (x + shift) / spread(smooth, k, 1).float().t() @ weight.t() + x @ down @ up.t()
    return y + spread(layer["bias"], n, 1).float().t() if "bias" in layer else y


def modulation(layer: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """What the runtime computes, in the order of its rows."""
    words = layer["qweight"].view(torch.int16)
    n, k = 4 * layer["qweight"].shape[0], 2 * layer["qweight"].shape[1]
    row, col = places(n, k)
    at = col % 64 // 32 * 8 + col % 8
    word = words.flatten()[((row // 4 * (k // 64) + col // 64) * 4 + row % 4) * 16 + at].long()
    code = (word >> (4 * (col % 32 // 8))) & 15
    scale, zero = (
        layer[name].float().t().repeat_interleave(64, 1) for name in ("wscales", "wzeros")
    )
    return x @ (code * scale + zero).t() + layer["bias"].float()


QWEN = configs.qwen_image_config(num_layers=1, num_attention_heads=2, joint_attention_dim=128)
Z_IMAGE = configs.z_image_config(dim=384, n_layers=1, n_heads=3, n_kv_heads=3, cap_feat_dim=128)
TINY = {
    "qwen-int4": (QWEN, "int4", ""),
    "qwen-nvfp4": (QWEN, "nvfp4", ""),
    "z-int4": (Z_IMAGE, "int4", "skip-refiners"),
    "z-nvfp4": (Z_IMAGE, "nvfp4", "v2"),
    "sdxl-nvfp4": (SDXL["config"](**SDXL["SMALL"] | SDXL["SHALLOW"]), "nvfp4", ""),
}
JOINED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "net.0.proj": ("w3", "w1"),
    "net.2": ("w2",),
}


@pytest.fixture(scope="module", params=TINY)
def converted(request: Any, tmp_path_factory: Any) -> tuple[dict[str, Tensor], Path, Path]:
    """Tensors of a tiny model, its folder, and what it was converted to."""
    config, precision, layout = TINY[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    meta = checkpoints.meta_model(config)
    model = {k: tensor * 0.05 for k, tensor in checkpoints.filled(meta).items()}
    (folder / "model").mkdir()
    save_file(model, folder / "model" / checkpoints.WEIGHTS)
    (folder / "model" / "config.json").write_text(json.dumps(config))
    words = ("--scheme", SCHEMES[precision], "--target", "nunchaku", "--output", folder / "out")
    words += ("--layout", layout) if layout else ()
    checkpoints.done("convert", folder / "model", *words)
    return model, folder / "model", folder / "out"


def parts_of(name: str, model: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The linears of the model that a layer of the file stacks."""
    for theirs, ours in JOINED.items():
        if name.endswith(f".{theirs}"):
            found = tuple(f"{name.removesuffix(theirs)}{one}" for one in ours)
            if f"{found[0]}.weight" in model:
                return found
    return (name,)


def layers_of(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for key in tensors:
        if key.endswith(".qweight"):
            name = key.removesuffix(".qweight")
            inside = (k for k in tensors if k.rpartition(".")[0] == name)
            yield name, {k.rpartition(".")[2]: tensors[k] for k in inside}


def test_packed_layers_compute_what_the_models_did(converted: Any) -> None:
    model, _, out = converted
    (file,) = out.glob("svdq-*.safetensors")
    tensors, seen = load_file(file), 0
    for name, layer in layers_of(tensors):
        weights = [model[f"{part}.weight"].float() for part in parts_of(name, model)]
        weight = torch.cat(weights)
        biases = [model[f"{p}.bias"].float() for p in parts_of(name, model) if f"{p}.bias" in model]
        bias = torch.cat(biases) if biases else None
        x = functional.gelu(torch.randn(16, weight.shape[1], generator=torch.Generator()))
        exact = functional.linear(x, weight, bias)
        if "wzeros" in layer:
            made = modulation(layer, x)
            made = made.view(16, -1, 6).transpose(1, 2)  # as the block's forward does
            exact = exact.view(16, 6, -1)
            exact[:, [1, 4]] += 1  # scales are multiplied as they come
        else:
            shift = (
                0.171875 if "_mlp.net.2" in name and layer["wscales"].element_size() > 1 else 0.0
            )
            made = linear(layer, x, shift)
            none = linear(layer, torch.zeros_like(x), shift)[0]
            assert torch.allclose(none, torch.zeros(1) if bias is None else bias, atol=0.02)
            seen += weight.numel()
        assert float((made - exact).norm() / exact.norm()) < 0.15, name
    assert seen > 0.1 * sum(tensor.numel() for tensor in model.values())
    for key in tensors.keys() & model.keys() - {k for k in tensors if k.endswith(".bias")}:
        assert torch.equal(tensors[key], model[key])


def test_files_are_told_verified_and_read_again(converted: Any, tmp_path: Path) -> None:
    model, folder, out = converted
    assert "sound" in checkpoints.done("verify", out, "--against", folder)
    (file,) = out.glob("svdq-*.safetensors")
    assert reopen(file).target.NAME == "nunchaku"
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["model_class"].startswith("Nunchaku")
    checkpoints.done("inspect", file)
    checkpoints.done("dequantize", out, "--output", tmp_path / "plain.safetensors")
    plain = load_file(tmp_path / "plain.safetensors")
    assert plain.keys() == model.keys()
    for key, tensor in model.items():
        assert (
            float((plain[key].float() - tensor.float()).norm()) < 0.15 * float(tensor.norm()) + 0.1
        )


def test_files_come_back_from_diffusers_layout_as_they_were(converted: Any, tmp_path: Path) -> None:
    """Codes, scales and branches move without a change; biases may lose digits on the way."""
    _, _, out = converted
    (file,) = out.glob("svdq-*.safetensors")
    first = load_file(file)
    layout = (
        ("--layout", "skip-refiners")
        if "noise_refiner.0.feed_forward.net.2.weight" in first
        else ()
    )
    there, back = tmp_path / "there", tmp_path / "back"
    checkpoints.done("transcode", out, "--target", "diffusers", "--output", there)
    checkpoints.done("transcode", there, "--target", "nunchaku", "--output", back, *layout)
    (file,) = back.glob("svdq-*.safetensors")
    again = load_file(file)
    assert again.keys() == first.keys()
    for key, tensor in first.items():
        if key.endswith(".bias"):
            assert torch.allclose(again[key].float(), tensor.float(), atol=0.02)
        else:
            assert samples.same(again[key], tensor), key


def test_the_unet_of_a_pipeline_is_found(tmp_path: Path) -> None:
    config = SDXL["config"](**SDXL["SMALL"] | SDXL["SHALLOW"])
    folder = tmp_path / "my-sdxl" / "unet"
    folder.mkdir(parents=True)
    meta = checkpoints.meta_model(config)
    checkpoints.sparse(folder / checkpoints.WEIGHTS, samples.infos_of(meta))
    (folder / "config.json").write_text(json.dumps(config))
    words = ("--scheme", "svdquant-w4a4", "--target", "nunchaku", "--dry-run")
    for model in (folder, folder.parent):
        assert "svdq-int4_r32-my-sdxl.safetensors" in checkpoints.done("convert", model, *words)
    (folder.parent / "model_index.json").write_text("{}")
    assert "my-sdxl" in checkpoints.done("convert", folder.parent, *words)
