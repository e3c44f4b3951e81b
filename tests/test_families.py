"""Families are tables; these laws hold for all of them, and diffusers judges FLUX."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dqconvert.converter.canonical import composed_info, entries_of
from dqconvert.converter.detect import open_canonical
from dqconvert.converter.families import aliases, families
from dqconvert.converter.family import LEAVES, Entry, depth, fill, leaves, match, patterns
from dqconvert.formats.targets import targets

torch.set_num_threads(1)
checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))
Memory, meta_model, filled = checkpoints.Memory, checkpoints.meta_model, checkpoints.filled
original, same_tensors, infos_of = (
    checkpoints.original,
    checkpoints.same_tensors,
    checkpoints.infos_of,
)
flux_config, SMALL, SCHNELL = checkpoints.flux_config, checkpoints.SMALL, checkpoints.SCHNELL

PATH = Path("memory.safetensors")
FLUX = families()["flux"]
MODELS = [
    pytest.param(families()[name], config, id=f"{name}-{number}")
    for name, configs in checkpoints.CONFIGS.items()
    for number, config in enumerate(configs)
]
SMALL_MODELS = [
    pytest.param(families()[name], config, id=f"{name}-{number}")
    for name, configs in checkpoints.CONFIGS.items()
    for number, config in enumerate(configs)
    if checkpoints.small(config)
]
PATTERNS = sorted(
    {
        pattern
        for family in families().values()
        for entries in family.dialects.values()
        for entry in entries
        for pattern in (entry.theirs, *entry.ours)
    }
)


def read_all(source: Any) -> dict[str, Tensor]:
    return {name: source.read(name) for name in source.infos}


def test_every_family_is_tried_and_every_alias_is_one_model() -> None:
    assert families().keys() == checkpoints.CONFIGS.keys()
    assert len(aliases()) == sum(len(family.aliases) for family in families().values())


@pytest.mark.parametrize("family", families().values(), ids=lambda family: family.name)
def test_the_table_is_whole(family: Any) -> None:
    assert set(family.sources) <= family.dialects.keys()
    assert family.dialects[family.sources[0]]
    written = [family.dialect_of(one.NAME, one.DIALECT) for one in targets().values()]
    assert any(dialect in family.dialects for dialect in written)
    assert family.licenses.keys() <= family.aliases.keys()
    listed = {ours for entry in family.dialects[family.sources[0]] for ours in entry.ours}
    for linear in family.linears:
        assert f"{linear.name}.*" in listed
        assert linear.site is None or any(linear.site == other.name for other in family.linears)
        assert (linear.role == "modulation") <= (linear.splits > 0)


@pytest.mark.parametrize(("family", "config"), MODELS)
def test_every_dialect_holds_each_row_and_column_once(family: Any, config: Any) -> None:
    """Counted on diffusers' own names and shapes: nothing lost, nothing twice."""
    model = meta_model(config)
    for dialect in family.dialects:
        theirs, _ = checkpoints.write_dialect(family, dialect, model)
        split = {
            fill(name, index)
            for entry, index in entries_of(family, dialect, infos_of(model))
            for leaf in leaves(entry)
            if leaf.columns and not leaf.theirs.endswith("weight")
            for name in leaf.ours
        }
        twice = sum(model[name].numel() for name in split)
        assert sum(t.numel() for t in theirs.values()) == twice + sum(
            t.numel() for t in model.values()
        )


@pytest.mark.parametrize(("family", "config"), SMALL_MODELS)
def test_every_dialect_has_an_inverse(family: Any, config: Any) -> None:
    model = filled(meta_model(config), columns=3 * 128)
    hidden = model[family.hidden].shape[0]
    for dialect in family.dialects:
        theirs, used = checkpoints.write_dialect(family, dialect, model)
        assert same_tensors(checkpoints.read_dialect(theirs, used, hidden), model), dialect


@pytest.mark.parametrize(("family", "config"), SMALL_MODELS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_checkpoints_are_read_from_either_dialect(family: Any, config: Any, prefix: str) -> None:
    model = filled(meta_model(config), columns=2)
    prefix = prefix if prefix in family.prefixes else ""
    for dialect in family.sources:
        theirs, _ = checkpoints.write_dialect(family, dialect, model)
        found = open_canonical(Memory({prefix + k: t for k, t in theirs.items()}), PATH)
        assert (found.family, found.dialect, found.ignored) == (family, dialect, 0)
        assert same_tensors(read_all(found), model)
        assert dict(found.infos) == infos_of(model)
        assert found.hidden == model[family.hidden].shape[0]


@pytest.mark.parametrize(("family", "config"), MODELS)
def test_the_shapes_imply_the_config(family: Any, config: Any) -> None:
    model = meta_model(config)
    for dialect in family.sources:
        tensors, _ = checkpoints.write_dialect(family, dialect, model)
        said = family.config_of(open_canonical(Memory(tensors), PATH).infos)
        for key, value in {"_class_name": "FluxTransformer2DModel", **config}.items():
            assert said.pop(key) == (list(value) if isinstance(value, tuple) else value), key
        assert not said


@pytest.mark.parametrize(("family", "config"), SMALL_MODELS)
def test_names_are_unambiguous(family: Any, config: Any) -> None:
    """A name of a dialect matches one row of its table, and composed headers are right."""
    model = filled(meta_model(config), columns=2)
    for dialect, table in family.dialects.items():
        theirs, used = checkpoints.write_dialect(family, dialect, model)
        rows = [leaf for entry in table for leaf in leaves(entry)]
        for name in theirs:
            assert len([1 for leaf in rows if match(leaf.theirs, name) is not None]) <= 1
        for leaf, index in used:
            if leaf.columns is None:
                infos = [infos_of(model)[fill(name, index)] for name in leaf.ours]
                composed = theirs[fill(leaf.theirs, index)]
                assert composed_info(leaf, infos) == infos_of({"": composed})[""]


def test_a_table_with_all_names_is_what_original_means() -> None:
    """Every tensor of diffusers' model is in the original dialect under another name."""
    model = meta_model(flux_config(**SMALL))
    assert not original(model).keys() & model.keys()


@pytest.mark.parametrize(("double", "single"), [(1, 1), (3, 2), (2, 11)])
@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_diffusers_reads_original_names_alike(
    double: int, single: int, guidance: bool, prefix: str
) -> None:
    """Its converter knows width 3072 only and cuts rows only, so two columns will do."""
    from diffusers.loaders.single_file_utils import (
        convert_flux_transformer_checkpoint_to_diffusers as convert,
    )

    config = flux_config(num_layers=double, num_single_layers=single, guidance_embeds=guidance)
    checkpoint = original(filled(meta_model(config), columns=2), prefix)
    ours = read_all(open_canonical(Memory(checkpoint), PATH))
    rest = dict(checkpoint)
    theirs = convert(rest)
    assert not rest, "our original dialect has names that BFL's has not"
    assert same_tensors(ours, theirs)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_other_components_are_counted_not_read(prefix: str) -> None:
    model = filled(meta_model(flux_config(**SMALL)), columns=1)
    extra = {
        name: torch.zeros(2)
        for name in ("vae.encoder.conv_in.weight", "text_encoders.t5xxl.shared.weight")
    }
    both = original(model, "model.diffusion_model.") | extra
    found = open_canonical(Memory(both), PATH)
    assert found.ignored == 2
    assert same_tensors(read_all(found), model)


@given(pattern=st.sampled_from(PATTERNS), index=st.integers(0, 10**6))
def test_fill_is_undone_by_match(pattern: str, index: int) -> None:
    name = fill(pattern, str(index))
    assert match(pattern, name) == (str(index) if "{i}" in pattern else "")
    assert (pattern, match(pattern, name)) in patterns(name)
    assert match(pattern, f"x.{name}") is None
    assert match(pattern, f"{name}.x") is None
    if "{i}" in pattern:
        assert match(pattern, fill(pattern, "x")) is None


@given(st.sets(st.integers(0, 40)), st.sets(st.integers(0, 40)))
def test_depth_counts_to_the_highest_block(double: set[int], single: set[int]) -> None:
    names = [f"blocks.{i}.norm.weight" for i in double]
    names += [f"single_blocks.{i}.norm.weight" for i in single] + ["blocks.last.weight", "blocks"]
    assert depth(names, "blocks") == max(double, default=-1) + 1
    assert depth(names, "single_blocks") == max(single, default=-1) + 1


@pytest.mark.parametrize("pattern", PATTERNS)
def test_leaves_share_all_but_their_name(pattern: str) -> None:
    entry = Entry(pattern, ("a.*", "b.*") if pattern.endswith(".*") else ("a",), swap=True)
    found = leaves(entry)
    if not pattern.endswith(".*"):
        assert found == [entry]
        return
    stem = pattern.removesuffix("*")
    assert [leaf.theirs for leaf in found] == [stem + leaf for leaf in LEAVES]
    assert [leaf.ours for leaf in found] == [(f"a.{leaf}", f"b.{leaf}") for leaf in LEAVES]
    assert all(leaf.swap for leaf in found)


DEV = {"guidance_embed": True, "in_channels": 16, "out_channels": 16}


@pytest.mark.parametrize(
    ("changes", "name", "said"),
    [
        ({}, "Flux", DEV),
        (SCHNELL, "FluxSchnell", DEV | {"guidance_embed": False}),
        ({"in_channels": 384, "out_channels": 64}, "Flux", DEV | {"in_channels": 96}),
    ],
    ids=["dev", "schnell", "fill"],
)
def test_nunchaku_is_told_which_model_it_is(changes: Any, name: str, said: Any) -> None:
    """comfy_config as nunchaku's own files have it; in_channels counts 2x2 patches once."""
    config = flux_config(**changes)
    facts = FLUX.facts("nunchaku", config)
    assert facts["model_class"] == "NunchakuFluxTransformer2dModel"
    assert facts["comfy_config"] == {
        "model_class": name,
        "model_config": {
            "axes_dim": [16, 56, 56],
            "context_in_dim": 4096,
            "depth": 19,
            "depth_single_blocks": 38,
            "disable_unet_model_creation": True,
            "hidden_size": 3072,
            "image_model": "flux",
            "mlp_ratio": 4.0,
            "num_heads": 24,
            "patch_size": 2,
            "qkv_bias": True,
            "theta": 10000,
            "vec_in_dim": 768,
        }
        | said,
    }
    assert FLUX.facts("original", config) == {}
