"""LoRAs in SVDQuant's low-rank branches: the base's output plus the LoRA's, and no other byte."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dqconvert.converter.reopen import PackedLayer, Reopened, reopen
from dqconvert.quantizers import forward, rtn
from dqconvert.quantizers.tensors import QuantizedTensor

torch.set_num_threads(1)
checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))
done, refused = checkpoints.done, checkpoints.refused
WIDTH, STRENGTH = 128, 0.5
RANKS = {
    "transformer_blocks.0.attn.to_q": 3,
    "transformer_blocks.0.attn.to_v": 5,
    "transformer_blocks.0.ff.net.2": 8,
    "transformer_blocks.0.attn.to_add_out": 17,
    "single_transformer_blocks.0.proj_mlp": 4,
    "single_transformer_blocks.0.proj_out": 6,
}
"""A LoRA of linears that have a branch; 17 pads to 32, so files of rank 16 get 48."""

configs = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("configs.py"))))
SDXL = checkpoints.FAMILY_MODELS["sdxl"]
Z_IMAGE = configs.z_image_config(dim=384, n_layers=1, n_heads=3, n_kv_heads=3, cap_feat_dim=128)
OTHERS = {
    "qwen-image": (
        configs.qwen_image_config(num_layers=1, num_attention_heads=2, joint_attention_dim=128),
        (),
    ),
    "z-image": (Z_IMAGE, ("--layout", "v2")),  # whose w3 and w1 are one layer
    "z-image-skip": (Z_IMAGE, ("--layout", "skip-refiners")),
    "sdxl": (SDXL["config"](**SDXL["SMALL"] | SDXL["SHALLOW"]), ()),
}

Weights = dict[str, Tensor]
RUNTIMES = [
    ("svdquant-w4a4", "nunchaku"),
    ("svdquant-nvfp4", "nunchaku"),
    ("svdquant-w4a4", "diffusers"),
]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = checkpoints.tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")
    return found


@pytest.fixture(scope="module", params=RUNTIMES, ids="@".join)
def base(
    request: pytest.FixtureRequest, pipeline: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A file without a LoRA, of rank 16."""
    scheme, target = request.param
    folder = tmp_path_factory.mktemp("base") / f"{scheme}-{target}"
    done(pipeline, "--scheme", scheme, "--target", target, "--rank", 16, "-o", folder, "-q")
    return folder


def factors(state: Weights, ranks: dict[str, int]) -> Weights:
    """Random factors that are exact in bf16, also when halved."""
    rng = torch.Generator().manual_seed(0)
    found = {}
    for name, rank in ranks.items():
        rows, columns = state[f"{name}.weight"].shape
        found[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, columns, generator=rng) / 8
        found[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, rank, generator=rng) / 8
    return {name: tensor.bfloat16() for name, tensor in found.items()}


@pytest.fixture(scope="module")
def lora(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file(factors(checkpoints.weights_of(pipeline), RANKS), path)
    return path


def words(base: Path) -> list[str]:
    scheme, _, target = base.name.rpartition("-")
    return ["--scheme", scheme, "--target", target, "--rank", "16"]


def tensors_of(folder: Path) -> Weights:
    (file,) = [path for path in folder.rglob("*.safetensors") if "precondition" not in path.name]
    return load_file(file)


def own(found: Reopened, layer: PackedLayer, x: Tensor, lora: Weights) -> Tensor:
    """What the LoRA adds to a layer's output in float64, module by module."""
    start = 0
    if layer.entry.columns is not None and layer.entry.columns[0] != 0:
        start = WIDTH
    parts = []
    for module in layer.modules:
        key = f"transformer.{module}.lora_"
        if f"{key}A.weight" in lora:
            down = lora[f"{key}A.weight"].double()[:, start : start + x.shape[1]]
            parts.append(x.double() @ down.T @ lora[f"{key}B.weight"].double().T * STRENGTH)
        else:
            rows = layer.form.shape[0] // len(layer.modules)
            parts.append(torch.zeros(len(x), rows, dtype=torch.float64))
    return torch.cat(parts, dim=1)


def output(q: QuantizedTensor, x: Tensor) -> Tensor:
    """The layer's output in float64, activations as they are."""
    seen = forward.entering(x + q.shift, q).double()
    y = seen @ rtn.dequantize(q).double().T
    assert q.lowrank is not None
    y += x.double() @ q.lowrank.down.double().T @ q.lowrank.up.double().T
    return y if q.bias is None else y + q.bias.double()


def test_an_existing_file_gets_the_lora_and_nothing_else(
    base: Path, lora: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done(base, "--lora", f"{lora}:{STRENGTH}", "--lora-mode", "branch", "-o", out)
    before, after, adds = reopen(base), reopen(out), load_file(lora)
    assert after.recognized.rank == 48 and not after.problems()
    rng = torch.Generator().manual_seed(1)
    touched = 0
    for one, two in zip(before.layers, after.layers, strict=True):
        if not one.form.rank:
            continue
        x = torch.randn(5, one.form.shape[1], generator=rng)
        plain = output(before.unpack(one), x)
        want = plain + own(before, one, x, adds)
        got = output(after.unpack(two), x)
        assert torch.allclose(got, want, atol=1e-5, rtol=1e-5), one.name
        touched += not torch.allclose(plain, want)
    assert touched >= 5
    old, new = tensors_of(base), tensors_of(out)
    assert old.keys() == new.keys()
    branch = ("lora_down", "lora_up", "proj_down", "proj_up")
    for name, tensor in old.items():
        if not name.endswith(branch):
            assert checkpoints.same_bits(tensor, new[name]), name
    assert "is sound" in done("verify", out)
    said = json.loads((out / "dqconvert.json").read_text())
    assert [row["strength"] for row in said["loras"]] == [STRENGTH]
    assert said["options"]["rank"] == 48


def test_a_dry_run_says_what_would_be_written(base: Path, lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (base, "--lora", lora, "--lora-mode", "branch", "-o", out)
    said = json.loads(done(*words, "--dry-run", "--json"))
    assert "rank 16 -> 48" in done(*words, "--dry-run") and not out.exists()
    assert set(said["modules"]["branch"]) == set(RANKS) and not said["modules"]["left out"]
    done(*words)
    (file,) = [p for p in out.rglob("*.safetensors") if p.name == said["file"]]
    data = sum(tensor.nbytes for tensor in load_file(file).values())
    assert said["bytes"]["after"] == data
    refused(tmp_path, *words[:-1], lora.parent, "--overwrite", "--dry-run")


def test_verify_and_a_second_lora(base: Path, lora: Path, pipeline: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    branch = ("--lora-mode", "branch", "-o")
    done(base, "--lora", lora, *branch, one)
    assert "is sound" in done("verify", one, "--against", pipeline)
    done(one, "--lora", f"{lora}:-1", *branch, two)
    assert "is sound" in done("verify", two, "--against", pipeline)
    plain, back = reopen(base), reopen(two)
    for a, b in zip(plain.layers, back.layers, strict=True):
        same = [forward.effective_weight(f.unpack(x)) for f, x in ((plain, a), (back, b))]
        assert torch.allclose(*same, atol=1e-5), "a LoRA and its opposite are nothing"


def test_a_new_conversion_writes_the_same_bytes(
    base: Path, lora: Path, pipeline: Path, tmp_path: Path
) -> None:
    for folder, source in (("later", base), ("new", pipeline)):
        given = words(base) if source is pipeline else []
        done(source, *given, "--lora", lora, "--lora-mode", "branch", "-o", tmp_path / folder, "-q")
    later, new = tensors_of(tmp_path / "later"), tensors_of(tmp_path / "new")
    assert checkpoints.same_tensors(later, new)
    names = [
        sorted(p.name for p in (tmp_path / f).rglob("*.safetensors")) for f in ("later", "new")
    ]
    assert names[0] == names[1]
    assert "is sound" in done("verify", tmp_path / "new", "--against", pipeline)


def test_a_cap_keeps_the_best_of_branch_and_lora(
    base: Path, lora: Path, pipeline: Path, tmp_path: Path
) -> None:
    whole, capped = tmp_path / "whole", tmp_path / "capped"
    given = ("--lora", lora, "--lora-mode", "branch")
    done(base, *given, "-o", whole)
    done(base, *given, "--rank-cap", 16, "-o", capped)
    one, two = reopen(whole), reopen(capped)
    assert (one.recognized.rank, two.recognized.rank) == (48, 16)
    for a, b in zip(one.layers, two.layers, strict=True):
        if not a.form.rank:
            continue
        p, q = one.unpack(a), two.unpack(b)
        assert p.lowrank is not None and q.lowrank is not None
        assert torch.equal(p.codes, q.codes)
        metric = torch.ones(a.form.shape[1]) if p.smooth is None else p.smooth.float()
        exact, got = ((f.up.float() @ f.down.float()) * metric for f in (p.lowrank, q.lowrank))
        s = torch.linalg.svdvals(exact.double())
        best = float(s[16:].square().sum().sqrt())
        assert float((got - exact).norm()) <= best + 0.01 * float(exact.norm())
    assert "is sound" in done("verify", capped)
    done(pipeline, *words(base), *given, "--rank-cap", 32, "-o", tmp_path / "new", "-q")
    assert reopen(tmp_path / "new").recognized.rank == 32


def test_kept_linears_and_biases_change_and_modulation_is_refused(
    base: Path, pipeline: Path, tmp_path: Path
) -> None:
    state = checkpoints.weights_of(pipeline)
    names = dict.fromkeys(("x_embedder", "norm_out.linear", "transformer_blocks.0.attn.to_k"), 4)
    adds = factors(state, names)
    adds["transformer.transformer_blocks.0.ff.net.2.diff_b"] = torch.ones(WIDTH).bfloat16()
    adds["transformer.transformer_blocks.0.attn.norm_q.diff"] = torch.ones(WIDTH).bfloat16()
    save_file(adds, tmp_path / "lora.safetensors")
    given = ("--lora", tmp_path / "lora.safetensors", "--lora-mode", "branch")
    done(base, *given, "-o", tmp_path / "out")
    assert "is sound" in done("verify", tmp_path / "out", "--against", pipeline)
    before, after = reopen(base), reopen(tmp_path / "out")
    for name in ("x_embedder.weight", "norm_out.linear.weight"):
        module = f"transformer.{name.removesuffix('.weight')}.lora_"
        product = adds[f"{module}B.weight"].float() @ adds[f"{module}A.weight"].float()
        want = (before.read_kept(name).float() + product).bfloat16()
        assert torch.equal(after.read_kept(name), want)
    norm = "transformer_blocks.0.attn.norm_q.weight"
    assert torch.equal(after.read_kept(norm), before.read_kept(norm) + 1)

    adds |= factors(state, {"transformer_blocks.0.norm1.linear": 2})
    adds["transformer.transformer_blocks.0.attn.to_out.0.lokr_w1"] = torch.ones(2, 2)
    adds["transformer.transformer_blocks.0.attn.to_out.0.lokr_w2"] = torch.ones(64, 64)
    save_file(adds, tmp_path / "lora.safetensors")
    problem = refused(tmp_path, base, *given, "-o", tmp_path / "more")
    assert "norm1.linear" in problem and "has no branch" in problem
    assert "to_out.0" in problem and "no product of two matrices" in problem
    done(base, *given, "-o", tmp_path / "more", "--lora-partial")
    assert "is sound" in done("verify", tmp_path / "more", "--against", pipeline)
    # a conversion of the original merges what has no branch
    done(pipeline, *words(base), *given, "-o", tmp_path / "new", "-q")
    assert "is sound" in done("verify", tmp_path / "new", "--against", pipeline)


def test_what_cannot_be_is_refused(base: Path, lora: Path, pipeline: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out")
    branch = ("--lora", lora, "--lora-mode", "branch")
    assert "multiple of 16" in refused(tmp_path, base, *branch, "--rank-cap", 20, *out)
    assert "there is no --lora" in refused(tmp_path, base, "--lora-mode", "branch", *out)
    problem = refused(tmp_path, pipeline, "--scheme", "int8", *branch, *out)
    assert "int8 has no low-rank branch" in problem
    done(pipeline, "--scheme", "int8", "--target", "comfyui", "-o", tmp_path / "int8", "-q")
    assert "no low-rank branches" in refused(tmp_path, tmp_path / "int8", *branch, *out)
    assert "--scheme" in refused(tmp_path, base, "--lora", lora, *out, code=2)
    text = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(1)}
    save_file(text, tmp_path / "text.safetensors")
    given = ("--lora", tmp_path / "text.safetensors", "--lora-mode", "branch")
    assert "nothing in it is of" in refused(tmp_path, base, *given, *out)


@pytest.mark.parametrize("name", OTHERS)
def test_nunchakus_other_models_get_it_row_by_row(name: str, tmp_path: Path) -> None:
    config, layout = OTHERS[name]
    model = {
        k: tensor * 0.05 for k, tensor in checkpoints.filled(checkpoints.meta_model(config)).items()
    }
    folder, lora = tmp_path / "model", tmp_path / "lora.safetensors"
    folder.mkdir()
    save_file(model, folder / checkpoints.WEIGHTS)
    (folder / "config.json").write_text(json.dumps(config))
    given = ("--scheme", "svdquant-w4a4", "--target", "nunchaku", "--rank", 16, "-q", *layout)
    done(folder, *given, "-o", tmp_path / "base")
    base = reopen(tmp_path / "base")
    held = [layer for layer in base.layers if layer.form.rank]
    modules = [module for layer in held for module in layer.modules]
    ranks = {module: 2 for place, module in enumerate(modules) if place % 3 != 2}
    save_file(factors(model, ranks), lora)
    branch = ("--lora", f"{lora}:{STRENGTH}", "--lora-mode", "branch")
    done(tmp_path / "base", *branch, "-o", tmp_path / "more")
    more, adds = reopen(tmp_path / "more"), load_file(lora)
    for one, two in zip(held, (x for x in more.layers if x.form.rank), strict=True):
        before, after = (
            forward.effective_weight(f.unpack(x)) for f, x in ((base, one), (more, two))
        )
        added = []
        for module in one.modules:
            up, down = (adds.get(f"transformer.{module}.lora_{x}.weight") for x in "BA")
            shape = model[f"{module}.weight"].shape
            none = torch.zeros(shape[0], shape[1:].numel(), dtype=torch.float64)
            plain = up is None or down is None
            added.append(none if plain else STRENGTH * up.double() @ down.double())
        want = before.double() + torch.cat(added)
        assert float((after - want).norm()) < 1e-3 * float(want.norm()), one.name
    if name in ("sdxl", "z-image"):  # which take their time
        return
    done(folder, *given, *branch, "-o", tmp_path / "new")
    first, second = tensors_of(tmp_path / "more"), tensors_of(tmp_path / "new")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k].view(torch.uint8), second[k].view(torch.uint8)) for k in first)
