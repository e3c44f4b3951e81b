"""Rebased LoRAs: original + LoRA is the same function as preconditioned + rebased LoRA."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dqconvert.converter import precondition
from dqconvert.converter.detect import open_canonical
from dqconvert.converter.precondition import Precondition, PreconditionedSource, places
from dqconvert.converter.rebase import rebase
from dqconvert.quantizers.errors import DQConvertError, PlanError

torch.set_num_threads(1)
HERE = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
flux = SimpleNamespace(**runpy.run_path(str(HERE / "test_precondition.py")))
WIDTH, RANK, ALPHA = 128, 3, 1.5
BLOCK, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
LINEARS = (
    f"{BLOCK}.norm1.linear", f"{BLOCK}.attn.to_q", f"{BLOCK}.attn.to_k", f"{BLOCK}.attn.to_v",
    f"{BLOCK}.attn.add_v_proj", f"{BLOCK}.attn.to_out.0", f"{BLOCK}.ff.net.0.proj",
    f"{BLOCK}.ff.net.2", f"{SINGLE}.norm.linear", f"{SINGLE}.attn.to_q", f"{SINGLE}.attn.to_k",
    f"{SINGLE}.attn.to_v", f"{SINGLE}.proj_mlp", f"{SINGLE}.proj_out", "x_embedder",
)  # fmt: skip
FUSED = (
    "double_blocks.0.img_mod.lin", "double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.proj",
    "double_blocks.0.txt_attn.qkv", "double_blocks.0.txt_mlp.0", "double_blocks.0.txt_mlp.2",
    "single_blocks.0.modulation.lin", "single_blocks.0.linear1", "single_blocks.0.linear2",
)  # fmt: skip
ROLES = (
    ".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".lora_down.weight", ".lora_up.weight",
    ".alpha", ".diff_b",
)  # fmt: skip
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def model() -> Any:
    changes = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}
    wide = {"attention_head_dim": WIDTH, "axes_dims_rope": (16, 56, 56)}
    return flux.build_flux(torch.float32, **changes, **wide)


@pytest.fixture(scope="module")
def state(model: Any) -> Weights:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def chosen(state: Weights) -> Precondition:
    """A transform for every input, but one: the first MLP is only folded, not centered."""
    source = open_canonical(checkpoints.Memory(state), Path("flux.safetensors"))
    found = []
    for seed, place in enumerate(places(source)):
        center = ".ff.net" not in place.name
        found.append((place, flux.random_transform(seed, torch.float32, center, WIDTH)))
    return Precondition(found)


@pytest.fixture(scope="module", params=["int8 comfyui", "svdquant-w4a4 nunchaku"])
def onto(
    request: Any, state: Weights, chosen: Precondition, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A quantized file that says that it was preconditioned."""
    folder = tmp_path_factory.mktemp("onto")
    scheme, target = request.param.split()
    save_file(state, folder / "flux.safetensors")
    words = (folder / "flux.safetensors", "--scheme", scheme, "--target", target, "-q")
    checkpoints.done(*words, "-o", folder / "out")
    (file,) = (folder / "out").glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata())
    save_file(load_file(file), file, {**metadata, **precondition.metadata(chosen)})
    return folder / "out"


def draw(names: Iterator[tuple[str, Tensor]], roles: tuple[str, str], prefix: str) -> Weights:
    """A LoRA of these weights with strong random deltas, every second one with an alpha."""
    rng = torch.Generator().manual_seed(3)
    found = {}
    for place, (name, weight) in enumerate(names):
        rows, columns = weight.shape
        base = prefix + name
        found[f"{base}.{roles[0]}.weight"] = torch.randn(RANK, columns, generator=rng) / 8
        found[f"{base}.{roles[1]}.weight"] = torch.randn(rows, RANK, generator=rng) / 8
        if place % 2:
            found[f"{base}.alpha"] = torch.tensor(ALPHA)
    return found


def patched(state: Weights, lora: Weights) -> Weights:
    """The weights with a LoRA merged as ComfyUI and PEFT say, keys of either naming."""
    whole = checkpoints.original(state)
    homes = {**dict.fromkeys(whole, "fused"), **dict.fromkeys(state, "canonical")}
    flat = {f"lora_unet_{name.replace('.', '_')}": name for name in homes}
    merged = {"fused": dict.fromkeys(whole, 0.0), "canonical": dict.fromkeys(state, 0.0)}
    for key, tensor in lora.items():
        base, role = next((key.removesuffix(r), r) for r in ROLES if key.endswith(r))
        plain = base.removeprefix("diffusion_model.").removeprefix("transformer.")
        name = flat.get(f"{base}_weight", f"{plain}.weight")
        scale = float(lora.get(f"{base}.alpha", torch.tensor(float(RANK)))) / RANK
        if role in (".lora_B.weight", ".lora_up.weight"):
            down = lora[key.replace("lora_B", "lora_A").replace("lora_up", "lora_down")]
            merged[homes[name]][name] += scale * tensor.float() @ down.float()
        elif role in (".lora_B.bias", ".diff_b"):
            bias = name.replace(".weight", ".bias")
            merged[homes[bias]][bias] += tensor * (1.0 if role == ".diff_b" else scale)
    found = {name: tensor + merged["canonical"][name] for name, tensor in state.items()}
    stacked = checkpoints.original(found)
    stacked = {name: tensor + merged["fused"][name] for name, tensor in stacked.items()}
    source = open_canonical(checkpoints.Memory(stacked), Path("flux.safetensors"))
    return {name: source.read(name) for name in state}


def lora_of(layout: str, state: Weights) -> Weights:
    if layout == "diffusers":
        names = ((name, state[f"{name}.weight"]) for name in LINEARS)
        return draw(names, ("lora_A", "lora_B"), "transformer.")
    whole = checkpoints.original(state)
    names = ((name, whole[f"{name}.weight"]) for name in FUSED)
    if layout == "bfl":
        return draw(names, ("lora_A", "lora_B"), "diffusion_model.")
    if layout == "bfl-up":
        return draw(names, ("lora_down", "lora_up"), "diffusion_model.")
    flat = ((name.replace(".", "_"), weight) for name, weight in names)
    return draw(flat, ("lora_down", "lora_up"), "lora_unet_")


@pytest.mark.parametrize("layout", ["diffusers", "bfl", "bfl-up", "kohya"])
def test_original_and_lora_is_folded_and_rebased_lora(
    model: Any, state: Weights, chosen: Precondition, onto: Path, tmp_path: Path, layout: str
) -> None:
    lora = lora_of(layout, state)
    save_file({**lora, "lora_te1_x.alpha": torch.ones(1)}, tmp_path / "lora.safetensors")
    model.load_state_dict(state)
    plain = flux.run(model)
    model.load_state_dict(patched(state, lora))
    want = flux.run(model)
    assert float((want - plain).norm() / plain.norm()) > 0.1, "the LoRA must matter"

    made = load_file(rebase(tmp_path / "lora.safetensors", onto, tmp_path / "rebased.safetensors"))
    assert torch.equal(made.pop("lora_te1_x.alpha"), torch.ones(1))
    source = open_canonical(checkpoints.Memory(state), Path("flux.safetensors"))
    moved = PreconditionedSource(source, chosen)
    folded = {name: moved.read(name) for name in state}
    model.load_state_dict(patched(folded, made))
    found = flux.run(model)
    assert float((found - want).norm() / want.norm()) < 1e-5
    model.load_state_dict(patched(folded, lora))
    assert float((flux.run(model) - want).norm() / want.norm()) > 0.1, "as it was it is wrong"


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_biases_lie_where_the_runtime_reads_them(
    state: Weights, onto: Path, tmp_path: Path, layout: str
) -> None:
    save_file(lora_of(layout, state), tmp_path / "lora.safetensors")
    made = load_file(rebase(tmp_path / "lora.safetensors", onto, tmp_path / "rebased.safetensors"))
    if any(path.name.startswith("svdq") for path in onto.iterdir()):
        bases = {name.rpartition(".lora_A")[0] for name in made if ".lora_A" in name}
        assert all(f"{base}.lora_B.bias" in made for base in bases)
        assert all(name.startswith("transformer.") for name in made)
        assert not any(name.endswith((".alpha", ".diff_b")) for name in made)
    else:
        grown = {name for name in made if name.endswith(".diff_b")}
        stacked = "diffusion_model.double_blocks.0.img_attn.qkv.diff_b"
        assert stacked in grown and made[stacked].shape == (3 * WIDTH,)
        assert not any(".ff." in name or "img_mlp" in name for name in grown), "only folded"


def test_every_key_that_cannot_be_rewritten_is_named(
    state: Weights, onto: Path, tmp_path: Path
) -> None:
    lora = lora_of("diffusers", state)
    lora["transformer.no.such.lora_A.weight"] = torch.ones(RANK, WIDTH)
    lora[f"transformer.{BLOCK}.attn.to_q.dora_scale"] = torch.ones(WIDTH)
    lora["riddle"] = torch.ones(1)
    del lora[f"transformer.{BLOCK}.attn.to_k.lora_B.weight"]
    save_file(lora, tmp_path / "lora.safetensors")
    with pytest.raises(PlanError) as refusal:
        rebase(tmp_path / "lora.safetensors", onto, tmp_path / "rebased.safetensors")
    named = "\n".join(refusal.value.problems)
    for part in ("no.such", "dora_scale", "riddle", "attn.to_k"):
        assert part in named
    assert len(refusal.value.problems) == 4
    assert not (tmp_path / "rebased.safetensors").exists()


def test_what_does_not_fit_is_refused(state: Weights, onto: Path, tmp_path: Path) -> None:
    lora = lora_of("diffusers", state)
    lora[f"transformer.{BLOCK}.attn.to_q.lora_A.weight"] = torch.ones(RANK, 7)
    save_file(lora, tmp_path / "lora.safetensors")
    with pytest.raises(PlanError, match="to_q: its shapes do not fit"):
        rebase(tmp_path / "lora.safetensors", onto, tmp_path / "rebased.safetensors")
    with pytest.raises(DQConvertError, match="must end in"):
        rebase(tmp_path / "lora.safetensors", onto, tmp_path / "rebased.pt")
    with pytest.raises(DQConvertError, match="exists"):
        rebase(tmp_path / "lora.safetensors", onto, tmp_path / "lora.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(DQConvertError, match="no LoRA in safetensors"):
        rebase(tmp_path / "text.safetensors", onto, tmp_path / "rebased.safetensors")
