"""LoRAs as a user meets them: words, notes, manifest, verification, calibration, encoders."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dqconvert.converter.detect import open_canonical
from dqconvert.converter.job import Job
from dqconvert.converter.lora.files import LoraSpec, opened
from dqconvert.converter.lora.match import read
from dqconvert.converter.lora.merged import MergedSource
from dqconvert.converter.prepare import prepare
from dqconvert.formats.source import open_source

torch.set_num_threads(1)
checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))
done, refused = checkpoints.done, checkpoints.refused
WIDTH = 128
MODULE = "transformer_blocks.0.attn.to_q"
INT8 = ("--scheme", "int8", "--target", "comfyui", "-q")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = checkpoints.tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")
    return found


def lora_of(seed: int, module: str = MODULE, rows: int = WIDTH) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        f"transformer.{module}.lora_A.weight": torch.randn(4, WIDTH, generator=rng) / 8,
        f"transformer.{module}.lora_B.weight": torch.randn(rows, 4, generator=rng) / 8,
    }


def merged(pipeline: Path, *loras: tuple[dict[str, Tensor], float]) -> dict[str, Tensor]:
    """The pipeline's weights with LoRAs added in float64."""
    found = checkpoints.weights_of(pipeline)
    for lora, strength in loras:
        down, up = (tensor.double() for tensor in lora.values())
        module = next(iter(lora)).removeprefix("transformer.").partition(".lora_")[0]
        name = f"{module}.weight"
        found[name] = (found[name].double() + strength * up @ down).float()
    return found


def test_a_conversion_with_loras_is_that_of_the_merged_model(
    pipeline: Path, tmp_path: Path
) -> None:
    one, two = lora_of(1), lora_of(2, "single_transformer_blocks.0.proj_mlp", 4 * WIDTH)
    odd = tmp_path / "a:b"
    odd.mkdir()
    save_file(one, odd / "one.safetensors")
    (tmp_path / "peft").mkdir()
    save_file(two, tmp_path / "peft" / "adapter_model.safetensors")
    state = merged(pipeline, (one, 0.5), (two, -1.0))
    (tmp_path / "merged").mkdir()
    save_file(state, tmp_path / "merged" / "tiny.safetensors")
    words = ("--lora", f"{odd / 'one.safetensors'}:.5", "--lora", f"{tmp_path / 'peft'}:-1")
    done(pipeline, *INT8, *words, "-o", tmp_path / "out")
    done(tmp_path / "merged" / "tiny.safetensors", *INT8, "-o", tmp_path / "want")
    (got,), (want,) = ((tmp_path / n).glob("*.safetensors") for n in ("out", "want"))
    found, expected = load_file(got), load_file(want)
    for name, tensor in expected.items():
        if tensor.dtype != torch.int8:
            assert torch.allclose(found[name].float(), tensor.float(), rtol=1e-5), name
            continue
        off = found[name].int() - tensor.int()  # sums in another order round a few the other way
        assert int(off.abs().max()) <= 1 and float((off != 0).float().mean()) < 0.01, name
    said = json.loads((tmp_path / "out" / "dqconvert.json").read_text())
    assert [(row["file"], row["strength"]) for row in said["loras"]] == [
        ("one.safetensors", 0.5), ("adapter_model.safetensors", -1.0)]  # fmt: skip
    assert all(len(row["sha256"]) == 64 for row in said["loras"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "one.safetensors, strength 0.5" in card

    assert "is sound" in done("verify", tmp_path / "out", "--against", pipeline)
    save_file(lora_of(3), odd / "one.safetensors")
    problem = refused(tmp_path, "verify", tmp_path / "out", "--against", pipeline)
    assert "another file" in problem and said["loras"][0]["sha256"] in problem
    (odd / "one.safetensors").unlink()
    problem = refused(tmp_path, "verify", tmp_path / "out", "--against", pipeline)
    assert "one.safetensors" in problem and "put that file there" in problem
    assert "is sound" in done("verify", tmp_path / "out")


def test_words_that_mean_nothing_are_refused(pipeline: Path, tmp_path: Path) -> None:
    save_file(lora_of(1), tmp_path / "l.safetensors")
    out = ("-o", tmp_path / "out")
    for word in ("no.safetensors", "no.safetensors:1", ":2", f"{tmp_path / 'l.safetensors'}:nan"):
        problem = refused(tmp_path, pipeline, *INT8, "--lora", word, *out, code=2)
        assert "--lora" in problem
    assert "no --lora" in refused(tmp_path, pipeline, *INT8, "--lora-partial", *out)
    lora = ("--lora", tmp_path / "l.safetensors")
    problem = refused(tmp_path, pipeline, *INT8, *lora, "--rank-cap", 32, *out)
    assert "branch alone" in problem
    problem = refused(tmp_path, pipeline, *INT8, "--lora", pipeline / "vae", *out)
    assert "nothing in it is of" in problem or "lora" in problem.lower()
    bad = lora_of(1) | {"transformer.riddle.lora_A.weight": torch.ones(2, 2)}
    save_file(bad, tmp_path / "bad.safetensors")
    given = ("--lora", tmp_path / "bad.safetensors")
    problem = refused(tmp_path, pipeline, *INT8, *given, *out)
    assert "riddle" in problem and "--lora-partial" in problem
    text = done(pipeline, *INT8[:-1], *given, "--lora-partial", "--dry-run", *out)
    assert "1 modules were left out, such as transformer.riddle" in text
    inside = tmp_path / "out" / "l.safetensors"
    done(pipeline, *INT8, *out)
    save_file(lora_of(1), inside)
    problem = refused(tmp_path, pipeline, *INT8, "--lora", inside, *out, "--overwrite")
    assert "l.safetensors" in problem


def test_statistics_belong_to_the_merged_model(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DQCONVERT_CACHE", str(tmp_path / "cache"))
    save_file(lora_of(1), tmp_path / "l.safetensors")
    (tmp_path / "p.txt").write_text("a seven\n")

    def key(loras: tuple[tuple[Path, float], ...], mode: str = "merge") -> str:
        job = Job(
            str(pipeline),
            "svdquant-w4a4",
            calib=tmp_path / "p.txt",
            loras=loras,
            lora_mode=mode,
            calib_steps=1,
            size=(32, 32),
            output=tmp_path / "out",
        )
        found = prepare(job).calibration
        assert found is not None
        return found.key

    one = ((tmp_path / "l.safetensors", 1.0),)
    half = ((tmp_path / "l.safetensors", 0.5),)
    keys = [key(()), key(one), key(half)]
    assert len(set(keys)) == 3 and key(one, "branch") == key(one) == keys[1]
    words = ("--calib", tmp_path / "p.txt", "--calib-steps", 1, "--size", "32x32")
    lora = ("--lora", tmp_path / "l.safetensors")
    made = done("calibrate", pipeline, *words, *lora, "-q")
    assert keys[1] in made
    out = tmp_path / "branch"
    done(pipeline, "--scheme", "svdquant-w4a4", *words, *lora, "--lora-mode", "branch", "-o", out)
    assert "is sound" in done("verify", out, "--against", pipeline)
    assert len(list((tmp_path / "cache").iterdir())) == 1, "one run served all"


def test_encoders_take_their_own_parts(pipeline: Path, tmp_path: Path) -> None:
    """Of a kohya file: diffusers' fusing into CLIP is the judge."""
    import diffusers

    pipe: Any = diffusers.FluxPipeline.from_pretrained(pipeline)
    pipe.text_encoder.float()
    before = {n: t.clone() for n, t in pipe.text_encoder.state_dict().items()}
    rng = torch.Generator().manual_seed(0)
    lora = {}
    for name, tensor in before.items():
        linear = name.endswith((".q_proj.weight", ".v_proj.weight", ".out_proj.weight"))
        if linear and "encoder.layers" in name:
            base = name.removesuffix(".weight").replace(".", "_")
            base = base if base.startswith("text_model") else f"text_model_{base}"
            base = f"lora_te1_{base}"
            lora[f"{base}.lora_down.weight"] = torch.randn(2, tensor.shape[1], generator=rng)
            lora[f"{base}.lora_up.weight"] = torch.randn(tensor.shape[0], 2, generator=rng)
            lora[f"{base}.alpha"] = torch.tensor(1.0)
    qkv = "lora_unet_double_blocks_0_img_attn_proj"
    lora |= {f"{qkv}.lora_down.weight": torch.randn(2, WIDTH, generator=rng),
             f"{qkv}.lora_up.weight": torch.randn(WIDTH, 2, generator=rng),
             f"{qkv}.alpha": torch.tensor(2.0)}  # fmt: skip
    path = tmp_path / "both.safetensors"
    save_file(lora, path)
    pipe.load_lora_weights(dict(lora))
    pipe.fuse_lora(components=["text_encoder"], lora_scale=0.5)
    pipe.unload_lora_weights()
    fused = pipe.text_encoder.state_dict()
    source = open_canonical(open_source(pipeline / "text_encoder"), pipeline)
    loras = read([opened(LoraSpec(path, 0.5))], source, "text_encoder", False)
    got = MergedSource(source, loras)
    short = {name.removeprefix("text_model."): name for name in fused}
    changed = 0
    for name in source.infos:
        want = fused[short[name.removeprefix("text_model.")]]
        assert torch.allclose(got.read(name).float(), want, atol=1e-5), name
        changed += not torch.equal(want, before[short[name.removeprefix("text_model.")]])
    assert changed >= 3
    assert loras.notes == (
        "both.safetensors: 3 tensors are of transformer; --component transformer takes them",
    )
    text = done(pipeline, *INT8[:-1], "--lora", path, "--dry-run", "-o", tmp_path / "out")
    assert "tensors are of text_encoder; --component text_encoder takes them" in text


def test_nothing_needs_torch_before_the_work(pipeline: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    save_file(lora_of(1), tmp_path / "l.safetensors")
    job = "Job(sys.argv[1], 'svdquant-w4a4', loras=((Path(sys.argv[2]), 1.0),), lora_mode='branch',"
    code = (
        "import sys; from pathlib import Path; from dqconvert.converter.job import Job;"
        "from dqconvert.converter.prepare import prepare;"
        f"prepare({job} output=Path(sys.argv[3]))); assert 'torch' not in sys.modules"
    )
    words = [pipeline, tmp_path / "l.safetensors", tmp_path / "out"]
    subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], check=True, env=checkpoints.environment()
    )
