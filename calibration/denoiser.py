"""The full-precision transformer, built without weights and then filled by the caller.

Contract: the class comes from the config, the tensors from `weights`, which returns those whose
name starts with a prefix. Blocks are asked for one by one, so that the caller never has to hold
more than one beside the model. Missing, unknown or misshapen tensors are one CalibrationError
that lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dqconvert.calibration.require import require
from dqconvert.calibration.settings import CalibrationSettings
from dqconvert.quantizers.errors import CalibrationError

Weights = Callable[[str], Mapping[str, Tensor]]

SHOWN = 5
"""Names that a message lists before it says how many more there are."""


def skeleton(config: Mapping[str, Any]) -> nn.Module:
    """The transformer with its parameters on the meta device; buffers are computed for real."""
    diffusers, accelerate = require("diffusers"), require("accelerate")
    name = str(config.get("_class_name", ""))
    model_class = getattr(diffusers, name, None)
    if model_class is None:
        raise CalibrationError(
            f"the transformer's config asks for '{name}', which diffusers {diffusers.__version__}"
            " does not have; upgrade it with: pip install -U diffusers"
        )
    with accelerate.init_empty_weights(include_buffers=False):
        model: nn.Module = model_class.from_config(dict(config))
    return model.requires_grad_(False).eval()


def blocks_of(model: nn.Module, lists: tuple[str, ...]) -> dict[str, nn.Module]:
    """The blocks of the model, by name, in the order in which it runs them."""
    children = dict(model.named_modules())
    blocks: dict[str, nn.Module] = {}
    for name in lists:
        if not isinstance(children.get(name), nn.ModuleList):
            raise CalibrationError(f"{type(model).__name__} has no list of blocks '{name}'")
        blocks |= {f"{name}.{i}": block for i, block in children[name].named_children()}
    return blocks


def fill(model: nn.Module, weights: Weights, settings: CalibrationSettings) -> None:
    """Give the model its tensors, in the dtype and on the device of the settings."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    expected, given = model.state_dict(), set()
    problems = []
    for prefix in _prefixes(model):
        piece = {}
        for name, tensor in weights(prefix).items():
            given.add(name)
            wide = kept.intersection(name.split("."))
            dtype = torch.float32 if wide else getattr(torch, settings.dtype)
            if name not in expected:
                problems.append(f"{name} is unknown")
            elif tensor.shape != expected[name].shape:
                found, wanted = tuple(tensor.shape), tuple(expected[name].shape)
                problems.append(f"{name} is {found}, not {wanted}")
            else:
                floating = tensor.is_floating_point()
                piece[name] = tensor.to(settings.device, dtype if floating else None)
        model.load_state_dict(piece, strict=False, assign=True)
    problems += [f"{name} is missing" for name in expected if name not in given]
    if problems:
        more = len(problems) - SHOWN
        rest = f" and {more} more" if more > 0 else ""
        raise CalibrationError(
            f"the checkpoint does not fit {type(model).__name__}: "
            f"{'; '.join(problems[:SHOWN])}{rest}"
        )
    model.requires_grad_(False).to(settings.device)


def _prefixes(model: nn.Module) -> Iterator[str]:
    """Prefixes that cover every tensor once: each block, each other child, each bare parameter."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            yield from (f"{name}.{index}." for index in range(len(child)))
        else:
            yield f"{name}."
    bare = [*model.named_parameters(recurse=False), *model.named_buffers(recurse=False)]
    yield from (name for name, _ in bare)
