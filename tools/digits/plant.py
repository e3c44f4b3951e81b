"""Planting: an exact change of variables that gives a small model a large one's channel outliers.

A *site* is a set of channels between the linears that produce them and those that consume them.
Channel j is multiplied by a power of two s_j and, seldom, moved by a constant c_j:

    producer rows      W' = s W      b' = s b + c      (an AdaLN scale: b' = s (1 + b) - 1)
    consumer columns   W' = W / s    b' = b - W' c

Sites: the AdaLN outputs (shift and scale rows of the modulation, read by q, k, v and the first MLP
linears) and the attention values (to_v, add_v_proj, read by the output projections; softmax rows
sum to one, so a constant passes attention unchanged). What sits behind a GELU cannot be planted:
those outliers are learnt (`flow.build_transformer`).

Laws: `unplant(plant(state, p), p)` gives back every weight bit for bit, also in bf16, and every
bias up to fp32 rounding; both leave the function unchanged. Held by tests/test_digits.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

State = dict[str, Tensor]

# How strong: shares of the channels of a site, and what happens to them.
OUTLIER_SHARE, OUTLIER_EXPONENTS = 0.02, (3, 4)  # activation outliers: x8, x16
COLUMN_SHARE, COLUMN_EXPONENT = 0.02, -2  # weight outlier columns: /4
OFFSET_SHARE, OFFSET_RMS = 0.0125, (8.0, 20.0)  # constants, in multiples of the channel's rms
MILD_EXPONENTS = (-1, 0, 0, 1)  # everybody else


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a linear that produce a site's channels, from row `start` on."""

    linear: str
    start: int = 0
    kind: Literal["plain", "scale"] = "plain"  # "scale": the model uses 1 + output


@dataclass(frozen=True, slots=True)
class Site:
    """Channels between producing rows and the first columns of the consumers."""

    name: str
    producers: tuple[Rows, ...]
    consumers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Channels:
    """What one site's channels undergo: x 2**exponent, then + offset."""

    exponents: tuple[int, ...]
    offsets: tuple[float, ...]


Planting = Mapping[str, Channels]


def sites(state: Mapping[str, Tensor]) -> Iterator[Site]:
    """All sites of a FLUX transformer in diffusers' names, an AdaLN before the values it feeds."""
    for suffix, block_sites in ((".norm1", _double_sites), (".norm", _single_sites)):
        ending = f"{suffix}.linear.weight"
        for name in sorted(name for name in state if name.endswith(ending)):
            yield from block_sites(name.removesuffix(ending), state[name].shape[1])


def _modulated(site: str, norm: str, first: int, width: int, consumers: tuple[str, ...]) -> Site:
    linear = f"{norm}.linear"
    shift, scale = Rows(linear, first * width), Rows(linear, (first + 1) * width, "scale")
    return Site(site, (shift, scale), consumers)


def _double_sites(block: str, width: int) -> Iterator[Site]:
    attn = f"{block}.attn"
    qkv = tuple(f"{attn}.to_{x}" for x in "qkv")
    added = tuple(f"{attn}.add_{x}_proj" for x in "qkv")
    norm, context = f"{block}.norm1", f"{block}.norm1_context"
    yield _modulated(f"{block}.img_attn", norm, 0, width, qkv)
    yield _modulated(f"{block}.img_mlp", norm, 3, width, (f"{block}.ff.net.0.proj",))
    yield _modulated(f"{block}.txt_attn", context, 0, width, added)
    yield _modulated(f"{block}.txt_mlp", context, 3, width, (f"{block}.ff_context.net.0.proj",))
    yield Site(
        f"{block}.value",
        (Rows(f"{attn}.to_v"), Rows(f"{attn}.add_v_proj")),
        (f"{attn}.to_out.0", f"{attn}.to_add_out"),
    )


def _single_sites(block: str, width: int) -> Iterator[Site]:
    inputs = (*(f"{block}.attn.to_{x}" for x in "qkv"), f"{block}.proj_mlp")
    yield _modulated(f"{block}.input", f"{block}.norm", 0, width, inputs)
    yield Site(f"{block}.value", (Rows(f"{block}.attn.to_v"),), (f"{block}.proj_out",))


def draw(rms: Mapping[str, Tensor], seed: int) -> dict[str, Channels]:
    """A planting for sites whose untouched channels have these root mean squares."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _draw_channels(rms[name], generator) for name in sorted(rms)}


def _draw_channels(rms: Tensor, generator: torch.Generator) -> Channels:
    width = len(rms)

    def choose(options: tuple[int, ...], count: int) -> Tensor:
        return torch.tensor(options)[torch.randint(len(options), (count,), generator=generator)]

    order = torch.randperm(width, generator=generator)
    sizes = [round(share * width) for share in (OUTLIER_SHARE, COLUMN_SHARE, OFFSET_SHARE)]
    loud, columns, moved, _ = order.split([*sizes, width - sum(sizes)])
    exponents = choose(MILD_EXPONENTS, width)
    exponents[loud] = choose(OUTLIER_EXPONENTS, len(loud))
    exponents[columns] = COLUMN_EXPONENT
    exponents[moved] = 0
    low, high = OFFSET_RMS
    size = low + (high - low) * torch.rand(len(moved), generator=generator)
    sign = choose((-1, 1), len(moved))
    offsets = torch.zeros(width)
    offsets[moved] = (sign * size * rms[moved].float()).bfloat16().float()
    return Channels(tuple(exponents.tolist()), tuple(offsets.tolist()))


def plant(state: Mapping[str, Tensor], planting: Planting) -> State:
    """The same function with outliers; `state` itself is left alone."""
    result = dict(state)
    for site in sites(state):
        _apply(result, site, planting[site.name])
    return result


def unplant(state: Mapping[str, Tensor], planting: Planting) -> State:
    """The inverse of `plant`."""
    result = dict(state)
    for site in reversed(list(sites(state))):
        _undo(result, site, planting[site.name])
    return result


def _vectors(channels: Channels) -> tuple[Tensor, Tensor]:
    factors = torch.exp2(torch.tensor(channels.exponents, dtype=torch.float64))
    return factors, torch.tensor(channels.offsets, dtype=torch.float64)


def _apply(state: State, site: Site, channels: Channels) -> None:
    s, c = _vectors(channels)
    for rows in site.producers:
        part = slice(rows.start, rows.start + len(s))
        one = 1.0 if rows.kind == "scale" else 0.0
        move = 0.0 if rows.kind == "scale" else c
        _scale_weight(state, rows.linear, (part, slice(None)), s[:, None])
        bias = state[f"{rows.linear}.bias"].double()
        bias[part] = s * (one + bias[part]) - one + move
        _set_bias(state, rows.linear, bias)
    for linear in site.consumers:
        _scale_weight(state, linear, (slice(None), slice(len(s))), 1 / s)
        weight = state[f"{linear}.weight"][:, : len(s)].double()
        _set_bias(state, linear, state[f"{linear}.bias"].double() - weight @ c)


def _undo(state: State, site: Site, channels: Channels) -> None:
    s, c = _vectors(channels)
    for linear in site.consumers:
        weight = state[f"{linear}.weight"][:, : len(s)].double()
        _set_bias(state, linear, state[f"{linear}.bias"].double() + weight @ c)
        _scale_weight(state, linear, (slice(None), slice(len(s))), s)
    for rows in site.producers:
        part = slice(rows.start, rows.start + len(s))
        one = 1.0 if rows.kind == "scale" else 0.0
        move = 0.0 if rows.kind == "scale" else c
        _scale_weight(state, rows.linear, (part, slice(None)), 1 / s[:, None])
        bias = state[f"{rows.linear}.bias"].double()
        bias[part] = (bias[part] + one - move) / s - one
        _set_bias(state, rows.linear, bias)


def _scale_weight(state: State, linear: str, where: tuple[slice, slice], factor: Tensor) -> None:
    weight = state[f"{linear}.weight"].clone()
    weight[where] = (weight[where].double() * factor).to(weight.dtype)
    state[f"{linear}.weight"] = weight


def _set_bias(state: State, linear: str, bias: Tensor) -> None:
    state[f"{linear}.bias"] = bias.to(state[f"{linear}.bias"].dtype)


def save(planting: Planting, path: Path) -> None:
    """The planting as JSON: exponents in full, offsets by channel."""
    record = {
        name: {
            "exponents": list(channels.exponents),
            "offsets": {str(j): c for j, c in enumerate(channels.offsets) if c},
        }
        for name, channels in planting.items()
    }
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in record.items())
    path.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def load(path: Path) -> dict[str, Channels]:
    """The inverse of `save`."""
    planting = {}
    for name, entry in json.loads(path.read_text(encoding="utf-8")).items():
        offsets = [0.0] * len(entry["exponents"])
        for channel, offset in entry["offsets"].items():
            offsets[int(channel)] = offset
        planting[name] = Channels(tuple(entry["exponents"]), tuple(offsets))
    return planting
