"""A tiny FLUX transformer, packed by us and read by diffusers, for the tests of its loaders."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.targets import Target
from dqconvert.formats.writer import StreamWriter
from dqconvert.quantizers import rtn
from dqconvert.quantizers.spec import Scheme, TensorInfo
from dqconvert.quantizers.tensors import DTYPE_NAMES, QuantizedTensor

SIZES = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 128}


def build() -> nn.Module:
    """Random weights in bf16 with one column of outliers, inner width 256."""
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FluxTransformer2DModel(
            in_channels=64,
            num_attention_heads=2,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            guidance_embeds=True,
            axes_dims_rope=(16, 56, 56),
            **SIZES,
        )
    for name in linears_of(model):
        model.get_submodule(name).weight.data[:, 3] *= 8
    return model.to(torch.bfloat16).eval()


def linears_of(model: nn.Module) -> list[str]:
    """Linears of the blocks."""
    found = ((name, module) for name, module in model.named_modules() if "blocks" in name)
    return [name for name, module in found if isinstance(module, nn.Linear)]


def run(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """One forward of fixed inputs, in fp32."""
    rng = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(dtype)

    with torch.no_grad():
        (out,) = model(
            hidden_states=noise(1, 4, 64),
            encoder_hidden_states=noise(1, 6, 64),
            pooled_projections=noise(1, 64),
            timestep=torch.tensor([0.5], dtype=dtype),
            guidance=torch.tensor([3.5], dtype=dtype),
            img_ids=torch.zeros(4, 3),
            txt_ids=torch.zeros(6, 3),
            return_dict=False,
        )
    found: Tensor = out.float()
    return found


def grouped(scheme: Scheme, group: int, zero_point: bool) -> Scheme:
    """The scheme with what a user may say of weight-only int4."""
    weight = replace(scheme.weight, tile=(1, group))
    if zero_point:
        weight = replace(weight, code="uint4", zero_point=True, full_range=False)
    return replace(scheme, weight=weight)


class Packed:
    """The model packed in one layout: its file, and the same model with the weights it stands for.

    keep: linears of the blocks that stay as they are; also: others that do not. change: applied
    to every form.
    """

    def __init__(
        self,
        model: nn.Module,
        runtime: Target,
        scheme: Scheme,
        layout: str,
        keep: tuple[str, ...] = (),
        also: tuple[str, ...] = (),
        **change: Any,
    ) -> None:
        self.runtime = runtime
        self.scheme = runtime.adapt(scheme, layout)
        self.reference = copy.deepcopy(model)
        self.tensors: dict[str, Tensor] = {}
        self.forms: dict[str, PackedForm] = {}
        for name in (*linears_of(model), *also):
            if name not in keep:
                self._pack(name, replace(self._form(name, layout), **change))
        for name, tensor in model.state_dict().items():
            if name.rpartition(".")[0] not in self.forms:
                self.tensors[name] = tensor
        matrices = [
            name for name, t in self.tensors.items() if name.endswith(".weight") and t.ndim == 2
        ]
        kept = tuple(name.removesuffix(".weight") for name in matrices)
        self.context = FileContext(
            model="tiny",
            scheme=self.scheme,
            rank=0,
            config=json.loads(model.to_json_string()),
            layers=self.forms,
            kept=tuple(name for name in kept if name not in self.forms),
            layout=layout,
            names=tuple(self.tensors),
        )

    def _form(self, name: str, layout: str) -> PackedForm:
        module = self.reference.get_submodule(name)
        n, k = module.weight.shape
        static = self.runtime.static(self.scheme, layout) == "required"
        return PackedForm(
            self.scheme.weight,
            (n, k),
            bias=module.bias is not None,
            layout=layout,
            input_scale=static,
        )

    def _pack(self, name: str, form: PackedForm) -> None:
        module = self.reference.get_submodule(name)
        problem = self.runtime.problem(form)
        assert problem is None, problem
        q = rtn.quantize(module.weight.data, form.spec)
        q = replace(
            q,
            bias=None if module.bias is None else module.bias.data,
            input_scale=torch.tensor(0.01) if form.input_scale else None,
        )
        packed = self.runtime.pack(form, q)
        back: QuantizedTensor = self.runtime.unpack(form, packed)
        module.weight.data = rtn.dequantize(back).to(module.weight.dtype)
        self.forms[name] = form
        self.tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return {
            k: TensorInfo(DTYPE_NAMES[t.dtype], tuple(t.shape)) for k, t in self.tensors.items()
        }

    def write(self, folder: Path) -> Path:
        """The file and the config, as a conversion leaves them; the file's path."""
        file = folder / self.runtime.filename(self.context)
        with StreamWriter(file, self.infos, self.runtime.metadata(self.context)) as writer:
            for name, tensor in self.tensors.items():
                writer.write(name, tensor)
        (folder / "config.json").write_text(json.dumps(self.runtime.config(self.context)))
        return file
