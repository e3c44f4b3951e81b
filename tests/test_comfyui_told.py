"""What ComfyUI reads of a file beside its layers: a config in the header, tensors of no weights."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dqconvert.converter.families import families

checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))
KNOWN = checkpoints.FAMILY_MODELS

LTX2 = {
    "num_attention_heads": 32,
    "cross_attention_dim": 4096,
    "positional_embedding_theta": 10000.0,
    "positional_embedding_max_pos": [20, 2048, 2048],
    "audio_positional_embedding_max_pos": [20],
    "causal_temporal_positioning": True,
    "use_middle_indices_grid": True,
    "rope_type": "split",
    "frequencies_precision": "float64",
    "timestep_scale_multiplier": 1000,
    "av_ca_timestep_scale_multiplier": 1000,
}
"""Of Lightricks' LTX-2, what ComfyUI's own defaults are not."""


def written(folder: Path, config: dict[str, Any]) -> tuple[dict[str, torch.Tensor], Path]:
    """A model folder of random weights, and those."""
    tensors = checkpoints.filled(checkpoints.meta_model(config))
    tensors = {name: (tensor * 0.05).contiguous() for name, tensor in tensors.items()}
    folder.mkdir()
    save_file(tensors, folder / checkpoints.WEIGHTS)
    (folder / "config.json").write_text(json.dumps(config))
    return tensors, folder


def header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def test_ltx2s_config_is_told() -> None:
    config = KNOWN["ltx2"]["REAL"]["ltx-2"]
    facts = families()["ltx2"].facts("original", config)
    said = json.loads(facts["metadata"]["config"])["transformer"]
    assert {key: said[key] for key in LTX2} == LTX2
    assert families()["ltx2"].facts("diffusers", config) == {}


@pytest.mark.parametrize(("name", "later"), [("ltx-video-0.9.5", None), ("ltx-video-0.9.7", True)])
def test_the_larger_ltx_video_counts_the_first_frame_once(name: str, later: bool | None) -> None:
    facts = families()["ltx"].facts("original", KNOWN["ltx"]["REAL"][name])
    said = json.loads(facts["metadata"]["config"])["transformer"]
    assert said.get("causal_temporal_positioning") is later


@pytest.mark.parametrize("scheme", ["int8", "nvfp4"])
def test_a_config_in_the_sources_header_is_passed_on(tmp_path: Path, scheme: str) -> None:
    family, config = families()["ltx"], KNOWN["ltx"]["CONFIGS"][0]
    tensors, folder = written(tmp_path / "model", config)
    checkpoints.done(folder, "--scheme", scheme, "--target", "comfyui", "-o", tmp_path / "a")
    (made,) = (tmp_path / "a").glob("*.safetensors")
    said = json.loads(header(made)["config"])["transformer"]
    # The shape that ComfyUI reads it from is packed.
    assert said["cross_attention_dim"] == config["cross_attention_dim"]
    original, _ = checkpoints.write_dialect(family, "original", tensors)
    own = json.dumps({"transformer": {**said, "causal_temporal_positioning": True}, "vae": {}})
    file = tmp_path / "ltxv.safetensors"
    save_file({k: t.contiguous() for k, t in original.items()}, file, {"config": own})
    checkpoints.done(file, "--scheme", scheme, "--target", "comfyui", "-o", tmp_path / "b")
    (made,) = (tmp_path / "b").glob("*.safetensors")
    assert header(made)["config"] == own
    checkpoints.done("verify", tmp_path / "b", "--against", file)


def test_minimaxs_frequencies_are_in_the_file(tmp_path: Path) -> None:
    config = KNOWN["minimax_h3"]["CONFIGS"][0]
    _, folder = written(tmp_path / "model", config)
    out = tmp_path / "out"
    checkpoints.done(folder, "--scheme", "int8", "--target", "comfyui", "-o", out)
    (made,) = out.glob("*.safetensors")
    with safe_open(made, "pt") as opened:
        found = opened.get_tensor("rope.inv_freq")
    expected = checkpoints.build_model(config).rope.inv_freq
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    checkpoints.done("verify", out, "--against", folder)
    back = tmp_path / "back"
    checkpoints.done("dequantize", out, "-o", back / "a.safetensors")


@pytest.mark.parametrize("connected", [False, True])
def test_a_file_without_ltx2s_connectors_is_said_not_to_run(
    tmp_path: Path, connected: bool
) -> None:
    tensors, folder = written(tmp_path / "model", KNOWN["ltx2"]["CONFIGS"][0])
    source = folder
    if connected:
        first, _ = checkpoints.write_dialect(families()["ltx2"], "original", tensors)
        names = [f"{kind}_embeddings_connector.learnable_registers" for kind in ("video", "audio")]
        parts = {name: torch.zeros(4, 8).bfloat16() for name in names}
        source = tmp_path / "ltx2.safetensors"
        save_file({k: t.contiguous() for k, t in (first | parts).items()}, source)
    words = (source, "--scheme", "int8", "--target", "comfyui", "-o", tmp_path / "out", "--dry-run")
    said = checkpoints.dqconvert(*words)
    assert said.exit_code == 0, said.output
    assert ("does not run" in said.output) is not connected
