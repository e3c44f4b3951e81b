"""Fold and center: the function of a real FLUX is unchanged, statistics are those of the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dqconvert.quantizers import precondition
from dqconvert.quantizers.precondition import Transform
from dqconvert.quantizers.tensors import LayerStats

torch.set_num_threads(1)
HIDDEN = 32
Weights = dict[str, Tensor]


def build_flux(dtype: torch.dtype, **changes: Any) -> Any:
    """diffusers' own transformer, two double and two single blocks, with large random weights."""
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 20,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
        }
        model = FluxTransformer2DModel(**config | changes)
        for tensor in model.parameters():
            tensor.data += 0.1 * torch.randn_like(tensor)
    return model.to(dtype).eval()


def run(model: Any) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    dtype, config = next(model.parameters()).dtype, model.config

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    with torch.no_grad():
        found: Tensor = model(
            hidden_states=noise(1, 9, config.in_channels),
            encoder_hidden_states=noise(1, 5, config.joint_attention_dim),
            pooled_projections=noise(1, config.pooled_projection_dim),
            timestep=torch.tensor([0.4], dtype=dtype),
            guidance=torch.tensor([3.5], dtype=dtype),
            img_ids=torch.randn(9, 3, generator=rng),
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
        )[0]
    return found


def random_transform(seed: int, dtype: torch.dtype, center: bool, width: int = HIDDEN) -> Transform:
    rng = torch.Generator().manual_seed(seed)
    smooth = torch.exp(1.5 * torch.randn(width, generator=rng, dtype=torch.float64)).to(dtype)
    mu = torch.randn(width, generator=rng, dtype=torch.float64).to(dtype)
    return Transform(smooth, mu if center else None)


def consume(state: Weights, linear: str, transform: Transform) -> None:
    weight, bias = state[f"{linear}.weight"], state[f"{linear}.bias"]
    state[f"{linear}.bias"] = precondition.consumer_bias(bias, weight, transform)
    state[f"{linear}.weight"] = precondition.consumer_weight(weight, transform)


def produce(
    state: Weights, linear: str, transform: Transform, chunk: int, bias: Callable[..., Tensor]
) -> None:
    rows = slice(chunk * HIDDEN, (chunk + 1) * HIDDEN)
    for leaf, change in (("weight", precondition.producer_weight), ("bias", bias)):
        tensor = state[f"{linear}.{leaf}"].clone()
        tensor[rows] = change(tensor[rows], transform)
        state[f"{linear}.{leaf}"] = tensor


def folds() -> list[tuple[tuple[str, ...], str, int, tuple[str, ...]]]:
    """(consumers, modulation, chunk of its shift, values) of every input, by diffusers' source."""
    found: list[tuple[tuple[str, ...], str, int, tuple[str, ...]]] = []
    for i in range(2):
        at, one = f"transformer_blocks.{i}", f"single_transformer_blocks.{i}"
        image = tuple(f"{at}.attn.to_{x}" for x in "qkv")
        text = tuple(f"{at}.attn.add_{x}_proj" for x in "qkv")
        single = (*(f"{one}.attn.to_{x}" for x in "qkv"), f"{one}.proj_mlp")
        found += [
            (image, f"{at}.norm1.linear", 0, ()),
            (text, f"{at}.norm1_context.linear", 0, ()),
            ((f"{at}.ff.net.0.proj",), f"{at}.norm1.linear", 3, ()),
            ((f"{at}.ff_context.net.0.proj",), f"{at}.norm1_context.linear", 3, ()),
            ((f"{at}.attn.to_out.0", f"{at}.attn.to_add_out"), "", 0, (image[2], text[2])),
            (single, f"{one}.norm.linear", 0, ()),
            ((f"{one}.proj_out",), "", 0, (single[2],)),
        ]
    return found


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("center", [False, True])
def test_a_flux_folded_everywhere_is_the_same_function(
    dtype: torch.dtype, limit: float, center: bool
) -> None:
    model = build_flux(dtype)
    before = run(model)
    state = dict(model.state_dict())
    for seed, (consumers, modulation, chunk, values) in enumerate(folds()):
        transform = random_transform(seed, dtype, center)
        for linear in consumers:
            consume(state, linear, transform)
        if modulation:
            produce(state, modulation, transform, chunk, precondition.shift_bias)
            produce(state, modulation, transform, chunk + 1, precondition.scale_bias)
        for linear in values:
            produce(state, linear, transform, 0, precondition.shift_bias)
    model.load_state_dict(state)
    after = run(model)
    assert float((after - before).norm() / before.norm()) < limit
    assert len(folds()) == 14


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), rows=st.integers(1, 9), start=st.integers(0, 5))
def test_the_inverse_takes_everything_back(seed: int, rows: int, start: int) -> None:
    transform = random_transform(seed, torch.float64, center=True)
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, HIDDEN + 9, generator=rng, dtype=torch.float64)
    bias = torch.randn(rows, generator=rng, dtype=torch.float64)
    there = precondition.consumer_weight(weight, transform, start)
    moved = precondition.consumer_bias(bias, weight, transform, start)
    back = transform.inverse
    assert torch.allclose(precondition.consumer_weight(there, back, start), weight)
    assert torch.allclose(precondition.consumer_bias(moved, there, back, start), bias)
    for change in (precondition.shift_bias, precondition.scale_bias):
        m = torch.randn(HIDDEN, generator=rng, dtype=torch.float64)
        assert torch.allclose(change(change(m, transform), back), m, atol=1e-9)


def stats_of(x: Tensor, held: int) -> LayerStats:
    seen = x[: len(x) - held].double()
    return LayerStats(
        count=len(x),
        absmax=x.abs().amax(0),
        mean=x.double().mean(0).float(),
        mean_square=x.double().square().mean(0).float(),
        second_moment=(seen.T @ seen / max(len(seen), 1)).float(),
        rows=x[len(x) - held :].clone(),
    )


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 99),
    held=st.sampled_from([0, 1, 16]),
    start=st.sampled_from([0, 7]),
    offset=st.sampled_from([0.0, 30.0]),
)
def test_statistics_are_those_of_the_rows_themselves(
    seed: int, held: int, start: int, offset: float
) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(64, HIDDEN + 9, generator=rng)
    x += offset * torch.randn(HIDDEN + 9, generator=rng)
    transform = random_transform(seed, torch.float32, center=True)
    assert transform.center is not None
    moved = x.double()
    cut = slice(start, start + HIDDEN)
    moved[:, cut] = (moved[:, cut] - transform.center.double()) / transform.smooth.double()
    want, found = (
        stats_of(moved.float(), held),
        precondition.statistics(stats_of(x, held), transform, start),
    )
    assert found.count == want.count
    assert torch.allclose(found.rows, want.rows, rtol=1e-4, atol=1e-4)
    for name in ("mean", "mean_square"):
        close = torch.isclose(getattr(found, name), getattr(want, name), rtol=1e-3, atol=1e-3)
        assert bool(close.all()), name
    assert found.second_moment is not None and want.second_moment is not None
    scale = want.second_moment.diagonal().sqrt()
    off = (found.second_moment - want.second_moment) / torch.outer(scale, scale)
    assert float(off.abs().max()) < 5e-3
    inside = found.absmax[cut] * 1.0001
    assert bool((inside >= found.rows[:, cut].abs().amax(0)).all() if held else True)
    bound = (x.abs().amax(0)[cut] + transform.center.abs()) / transform.smooth
    assert bool((inside <= bound * 1.001).all())
    assert torch.equal(found.absmax[: cut.start], x.abs().amax(0)[: cut.start])


def test_folding_alone_keeps_the_range_exact() -> None:
    x = torch.randn(20, HIDDEN)
    transform = random_transform(0, torch.float32, center=False)
    found = precondition.statistics(stats_of(x, 4), transform)
    assert torch.allclose(found.absmax, (x / transform.smooth).abs().amax(0))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), spread=st.floats(0.1, 3.0))
def test_snapped_biases_are_exact_in_bf16(seed: int, spread: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    shift = (spread * torch.randn(HIDDEN, generator=rng)).bfloat16()
    scale = (0.4 * torch.randn(HIDDEN, generator=rng)).bfloat16()
    wanted = Transform(
        precondition.bounded(torch.exp(2 * torch.randn(HIDDEN, generator=rng))),
        torch.randn(HIDDEN, generator=rng),
    )
    found = precondition.snapped(wanted, shift, scale, torch.bfloat16)
    assert found.center is not None and wanted.center is not None
    assert bool(((found.smooth / wanted.smooth - 1).abs() < 1 / 16).all())
    m = precondition.scale_bias(scale, found)
    usable = (1 + scale.float()).abs() > 0.1
    assert torch.allclose((1 + m)[usable], (1 + m.bfloat16().float())[usable], rtol=2e-6)
    m = precondition.shift_bias(shift, found)
    assert torch.allclose(m, m.bfloat16().float(), rtol=1e-4, atol=1e-5 * spread)
    near = (found.center - wanted.center).abs() <= (shift.float() - wanted.center).abs() / 100
    assert bool(near.all())


def test_smooth_factors_stay_within_reach_of_16_bits() -> None:
    smooth = torch.tensor([0.0, 1e-9, 1.0, 4.0, float("inf"), float("nan")])
    found = precondition.bounded(smooth)
    assert torch.equal(found, torch.tensor([1.0, 1 / 256, 0.25, 1.0, 1.0, 1.0]))
    assert torch.equal(precondition.bounded(torch.zeros(3)), torch.ones(3))
    assert torch.equal(
        precondition.bounded(torch.tensor([2.0, 8.0]), 4.0), torch.tensor([0.5, 2.0])
    )
    rms_x, rms_w = torch.tensor([1.0, 36.0]), torch.tensor([1.0, 4.0])
    assert torch.allclose(precondition.ratio(rms_x, rms_w), torch.tensor([1.0, 3.0]))
    assert precondition.level(torch.tensor([1.0, 4.0, 0.0])) == pytest.approx(2.0)
