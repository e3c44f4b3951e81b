"""Regular Hadamard rotations: comfy-kitchen's bits, Kronecker products in float64, and laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comfy_kitchen.backends.eager import convrot_w4a4
from comfy_kitchen.backends.eager.quantization import rotate_int8_convrot_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from dqconvert.quantizers import hadamard

torch.set_num_threads(1)

GROUPS = (4, 16, 64, 256, 1024)
every_group = pytest.mark.parametrize("group", GROUPS)
lawful = settings(derandomize=True, deadline=None, max_examples=60)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def exact(group: int) -> np.ndarray:
    """The normalized matrix in float64, entry by entry: a product over the base-4 digits."""
    order = round(np.log(group) / np.log(4))
    h = np.ones((group, group))
    for i in range(group):
        for j in range(group):
            for digit in range(order):
                a, b = i // 4**digit % 4, j // 4**digit % 4
                h[i, j] *= -0.5 if a + b == 3 else 0.5
    return h


@every_group
def test_matrix_is_kitchens(group: int) -> None:
    assert torch.equal(hadamard.matrix(group), convrot_w4a4._build_hadamard(group))


@pytest.mark.parametrize("group", GROUPS[:4])
def test_matrix_is_the_kronecker_power(group: int) -> None:
    assert np.array_equal(hadamard.matrix(group).double().numpy(), exact(group))


@every_group
def test_matrix_laws(group: int) -> None:
    h = hadamard.matrix(group).double()
    assert torch.equal(h, h.T)
    assert torch.equal(h @ h, torch.eye(group, dtype=torch.float64))
    assert torch.equal(h.sum(1), torch.ones(group, dtype=torch.float64))
    assert torch.equal(h.abs(), torch.full_like(h, group**-0.5))


@pytest.mark.parametrize("group", [-4, 0, 1, 2, 3, 8, 12, 32, 128, 255, 512, 2048])
def test_matrix_refuses_other_sizes(group: int) -> None:
    with pytest.raises(ValueError, match="power of 4"):
        hadamard.matrix(group)


@every_group
@pytest.mark.parametrize("rows", [16, 37, 300])
def test_rotates_like_kitchen(group: int, rows: int) -> None:
    weight = draw(rows, max(1024, 2 * group), seed=rows)
    theirs = rotate_int8_convrot_weight(weight, group)
    assert torch.equal(hadamard.rotate(weight, group), theirs)
    with_block = convrot_w4a4._rotate_weight(weight, convrot_w4a4._build_hadamard(group), group)
    assert torch.equal(hadamard.rotate(weight, group), with_block)


@every_group
@pytest.mark.parametrize("step", [1, 3, 7, 64])
def test_blocks_of_rows_give_the_same_bits(group: int, step: int) -> None:
    weight = draw(100, 1024)
    whole = rotate_int8_convrot_weight(weight, group)
    parts = [hadamard.rotate(weight[i : i + step], group) for i in range(0, 100, step)]
    assert torch.equal(torch.cat(parts), whole)


@lawful
@given(
    group=st.sampled_from((4, 16, 64, 256)),
    groups=st.integers(0, 4),
    lead=st.lists(st.integers(0, 5), max_size=3),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    seed=st.integers(0, 2**31),
)
def test_laws(group: int, groups: int, lead: list[int], dtype: torch.dtype, seed: int) -> None:
    x = draw(*lead, groups * group, seed=seed).to(dtype)
    before = x.clone()
    y = hadamard.rotate(x, group)
    assert torch.equal(x, before), "the input was changed in place"
    assert y.shape == x.shape and y.dtype == torch.float32
    h = torch.from_numpy(exact(group))
    wide = x.float().double().reshape(-1, group) @ h
    assert torch.allclose(y.double().reshape(-1, group), wide, rtol=0, atol=1e-6)
    assert torch.allclose(hadamard.rotate(y, group), x.float(), rtol=0, atol=1e-6)
    assert torch.allclose(y.norm(), x.float().norm(), rtol=1e-5)


def test_a_layer_keeps_its_output() -> None:
    weight, x = draw(40, 512), draw(9, 512, seed=1)
    rotated = hadamard.rotate(x, 256).double() @ hadamard.rotate(weight, 256).double().T
    assert torch.allclose(rotated, x.double() @ weight.double().T, rtol=0, atol=1e-7)


def test_views_are_rotated_as_copies() -> None:
    weight = draw(64, 80).T
    assert torch.equal(hadamard.rotate(weight, 64), hadamard.rotate(weight.contiguous(), 64))


def test_group_zero_is_the_identity() -> None:
    x = draw(3, 10).bfloat16()
    assert torch.equal(hadamard.rotate(x, 0), x.float())
    assert hadamard.rotate(x, 0).dtype == torch.float32


def test_refuses_what_groups_do_not_divide() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        hadamard.rotate(draw(3, 100), 64)
