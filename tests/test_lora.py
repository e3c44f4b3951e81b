"""LoRAs in the layouts of their makers, merged: diffusers' own loading and fusing is the judge."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dqconvert.converter.canonical import CanonicalSource
from dqconvert.converter.detect import open_canonical
from dqconvert.converter.lora.branch import factors
from dqconvert.converter.lora.files import LoraSpec, opened
from dqconvert.converter.lora.match import BIAS, Loras, read
from dqconvert.converter.lora.merged import MergedSource
from dqconvert.quantizers.errors import PlanError, SourceError

torch.set_num_threads(1)
checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))
RANK, ALPHA, STRENGTH = 3, 1.5, 0.7
WIDTH = 128
CANONICAL = (
    "x_embedder", "context_embedder", "time_text_embed.text_embedder.linear_1",
    "transformer_blocks.0.norm1.linear", "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.attn.add_v_proj",
    "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff_context.net.2",
    "single_transformer_blocks.0.attn.to_v", "single_transformer_blocks.0.proj_mlp",
    "single_transformer_blocks.0.proj_out", "norm_out.linear", "proj_out",
)  # fmt: skip
FUSED = (
    "double_blocks.0.img_attn.qkv", "double_blocks.0.txt_attn.qkv", "double_blocks.0.img_attn.proj",
    "double_blocks.0.img_mlp.0", "double_blocks.0.txt_mlp.2", "double_blocks.0.img_mod.lin",
    "single_blocks.0.linear1", "single_blocks.0.linear2", "single_blocks.0.modulation.lin",
)  # fmt: skip
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """diffusers' pipeline of a tiny FLUX, in fp32."""
    import diffusers

    folder = checkpoints.tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")
    return diffusers.FluxPipeline.from_pretrained(folder).to(torch.float32)


@pytest.fixture(scope="module")
def state(pipeline: Any) -> Weights:
    return {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}


def opened_model(state: Weights) -> CanonicalSource:
    found: CanonicalSource = open_canonical(checkpoints.Memory(state), Path("flux.safetensors"))
    return found


def loras_of(
    path: Path, source: CanonicalSource, strength: float = STRENGTH, partial: bool = False
) -> Loras:
    return read([opened(LoraSpec(path, strength))], source, "transformer", partial)


def pairs(
    names: Iterator[tuple[str, Tensor]], words: tuple[str, str], prefix: str, alpha: bool = True
) -> Weights:
    """Random factors for some weights, every second with an alpha."""
    rng = torch.Generator().manual_seed(3)
    found = {}
    for place, (name, weight) in enumerate(names):
        found[f"{prefix}{name}{words[0]}"] = torch.randn(RANK, weight[0].numel(), generator=rng) / 8
        found[f"{prefix}{name}{words[1]}"] = torch.randn(len(weight), RANK, generator=rng) / 8
        if alpha and place % 2:
            found[f"{prefix}{name}.alpha"] = torch.tensor(ALPHA)
    return found


def lora_of(layout: str, state: Weights) -> Weights:
    """A LoRA as one of the makers writes it."""
    whole = checkpoints.original(state)
    canonical = [(name, state[f"{name}.weight"]) for name in CANONICAL]
    # diffusers' reader of these knows linear1 at FLUX.1-dev's width alone
    fused = [(name, whole[f"{name}.weight"]) for name in FUSED if not name.endswith("linear1")]
    flat = [(name.replace(".", "_"), weight) for name, weight in fused]
    ab, updown = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
    if layout == "diffusers":
        return pairs(iter(canonical), ab, "transformer.", alpha=False)
    if layout == "kohya":
        return pairs(iter(flat), updown, "lora_unet_")
    if layout == "final":
        names = [("final_layer_linear", whole["final_layer.linear.weight"])]
        swapped = whole["final_layer.adaLN_modulation.1.weight"]
        names.append(("final_layer_adaLN_modulation_1", swapped))
        return pairs(iter(names), updown, "lora_unet_", alpha=False)
    if layout == "onetrainer":
        names = [(n.replace(".", "_"), w) for n, w in canonical if "attn" in n]
        return pairs(iter(names), updown, "lora_transformer_") | {
            f"lora_transformer_{name}.alpha": torch.tensor(ALPHA) for name, _ in names
        }
    if layout == "comfyui":
        return pairs(iter(fused), updown, "diffusion_model.")
    assert layout == "xlabs"
    rng = torch.Generator().manual_seed(4)
    shapes = {f"double_blocks.0.processor.{kind}_lora{n}": rows * WIDTH
              for n in (1, 2) for kind, rows in (("qkv", 3), ("proj", 1))}  # fmt: skip
    shapes["single_blocks.0.processor.qkv_lora"] = 3 * WIDTH
    found = {}
    for name, rows in shapes.items():
        found[f"{name}.down.weight"] = torch.randn(RANK, WIDTH, generator=rng) / 8
        found[f"{name}.up.weight"] = torch.randn(rows, RANK, generator=rng) / 8
    return found


def fused_by_diffusers(pipeline: Any, lora: Weights | Path, state: Weights) -> Weights:
    """The transformer after load_lora_weights and fuse_lora."""
    pipeline.load_lora_weights(lora if isinstance(lora, Path) else dict(lora))
    pipeline.fuse_lora(components=["transformer"], lora_scale=STRENGTH)
    pipeline.unload_lora_weights()
    found = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    pipeline.transformer.load_state_dict(state)
    return found


def same(got: CanonicalSource, want: Weights, state: Weights) -> int:
    """Every tensor is what it should be; returns how many changed."""
    changed = 0
    for name, tensor in want.items():
        off = float((got.read(name).double() - tensor.double()).norm())
        moved = float((tensor.double() - state[name].double()).norm())
        assert off <= 1e-5 * moved + 1e-7, name
        changed += moved > 0.01
    return changed


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "onetrainer", "comfyui", "xlabs"])
def test_merged_is_what_diffusers_fuses(
    pipeline: Any, state: Weights, tmp_path: Path, layout: str
) -> None:
    lora = lora_of(layout, state)
    want = fused_by_diffusers(pipeline, lora, state)
    save_file(lora, tmp_path / "lora.safetensors")
    source = opened_model(state)
    got = MergedSource(source, loras_of(tmp_path / "lora.safetensors", source))
    changed = same(got, want, state)
    least = {"diffusers": 14, "kohya": 12, "onetrainer": 4, "comfyui": 12, "xlabs": 11}
    assert changed >= least[layout]
    # the same from a checkpoint in the other dialect, which fuses what the LoRA may not
    other = opened_model(checkpoints.original(state))
    assert other.dialect == "original"
    got = MergedSource(other, loras_of(tmp_path / "lora.safetensors", other))
    assert same(got, want, state) == changed


def test_the_final_layer_of_kohya_is_swapped(state: Weights, tmp_path: Path) -> None:
    """diffusers converts it, and loses it for want of a prefix, so its converter is the judge."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    lora = lora_of("final", state)
    want = _convert_kohya_flux_lora_to_diffusers(dict(lora))
    save_file(lora, tmp_path / "lora.safetensors")
    source = opened_model(state)
    got = MergedSource(source, loras_of(tmp_path / "lora.safetensors", source))
    for name in ("norm_out.linear", "proj_out"):
        product = want[f"{name}.lora_B.weight"].double() @ want[f"{name}.lora_A.weight"].double()
        expected = state[f"{name}.weight"].double() + STRENGTH * product
        assert torch.allclose(got.read(f"{name}.weight").double(), expected, atol=1e-5)


def test_rows_of_a_stack_are_those_of_the_whole(state: Weights, tmp_path: Path) -> None:
    lora = lora_of("kohya", state) | lora_of("final", state)
    save_file(lora, tmp_path / "lora.safetensors")
    source = opened_model(state)
    got = MergedSource(source, loras_of(tmp_path / "lora.safetensors", source))
    names = [f"transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"]
    whole = torch.cat([got.read(name) for name in names])
    assert torch.equal(got.stack(names), whole)
    for rows in ((0, 5), (100, 300), (256, 384), (127, 129)):
        assert torch.allclose(got.stack(names, rows), whole[slice(*rows)], atol=1e-6)
    swapped = "norm_out.linear.weight"
    assert torch.equal(got.stack([swapped], (3, 200)), got.read(swapped)[3:200])
    untouched = "transformer_blocks.0.norm1_context.linear.weight"
    assert torch.equal(got.stack([untouched]), state[untouched])


def test_alpha_is_what_peft_and_diffusers_say(
    pipeline: Any, state: Weights, tmp_path: Path
) -> None:
    lora = lora_of("diffusers", state)
    said = {"r": RANK, "lora_alpha": 6, "alpha_pattern": {"attn.to_q": 12}, "rank_pattern": {}}
    header = {f"transformer.{key}": value for key, value in said.items()}
    header["transformer.target_modules"] = CANONICAL
    file = tmp_path / "lora.safetensors"
    save_file(lora, file, {"lora_adapter_metadata": json.dumps(header)})
    want = fused_by_diffusers(pipeline, file, state)
    source = opened_model(state)
    same(MergedSource(source, loras_of(file, source)), want, state)
    folder = tmp_path / "peft"  # PEFT's own folder: other names, the same config beside
    folder.mkdir()
    peft = {key.replace("transformer.", "base_model.model.", 1): t for key, t in lora.items()}
    save_file(peft, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(said))
    same(MergedSource(source, loras_of(folder, source)), want, state)
    (folder / "adapter_config.json").write_text('{"lora_alpha": "much"}')
    with pytest.raises(SourceError, match="says no alpha"):
        loras_of(folder, source)


def test_control_loras_of_bfl_are_read_as_diffusers_reads_them(tmp_path: Path) -> None:
    """At FLUX.1-dev's size, factor by factor: with biases of B, new norms, swapped halves."""
    from diffusers.loaders.lora_conversion_utils import _convert_bfl_flux_control_lora_to_diffusers

    config = checkpoints.flux_config()
    source = opened_model(checkpoints.meta_model(config))
    whole = checkpoints.original(checkpoints.meta_model(config))
    rng = torch.Generator().manual_seed(0)
    lora = {}
    for name, weight in whole.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and weight.ndim == 2:
            rank = 2 if "adaLN" in module else 1
            lora[f"{module}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=rng)
            lora[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=rng)
            lora[f"{module}.lora_B.bias"] = torch.randn(weight.shape[0], generator=rng)
        elif leaf == "scale":
            lora[name] = torch.randn(weight.shape, generator=rng)
    save_file(lora, tmp_path / "lora.safetensors")
    want = _convert_bfl_flux_control_lora_to_diffusers(dict(lora))
    loras = loras_of(tmp_path / "lora.safetensors", source, 1.0)
    merged = MergedSource(source, loras)
    plain = [patch for patch in loras.patches if patch.rank is not None and patch.home.plain]
    seen = 0
    for name, tensor in want.items():
        name = name.removeprefix("transformer.")
        module, _, role = name.partition(".lora_")
        if name in source.infos:
            (share,) = merged.shares[name]
            added = share.patch.added(torch.zeros(len(tensor), 1), 0, len(tensor))[:, 0]
            assert torch.equal(added, tensor)
        elif role == "B.bias":
            (share,) = merged.shares[f"{module}.bias"]
            assert share.patch.kind == BIAS
            added = share.patch.added(None, 0, share.patch.extent[0])[:, 0]
            half = len(added) // 2
            added = added.roll(half) if share.patch.home.leaf.swap else added
            assert torch.equal(added[share.start : share.stop], tensor)
        elif module != "norm_out.linear":
            found = factors(plain, [module], source.infos, None)
            assert found is not None
            assert torch.equal(found[0] if role == "B.weight" else found[1], tensor)
        seen += 1
    assert seen == len(want)
    (swapped,) = (patch for patch in loras.patches if patch.home.leaf.swap and patch.kind != BIAS)
    assert swapped.home.parts == ("norm_out.linear.weight",)


@pytest.mark.parametrize(
    "words",
    [(".lora_down.weight", ".lora_up.weight"), (".lora_A.default.weight", ".lora_B.default.weight"),
     (".lora_A", ".lora_B"), (".lora.down.weight", ".lora.up.weight"),
     (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
     ("_lora.down.weight", "_lora.up.weight"), (".down.weight", ".up.weight")],
)  # fmt: skip
@pytest.mark.parametrize(
    "prefix",
    ["", "diffusion_model.", "model.diffusion_model.", "unet.base_model.model.", "lycoris_",
     "lora_unet__"],
)  # fmt: skip
def test_every_spelling_means_the_same(
    state: Weights, tmp_path: Path, words: tuple[str, str], prefix: str
) -> None:
    flat = prefix.endswith("_")
    name = "transformer_blocks.0.attn.to_q"
    base = prefix + (name.replace(".", "_") if flat else name)
    down, up = torch.randn(RANK, WIDTH), torch.randn(WIDTH, RANK)
    save_file({base + words[0]: down, base + words[1]: up}, tmp_path / "lora.safetensors")
    source = opened_model({name: tensor for name, tensor in state.items()})
    got = MergedSource(source, loras_of(tmp_path / "lora.safetensors", source, 2.0))
    want = state[f"{name}.weight"].double() + 2 * up.double() @ down.double()
    assert torch.allclose(got.read(f"{name}.weight").double(), want, atol=1e-4)


def test_differences_biases_and_modulations_of_lightx2v(tmp_path: Path) -> None:
    config = checkpoints.MODELS["wan"][0]
    model = {
        name: tensor.float()
        for name, tensor in checkpoints.filled(checkpoints.meta_model(config)).items()
    }
    source = opened_model(model)
    family = source.family
    theirs, _ = checkpoints.write_dialect(family, "original", model)
    rng = torch.Generator().manual_seed(1)
    changes = {
        "blocks.0.self_attn.q.weight": "diffusion_model.blocks.0.self_attn.q.diff",
        "blocks.0.self_attn.q.bias": "diffusion_model.blocks.0.self_attn.q.diff_b",
        "blocks.0.self_attn.norm_q.weight": "diffusion_model.blocks.0.self_attn.norm_q.diff",
        "blocks.0.modulation": "diffusion_model.blocks.0.diff_m",
        "head.modulation": "diffusion_model.head.diff_m",
        "patch_embedding.weight": "diffusion_model.patch_embedding.diff",
        "time_projection.1.weight": "diffusion_model.time_projection.1.diff",
    }
    lora, want = {}, dict(theirs)
    for name, key in changes.items():
        lora[key] = torch.randn(theirs[name].shape, generator=rng)
        want[name] = theirs[name] + STRENGTH * lora[key]
    save_file(lora, tmp_path / "lora.safetensors")
    for dialect in (model, theirs):
        opened_one = opened_model(dialect)
        got = MergedSource(opened_one, loras_of(tmp_path / "lora.safetensors", opened_one))
        written, _ = checkpoints.write_dialect(family, "original", {n: got.read(n) for n in model})
        assert all(torch.allclose(written[name], want[name], atol=1e-6) for name in want)


def test_several_add_in_any_order_also_with_dora(state: Weights, tmp_path: Path) -> None:
    name = "double_blocks.0.img_attn.qkv"
    rows = 3 * WIDTH
    one = {f"{name}.lora_down.weight": torch.randn(4, WIDTH), f"{name}.alpha": torch.tensor(2.0),
           f"{name}.lora_up.weight": torch.randn(rows, 4),
           f"{name}.dora_scale": torch.rand(1, WIDTH) + 1}  # fmt: skip
    two = {f"{name}.lokr_w1": torch.randn(3, 2), f"{name}.lokr_w2": torch.randn(WIDTH, WIDTH // 2)}
    save_file(one, tmp_path / "one.safetensors")
    save_file(two, tmp_path / "two.safetensors")
    source = opened_model(state)
    specs = [
        LoraSpec(tmp_path / "one.safetensors", 0.5),
        LoraSpec(tmp_path / "two.safetensors", -2),
    ]
    base = checkpoints.original(state)[f"{name}.weight"].double()
    merged = base + 0.5 * one[f"{name}.lora_up.weight"].double() @ one[
        f"{name}.lora_down.weight"].double()  # fmt: skip
    dora = merged / merged.norm(dim=0, keepdim=True) * one[f"{name}.dora_scale"].double()
    kron = torch.kron(two[f"{name}.lokr_w1"].double(), two[f"{name}.lokr_w2"].double())
    want = base + 0.5 * (dora - base) - 2 * kron
    for order in (specs, specs[::-1]):
        loras = read([opened(spec) for spec in order], source, "transformer", False)
        names = [f"transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"]
        got = MergedSource(source, loras).stack(names)
        assert torch.allclose(got.double(), want, atol=1e-4)
        rows_of = MergedSource(source, loras).stack(names, (100, 200))
        assert torch.allclose(rows_of.double(), want[100:200], atol=1e-4)


def test_every_tensor_is_used_or_named(state: Weights, tmp_path: Path) -> None:
    good = "transformer.transformer_blocks.0.attn.to_q"
    lora = {
        f"{good}.lora_A.weight": torch.ones(2, WIDTH),
        f"{good}.lora_B.weight": torch.ones(WIDTH, 2),
        "transformer.no.such.lora_A.weight": torch.ones(2, WIDTH),
        "transformer.transformer_blocks.0.attn.to_k.lora_A.weight": torch.ones(2, WIDTH),
        "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(2, 7),
        "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": torch.ones(WIDTH, 2),
        "transformer.transformer_blocks.0.attn.to_v.lora_A.weight": torch.ones(2, WIDTH),
        "transformer.transformer_blocks.0.attn.to_v.lora_B.weight": torch.ones(WIDTH, 3),
        "transformer.proj_out.oft_blocks": torch.ones(2, 2, 2),
        "transformer.transformer_blocks.0.attn.norm_q.diff_b": torch.ones(WIDTH),
        "riddle": torch.ones(1),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(1),
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight": torch.ones(2, 8),
    }
    path = tmp_path / "lora.safetensors"
    save_file(lora, path)
    source = opened_model(state)
    with pytest.raises(PlanError) as refusal:
        loras_of(path, source)
    text = "\n".join(refusal.value.problems)
    assert len(refusal.value.problems) == 7
    for part in ("no.such", "to_k", "img_attn_proj", "[128, 7]", "[128, 128]", "to_v",
                 "other ranks", "oft_blocks", "norm_q", "riddle", "--lora-partial"):  # fmt: skip
        assert part in text, part
    assert good not in text and "lora_te1" not in text
    loras = loras_of(path, source, partial=True)
    assert [patch.base for patch in loras.patches] == [good]
    notes = "\n".join(loras.notes)
    assert "1 tensors are of text_encoder;" in notes and "1 tensors are of text_encoder_2;" in notes
    assert "7 modules were left out" in notes
    save_file({"riddle": torch.ones(1)}, path)
    with pytest.raises(PlanError, match="nothing in it is of"):
        loras_of(path, source, partial=True)
    save_file({f"{good}.lora_A.weight": torch.ones(2, 2, dtype=torch.int32)}, path)
    with pytest.raises(SourceError, match="floating point"):
        loras_of(path, source)
