"""The command line where all goes well: every scheme and container, prints and files."""

from __future__ import annotations

import hashlib
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dqconvert.converter.families import aliases
from dqconvert.converter.resolve import embedded
from dqconvert.formats.targets import targets
from dqconvert.quantizers.schemes import schemes

torch.set_num_threads(1)
checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))
done, tree, PAIRS, WEIGHTS = (
    checkpoints.done,
    checkpoints.tree,
    checkpoints.PAIRS,
    checkpoints.WEIGHTS,
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = checkpoints.tiny_pipeline(tmp_path_factory.mktemp("model") / "Tiny-FLUX")
    return found


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of its own, for outputs with default names."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def only_weights(folder: Path) -> Path:
    (found,) = folder.rglob("*.safetensors")
    return found


def test_the_help_names_every_command() -> None:
    text = done("--help")
    for word in ("convert", "list", "inspect", "verify", "dequantize", "calibrate"):
        assert word in text
    assert done("-h") == text
    for option in ("--scheme", "--target", "--calib", "--keep", "--dry-run", "--json"):
        assert option in done("convert", "--help")
    assert done("--version").strip()


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("schemes", schemes().keys()),
        ("targets", targets().keys()),
        ("models", [*embedded(), *aliases()]),
    ],
)
def test_lists_come_from_the_registries(what: str, names: Any) -> None:
    rows = json.loads(done("list", what, "--json"))
    assert [row["name"] for row in rows] == list(names)
    assert all(isinstance(value, str) and value for row in rows for value in row.values())
    lines = done("list", what).splitlines()
    assert [line.split()[0] for line in lines] == ["name", *names]


def test_schemes_and_targets_list_each_other() -> None:
    forth = {
        (row["name"], target)
        for row in json.loads(done("list", "schemes", "--json"))
        for target in row["targets"].split(", ")
    }
    back = {
        (scheme, row["name"])
        for row in json.loads(done("list", "targets", "--json"))
        for scheme in row["schemes"].split(", ")
    }
    assert forth == back >= set(checkpoints.CALIBRATED) > set(PAIRS)


SCRIPT = """
import json, sys
from dqconvert.converter.cli import main
for words in json.loads(sys.argv[1]):
    main(words, standalone_mode=False)
print([name for name in ("torch", "diffusers", "transformers") if name in sys.modules])
"""


def test_what_computes_nothing_imports_no_torch(pipeline: Path, here: Path) -> None:
    commands = [
        ["--help"],
        ["list", "schemes"],
        ["list", "targets", "--json"],
        ["list", "models"],
        ["inspect", str(pipeline)],
        [str(pipeline), "--scheme", "int8", "--dry-run"],
        [str(pipeline), "--scheme", "svdquant-nvfp4", "--dry-run", "--json"],
    ]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)],
        env=checkpoints.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines()[-1] == "[]"
    assert not tree(here)


@pytest.mark.parametrize(("scheme", "target"), PAIRS)
def test_every_scheme_runs_on_every_target(
    pipeline: Path, here: Path, scheme: str, target: str
) -> None:
    """Data-free: the plan, the printed JSON, the manifest and the bytes say the same."""
    words = (pipeline, "--scheme", scheme, "--target", target, "--json")
    planned = json.loads(done(*words, "--dry-run"))
    assert not tree(here)
    said = json.loads(done(*words))
    out = here / f"tiny-flux-{scheme}-{target}"
    assert [path.name for path in here.iterdir()] == [out.name]

    manifest = json.loads((out / "dqconvert.json").read_text())
    assert said == manifest
    for key in ("source", "scheme", "target", "options", "calibration", "output", "notes"):
        assert said[key] == planned[key]
    file = only_weights(out)
    with safe_open(file, "pt") as opened:
        sizes = [t.numel() * t.element_size() for t in map(opened.get_tensor, opened.keys())]
    assert sum(sizes) == said["output"]["bytes"] == sum(row["bytes"] for row in planned["layers"])
    assert {row["name"] for row in said["layers"]} <= {row["name"] for row in planned["layers"]}
    assert all(0 < row["weight_error"] < 0.2 for row in said["layers"])

    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    beside = {path.as_posix() for path in files} - {"dqconvert.json", "README.md"}
    assert said["files"].keys() == beside
    for name, described in said["files"].items():
        data = (out / name).read_bytes()
        assert described["sha256"] == hashlib.sha256(data).hexdigest()
        assert described["bytes"] == len(data)

    card = huggingface_hub.ModelCard((out / "README.md").read_text()).data.to_dict()
    assert card.get("library_name") == ("diffusers" if target == "diffusers" else None)

    seen = json.loads(done("inspect", out, "--json"))
    assert (seen["facts"]["scheme"], seen["facts"]["target"]) == (scheme, target)
    assert not seen["problems"] and seen["facts"]["family"] == "FLUX.1"
    assert sum(seen["formats"].values()) - seen["formats"]["kept"] == len(said["layers"])
    assert f"scheme     {scheme}" in done("inspect", out)


@pytest.fixture(scope="module")
def containers(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights, five times."""
    folder = tmp_path_factory.mktemp("containers")
    tensors = checkpoints.weights_of(pipeline)
    shutil.copy(pipeline / "transformer" / WEIGHTS, folder / "single.safetensors")
    save_file(checkpoints.original(tensors), folder / "original.safetensors")
    extra = {"vae.decoder.conv_in.bias": torch.zeros(3)}
    save_file(
        checkpoints.original(tensors, "model.diffusion_model.") | extra,
        folder / "all-in-one.safetensors",
    )
    return {
        "pipeline": pipeline,
        "transformer": pipeline / "transformer",
        "single": folder / "single.safetensors",
        "original": folder / "original.safetensors",
        "all-in-one": folder / "all-in-one.safetensors",
        "sharded": checkpoints.shard(tensors, folder / "sharded"),
        "index": folder / "sharded" / f"{WEIGHTS}.index.json",
    }


@pytest.mark.parametrize(("scheme", "target"), [("int8", "comfyui"), ("svdquant-w4a4", "nunchaku")])
def test_the_container_changes_no_bit(
    containers: dict[str, Path], here: Path, scheme: str, target: str
) -> None:
    outputs, orders = {}, {}
    for name, path in containers.items():
        done(path, "--scheme", scheme, "--target", target, "-o", here / name, "-q")
        file = only_weights(here / name)
        outputs[name] = load_file(file)
        with safe_open(file, "pt") as opened:
            orders[name] = tuple(opened.offset_keys())
    for name, tensors in outputs.items():
        assert checkpoints.same_tensors(tensors, outputs["pipeline"]), name
    assert len(set(orders.values())) == 1


def test_ignored_tensors_are_noted(containers: dict[str, Path], here: Path) -> None:
    text = done(containers["all-in-one"], "--scheme", "int8")
    assert "1 tensors of other components were left out" in text
    assert (here / "all-in-one-int8-comfyui").is_dir()


def test_a_dry_run_prints_the_plan_and_writes_nothing(pipeline: Path, here: Path) -> None:
    text = done(pipeline, "--scheme", "int8", "--keep", r"\.proj_out$", "--dry-run")
    assert not tree(here)
    (line,) = (line for line in text.splitlines() if line.startswith("single_blocks.0.linear2"))
    assert "kept" in line and "--keep" in line
    assert "tiny-flux-int8-comfyui/tiny-flux-int8.safetensors" in text


def test_quiet_prints_nothing(pipeline: Path, here: Path) -> None:
    assert done(pipeline, "--scheme", "int8", "-q") == ""
    assert only_weights(here / "tiny-flux-int8-comfyui")


def test_convert_is_the_default_command(pipeline: Path, here: Path) -> None:
    done("convert", pipeline, "--scheme", "int8", "-o", here / "a", "-q")
    done("--scheme", "int8", pipeline, "-o", here / "deep" / "er" / "b", "-q")
    one, two = (only_weights(here / path) for path in ("a", "deep/er/b"))
    assert one.read_bytes() == two.read_bytes()


def test_the_number_of_workers_changes_no_bit(pipeline: Path, here: Path) -> None:
    for workers in (1, 3):
        words = ("--scheme", "svdquant-w4a4", "--workers", workers, "-o", here / str(workers))
        done(pipeline, *words, "-q")
    assert only_weights(here / "1").read_bytes() == only_weights(here / "3").read_bytes()


def test_overwrite_replaces_an_earlier_output_whole(pipeline: Path, here: Path) -> None:
    out = here / "out"
    done(pipeline, "--scheme", "svdquant-w4a4", "-o", out, "-q")
    (out / "mine.txt").write_text("left by hand")
    text = checkpoints.refused(here, pipeline, "--scheme", "int8", "-o", out, "--overwrite")
    assert "holds mine.txt, which dqconvert did not write" in text
    (out / "mine.txt").unlink()
    done(pipeline, "--scheme", "int8", "-o", out, "--overwrite", "-q")
    assert [path.name for path in here.iterdir()] == ["out"]
    assert sorted(tree(out)) == ["README.md", "dqconvert.json", "tiny-flux-int8.safetensors"]


def test_the_card_has_what_the_hub_reads(
    pipeline: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged by huggingface_hub's own parser, for a gated alias, a Hub id and a folder."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(pipeline))
    expected = {
        "flux1-dev": {
            "base_model": "black-forest-labs/FLUX.1-dev",
            "license": "other",
            "license_name": "flux-1-dev-non-commercial-license",
        },
        "flux1-schnell": {
            "base_model": "black-forest-labs/FLUX.1-schnell",
            "license": "apache-2.0",
        },
        "Some-One/Fine.Tune": {"base_model": "Some-One/Fine.Tune"},
        str(pipeline): {},
    }
    for number, (model, fields) in enumerate(expected.items()):
        out = here / str(number)
        done(model, "--scheme", "fp8-tensor", "-o", out, "-q")
        text = (out / "README.md").read_text()
        data = huggingface_hub.ModelCard(text, ignore_metadata_errors=False).data.to_dict()
        relation = {"base_model_relation": "quantized"} if "base_model" in fields else {}
        assert data == fields | relation | {
            "pipeline_tag": "text-to-image",
            "tags": ["dqconvert", "fp8-tensor", "comfyui"],
        }
        origin = json.loads((out / "dqconvert.json").read_text())["source"]["origin"]
        assert origin == fields.get("base_model")
        assert "from weights alone" in text and "worst layer" in text


@pytest.mark.parametrize("name", ["flux1-dev", "some-one/fine-tune"])
def test_only_a_calibration_fetches_the_text_encoders(
    pipeline: Path, here: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked: list[list[str]] = []

    def fetch(repo: str, allow_patterns: list[str], **_: Any) -> str:
        asked.append(allow_patterns)
        return str(pipeline)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    done(name, "--scheme", "int8", "--dry-run")
    (here / "p.txt").write_text("a cat\n")
    done(name, "--scheme", "int8", "--dry-run", "--calib", here / "p.txt")
    without, having = (" ".join(patterns) for patterns in asked)
    assert "transformer/*.safetensors" in without and "text_encoder" not in without
    assert "text_encoder*/*.safetensors" in having and "tokenizer*" in having
