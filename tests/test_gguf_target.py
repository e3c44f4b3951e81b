"""What a GGUF file must be for its readers to load it: each trap of theirs, one test.

Oracles: the exclusions and type choices of ComfyUI-GGUF's lcpp.patch, its loader's architectures,
gguf-py's reader.
"""

from __future__ import annotations

import runpy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFValueType
from safetensors.torch import load_file, save_file

from dqconvert.converter.detect import open_canonical
from dqconvert.converter.families import families
from dqconvert.converter.options import PlanOptions
from dqconvert.converter.plan import Plan, make_plan
from dqconvert.formats import gguf_header
from dqconvert.formats.gguf_readers import readers
from dqconvert.formats.gguf_source import GGUFSource
from dqconvert.formats.targets import target
from dqconvert.quantizers.errors import PlanError
from dqconvert.quantizers.schemes import scheme
from dqconvert.quantizers.spec import BLOCKS, TensorInfo

checkpoints = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).with_name("checkpoints.py")), run_name="checkpoints")
)
done, refused, Memory = checkpoints.done, checkpoints.refused, checkpoints.Memory

TRANSFORMERS = ("flux", "qwen_image", "wan", "z_image", "sd3")
ARCHITECTURES = {
    "flux": "flux",
    "qwen_image": "qwen_image",
    "wan": "wan",
    "z_image": "lumina2",
    "sd3": "sd3",
}
COMFYUI = {
    "flux", "sd1", "sdxl", "sd3", "aura", "hidream", "cosmos", "ltxv", "hyvid", "wan", "lumina2",
    "qwen_image",
}  # fmt: skip
KEPT = {
    "flux": "txt_in. img_in. time_in. vector_in. guidance_in. final_layer.",
    "sd3": "final_layer. context_embedder. t_embedder. y_embedder. x_embedder. pos_embed",
    "wan": "modulation. patch_embedding. text_embedding. time_projection. time_embedding. "
    "img_emb. head.",
    "z_image": "t_embedder. x_embedder. final_layer. cap_embedder. context_refiner. noise_refiner.",
    "qwen_image": "img_in. txt_in. time_text_embed. norm_out. proj_out.",
}
"""What the patch leaves unquantized; it does not know Qwen-Image, of which it would be these."""


def planned(
    name: str, config: Mapping[str, Any], chosen: str = "gguf-q4_k_m", **options: Any
) -> Plan:
    """The plan of a model that has no bytes."""
    source = open_canonical(Memory(checkpoints.meta_model(config)), Path("model.safetensors"))
    assert source.family.name == name
    identity = ("model", source.family.config_of(source.infos))
    return make_plan(source, target("gguf"), scheme(chosen), PlanOptions(**options), identity)


MODELS = [
    pytest.param(name, config, id=f"{name}-{i}")
    for name in TRANSFORMERS
    for i, config in enumerate(checkpoints.CONFIGS[name])
]
each_model = pytest.mark.parametrize(("name", "config"), MODELS)
each_family = pytest.mark.parametrize("name", TRANSFORMERS)


def real(name: str) -> Mapping[str, Any]:
    """The config of a released model."""
    known = checkpoints.FAMILY_MODELS.get(name, {}).get("REAL", {})
    found: Mapping[str, Any] = [*checkpoints.CONFIGS[name], *known.values()][-1]
    return found


@each_family
def test_the_architecture_is_one_that_comfyui_knows(name: str) -> None:
    said = planned(name, real(name))
    metadata = said.target.metadata(said.context)
    assert metadata["general.architecture"] == ARCHITECTURES[name]
    assert metadata["general.architecture"] in COMFYUI


def test_an_embedding_that_diffusers_looks_up_is_fp32() -> None:
    config = dict(real("qwen_image")) | {"num_layers": 1, "use_additional_t_cond": True}
    found = planned("qwen_image", config).outputs["time_text_embed.addition_t_embedding.weight"]
    assert found == TensorInfo("F32", (2, 3072))


@each_model
def test_tensors_that_no_linear_decodes_are_fp32(name: str, config: Mapping[str, Any]) -> None:
    for key, info in planned(name, config).outputs.items():
        if not key.endswith(".weight") or len(info.shape) != 2 or info.numel <= 1024:
            assert info.dtype == "F32", key


@each_model
def test_what_is_sensitive_stays_in_16_bit(name: str, config: Mapping[str, Any]) -> None:
    for key, info in planned(name, config).outputs.items():
        if any(part in key for part in KEPT[name].split()) and "lin.weight" not in key:
            sixteen = name == "wan" and "modulation" in key  # adaLN tables are parameters
            assert info.dtype in ("F32", "F16", "BF16") or sixteen, key


@each_model
def test_blocks_are_in_matrices_whose_width_they_divide(
    name: str, config: Mapping[str, Any]
) -> None:
    for scheme_name in ("gguf-q4_k", "gguf-q6_k", "gguf-q8_0", "gguf-iq2_s"):
        for key, info in planned(name, config, scheme_name).outputs.items():
            if info.dtype in BLOCKS:
                assert len(info.shape) == 2 and key.endswith(".weight"), key
                assert info.shape[1] % BLOCKS[info.dtype][0] == 0, key


@each_model
def test_every_tensor_keeps_its_dimensions(name: str, config: Mapping[str, Any]) -> None:
    family = families()[name]
    tensors = checkpoints.meta_model(config)
    if name in ("flux", "wan", "z_image", "sd3"):
        tensors, _ = checkpoints.write_dialect(family, "original", tensors)
    found = planned(name, config).outputs
    assert {key: info.shape for key, info in found.items()} == {
        key: tuple(tensor.shape) for key, tensor in tensors.items()
    }


def test_one_by_d_and_five_dimensions_are_there() -> None:
    pads = planned("z_image", real("z_image")).outputs
    assert pads["x_pad_token"] == TensorInfo("F32", (1, 3840))
    video = planned("wan", real("wan")).outputs
    assert len(video["patch_embedding.weight"].shape) == 5
    assert video["blocks.0.modulation"].dtype == "F32"
    assert len(video["blocks.0.modulation"].shape) == 3


@pytest.mark.parametrize(
    ("chosen", "width", "type_"),
    [
        ("gguf-q2_k", 320, "Q5_1"),
        ("gguf-q4_k", 320, "Q5_1"),
        ("gguf-q5_k", 320, "Q5_1"),
        ("gguf-q6_k", 320, "Q8_0"),
        ("gguf-iq4_xs", 320, "Q5_1"),
        ("gguf-q8_0", 320, "Q8_0"),
        ("gguf-q4_0", 40, "F16"),
        ("gguf-q4_k", 40, "F16"),
        ("gguf-q4_k", 512, "Q4_K"),
    ],
)
def test_a_width_that_blocks_do_not_divide_falls_back(chosen: str, width: int, type_: str) -> None:
    spec = target("gguf").fitting(scheme(chosen).weight, (64, width))  # type: ignore[attr-defined]
    assert spec.code.upper() == type_


# ------------------------------------------------------------------------------------- mixes

VALUE = ("attn_v.weight", ".to_v.weight", ".v.weight", ".attn.w1v.weight", "_attn.v_proj.weight")
FUSED = ("attn_qkv.weight", "attn.qkv.weight", "attention.qkv.weight")
DOWN = ("ffn_down", ".ffn.2.weight", ".ff.net.2.weight", ".feed_forward.w2.weight")
TABLE = {
    "gguf-q2_k": ("Q2_K", ["Q3_K"], None, None),
    "gguf-q3_k_m": ("Q3_K", ["Q5_K", "Q5_K", "Q4_K"], "Q4_K", "Q4_K"),
    "gguf-q3_k_l": ("Q3_K", ["Q5_K"], "Q4_K", "Q5_K"),
    "gguf-q4_k_s": ("Q4_K", ["Q5_K"] * 4 + ["Q4_K"], None, "Q5_K"),
    "gguf-q4_k_m": ("Q4_K", ["Q6_K"], "Q5_K", "Q6_K"),
    "gguf-q5_k_m": ("Q5_K", ["Q6_K"], "Q6_K", "Q6_K"),
    "gguf-q4_0": ("Q4_0", None, None, "Q4_1"),
    "gguf-q5_0": ("Q5_0", None, None, "Q5_1"),
}
"""Of each file type: the base, what the first, second, ... value projection gets (the last of them
goes on), fused qkv, and the feed-forward's output."""


@pytest.mark.parametrize("chosen", TABLE)
@each_family
def test_mixes_are_those_in_circulation(name: str, chosen: str) -> None:
    base, values, fused, down = TABLE[chosen]
    seen = 0
    for key, info in planned(name, real(name), chosen).outputs.items():
        if info.dtype not in BLOCKS:
            continue
        want = base
        if any(part in key for part in VALUE):
            want = values[min(seen, len(values) - 1)] if values else base
            seen += 1
        elif any(part in key for part in FUSED):
            want = fused or base
        elif any(part in key for part in DOWN):
            want = down or base
        if info.shape[1] % BLOCKS[want][0]:
            want = "Q8_0" if want == "Q6_K" else "Q5_1"
        assert info.dtype == want, key


@each_family
def test_the_pure_layout_has_one_type(name: str) -> None:
    found = planned(name, real(name), "gguf-q2_k", layout="pure").outputs.values()
    usual = {info.dtype for info in found if info.dtype in BLOCKS and not info.shape[1] % 256}
    assert usual == {"Q2_K"}


def test_an_override_is_a_type_of_its_own() -> None:
    overrides = ((r"to_out\.0$", "gguf-q6_k"),)
    outputs = planned("flux", real("flux"), "gguf-q4_k", overrides=overrides).outputs
    assert outputs["double_blocks.0.img_attn.proj.weight"].dtype == "Q6_K"
    assert outputs["double_blocks.0.txt_attn.proj.weight"].dtype == "Q4_K"


# ------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """flux-digits as Q4_K_M, from a file with ComfyUI's prefix."""
    folder = tmp_path_factory.mktemp("gguf")
    tensors = load_file(
        Path(__file__).parents[1] / "converter/data/flux-digits/transformer" / checkpoints.WEIGHTS
    )
    save_file(checkpoints.original(tensors, "model.diffusion_model."), folder / "m.safetensors")
    done(folder / "m.safetensors", "--scheme", "gguf-q4_k_m", "-o", folder / "out", "-q")
    return folder / "out" / "m-Q4_K_M.gguf"


def test_the_reader_of_gguf_sees_what_we_see(made: Path) -> None:
    ours, theirs = GGUFSource((made,)), GGUFReader(made)
    assert [tensor.name for tensor in theirs.tensors] == list(ours.infos)
    for tensor in theirs.tensors:
        info = ours.infos[tensor.name]
        assert tensor.tensor_type.name == info.dtype
        assert tuple(int(n) for n in reversed(tensor.shape)) == info.shape
        raw = torch.from_numpy(tensor.data.copy()).view(torch.uint8).flatten()
        assert torch.equal(raw, ours.read(tensor.name).view(torch.uint8).flatten())


def test_names_have_no_prefix_and_are_short(made: Path) -> None:
    names = [tensor.name for tensor in GGUFReader(made).tensors]
    assert not any(name.startswith("model.") for name in names)
    assert "double_blocks.0.img_attn.qkv.weight" in names
    assert max(map(len, names)) <= 63  # what stock ggml allows


def test_metadata_has_the_types_that_loaders_read(made: Path) -> None:
    fields = GGUFReader(made).fields
    for key, kind, value in (
        ("general.architecture", GGUFValueType.STRING, "flux"),
        ("general.quantization_version", GGUFValueType.UINT32, 2),
        ("general.file_type", GGUFValueType.UINT32, 15),
        ("general.quantized_by", GGUFValueType.STRING, "dqconvert"),
    ):
        assert fields[key].types == [kind]
        assert fields[key].contents() == value


def test_provenance_names_the_base_and_its_licence(tmp_path: Path) -> None:
    done("flux-digits", "--scheme", "gguf-q8_0", "-o", tmp_path / "out", "-q")
    metadata = gguf_header.read(tmp_path / "out" / "flux-digits-Q8_0.gguf").metadata
    assert metadata["general.license"] == "apache-2.0"
    assert metadata["general.name"] == "flux-digits"


def test_a_long_name_is_refused() -> None:
    runtime = target("gguf")
    infos = {"a" * 122 + ".weight": TensorInfo("Q8_0", (8, 32))}
    found = runtime.recognize(infos, {"general.architecture": "flux"}, {})
    assert found is not None
    assert "readers allow 127" in found.problems[0]


def test_other_schemes_have_no_place_in_gguf(tmp_path: Path) -> None:
    text = refused(tmp_path, "flux-digits", "--scheme", "int8", "--target", "gguf")
    assert "GGUF has no type for int8" in text
    with pytest.raises(PlanError, match="has a size of its own"):
        planned("flux", real("flux"), "gguf-q4_k", bits=4.0)


# ------------------------------------------------------------------------------------- readers

FLUX = {"general.architecture": "flux"}
LONE = TensorInfo("F32", (4,))
FIVE = {"a.weight": TensorInfo("F32", (4, 4, 1, 2, 2))}
LINEAR = {"double_blocks.0.img_mlp.0.weight": TensorInfo("Q4_K", (64, 256))}


def test_a_file_of_ours_is_for_all_readers() -> None:
    plan = planned("flux", real("flux"))
    found = readers(plan.outputs, plan.target.metadata(plan.context))
    assert set(found.values()) == {"yes"}


@pytest.mark.parametrize(
    ("infos", "metadata", "reader", "said"),
    [
        (LINEAR, {"general.architecture": "flux2"}, "ComfyUI-GGUF", "no: it does not know"),
        (LINEAR, {}, "ComfyUI-GGUF", "yes, but it has to guess"),
        ({"a.weight": TensorInfo("IQ3_S", (4, 256))}, FLUX, "ComfyUI-GGUF", "yes, but it decodes"),
        ({"a.weight": TensorInfo("IQ3_S", (4, 256))}, FLUX, "diffusers", "no: it does not know"),
        ({"a.bias": TensorInfo("BF16", (4,))}, FLUX, "diffusers", "no: a.bias is BF16"),
        ({"pad_token": TensorInfo("BF16", (1, 64))}, FLUX, "ComfyUI-GGUF", "no: pad_token is BF16"),
        ({"a.bias": TensorInfo("BF16", (4,))}, FLUX, "stable-diffusion.cpp", "yes"),
        (LINEAR, {"general.architecture": "t5"}, "diffusers", "no: it reads transformers alone"),
        (LINEAR, {"a.list": [1]}, "stable-diffusion.cpp", "yes"),
        (FIVE, {"a.name": "b"}, "stable-diffusion.cpp", "yes"),
        (FIVE, {"a.list": [1]}, "stable-diffusion.cpp", "no: beside a.weight [4, 4, 1, 2, 2]"),
        ({"a" * 160: LONE}, {"a.list": [1]}, "stable-diffusion.cpp", "no: beside aaa"),
    ],
)
def test_who_cannot_read_a_file_is_told(
    infos: Mapping[str, TensorInfo], metadata: Mapping[str, Any], reader: str, said: str
) -> None:
    assert readers(infos, metadata)[reader].startswith(said)


def test_inspect_names_the_readers(made: Path) -> None:
    text = done("inspect", made)
    for reader in ("ComfyUI-GGUF", "diffusers", "stable-diffusion.cpp"):
        assert f"read by {reader}" in text
    assert "takes FLUX.1 to be 3072 wide; this is 256" in text
