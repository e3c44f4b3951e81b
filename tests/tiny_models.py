"""Tiny models of every family, with a forward pass in any dtype."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dqconvert.converter.family import Fold, fill
from dqconvert.quantizers import precondition
from dqconvert.quantizers.precondition import Transform


def build(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """diffusers' own model with large random weights, none of them zero."""
    import diffusers

    said = dict(config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(diffusers, said.pop("_class_name"))(**said)
        for tensor in model.parameters():
            tensor.data += 0.1 * torch.randn_like(tensor)
    return model.to(dtype).eval()


def forward(model: Any) -> Tensor:
    """What the model makes of fixed noise."""
    rng = torch.Generator().manual_seed(1)
    dtype = model.dtype

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    with torch.no_grad():
        found = INPUTS[type(model).__name__](model, noise)[0]
    return torch.stack(list(found)) if isinstance(found, list) else found


def fold_into(state: dict[str, Tensor], fold: Fold, index: str, transform: Transform) -> None:
    """A fold, applied by the words of its documentation."""
    size = len(transform.smooth)
    for name in (fill(one, index) for one in fold.consumers):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        state[f"{name}.bias"] = precondition.consumer_bias(bias, weight, transform)
        state[f"{name}.weight"] = precondition.consumer_weight(weight, transform)
    makers = [(fill(one, index), 0, precondition.shift_bias) for one in fold.values]
    if fold.modulation:
        name = fill(fold.modulation, index)
        makers += [
            (name, fold.shift, precondition.shift_bias),
            (name, fold.scale, precondition.scale_bias),
        ]
    for name, chunk, moved in makers:
        rows = slice(chunk * size, (chunk + 1) * size)
        weight, bias = state[f"{name}.weight"].clone(), state[f"{name}.bias"].clone()
        weight[rows] = precondition.producer_weight(weight[rows], transform)
        bias[rows] = moved(bias[rows], transform)
        state[f"{name}.weight"], state[f"{name}.bias"] = weight, bias


def _qwen_image(model: Any, noise: Callable[..., Tensor]) -> Any:
    return model(
        hidden_states=noise(1, 6, model.config.in_channels),
        encoder_hidden_states=noise(1, 5, model.config.joint_attention_dim),
        encoder_hidden_states_mask=torch.ones(1, 5, dtype=torch.bool),
        timestep=noise(1).abs(),
        img_shapes=[[(1, 2, 3)]],
        return_dict=False,
        **({"additional_t_cond": torch.tensor([1])} if model.config.use_additional_t_cond else {}),
    )


def _sd3(model: Any, noise: Callable[..., Tensor]) -> Any:
    return model(
        hidden_states=noise(1, model.config.in_channels, 4, 4),
        encoder_hidden_states=noise(1, 5, model.config.joint_attention_dim),
        pooled_projections=noise(1, model.config.pooled_projection_dim),
        timestep=torch.tensor([400]),
        return_dict=False,
    )


def _wan(model: Any, noise: Callable[..., Tensor]) -> Any:
    width, places = model.config.image_dim, model.config.pos_embed_seq_len
    images = noise(2, places // 2, width) if places else noise(1, 6, width or 1)
    return model(
        hidden_states=noise(1, model.config.in_channels, 2, 4, 4),
        timestep=torch.tensor([400]),
        encoder_hidden_states=noise(1, 512, model.config.text_dim),
        encoder_hidden_states_image=images if width else None,
        return_dict=False,
    )


def _z_image(model: Any, noise: Callable[..., Tensor]) -> Any:
    return model(
        x=[noise(model.config.in_channels, 1, 4, 4)],
        t=noise(1).abs(),
        cap_feats=[noise(5, model.config.cap_feat_dim)],
        return_dict=False,
    )


INPUTS: Mapping[str, Callable[[Any, Callable[..., Tensor]], Any]] = {
    "QwenImageTransformer2DModel": _qwen_image,
    "SD3Transformer2DModel": _sd3,
    "WanTransformer3DModel": _wan,
    "ZImageTransformer2DModel": _z_image,
    **{
        kind: run
        for path in sorted(Path(__file__).with_name("models").glob("*.py"))
        for kind, run in runpy.run_path(str(path)).get("INPUTS", {}).items()
    },
}
