"""Text and image encoders: transformers judges UMT5's names, LightX2V's modules the layers."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dqconvert.converter.detect import open_canonical
from dqconvert.converter.families import families
from dqconvert.converter.options import PlanOptions
from dqconvert.converter.plan import make_plan
from dqconvert.formats.targets import targets
from dqconvert.quantizers.errors import PlanError
from dqconvert.quantizers.schemes import scheme

torch.set_num_threads(1)
HERE = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
configs = SimpleNamespace(**runpy.run_path(str(HERE / "configs.py")))
Memory, meta_model = checkpoints.Memory, checkpoints.meta_model

PATH = Path("memory.safetensors")
HEADS, BUCKETS, BLOCKS = 4, 32, 2
SMALL_T5 = configs.umt5_config(**configs.UMT5_SMALL, num_layers=BLOCKS)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def native_t5(state: dict[str, Tensor], ids: Tensor, buckets: Tensor) -> Tensor:
    """Wan's encoder by its own names: no scaling of attention, positions in every block."""
    x = state["token_embedding.weight"][ids]
    for i in range(BLOCKS):
        w = {name.removeprefix(f"blocks.{i}."): tensor for name, tensor in state.items()}
        y = rms(x, w["norm1.weight"])
        q, k, v = (
            (y @ w[f"attn.{name}.weight"].T).unflatten(-1, (HEADS, -1)).transpose(0, 1)
            for name in "qkv"
        )
        bias = w["pos_embedding.embedding.weight"][buckets].permute(2, 0, 1)
        mixed = (q @ k.mT + bias).softmax(-1) @ v
        x = x + mixed.transpose(0, 1).flatten(1) @ w["attn.o.weight"].T
        y = rms(x, w["norm2.weight"])
        gate = functional.gelu(y @ w["ffn.gate.0.weight"].T, approximate="tanh")
        x = x + ((y @ w["ffn.fc1.weight"].T) * gate) @ w["ffn.fc2.weight"].T
    return rms(x, state["norm.weight"])


def hugging_face_t5() -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    said = {key: value for key, value in SMALL_T5.items() if key != "_class_name"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UMT5EncoderModel(UMT5Config(**said))
        for tensor in model.parameters():
            tensor.data += 0.1 * torch.randn_like(tensor)
    return model.double().eval()


def test_both_sets_of_names_compute_the_same() -> None:
    """The gated half is the right one of two of equal shape; norms of the oracle are fp32."""
    model = hugging_face_t5()
    state = dict(model.state_dict())
    tied = state.pop("encoder.embed_tokens.weight")
    assert torch.equal(tied, state["shared.weight"])
    native, _ = checkpoints.write_dialect(families()["umt5"], "native", state)
    ids = torch.arange(1, 24)
    attention = model.encoder.block[0].layer[0].SelfAttention
    buckets = attention._relative_position_bucket(ids[None, :] - ids[:, None])
    with torch.no_grad():
        expected = model(input_ids=ids[None]).last_hidden_state[0]
    assert torch.allclose(native_t5(native, ids, buckets), expected, rtol=1e-5, atol=1e-5)


def test_what_belongs_to_others_is_not_read() -> None:
    """Tied embeddings, and the half of CLIP that reads text."""
    t5 = checkpoints.filled(meta_model(SMALL_T5))
    more = {"encoder.embed_tokens.weight": t5["shared.weight"]}
    found = open_canonical(Memory(t5 | more), PATH)
    assert found.family.name == "umt5" and dict(found.infos) == checkpoints.infos_of(t5)
    clip = checkpoints.filled(meta_model(configs.CONFIGS["clip_vision"][0]))
    found = open_canonical(Memory(clip | {"textual.head.0.weight": torch.zeros(2, 2)}), PATH)
    assert found.family.name == "clip_vision" and dict(found.infos) == checkpoints.infos_of(clip)


@pytest.mark.parametrize("dialect", ["transformers", "gguf"])
def test_t5_is_not_umt5(dialect: str) -> None:
    """Only the first block of T5 knows positions."""
    state = {
        name: tensor
        for name, tensor in meta_model(SMALL_T5).items()
        if not name.startswith("encoder.block.1.") or "relative" not in name
    }
    for name, tensors in (("t5", state), ("umt5", meta_model(SMALL_T5))):
        written, _ = checkpoints.write_dialect(families()[name], dialect, tensors)
        assert open_canonical(Memory(written), PATH).family.name == name


T5 = [f"attn.{name}" for name in "qkvo"] + ["ffn.gate.0", "ffn.fc1", "ffn.fc2"]
CLIP = ["attn.to_qkv", "attn.proj", "mlp.0", "mlp.2"]


@pytest.mark.parametrize(
    ("name", "component", "layers"),
    [
        ("umt5", "t5", {f"blocks.{i}.{layer}" for i in range(24) for layer in T5}),
        (
            "clip_vision",
            "clip",
            {f"visual.transformer.{i}.{layer}" for i in range(32) for layer in CLIP},
        ),
    ],
)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_lightx2v_gets_the_layers_that_its_modules_quantize(
    name: str, component: str, layers: set[str], kind: str
) -> None:
    """All others keep name, dtype and shape; the runtime loads strictly."""
    config = configs.CONFIGS[name][-1]
    model = meta_model(config)
    native, _ = checkpoints.write_dialect(families()[name], "native", model)
    for tensors in (model, native):
        source = open_canonical(Memory(tensors), PATH)
        options = PlanOptions()
        plan = make_plan(source, targets()["lightx2v"], scheme(kind), options, (name, config))
        assert set(plan.context.layers) == layers
        assert plan.context.facts["component"] == component
        infos = checkpoints.infos_of(native)
        for tensor in native.keys() - {f"{layer}.weight" for layer in layers}:
            assert plan.outputs[tensor] == infos[tensor]
        assert plan.outputs.keys() == native.keys() | {f"{layer}.weight_scale" for layer in layers}


@pytest.mark.parametrize(
    ("name", "target"),
    [("clip_vision", "comfyui"), ("clip_vision", "diffusers"), ("umt5", "sglang"), ("t5", "vllm")],
)
def test_other_targets_do_not_run_encoders(name: str, target: str) -> None:
    """SGLang and vLLM-Omni load text encoders in 16 bit."""
    config = configs.CONFIGS[name][0]
    source = open_canonical(Memory(meta_model(config)), PATH)
    with pytest.raises(PlanError, match=f"{target} does not run {families()[name].title}"):
        some = scheme("svdquant-nvfp4" if target == "diffusers" else "fp8-tensor")
        make_plan(source, targets()[target], some, PlanOptions(), (name, config))


def test_tokenizers_inside_files_go_where_they_are_read() -> None:
    """ComfyUI's UMT5 has its tokenizer beside the weights; others have no place for it."""
    state = meta_model(configs.CONFIGS["umt5"][-1]) | {"spiece_model": torch.zeros(9).byte()}
    source = open_canonical(Memory(state), PATH)
    for target, there in (("comfyui", True), ("lightx2v", False), ("gguf", False)):
        kind = {"comfyui": "fp8-tensor", "lightx2v": "int8", "gguf": "gguf-q8_0"}[target]
        identity = ("umt5", configs.CONFIGS["umt5"][-1])
        plan = make_plan(source, targets()[target], scheme(kind), PlanOptions(), identity)
        assert ("spiece_model" in plan.outputs) == there
