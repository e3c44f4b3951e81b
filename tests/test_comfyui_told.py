"""ComfyUI's own habits: configs in headers, tensors of no weights, the names in what it saves."""

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

from dqconvert.converter.detect import open_canonical
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


@pytest.mark.parametrize("name", ["flux", "flux2", "chroma"])
def test_what_comfyui_saves_is_read(name: str) -> None:
    """Its models have weights where the authors' norms have scales: it renames them as it loads."""
    tensors = checkpoints.filled(checkpoints.meta_model(KNOWN[name]["CONFIGS"][0]), columns=2)
    first, _ = checkpoints.write_dialect(families()[name], "original", tensors)
    saved = {
        f"{k.removesuffix('.scale')}.weight" if k.endswith(".scale") else k: t
        for k, t in first.items()
    }
    assert saved.keys() != first.keys()
    found = open_canonical(checkpoints.Memory(saved), Path("memory"))
    assert (found.family.name, found.dialect) == (name, "saved")
    norm = "single_transformer_blocks.0.attn.norm_k.weight"
    assert torch.equal(found.read(norm), tensors[norm])


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        (
            "longcat_image",
            "time_in.in_layer.weight",
            "time_embed.timestep_embedder.linear_1.weight",
        ),
        (
            "longcat_image",
            "single_blocks.1.norm.query_norm.weight",
            "single_transformer_blocks.1.attn.norm_q.weight",
        ),
        ("hunyuan_image", "byt5_in.fc3.weight", "context_embedder_2.linear_3.weight"),
        ("hunyuan_image", "img_in.proj.weight", "x_embedder.proj.weight"),
    ],
)
def test_names_by_which_comfyui_knows_a_model(name: str, theirs: str, ours: str) -> None:
    tensors = checkpoints.filled(checkpoints.meta_model(KNOWN[name]["CONFIGS"][0]), columns=2)
    first, _ = checkpoints.write_dialect(families()[name], "original", tensors)
    assert torch.equal(first[theirs], tensors[ours])
    found = open_canonical(checkpoints.Memory(first), Path("memory"))
    assert (found.family.name, found.dialect) == (name, "original")
    assert all(torch.equal(found.read(key), tensor) for key, tensor in tensors.items())
