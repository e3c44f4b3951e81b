"""diffusers itself loads what we write and runs it: a tiny FLUX in every layout that the CPU takes.

The judge is the same model holding the weights that our bytes stand for. What remains between the
two is the order of bf16 sums, and where inputs are quantized, their rounding.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dqconvert.formats import header
from dqconvert.formats.targets import target
from dqconvert.quantizers import rtn
from dqconvert.quantizers.schemes import schemes

torch.set_num_threads(1)
clients = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("flux_clients.py"))))
RUNTIME = target("diffusers")

KEPT = "transformer_blocks.0.ff.net.2"
LINEAR = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    found: nn.Module = clients.build()
    return found


def loaded(packed: Any, folder: Path) -> nn.Module:
    """The model as a user gets it."""
    from diffusers import BFLQuantizationConfig, FluxTransformer2DModel

    file = packed.write(folder)
    if packed.context.layout == "bfl":
        config = BFLQuantizationConfig()
        found = FluxTransformer2DModel.from_single_file(
            str(file), config=str(folder), quantization_config=config, dtype=torch.bfloat16
        )
    else:
        found = FluxTransformer2DModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert isinstance(found, nn.Module)
    return found.eval()


def off(one: Tensor, two: Tensor) -> float:
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize(
    ("name", "layout", "weight", "tolerance"),
    [
        ("int8", "torchao", "Int8Tensor", 6e-3),
        ("int8", "torchao-weight-only", "Int8Tensor", 4e-3),
        ("fp8", "torchao", "Float8Tensor", 8e-3),
        ("fp8", "torchao-weight-only", "Float8Tensor", 4e-3),
        ("fp8-block128", "torchao-weight-only", "Float8Tensor", 4e-3),
        ("nvfp4", "torchao-weight-only", "NVFP4Tensor", 1e-6),
        ("fp8", "bfl", "Parameter", 1e-6),
        ("nvfp4", "bfl", "Parameter", 1e-6),
        ("fp8-cast", "layerwise", "Parameter", 1e-6),
    ],
)
def test_diffusers_runs_what_we_packed(
    model: nn.Module, tmp_path: Path, name: str, layout: str, weight: str, tolerance: float
) -> None:
    packed = clients.Packed(model, RUNTIME, schemes()[name], layout, keep=(KEPT,))
    found = loaded(packed, tmp_path)
    assert type(found.get_submodule(LINEAR).weight).__name__ == weight
    for kept in (KEPT, "proj_out", "x_embedder"):
        assert torch.equal(found.get_submodule(kept).weight, model.get_submodule(kept).weight)
        assert type(found.get_submodule(kept).weight) is nn.Parameter
    wanted = clients.run(packed.reference)
    assert off(clients.run(found), wanted) < tolerance
    assert off(wanted, clients.run(model)) > 1e-3  # it is not the model that was never packed


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("int8", "torchao"),
        ("fp8", "torchao"),
        ("fp8-block128", "torchao-weight-only"),
        ("nvfp4", "torchao-weight-only"),
    ],
)
def test_torchao_gives_the_weight_back(
    model: nn.Module, tmp_path: Path, name: str, layout: str
) -> None:
    """Exactly, in fp32, from what diffusers loaded."""
    packed = clients.Packed(model, RUNTIME, schemes()[name], layout)
    weight = loaded(packed, tmp_path).get_submodule(LINEAR).weight
    form = packed.forms[LINEAR]
    parts = {s: packed.tensors[f"{LINEAR}.{s}"] for s in RUNTIME.promise(form)}
    ours = rtn.dequantize(RUNTIME.unpack(form, parts))
    assert torch.equal(weight.dequantize(torch.float32), ours)


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("group", [32, 128])
def test_auto_round_runs_groups_with_and_without_zero_points(
    model: nn.Module, tmp_path: Path, group: int, zero_point: bool
) -> None:
    scheme = clients.grouped(schemes()["gptq-w4a16"], group, zero_point)
    packed = clients.Packed(model, RUNTIME, scheme, "auto-round", keep=(KEPT,))
    found = loaded(packed, tmp_path)
    assert type(found.get_submodule(LINEAR)).__name__ == "QuantLinear"
    assert torch.equal(found.get_submodule(KEPT).weight, model.get_submodule(KEPT).weight)
    # diffusers casts the F16 scales to its dtype
    assert off(clients.run(found), clients.run(packed.reference)) < 6e-3


def test_a_layer_of_a_dynamic_file_may_keep_its_inputs(model: nn.Module, tmp_path: Path) -> None:
    """Both kinds stand in one header, and nothing but rounded inputs tells them apart."""
    scheme = schemes()["int8"]
    packed = clients.Packed(model, RUNTIME, scheme, "torchao", full_precision=True)
    found = loaded(packed, tmp_path)
    assert found.get_submodule(LINEAR).weight.act_quant_kwargs is None
    assert off(clients.run(found), clients.run(packed.reference)) < 4e-3


def test_codes_lie_where_aligned_loads_find_them(model: nn.Module, tmp_path: Path) -> None:
    """torch's int8 kernel fails on weights in a mapped file that are not aligned to 16 bytes."""
    packed = clients.Packed(model, RUNTIME, schemes()["int8"], "torchao-weight-only")
    extents = header.read(packed.write(tmp_path)).extents
    codes = [extent for name, extent in extents.items() if name.endswith("_weight_qdata")]
    assert len(codes) == len(packed.forms)
    assert not [extent for extent in codes if extent.offset % header.ALIGNMENT]


def test_an_nvfp4_file_without_input_scales_does_not_load_as_bfl(
    model: nn.Module, tmp_path: Path
) -> None:
    """Why the layout asks for calibration."""
    packed = clients.Packed(model, RUNTIME, schemes()["nvfp4"], "bfl")
    del packed.tensors[f"{LINEAR}.input_scale"]
    with pytest.raises(ValueError, match="no `input_scale`"):
        loaded(packed, tmp_path)
