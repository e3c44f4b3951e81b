"""The command line where the input is wrong: one error that names the place, the right exit code,
and a disk that is as it was.
"""

from __future__ import annotations

import errno
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))
done, refused, tree = checkpoints.done, checkpoints.refused, checkpoints.tree
PAIRS, WEIGHTS = checkpoints.PAIRS, checkpoints.WEIGHTS


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = checkpoints.tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")
    return found


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DQCONVERT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_near_names_are_proposed(here: Path, pipeline: Path) -> None:
    text = refused(here, "flux1-dv", "--scheme", "int8", code=2)
    assert "no model is called 'flux1-dv'" in text and "flux1-dev" in text
    text = refused(here, pipeline, "--scheme", "int-4", code=2)
    assert "no scheme is called 'int-4'; did you mean" in text and "int8" in text
    text = refused(here, pipeline, "--scheme", "int8", "--target", "comfy", code=2)
    assert "no target is called 'comfy'; did you mean comfyui?" in text


def test_an_unknown_model_says_where_the_known_ones_are(here: Path) -> None:
    for name in ("zzz", "no/such/folder", "missing.safetensors"):
        text = refused(here, name, "--scheme", "int8")
        assert text.startswith(f"Error: {name}: no such file or folder")
        assert "dqconvert list models" in text and "owner/name" in text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["m"], "'--scheme'"),
        (["m", "--scheme", "int8", "--size", "512"], "'512' is not of the form HxW"),
        (["m", "--scheme", "int8", "--smooth", "2"], "from 0 to 1"),
        (["m", "--scheme", "int8", "--rounding", "best"], "'rtn', 'mse', 'gptq'"),
        (["m", "--scheme", "int8", "--workers", "0"], "'--workers'"),
        (["m", "--scheme", "int8", "--what"], "--what"),
        (["list", "colours"], "schemes"),
        (["verify"], "OUT"),
        (["dequantize", "x"], "--output"),
        (["calibrate", "x"], "--calib"),
    ],
)
def test_wrong_words_are_usage_errors(here: Path, words: list[str], text: str) -> None:
    assert text in refused(here, *words, code=2)


def test_what_is_no_transformer_is_refused(here: Path) -> None:
    save_file({"model.layers.0.mlp.weight": torch.zeros(2)}, here / "llm.safetensors")
    text = refused(here, "llm.safetensors", "--scheme", "int8")
    assert "llm.safetensors: not a diffusion transformer" in text
    assert "llm.safetensors" in refused(here, "inspect", "llm.safetensors")
    assert "llm.safetensors" in refused(here, "verify", "llm.safetensors")
    (here / "weights.gguf").write_bytes(b"GGUF")
    assert "weights.gguf: " in refused(here, "weights.gguf", "--scheme", "int8")
    (here / "empty").mkdir()
    assert "holds no .safetensors file" in refused(here, "empty", "--scheme", "int8")
    (here / "model_index.json").write_text("{}")
    assert "no folder called transformer" in refused(here, here, "--scheme", "int8")


def test_a_plan_that_cannot_be_is_refused(here: Path, pipeline: Path) -> None:
    text = refused(here, pipeline, "--scheme", "int8", "--target", "nunchaku")
    assert "target nunchaku cannot hold scheme int8" in text and "--target comfyui" in text
    text = refused(here, pipeline, "--scheme", "int8", "--rounding", "gptq")
    assert "--calib" in text
    text = refused(here, pipeline, "--scheme", "svdquant-w4a4", "--keep", "ff")
    assert "transformer_blocks.0.ff.net.0.proj.weight: --keep matches it" in text


def test_shapes_that_do_not_divide_are_listed(here: Path) -> None:
    config = checkpoints.flux_config(**checkpoints.NARROW | {"num_attention_heads": 3})
    checkpoints.sparse(
        here / "odd.safetensors", checkpoints.infos_of(checkpoints.meta_model(config))
    )
    text = refused(here, "odd.safetensors", "--scheme", "svdquant-w4a4")
    assert text.startswith("Error: 28 problem(s); nothing was written\n")
    assert "\n  - transformer_blocks.0.qkv_proj: needs extents that are multiples of 128" in text


def test_broken_containers_are_named(here: Path, pipeline: Path) -> None:
    tensors = checkpoints.weights_of(pipeline)
    folder = checkpoints.shard(tensors, here / "sharded")
    lost = folder / "diffusion_pytorch_model-00002-of-00003.safetensors"
    lost.rename(here / "elsewhere")
    assert f"missing shard {lost.name}" in refused(here, folder, "--scheme", "int8")
    (folder / f"{WEIGHTS}.index.json").unlink()
    assert f"missing shard {lost.name}" in refused(here, folder, "--scheme", "int8")

    whole = (pipeline / "transformer" / WEIGHTS).read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        (here / "cut.safetensors").write_bytes(whole[:size])
        text = refused(here, "cut.safetensors", "--scheme", "int8")
        assert "cut.safetensors" in text and "cut off" in text and "download it again" in text
    (here / "bad.safetensors").write_bytes(whole[:8] + b"x" + whole[9:])
    assert "bad.safetensors: its safetensors header" in refused(
        here, "bad.safetensors", "--scheme", "int8"
    )


def test_a_config_of_another_model_is_refused(here: Path, pipeline: Path) -> None:
    """A missing last block leaves a whole, shallower model; only config.json knows better."""
    config = json.loads((pipeline / "transformer" / "config.json").read_text())
    (here / "m").mkdir()
    save_file(checkpoints.weights_of(pipeline), here / "m" / WEIGHTS)
    (here / "m" / "config.json").write_text(json.dumps(config | {"num_single_layers": 2}))
    text = refused(here, "m", "--scheme", "int8")
    assert "config.json says num_single_layers 2, the tensors say 1" in text
    (here / "m" / "config.json").write_text("{")
    assert "config.json: not JSON" in refused(here, "m", "--scheme", "int8")


def test_a_config_may_leave_out_what_the_tensors_say(here: Path, pipeline: Path) -> None:
    """As that of FLUX.1-dev does, which has no axes_dims_rope."""
    config = json.loads((pipeline / "transformer" / "config.json").read_text())
    (here / "m").mkdir()
    save_file(checkpoints.weights_of(pipeline), here / "m" / WEIGHTS)
    del config["axes_dims_rope"], config["out_channels"]
    (here / "m" / "config.json").write_text(json.dumps(config))
    done("m", "--scheme", "svdquant-w4a4", "--target", "nunchaku", "--dry-run")


QKV = "transformer_blocks.0.attn.to_k.weight"
SPOILED = [
    QKV,
    "transformer_blocks.0.norm1_context.linear.weight",
    "proj_out.weight",
    "single_transformer_blocks.0.attn.norm_k.weight",
    "single_transformer_blocks.0.proj_out.bias",
    "transformer_blocks.0.norm1.linear.bias",
]


@pytest.mark.parametrize(("scheme", "target"), PAIRS)
def test_not_a_number_is_found_wherever_it_is(
    here: Path, pipeline: Path, scheme: str, target: str
) -> None:
    names = SPOILED[:2] if target == "diffusers" else SPOILED  # it shares nunchaku's path
    for number, name in enumerate(names):
        tensors = checkpoints.weights_of(pipeline)
        tensors[name].view(-1)[-1] = float("inf" if number % 2 else "nan")
        save_file(tensors, here / "spoiled.safetensors")
        text = refused(here, "spoiled.safetensors", "--scheme", scheme, "--target", target)
        assert f"spoiled.safetensors: tensor {name} holds NaN or infinity" in text


def test_not_a_number_is_named_as_the_file_names_it(here: Path, pipeline: Path) -> None:
    tensors = checkpoints.weights_of(pipeline)
    tensors[QKV][0, 0] = float("nan")
    save_file(checkpoints.original(tensors), here / "spoiled.safetensors")
    text = refused(here, "spoiled.safetensors", "--scheme", "int8")
    assert "spoiled.safetensors: tensor double_blocks.0.img_attn.qkv.weight holds NaN" in text


def test_bad_prompts_are_named_by_line(here: Path, pipeline: Path) -> None:
    (here / "empty.txt").write_text("\n  \n")
    (here / "bad.jsonl").write_text('{"prompt": "a cat"}\n{"promt": "a dog"}\n')
    words = (pipeline, "--scheme", "int8", "--calib")
    for command in (words, ("calibrate", pipeline, "--calib")):
        assert "empty.txt: the file holds no prompts" in refused(here, *command, "empty.txt")
        assert "none.txt: there is no such file" in refused(here, *command, "none.txt")
        text = refused(here, *command, "bad.jsonl")
        assert "bad.jsonl:2: the key 'promt' is unknown; did you mean 'prompt'?" in text


def test_a_lone_transformer_cannot_calibrate(here: Path, pipeline: Path) -> None:
    save_file(checkpoints.weights_of(pipeline), here / "lone.safetensors")
    (here / "prompts.txt").write_text("a cat\n")
    words = ("lone.safetensors", "--scheme", "int8", "--calib", "prompts.txt")
    text = refused(here, *words)
    assert "lone.safetensors: only a transformer" in text and "--pipeline" in text
    assert "no such file or folder" in refused(here, *words, "--pipeline", "no/such/thing")
    done(*words, "--pipeline", pipeline, "--dry-run")


# --------------------------------------------------------------------------- the disk


def no_space(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_is_one_error(
    here: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(os, call, no_space)
    text = refused(here, pipeline, "--scheme", "int8", "--workers", "2")
    assert "No space left on device" in text and "GB are needed there" in text
    assert text.count("\n") == 1


def test_a_full_disk_is_noticed_by_a_worker_in_the_middle(
    here: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.pwrite, iter(range(1000))
    monkeypatch.setattr(os, "pwrite", lambda *args: no_space() if next(calls) > 20 else real(*args))
    assert "No space left" in refused(here, pipeline, "--scheme", "int8")
    monkeypatch.undo()
    done(pipeline, "--scheme", "int8", "-o", here / "after", "-q")


def test_a_full_disk_spares_the_earlier_output(
    here: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(pipeline, "--scheme", "int8", "-o", here / "out", "-q")
    before = load_file(here / "out" / "tiny-int8.safetensors")
    monkeypatch.setattr(os, "pwrite", no_space)
    refused(here, pipeline, "--scheme", "fp8-tensor", "-o", here / "out", "--overwrite")
    assert checkpoints.same_tensors(before, load_file(here / "out" / "tiny-int8.safetensors"))


@pytest.mark.parametrize(
    "words",
    [
        ("--smooth", "0.5"),
        ("--calib-steps", "3"),
        ("--calib-samples", "2"),
        ("--size", "64x64"),
        ("--pipeline", "flux-digits"),
        ("--rounding", "gptq"),
    ],
)
def test_words_about_calibration_need_prompts(
    here: Path, pipeline: Path, words: tuple[str, str]
) -> None:
    text = refused(here, pipeline, "--scheme", "svdquant-w4a4", *words)
    assert words[0] in text and "give prompts with --calib" in text


@pytest.mark.parametrize("name", ["~nobody-here/x", "x" * 400, " "])
def test_words_that_are_no_model_are_one_error(here: Path, name: str) -> None:
    refused(here, name, "--scheme", "int8")


def test_the_source_is_never_replaced_by_its_output(here: Path, pipeline: Path) -> None:
    done(pipeline, "--scheme", "int8", "-o", "out", "-q")
    done("dequantize", "out", "-o", "out/plain.safetensors")
    words = ("out/plain.safetensors", "--scheme", "int8", "-o", "out", "--overwrite")
    assert "plain.safetensors" in refused(here, *words)


def test_an_output_that_exists_is_kept(here: Path, pipeline: Path) -> None:
    done(pipeline, "--scheme", "int8", "-o", "out", "-q")
    text = refused(here, pipeline, "--scheme", "int8", "-o", "out")
    assert "out: exists; choose another -o, or give --overwrite" in text
    (here / "mine").mkdir()
    (here / "mine" / "thesis.txt").write_text("years of work")
    (here / "file").write_text("")
    for name in ("mine", "file", "."):
        assert f"{name}: exists" in refused(here, pipeline, "--scheme", "int8", "-o", name)
        text = refused(here, pipeline, "--scheme", "int8", "-o", name, "--overwrite")
        assert f"{name}: was not written by dqconvert" in text
    text = refused(here, pipeline, "--scheme", "int8", "-o", "file/below")
    assert "file/below" in text


# ------------------------------------------------------------------- the Hub, the user

RESPONSE: Any = SimpleNamespace(headers={}, request=None)
ANSWERS = [
    (hub.GatedRepoError("gated", response=RESPONSE), "is gated: accept its licence at"),
    (hub.RepositoryNotFoundError("404", response=RESPONSE), "is not on the Hub, or is private"),
    (hub.LocalEntryNotFoundError("offline"), "is not in the local cache"),
    (hub.OfflineModeIsEnabled("offline"), "is not in the local cache"),
    (hub.HfHubHTTPError("500 Server Error\nmore", response=RESPONSE), "500 Server Error"),
    (hub.HfHubHTTPError("", response=RESPONSE), "cannot be fetched"),
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
]


@pytest.mark.parametrize(("answer", "text"), ANSWERS)
@pytest.mark.parametrize(
    ("name", "repo"),
    [("flux1-dev", "black-forest-labs/FLUX.1-dev"), ("owner/name", "owner/name")],
)
def test_what_the_hub_refuses_is_one_error(
    here: Path, monkeypatch: pytest.MonkeyPatch, answer: Exception, text: str, name: str, repo: str
) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise answer

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    said = refused(here, name, "--scheme", "int8")
    assert said.startswith(f"Error: {repo}: ") and text in said
    assert said.count("\n") == 1


SLOW = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from dqconvert.converter.cli import main
main()
"""


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_nothing_behind(here: Path, sign: signal.Signals) -> None:
    config = checkpoints.flux_config(num_attention_heads=8, num_layers=3, num_single_layers=6)
    infos = checkpoints.infos_of(checkpoints.meta_model(config))
    checkpoints.sparse(here / "big.safetensors", infos)
    before = tree(here)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "big.safetensors", "--scheme", "svdquant-w4a4"],
        env=checkpoints.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(here.glob("*.partial/*.partial")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert tree(here) != before
    time.sleep(0.2)
    process.send_signal(sign)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert (out, err) == ("", "Interrupted; nothing was written.\n")
    assert tree(here) == before
