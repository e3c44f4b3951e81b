"""One quantization in several layouts: bytes as converted, back again, and foreign readers."""

from __future__ import annotations

import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dqconvert.converter.reopen import reopen
from dqconvert.quantizers.forward import effective_weight

torch.set_num_threads(1)
HERE = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
configs = SimpleNamespace(**runpy.run_path(str(HERE / "configs.py")))
comfy = SimpleNamespace(**runpy.run_path(str(HERE / "test_comfyui.py")))
vllm = SimpleNamespace(**runpy.run_path(str(HERE / "test_vllm.py")))
lite = runpy.run_path(str(HERE / "test_nunchaku_lite.py"))["lite"]
done, refused, same_bits = checkpoints.done, checkpoints.refused, checkpoints.same_bits

WAN = configs.wan_config(
    num_layers=1, num_attention_heads=2, text_dim=128, ffn_dim=512, in_channels=16
)
SVDQ_MODELS = {
    "qwen_image": configs.qwen_image_config(
        num_layers=1, num_attention_heads=1, joint_attention_dim=128
    ),
    "z_image": configs.z_image_config(
        dim=384, n_layers=1, n_refiner_layers=1, n_heads=3, n_kv_heads=3, cap_feat_dim=128
    ),
}
Tensors = dict[str, Tensor]


class Bench:
    """Models, and what was made of them, each once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[tuple[Any, ...], Path] = {}

    def wan(self) -> Path:
        """A tiny Wan under diffusers' names."""
        return self.model("wan", WAN)

    def model(self, name: str, config: dict[str, Any]) -> Path:
        """A tiny model under diffusers' names."""
        path = self.folder / name
        if not path.exists():
            path.mkdir()
            tensors = checkpoints.filled(checkpoints.meta_model(config))
            save_file(tensors, path / checkpoints.WEIGHTS, {"format": "pt"})
            (path / "config.json").write_text(json.dumps(config))
        return path

    def direct(self, model: Path, scheme: str, target: str, *words: Any) -> Path:
        """A conversion."""
        return self._once(model, "--scheme", scheme, "--target", target, *words)

    def moved(self, out: Path, target: str, *words: Any) -> Path:
        """A transcoding."""
        return self._once("transcode", out, "--target", target, *words)

    def _once(self, *words: Any) -> Path:
        if words not in self._made:
            out = self.folder / f"out-{len(self._made)}"
            done(*words, "-o", out, "-q")
            self._made[words] = out
        return self._made[words]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def tensors_of(out: Path) -> Tensors:
    return {k: t for file in sorted(out.rglob("*.safetensors")) for k, t in load_file(file).items()}


def different(one: Path, two: Path) -> list[str]:
    """Names of tensors that are not the same bits."""
    a, b = tensors_of(one), tensors_of(two)
    assert a.keys() == b.keys()
    return [name for name in a if not same_bits(a[name], b[name])]


def weights_are_equal(one: Path, two: Path) -> bool:
    """Whether two outputs hold the same files for the runtime, byte for byte."""
    ours = ("dqconvert.json", "README.md")
    names = [
        sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file() and p.name not in ours)
        for out in (one, two)
    ]
    same = (((one / name).read_bytes() == (two / name).read_bytes()) for name in names[0])
    return names[0] == names[1] and all(same)


EXACT = [
    ("int8", "comfyui", "vllm"),
    ("int8", "vllm", "diffusers"),
    ("int8", "diffusers", "comfyui"),
    ("fp8", "vllm", "diffusers"),
    ("fp8-block128", "vllm", "sglang"),
    ("mxfp8", "comfyui", "lightx2v"),
    ("mxfp8", "lightx2v", "sglang"),
    ("mxfp8", "sglang", "vllm"),
    ("mxfp4", "lightx2v", "vllm"),
]


@pytest.mark.parametrize(("scheme", "one", "two"), EXACT)
def test_a_layout_is_what_converting_to_it_gives_and_leads_back(
    bench: Bench, scheme: str, one: str, two: str
) -> None:
    """Wan's linears are the same for every runtime: nothing can differ, and names go both ways."""
    first, second = (bench.direct(bench.wan(), scheme, target) for target in (one, two))
    moved = bench.moved(first, two)
    assert weights_are_equal(moved, second)
    assert weights_are_equal(bench.moved(moved, one), first)
    done("verify", moved, "--against", bench.wan())


@pytest.mark.parametrize("scheme", ["int8", "fp8-block128"])
def test_scales_that_lightx2v_cannot_hold_are_rounded_and_said(bench: Bench, scheme: str) -> None:
    """Its loader casts them to bf16; codes stay, and the loss is within half a step of bf16."""
    first = bench.direct(bench.wan(), scheme, "vllm")
    moved = bench.moved(first, "lightx2v")
    found, before = reopen(moved), reopen(first)
    was = {module: layer for layer in before.layers for module in layer.modules}
    for layer in found.layers:
        q = found.unpack(layer)
        exact = before.unpack(was[layer.modules[0]])
        assert torch.equal(q.codes.view(torch.uint8), exact.codes.view(torch.uint8))
        ratio = q.scale.float() / exact.scale.float()
        assert bool(((ratio - 1).abs() <= 2.0**-8).all())
    (note,) = json.loads((moved / "dqconvert.json").read_text())["notes"]
    assert note.startswith(f"scales of {len(found.layers)} layers lose digits: 0.00")
    back = bench.moved(moved, "vllm")
    assert all("scale" in name for name in different(back, first))
    assert weights_are_equal(bench.moved(back, "lightx2v"), moved)  # from then on, exact


@pytest.mark.parametrize("scheme", ["int8", "mxfp8"])
def test_two_libraries_of_others_read_the_same_weights(bench: Bench, scheme: str) -> None:
    """comfy-kitchen on the file before, compressed-tensors on the file after."""
    first = bench.direct(bench.wan(), scheme, "comfyui")
    moved = bench.moved(first, "vllm", "--layout", "compressed-tensors")
    said = json.loads((moved / "transformer" / "config.json").read_text())
    _, arguments = vllm.parsed(said["quantization_config"])
    codec = vllm.compressor(said["quantization_config"])
    before, after = tensors_of(first), tensors_of(moved)
    names = {
        "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
        "blocks.0.ffn.0": "blocks.0.ffn.net.0.proj",
    }
    for theirs, ours in names.items():
        packed = parts(before, theirs)
        wide = parts(after, ours)
        found = codec.decompress({k: t for k, t in wide.items() if k != "bias"}, arguments)[
            "weight"
        ]
        meant = comfy.loaded(packed, tuple(packed["weight"].shape)).dequantize()
        torch.testing.assert_close(found.float(), meant.float(), rtol=2**-7, atol=0)


def parts(tensors: Mapping[str, Tensor], layer: str) -> Tensors:
    start = f"{layer}."
    return {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}


def test_modelopt_and_bfl_read_nvfp4_of_comfyui(shop: Any, bench: Bench) -> None:
    """Nibbles and tiles of scales are turned; modelopt's own class gives the same weights."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    out = shop.output(("nvfp4", "comfyui"), "--keep", r"norm")
    static = {
        f"{layer.name}.input_scale": torch.tensor(0.25 / (i + 1))
        for i, layer in enumerate(shop.opened(out).layers)
    }
    calibrated = bench.folder / "nvfp4-static"
    shop.damaged(out, static).rename(calibrated)
    moved = bench.moved(calibrated, "diffusers", "--layout", "bfl")
    assert len(reopen(moved).layers) > len(reopen(calibrated).layers)  # q, k and v stand apart
    before, after = tensors_of(calibrated), tensors_of(moved)
    packed, plain = (
        parts(before, "double_blocks.0.img_attn.qkv"),
        [parts(after, f"transformer_blocks.0.attn.to_{x}") for x in "qkv"],
    )
    exact = comfy.loaded(packed, (384, 128)).dequantize()
    rows = []
    for part in plain:
        assert torch.equal(part["input_scale"], packed["input_scale"])
        whole = NVFP4QTensor((128, 128), torch.float32, part["weight"])
        rows.append(
            whole.dequantize(
                scale=part["weight_scale"],
                double_scale=part["weight_scale_2"],
                block_sizes={-1: 16},
            )
        )
    torch.testing.assert_close(torch.cat(rows).float(), exact.float(), rtol=2**-7, atol=1e-6)
    back = bench.moved(moved, "comfyui")
    assert not different(back, calibrated)
    text = refused(
        bench.folder, "transcode", out, "--target", "diffusers", "--layout", "bfl", "-o", "x"
    )
    assert "needs a static scale of every input, and the file has none" in text


# SVDQuant


def test_nunchaku_becomes_a_folder_that_diffusers_loads(
    shop: Any, bench: Bench, lite: ModuleType
) -> None:
    from diffusers import FluxTransformer2DModel

    first = shop.output(("svdquant-w4a4", "nunchaku"), "--rank", 16)
    moved = bench.moved(first, "diffusers")
    config = json.loads((moved / "config.json").read_text())
    said = config.pop("quantization_config")
    assert said["svdq_w4a4"]["rank"] == 32  # proj_out has two branches of 16
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)
    lite.replace_with_nunchaku_linear(model, said, torch.bfloat16)
    state = tensors_of(moved)
    lite.check_strict_state_dict_match(model, state)
    model.load_state_dict(state, strict=True, assign=True)
    done("verify", moved, "--against", shop.model)
    notes = json.loads((moved / "dqconvert.json").read_text())["notes"]
    assert "rank 32 in the place of 16" in notes[0] and "behind a GELU" in notes[1]


@pytest.mark.parametrize("scheme", ["svdquant-w4a4", "svdquant-nvfp4"])
def test_svdquant_keeps_every_code_and_weight(shop: Any, bench: Bench, scheme: str) -> None:
    """Weights in fp32 by linear, from either file; and the way back gives the same file."""
    first = shop.output((scheme, "nunchaku"), "--rank", 16)
    moved = bench.moved(first, "diffusers")
    before, after = linears(first), linears(moved)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        off = (after[name] - weight).norm() / weight.norm()
        assert off < (2e-3 if "proj_out" in name else 1e-6), name
    back = bench.moved(moved, "nunchaku")
    folded = [] if scheme == "svdquant-w4a4" else ["smooth", "smooth_orig", "wtscale"]
    only = "single_transformer_blocks.0.mlp_fc2"  # its tensor scale went into its smooth vector
    biased = [n for n in different(back, first) if not n.endswith("fc2.bias")]
    assert biased == [f"{only}.{part}" for part in folded]


@pytest.mark.parametrize("scheme", ["svdquant-w4a4", "svdquant-nvfp4"])
@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_version_2_names_go_to_diffusers_and_back(bench: Bench, name: str, scheme: str) -> None:
    """No linear is split on its columns there, so the file comes back byte for byte."""
    model = bench.model(name, SVDQ_MODELS[name])
    first = bench.direct(model, scheme, "nunchaku", "--rank", 16)
    moved = bench.moved(first, "diffusers")
    section = json.loads((moved / "config.json").read_text())["quantization_config"]
    assert section["svdq_w4a4"]["rank"] == 16
    done("verify", moved, "--against", model)
    assert weights_are_equal(bench.moved(moved, "nunchaku"), first)


def linears(out: Path) -> Tensors:
    """Effective weights [fp32] by canonical linear."""
    found = reopen(out)
    pieces: dict[str, list[Tensor]] = {}
    for layer in sorted(found.layers, key=lambda one: "fc2" in one.name):
        whole = effective_weight(found.unpack(layer)).chunk(len(layer.modules))
        for module, part in zip(layer.modules, whole, strict=True):
            pieces.setdefault(module, []).append(part)
    return {name: torch.cat(parts, 1) for name, parts in pieces.items()}


def test_branches_of_q_k_and_v_are_joined_where_the_rank_allows_it(shop: Any, bench: Bench) -> None:
    first = shop.output(("svdquant-w4a4", "diffusers"), "--rank", 16)
    moved = bench.moved(first, "nunchaku")
    (file,) = moved.glob("*.safetensors")
    assert file.name == "svdq-int4_r48-tiny.safetensors"
    done("verify", moved, "--against", shop.model)
    before, after = linears(first), linears(moved)
    for name, weight in before.items():
        assert (after[name] - weight).norm() < 1e-5 * weight.norm(), name
    wide = shop.output(("svdquant-w4a4", "diffusers"), "--rank", 64)
    text = refused(
        bench.folder, "transcode", wide, "--target", "nunchaku", "-o", bench.folder / "x"
    )
    assert "a rank of 192 is more than a weight of" in text
