"""What is no whole, plain checkpoint of a known family is refused, by file and tensor."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dqconvert.converter.detect import open_canonical, unknown
from dqconvert.converter.families import families
from dqconvert.quantizers.errors import SourceError

torch.set_num_threads(1)
checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))
Memory, original = checkpoints.Memory, checkpoints.original

PATH = Path("some/model.safetensors")
MODEL: dict[str, Tensor] = checkpoints.meta_model(checkpoints.flux_config(**checkpoints.SMALL))
SIGNATURE = families()["flux"].signature
REQUIRED = sorted(name for name in MODEL if "guidance" not in name and name not in SIGNATURE)


def refused(tensors: dict[str, Tensor]) -> str:
    with pytest.raises(SourceError) as caught:
        open_canonical(Memory(tensors), PATH)
    return str(caught.value)


@pytest.mark.parametrize("lost", REQUIRED)
def test_each_missing_tensor_is_named(lost: str) -> None:
    text = refused({name: tensor for name, tensor in MODEL.items() if name != lost})
    assert str(PATH) in text and f"the first is {lost}" in text and "1 tensors are missing" in text


def test_a_missing_tensor_of_original_names_is_found() -> None:
    tensors = original(MODEL)
    del tensors["double_blocks.1.img_attn.qkv.bias"]
    text = refused(tensors)
    assert str(PATH) in text and "3 tensors are missing" in text
    assert "transformer_blocks.1.attn.to_k.bias" in text


def test_a_missing_block_is_found() -> None:
    text = refused({k: t for k, t in MODEL.items() if not k.startswith("transformer_blocks.0.")})
    assert str(PATH) in text
    text = refused({k: t for k, t in MODEL.items() if ".1.attn.to_q" not in k})
    assert "transformer_blocks.1.attn.to_q" in text


def test_half_a_guidance_embedder_is_no_whole_one() -> None:
    lost = "time_text_embed.guidance_embedder.linear_2.bias"
    assert lost in refused({name: tensor for name, tensor in MODEL.items() if name != lost})


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("extra", ["double_blocks.0.img_attn.extra.weight", "lora_unet_x.alpha"])
def test_unknown_tensors_are_kept_and_named(prefix: str, extra: str) -> None:
    for tensors in (original(MODEL), MODEL):
        both = {
            prefix + name: tensor for name, tensor in (tensors | {extra: torch.ones(1)}).items()
        }
        found = open_canonical(Memory(both), PATH)
        assert unknown(found) == [extra]
        assert found.infos.keys() == MODEL.keys() | {extra}
        assert torch.equal(found.read(extra), torch.ones(1))


@pytest.mark.parametrize("extra", ["double_blocks.0.img_attn.proj.extra", "img_in.weight_g"])
def test_unknown_tensors_beside_a_linear_are_refused(extra: str) -> None:
    text = refused(original(MODEL) | {extra: torch.zeros(1)})
    assert str(PATH) in text and f"1 tensors are not part of FLUX.1, the first is {extra}" in text


def test_a_near_match_says_what_differs() -> None:
    tensors = original(MODEL)
    tensors["vector_in.my_layer.weight"] = tensors.pop("vector_in.in_layer.weight")
    text = refused(tensors)
    assert "nearly FLUX.1 in original names, but it lacks vector_in.in_layer.weight" in text
    assert "vector_in.my_layer.weight" in text


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_quantized_weights_are_named(dtype: torch.dtype) -> None:
    for tensors, name in (
        (dict(MODEL), "transformer_blocks.1.ff.net.2.weight"),
        (original(MODEL), "double_blocks.1.img_mlp.2.weight"),
    ):
        tensors[name] = torch.empty(tensors[name].shape, dtype=dtype, device="meta")
        text = refused(tensors)
        assert "memory.safetensors" in text and name in text and "already quantized" in text


def test_scales_beside_float_weights_are_named() -> None:
    name = "single_blocks.0.linear1.scale_weight"
    assert name in refused(original(MODEL) | {name: torch.zeros(())})


@pytest.mark.parametrize("number", ["3000000", "9" * 5000])
@pytest.mark.parametrize("blocks", ["transformer_blocks", "single_transformer_blocks"])
def test_a_block_number_that_cannot_be_is_refused_at_once(blocks: str, number: str) -> None:
    theirs = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}
    leaf = "img_mlp.0" if blocks == "transformer_blocks" else "linear2"
    name, far = f"{blocks}.{number}.x", f"{theirs[blocks]}.{number}.{leaf}.weight"
    for tensors in (MODEL | {name: torch.zeros(1)}, original(MODEL) | {far: torch.zeros(1)}):
        text = refused(tensors)
        if len(number) < 10:
            assert f"a tensor of {blocks}.{number}, but only {len(MODEL) + 1} tensors" in text
        else:
            assert "1 tensors are not part of" in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("axes_dims_rope", None),
        ("axes_dims_rope", "abc"),
        ("axes_dims_rope", [8, 28, "28"]),
        ("axes_dims_rope", [8, 28]),
        ("out_channels", "abc"),
        ("out_channels", [64]),
    ],
)
def test_a_config_of_wrong_kinds_is_refused(tmp_path: Path, key: str, value: object) -> None:
    config = checkpoints.flux_config(**checkpoints.NARROW)
    infos = checkpoints.infos_of(checkpoints.meta_model(config))
    checkpoints.sparse(tmp_path / checkpoints.WEIGHTS, infos)
    said = {"_class_name": "FluxTransformer2DModel", **config, key: value}
    (tmp_path / "config.json").write_text(json.dumps(said))
    for words in (("int8",), ("svdquant-w4a4", "--target", "nunchaku")):
        text = checkpoints.refused(tmp_path, tmp_path, "--dry-run", "--scheme", *words)
        assert f"config.json: {key} is {value!r}" in text


def test_another_model_is_no_transformer() -> None:
    text = refused({"model.layers.0.self_attn.q_proj.weight": torch.zeros(1)})
    assert str(PATH) in text and "model.layers.0.self_attn.q_proj.weight" in text
    assert all(family.title in text for family in families().values())
    assert "not a diffusion transformer" in refused({})
