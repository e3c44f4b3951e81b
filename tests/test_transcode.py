"""One quantization in several layouts: bytes as converted, back again, and foreign readers."""

from __future__ import annotations

import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
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


# GGUF


def rewritten(path: Path, out: Path, architecture: str | None, prefix: str) -> Path:
    """A GGUF file with other words around the same tensors, by gguf-py."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, architecture or "")
    if architecture is None:
        writer.kv_data[0].pop("general.architecture", None)
    for tensor in reader.tensors:
        kind = tensor.tensor_type
        writer.add_tensor(prefix + tensor.name, np.array(tensor.data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(
    ("architecture", "prefix"), [(None, ""), ("sd", ""), (None, "model.diffusion_model.")]
)
def test_gguf_files_of_others_get_our_words(
    shop: Any, bench: Bench, architecture: str | None, prefix: str
) -> None:
    out = bench.direct(shop.model, "gguf-q8_0", "gguf")
    (ours,) = out.glob("*.gguf")
    name = f"model{len(list(bench.folder.iterdir()))}-Q8_0.gguf"
    theirs = rewritten(ours, bench.folder / name, architecture, prefix)
    moved = bench.moved(theirs, "gguf")
    (found,) = moved.glob("*.gguf")
    assert found.name == name
    one, two = gguf.GGUFReader(ours), gguf.GGUFReader(found)
    assert str(two.fields["general.architecture"].contents()) == "flux"
    assert [t.name for t in one.tensors] == [t.name for t in two.tensors]
    for a, b in zip(one.tensors, two.tensors, strict=True):
        assert a.tensor_type == b.tensor_type and bytes(a.data) == bytes(b.data), a.name
    done("verify", moved, "--against", shop.model)


# what is said, and what is refused


def test_the_manifest_and_the_card_say_where_it_comes_from(shop: Any, tmp_path: Path) -> None:
    first = shop.output(("int8", "vllm"))
    out = tmp_path / "out"
    said = json.loads(done("transcode", first, "--target", "diffusers", "-o", out, "--json"))
    before = json.loads((first / "dqconvert.json").read_text())
    assert said == json.loads((out / "dqconvert.json").read_text())
    assert said["source"] == before["source"] and said["source"]["name"] == "tiny"
    made = said["transcoded"]
    assert (made["file"], made["target"]) == ("diffusion_pytorch_model.safetensors", "vllm")
    digest = before["files"]["transformer/diffusion_pytorch_model.safetensors"]["sha256"]
    assert made["files"] == {"diffusion_pytorch_model.safetensors": digest}
    assert said["options"]["rounding"] == before["options"]["rounding"]
    card = (out / "README.md").read_text()
    assert "a file for vllm: the codes" in card and "weight error" not in card
    kept = said["options"]["keep"]
    assert kept.startswith("^(") and r"transformer_blocks\.\d+\.norm1\.linear" in kept
    done("verify", out, "--against", shop.model)
    again = tmp_path / "again"
    done("transcode", out, "--target", "vllm", "-o", again, "-q")
    assert weights_are_equal(again, first)
    made = json.loads((again / "dqconvert.json").read_text())["transcoded"]
    assert made["target"] == "diffusers" and made["before"]["target"] == "vllm"


def test_layers_that_only_one_of_two_targets_quantizes(shop: Any, tmp_path: Path) -> None:
    first = shop.output(("int8", "comfyui"))
    words = ("transcode", first, "--target", "vllm", "-o", tmp_path / "out")
    text = refused(tmp_path, *words)
    line = "transformer_blocks.{i}.norm1.linear: quantized in the file, but not for vllm"
    assert line in text and text.count("norm1.linear:") == 1
    stdout = done(*words, "--dequantize-kept")
    found = reopen(tmp_path / "out")
    packed = reopen(first)
    gone = len({m for x in packed.layers for m in x.modules}) - len(found.layers)
    assert f"note: {gone} layers were dequantized to 16 bit" in stdout
    exact = {m: packed.unpack(x) for x in packed.layers for m in x.modules}
    name = "transformer_blocks.0.norm1.linear"
    weight = effective_weight(exact[name]).bfloat16()
    assert torch.equal(found.read_kept(f"{name}.weight"), weight)
    done("verify", tmp_path / "out")


def test_what_cannot_be_is_refused_by_name(shop: Any, bench: Bench, tmp_path: Path) -> None:
    first = shop.output(("int8", "comfyui"))
    out = ("-o", tmp_path / "out")
    text = refused(tmp_path, "transcode", first, "--target", "gguf", *out)
    assert "target gguf cannot hold scheme int8" in text
    text = refused(tmp_path, "transcode", first, "--target", "lightx2v", *out)
    assert "target lightx2v does not run FLUX.1" in text
    text = refused(tmp_path, "transcode", first, "--target", "comfy", *out, code=2)
    assert "comfyui" in text
    text = refused(tmp_path, "transcode", first, "--target", "vllm", "--layout", "x", *out)
    assert "--layout x: vllm has no such layout" in text
    text = refused(tmp_path, "transcode", first, "--target", "diffusers", "--layout", "x", *out)
    assert "--layout x: diffusers has no such layout" in text
    text = refused(tmp_path, "transcode", shop.model / "transformer", "--target", "vllm", *out)
    assert "not a quantized checkpoint" in text
    text = refused(tmp_path, "transcode", tmp_path / "none", "--target", "vllm", *out)
    assert "no such file or folder" in text
    done("transcode", first, "--target", "diffusers", *out, "-q")
    text = refused(tmp_path, "transcode", first, "--target", "diffusers", *out)
    assert "exists; choose another -o" in text
    text = refused(
        tmp_path, "transcode", tmp_path / "out", "--target", "comfyui", *out, "--overwrite"
    )
    assert "which is read; choose another -o" in text
    # vLLM fuses q, k and v: scales of their own would be rounded again by its loader
    own = bench.direct(bench.wan(), "fp8-tensor", "comfyui")
    text = refused(tmp_path, "transcode", own, "--target", "vllm", "-o", tmp_path / "x")
    assert "blocks.0.attn1.to_k: has a scale of its own, but the runtime fuses it" in text
    part = bench.direct(bench.wan(), "int8", "vllm", "--keep", r"attn1\.to_q")
    text = refused(tmp_path, "transcode", part, "--target", "lightx2v", "-o", tmp_path / "x")
    assert "blocks.{i}.attn1.to_q: not quantized in the file, and lightx2v has no layout" in text
    with safe_open(shop.file(first), "pt") as opened:
        name = next(name for name in opened.keys() if name.endswith("img_in.weight"))  # noqa: SIM118
    broken = shop.damaged(first, {name: None})
    text = refused(tmp_path, "transcode", broken, "--target", "diffusers", "-o", tmp_path / "x")
    assert "x_embedder.weight: missing" in text or "img_in.weight: missing" in text
