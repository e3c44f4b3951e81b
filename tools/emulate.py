"""Runs a packed file inside the diffusers pipeline: its bytes, with the runtime's activations.

Every packed layer is unpacked from the file's tensors and put in the place of the linears it was
made of. What the CUDA kernels do to activations is quantizers/forward.py; their own rounding of
accumulators is not imitated. A check of quality, not of speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dqconvert.converter.reopen import PackedLayer, Reopened
from dqconvert.formats.recognition import scheme_for
from dqconvert.formats.targets import Target
from dqconvert.quantizers.forward import apply, take_rows
from dqconvert.quantizers.schemes import scheme
from dqconvert.quantizers.spec import QuantSpec, Scheme
from dqconvert.quantizers.tensors import QuantizedTensor


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A packed layer's rows that stand for one linear, and the input channels that it reads."""

    q: QuantizedTensor
    activation: QuantSpec | None
    columns: tuple[int, int]


class PackedLinear(nn.Module):
    """Several pieces, summed, in the place of one linear."""

    def __init__(self, linear: nn.Linear, pieces: list[Piece]) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.pieces = pieces

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        rows = x.reshape(-1, x.shape[-1])
        parts = [apply(p.q, rows[:, slice(*p.columns)], p.activation) for p in self.pieces]
        return torch.stack(parts).sum(0).view(*x.shape[:-1], -1).to(x.dtype)


def install(
    transformer: nn.Module,
    layers: Iterable[tuple[PackedLayer, QuantizedTensor, Scheme]],
    target: Target,
) -> None:
    """Replace linears of a diffusers transformer by packed layers of a target's file."""
    pieces: dict[str, list[Piece]] = {}
    for layer, q, chosen in layers:
        activation = target.activation(layer.form, chosen)
        start = 0
        for module in layer.modules:
            linear = transformer.get_submodule(module)
            stop = start + int(linear.out_features)  # type: ignore[call-overload]
            part = q if len(layer.modules) == 1 else take_rows(q, start, stop)
            width = int(linear.in_features)  # type: ignore[call-overload]
            pieces.setdefault(module, []).append(Piece(part, activation, _columns(layer, width)))
            start = stop
    for module, found in pieces.items():
        parent, _, leaf = module.rpartition(".")
        owner = transformer.get_submodule(parent)
        linear = transformer.get_submodule(module)
        assert isinstance(linear, nn.Linear)
        owner._modules[leaf] = PackedLinear(linear, found)


def install_file(transformer: nn.Module, found: Reopened) -> None:
    """Replace linears by the layers of a reopened file, and check that the rest is its too."""
    install(transformer, _layers(found), found.target)
    state = transformer.state_dict()
    for name in found.kept:
        state[name].copy_(found.read_kept(name))


def _layers(found: Reopened) -> Iterator[tuple[PackedLayer, QuantizedTensor, Scheme]]:
    """Every layer with its scheme as the runtime has it."""
    target = found.target
    for layer in found.layers:
        name = found.manifest.schemes.get(layer.name) or scheme_for(target.NAME, [layer.form])
        assert name is not None
        yield layer, found.unpack(layer), target.adapt(scheme(name), layer.form.layout)


def _columns(layer: PackedLayer, width: int) -> tuple[int, int]:
    """Input channels of a layer that may hold only some of its linear's."""
    if layer.entry.columns is None:
        return 0, width
    size = layer.form.shape[1]
    return (0, size) if layer.entry.columns[0] == 0 else (width - size, width)
