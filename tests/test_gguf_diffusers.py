"""diffusers opens our GGUF files with its own loader and computes what their blocks stand for.

Oracle: from_single_file with GGUFQuantizationConfig, against the same model loaded from the same
tensors as the gguf package decodes them. Both go through diffusers' own converter of the original
names, which takes FLUX.1 to be 3072 wide.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(FOLDER / "checkpoints.py")))
configs = SimpleNamespace(**runpy.run_path(str(FOLDER / "configs.py")))
tiny = SimpleNamespace(**runpy.run_path(str(FOLDER / "tiny_models.py")))
done = checkpoints.done

MODELS = {
    "qwen_image": configs.qwen_image_config(
        num_layers=1, num_attention_heads=2, joint_attention_dim=256
    ),
    "wan": configs.wan_config(num_layers=1, num_attention_heads=2, ffn_dim=512, text_dim=256),
    "sd3": configs.sd3_config(
        num_layers=2,
        num_attention_heads=4,
        joint_attention_dim=256,
        caption_projection_dim=256,
        pooled_projection_dim=256,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
    ),
    "z_image": configs.z_image_config(
        dim=256, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=256
    ),
}
CLOSE = 4e-3
"""diffusers multiplies codes and scales in fp16."""


def folder_of(config: Mapping[str, Any], folder: Path, dtype: torch.dtype) -> Path:
    """A diffusers folder of a model with random weights."""
    model = tiny.build(config, dtype)
    model.save_pretrained(folder)
    return folder


def decoded(path: Path) -> dict[str, Tensor]:
    """Every tensor of a GGUF file, fp32, as the gguf package decodes it."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        shape = [int(n) for n in reversed(tensor.shape)]
        found[tensor.name] = torch.from_numpy(values.copy()).float().reshape(shape)
    return found


def loaded(kind: Any, weights: Any, config: Path, quantized: bool) -> Any:
    """A model from a GGUF file, or from the tensors themselves."""
    from diffusers import GGUFQuantizationConfig

    how = {"quantization_config": GGUFQuantizationConfig(torch.float32)} if quantized else {}
    return kind.from_single_file(
        weights, config=str(config), torch_dtype=torch.float32, local_files_only=True, **how
    ).eval()


def agrees(folder: Path, file: Path, forward: Any) -> int:
    """Assert that both ways to load a file compute the same; returns how many layers are packed."""
    import diffusers
    from diffusers.quantizers.gguf.utils import GGUFLinear

    config = json.loads((folder / "config.json").read_text())
    kind = getattr(diffusers, config["_class_name"])
    packed = loaded(kind, str(file), folder, quantized=True)
    plain = loaded(kind, decoded(file), folder, quantized=False)
    one, two = forward(packed), forward(plain)
    assert torch.isfinite(one).all()
    assert float((one - two).norm() / two.norm()) < CLOSE
    return sum(isinstance(module, GGUFLinear) for module in packed.modules())


@pytest.mark.parametrize("scheme", ["gguf-q8_0", "gguf-q4_k_m", "gguf-q2_k", "gguf-iq4_xs"])
@pytest.mark.parametrize("name", MODELS)
def test_small_models_load_and_run(name: str, scheme: str, tmp_path: Path) -> None:
    folder = folder_of(MODELS[name], tmp_path / "model", torch.bfloat16)
    done(folder, "--scheme", scheme, "-o", tmp_path / "out", "-q")
    (file,) = (tmp_path / "out").glob("*.gguf")
    assert agrees(folder, file, tiny.forward) > 5


def test_flux_of_its_true_width_loads_and_runs(tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    config = checkpoints.flux_config(
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=256,
        pooled_projection_dim=256,
        guidance_embeds=False,
    )
    said = {"_class_name": "FluxTransformer2DModel", **config}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(said))
    tensors = {
        key: torch.randn(tensor.shape, dtype=torch.bfloat16) * 0.02
        for key, tensor in checkpoints.meta_model(config).items()
    }
    save_file(checkpoints.original(tensors), folder / "flux.safetensors")
    del tensors
    out = tmp_path / "out"
    done(folder / "flux.safetensors", "--scheme", "gguf-q4_k_m", "-o", out, "-q")
    (folder / "flux.safetensors").unlink()
    assert isinstance(FluxTransformer2DModel, type)

    def forward(model: Any) -> Tensor:
        rng = torch.Generator().manual_seed(1)
        with torch.no_grad():
            found: Tensor = model(
                hidden_states=torch.randn(1, 8, 64, generator=rng),
                encoder_hidden_states=torch.randn(1, 4, 256, generator=rng),
                pooled_projections=torch.randn(1, 256, generator=rng),
                timestep=torch.tensor([0.4]),
                img_ids=torch.zeros(8, 3),
                txt_ids=torch.zeros(4, 3),
                return_dict=False,
            )[0]
        return found

    assert agrees(folder, out / "flux-Q4_K_M.gguf", forward) > 10
