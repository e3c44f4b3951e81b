"""Every family gets LoRAs from its tables; diffusers' converters of LoRA names are the judge."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dqconvert.converter.canonical import CanonicalSource
from dqconvert.converter.detect import open_canonical
from dqconvert.converter.families import families
from dqconvert.converter.lora.branch import factors
from dqconvert.converter.lora.files import LoraSpec, opened
from dqconvert.converter.lora.match import read
from dqconvert.converter.lora.names import Names

torch.set_num_threads(1)
checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))
CONVERTERS = {
    "wan": "_convert_non_diffusers_wan_lora_to_diffusers",
    "z_image": "_convert_non_diffusers_z_image_lora_to_diffusers",
    "flux2": "_convert_non_diffusers_flux2_lora_to_diffusers",
    "qwen_image": "_convert_non_diffusers_qwen_lora_to_diffusers",
}
"""Those that know the widths of no single model."""


def opened_model(name: str) -> CanonicalSource:
    meta = checkpoints.meta_model(checkpoints.CONFIGS[name][0])
    found: CanonicalSource = open_canonical(checkpoints.Memory(meta), Path("model.safetensors"))
    return found


@pytest.mark.parametrize("name", sorted(CONVERTERS))
def test_original_names_mean_what_diffusers_says(name: str, tmp_path: Path) -> None:
    from diffusers.loaders import lora_conversion_utils

    source = opened_model(name)
    names = Names(source.family, source.infos)
    original = next((d for d in source.family.sources if d != "diffusers"), "diffusers")
    rng = torch.Generator().manual_seed(0)
    lora: dict[str, Tensor] = {}
    meta = checkpoints.meta_model(checkpoints.CONFIGS[name][0])
    theirs, _ = checkpoints.write_dialect(source.family, original, meta)
    for key, tensor in theirs.items():
        base, _, leaf = key.rpartition(".")
        home = names.tensors[key]
        blocks = all(source.family.linear(module) for module in home.modules)
        if leaf == "weight" and tensor.ndim == 2 and blocks and "mod" not in base:
            lora[f"diffusion_model.{base}.lora_A.weight"] = torch.randn(
                2, tensor.shape[1], generator=rng
            )
            lora[f"diffusion_model.{base}.lora_B.weight"] = torch.randn(
                tensor.shape[0], 2, generator=rng
            )
    save_file(lora, tmp_path / "lora.safetensors")
    want = getattr(lora_conversion_utils, CONVERTERS[name])(dict(lora))
    loras = read([opened(LoraSpec(tmp_path / "lora.safetensors"))], source, "transformer", False)
    seen = 0
    for key, down in want.items():
        module, found, _ = key.removeprefix("transformer.").partition(".lora_A.")
        if not found or f"{module}.weight" not in source.infos:  # Z-Image's final layer
            continue
        up = want[key.replace("lora_A", "lora_B")]
        got = factors(loras.patches, [module], source.infos, None)
        assert got is not None, module
        assert torch.allclose(got[0] @ got[1], up.float() @ down.float(), atol=1e-5), module
        seen += 1
    assert seen >= 12  # of Z-Image, it does not know the fused names


@pytest.mark.parametrize("name", sorted(families().keys() & checkpoints.CONFIGS.keys()))
def test_every_module_is_found_by_every_spelling(name: str) -> None:
    if name.endswith("_vision"):
        pytest.skip("stands inside another encoder")
    source = opened_model(name)
    names = Names(source.family, source.infos)
    for tensor, home in names.tensors.items():
        module = tensor.removesuffix(".weight")
        flat = module.replace(".", "_")
        spelt = (module, f"transformer.{module}", f"diffusion_model.{module}", f"lora_unet_{flat}")
        for one in (*spelt, f"lycoris_{flat}") if tensor != module else ():
            assert names.tensors[f"{names.module(one)}.weight"].parts == home.parts, one
