"""What must be true of every model: its alias works, nothing of it falls through, and what is
nearly it, or not it at all, is refused with words that say so."""

from __future__ import annotations

import json
import runpy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from torch import Tensor

from dqconvert.converter.detect import open_canonical, unknown
from dqconvert.converter.families import aliases, families
from dqconvert.converter.options import PlanOptions, runs
from dqconvert.converter.plan import make_plan
from dqconvert.formats.targets import targets
from dqconvert.quantizers.errors import PlanError, SourceError
from dqconvert.quantizers.schemes import schemes

torch.set_num_threads(1)
checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))
PATH = Path("memory.safetensors")
META = {
    (name, number): checkpoints.meta_model(config)
    for name, configs in checkpoints.CONFIGS.items()
    for number, config in enumerate(configs)
    if checkpoints.small(config)
}
MODELS = [pytest.param(*key, id=f"{key[0]}-{key[1]}") for key in META]
DENOISERS = [name for name, family in families().items() if family.task]

ALONE = {"framepack-i2v"}
"""Repositories that hold a model at their top."""
MODULAR = {"flux3-image-klein", "flux3-image-klein-base", "minimax-h3"}
"""Repositories of modular pipelines."""
BF16 = {"sana-1600m-2k", "sana-1600m-4k"}
"""Repositories that are tried with weights in a variant's files alone."""
BESIDE = (
    "model.fp16.safetensors",
    "ltx-video-2b-v0.9.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "transformer/diffusion_pytorch_model.bin",
    "unet/flax_model.msgpack",
    "assets/teaser.png",
)
"""What else lies in repositories, and is not needed for weights alone."""


BASES = {"sana_sprint": "SANA"}
"""Families that are another one once they lack a tensor."""


def infos_of(name: str) -> Any:
    return checkpoints.infos_of(next(meta for key, meta in META.items() if key[0] == name))


class Hub:
    """A Hub with one repository, whose files are made when they are asked for."""

    def __init__(self, alias: str, family: Any, snapshot: Path) -> None:
        self.snapshot, self.infos = snapshot, infos_of(family.name)
        self.config = checkpoints.CONFIGS[family.name][0]
        folder = "unet/" if family.name == "sdxl" else "transformer/"
        folder = "" if alias in ALONE else folder
        kind = ".bf16" if alias in BF16 else ""
        self.weights = f"{folder}diffusion_pytorch_model{kind}.safetensors"
        index = ["modular_model_index.json"] if alias in MODULAR else ["model_index.json"]
        own = [self.weights, f"{folder}config.json", *([] if alias in ALONE else index)]
        hidden = "unet/" if folder == "transformer/" else "transformer/"
        beside = [one for one in BESIDE if not one.startswith(hidden)]
        self.files = [*own, *(one for one in beside if not (kind and one.startswith(folder)))]
        self.fetched: list[str] = []

    def download(
        self,
        repo: str,
        allow_patterns: Sequence[str] | None = None,
        ignore_patterns: Sequence[str] | None = None,
    ) -> str:
        allowed, ignored = list(allow_patterns or ["*"]), list(ignore_patterns or [])
        chosen = filter_repo_objects(self.files, allow_patterns=allowed, ignore_patterns=ignored)
        for name in chosen:
            path = self.snapshot / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name == self.weights:
                checkpoints.sparse(path, self.infos)
            elif name.endswith("config.json"):
                said = {"_class_name": "FluxTransformer2DModel", **self.config}
                path.write_text(json.dumps(said))
            else:
                path.write_text(json.dumps({"_class_name": "Pipeline"}))
            self.fetched.append(name)
        self.snapshot.mkdir(exist_ok=True)
        return str(self.snapshot)


@pytest.mark.parametrize("alias", aliases())
def test_the_first_command_takes_every_alias(
    alias: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the model comes from the Hub, whatever the repository's layout."""
    family = next(one for one in families().values() if alias in one.aliases)
    hub = Hub(alias, family, tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    said = json.loads(checkpoints.done(alias, "--scheme", "int8", "--dry-run", "--json"))
    assert said["source"]["origin"] == family.aliases[alias]
    assert said["source"]["family"] == family.name
    assert hub.weights in hub.fetched
    assert not set(hub.fetched) & set(BESIDE)


@pytest.mark.parametrize("family", families().values(), ids=lambda family: family.name)
def test_config_of_names_a_class_of_the_family(family: Any) -> None:
    made = {
        str(family.config_of(checkpoints.infos_of(meta))["_class_name"])
        for (name, _), meta in META.items()
        if name == family.name
    }
    assert family.classes or not family.task
    assert not family.classes or made <= set(family.classes)


def plans(source: Any) -> Iterator[Any]:
    """The plan for each target that runs the family, in the first scheme that its widths allow."""
    config = source.family.config_of(source.infos)
    options = PlanOptions(calibrated=True)
    for goal in targets().values():
        for scheme in schemes().values() if runs(goal, source.family) else ():
            plain = goal.NAME in scheme.targets and not (scheme.menu or scheme.mixes)
            if not plain or goal.accepts(scheme) is not None:
                continue
            try:
                yield make_plan(source, goal, scheme, options, ("m", config))
                break
            except PlanError:
                continue


@pytest.mark.parametrize(("name", "number"), MODELS)
def test_every_tensor_has_one_role(name: str, number: int) -> None:
    """Each is kept once or packed once, cut in columns or not, and none is another's."""
    meta, family = META[name, number], families()[name]
    for dialect in family.sources:
        theirs, _ = checkpoints.write_dialect(family, dialect, meta)
        source = open_canonical(checkpoints.Memory(theirs), PATH)
        assert {origin.tensor for origin in source.origins.values()} == theirs.keys()
        assert unknown(source) == [] and source.ignored == 0
    for plan in plans(source):
        whole: Counter[str] = Counter()
        cut: dict[str, set[tuple[int, int]]] = {}
        for layer in plan.layers:
            for tensor in layer.sources:
                if layer.columns and tensor.endswith(".weight"):
                    cut.setdefault(tensor, set()).add(layer.columns)
                elif layer.carries_bias or not tensor.endswith(".bias"):
                    whole[tensor] += 1
        carried = {tensor for tensor in meta if family.carries(plan.target.NAME, tensor)}
        assert whole.keys() | cut.keys() == carried, plan.target.NAME
        assert not whole.keys() & cut.keys()
        assert all(count == 1 for count in whole.values())
        for tensor, pieces in cut.items():
            first = 0
            for start, stop in sorted(pieces):
                assert start == first
                first = stop
            assert first == meta[tensor].shape[1], tensor


@pytest.mark.parametrize("name", DENOISERS)
def test_a_near_match_names_the_family_and_the_tensor(name: str) -> None:
    family = families()[name]
    meta = next(meta for key, meta in META.items() if key[0] == name)
    for dialect in family.sources:
        theirs, used = checkpoints.write_dialect(family, dialect, meta)
        for lost in family.signature:
            gone = one_of(used, lost)
            rest = {k: t for k, t in theirs.items() if k != gone}
            for tensors in (rest, rest | {f"{gone}_renamed": torch.zeros(1)}):
                text = refused(tensors)
                assert BASES.get(name, family.title) in text, (dialect, lost, text)
                assert gone in text or lost in text, (dialect, lost, text)


def one_of(used: Any, canonical: str) -> str:
    """What a tensor is called in a dialect."""
    for leaf, index in used:
        if canonical in [name.replace("{i}", index) for name in leaf.ours]:
            return str(leaf.theirs.replace("{i}", index))
    return canonical


def refused(tensors: Mapping[str, Tensor]) -> str:
    with pytest.raises(SourceError) as caught:
        open_canonical(checkpoints.Memory(tensors), PATH)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_model_is_refused_in_a_line() -> None:
    for tensors in (
        {"model.layers.0.mlp.weight": torch.zeros(2, 2)},
        {f"layer{i}.conv.weight": torch.zeros(2, 2, 3, 3) for i in range(50)},
        {"encoder.down.0.block.0.norm1.weight": torch.zeros(4), "decoder.x": torch.zeros(1)},
    ):
        assert "not a diffusion transformer that is known" in refused(tensors)


@pytest.mark.parametrize("name", ["flux", "wan", "sdxl"])
def test_an_unknown_tensor_is_kept_and_noted(name: str, tmp_path: Path) -> None:
    infos = infos_of(name) | checkpoints.infos_of({"my.own_table": torch.zeros(3, 5)})
    path = checkpoints.sparse(tmp_path / "m.safetensors", infos)
    said = checkpoints.done(path, "--scheme", "fp8-tensor", "--target", "comfyui", "--dry-run")
    assert "kept as they are: my.own_table" in said
    assert families()[name].title in checkpoints.done("inspect", path)


@pytest.mark.parametrize("prefix", ["module.model.", "model._orig_mod.", "net._orig_mod.module."])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_prefixes_may_stand_one_behind_the_other(name: str, prefix: str) -> None:
    family = families()[name]
    theirs, _ = checkpoints.write_dialect(family, "original", META[name, 0])
    copies = {f"model_ema.{k}": t for k, t in theirs.items()}
    tensors = {prefix + k: t for k, t in (theirs | copies).items()}
    found = open_canonical(checkpoints.Memory(tensors), PATH)
    assert found.family is family and found.infos.keys() == META[name, 0].keys()
    assert found.ignored == len(copies)


def test_inspect_says_the_variant(tmp_path: Path) -> None:
    path = checkpoints.sparse(tmp_path / "m.safetensors", infos_of("wan"))
    said = json.loads(checkpoints.done("inspect", path, "--json"))["facts"]
    assert (said["family"], said["variant"], said["dialect"]) == ("Wan", "t2v", "diffusers")


def test_a_repository_without_a_model_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: Any, **__: Any) -> str:
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    text = checkpoints.dqconvert("some-one/original", "--scheme", "int8", "--dry-run").stderr
    assert "has no folder called transformer or unet" in text and "give its path" in text


@pytest.mark.parametrize(
    ("said", "title"),
    [
        ("PixArtTransformer2DModel", "PixArt"),
        ("Transformer2DModel", "PixArt"),
        ("AllegroTransformer3DModel", "AllegroTransformer3DModel"),
    ],
)
def test_the_class_tells_models_with_equal_names_apart(said: str, title: str) -> None:
    source = checkpoints.Memory(META["pixart", 0])
    assert open_canonical(source, PATH, config={"_class_name": said}).family.title == title
