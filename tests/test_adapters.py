"""Adapters by themselves: PEFT's own merging and closed forms in float64 are the judges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dqconvert.quantizers.adapters import (
    Adapter,
    extent,
    kind_of,
    missing,
    rank_of,
    recompressed,
    scale_of,
)

torch.set_num_threads(1)
N, K, RANK = 24, 16, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def whole(adapter: Adapter, base: Tensor | None = None) -> Tensor:
    return adapter.added(base, 0, adapter.rows)


def near(one: Tensor, two: Tensor) -> bool:
    return float((one.double() - two.double()).norm()) <= 2e-6 * float(two.double().norm() + 1e-12)


def lokr(one: str, two: str, conv: bool = False) -> dict[str, Tensor]:
    """w1 [4, 2] and w2 [6, 8], whole ("") or decomposed ("ab"), w2 of a 3x3 convolution or not."""
    found = {}
    tail = (3, 3) if conv else ()
    if one:
        found |= {"lokr_w1_a": draw(4, RANK), "lokr_w1_b": draw(RANK, 2)}
    else:
        found["lokr_w1"] = draw(4, 2)
    if two == "tucker":
        found |= {"lokr_t2": draw(RANK, RANK, *tail), "lokr_w2_a": draw(RANK, 6, seed=1)}
        found["lokr_w2_b"] = draw(RANK, 8, seed=2)
    elif two:
        found |= {"lokr_w2_a": draw(6, RANK, seed=3), "lokr_w2_b": draw(RANK, 8, seed=4)}
    else:
        found["lokr_w2"] = draw(6, 8, *tail)
    return found


def kron(t: dict[str, Tensor]) -> Tensor:
    """w1 ⊗ w2 in float64, element by element."""
    d = {name: tensor.double() for name, tensor in t.items()}
    one = d["lokr_w1"] if "lokr_w1" in d else d["lokr_w1_a"] @ d["lokr_w1_b"]
    if "lokr_t2" in d:
        two = torch.einsum("ijkl,ip,jr->prkl", d["lokr_t2"], d["lokr_w2_a"], d["lokr_w2_b"])
    else:
        two = d["lokr_w2"] if "lokr_w2" in d else d["lokr_w2_a"] @ d["lokr_w2_b"]
    rows = [torch.cat([x * two for x in row], dim=1) for row in one]
    return torch.cat(rows).flatten(1)


@pytest.mark.parametrize(
    ("one", "two", "conv"),
    [("", "", False), ("ab", "", False), ("", "ab", False), ("ab", "ab", False),
     ("", "", True), ("ab", "tucker", True)],
)  # fmt: skip
def test_lokr_is_the_kronecker_product(one: str, two: str, conv: bool) -> None:
    tensors = lokr(one, two, conv)
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    assert (kind_of(tensors), missing("lokr", tensors)) == ("lokr", [])
    want = kron(tensors)
    assert extent("lokr", shapes) == tuple(want.shape)
    rank = rank_of("lokr", shapes)
    assert rank == (RANK if one or two else None)
    scale = scale_of(rank, 2.0)
    assert scale == (0.5 if one or two else 1.0), "whole matrices are not scaled"
    adapter = Adapter("lokr", tensors, scale)
    assert near(whole(adapter), scale * want)
    for start, stop in ((0, 1), (5, 13), (17, 24)):
        assert near(adapter.added(None, start, stop), scale * want[start:stop])


def test_loha_is_the_product_of_products() -> None:
    t = {f"hada_w{n}_{x}": draw(*((N, RANK) if x == "a" else (RANK, K)), seed=n)
         for n in (1, 2) for x in "ab"}  # fmt: skip
    d = {name: tensor.double() for name, tensor in t.items()}
    want = (d["hada_w1_a"] @ d["hada_w1_b"]) * (d["hada_w2_a"] @ d["hada_w2_b"]) * 0.25
    adapter = Adapter("loha", t, scale_of(RANK, 1.0))
    assert near(whole(adapter), want) and near(adapter.added(None, 3, 9), want[3:9])


def test_tucker_forms_of_convolutions() -> None:
    t = {f"hada_w{n}_{x}": draw(RANK, N if x == "a" else 5, seed=n) for n in (1, 2) for x in "ab"}
    t |= {f"hada_t{n}": draw(RANK, RANK, 3, 3, seed=n) for n in (1, 2)}
    d = {name: tensor.double() for name, tensor in t.items()}
    halves = [
        torch.einsum("ijkl,ip,jr->prkl", d[f"hada_t{n}"], d[f"hada_w{n}_a"], d[f"hada_w{n}_b"])
        for n in (1, 2)
    ]
    want = (halves[0] * halves[1]).flatten(1)
    adapter = Adapter("loha", t)
    assert near(whole(adapter), want) and near(adapter.added(None, 2, 7), want[2:7])

    lora = {"up": draw(N, RANK, 1, 1), "down": draw(RANK, 5, 1, 1), "mid": draw(RANK, RANK, 3, 3)}
    up, down = (lora[name].double().flatten(1) for name in ("up", "down"))
    want = torch.einsum("nr,rskl,sc->nckl", up, lora["mid"].double(), down).flatten(1)
    assert near(whole(Adapter("lora", lora)), want)
    assert extent("lora", {name: tuple(x.shape) for name, x in lora.items()}) == want.shape
    plain = {"up": draw(N, RANK, 1, 1), "down": draw(RANK, 5, 3, 3)}
    want = plain["up"].double().flatten(1) @ plain["down"].double().flatten(1)
    assert near(whole(Adapter("lora", plain)), want)


@pytest.mark.parametrize("shape", [(N,), (N, 1), (1, K)])
def test_dora_has_the_norms_of_its_magnitudes(shape: tuple[int, ...]) -> None:
    base = draw(N, K, seed=9)
    magnitude = draw(*shape).abs() + 0.1
    t = {"up": draw(N, RANK), "down": draw(RANK, K), "magnitude": magnitude}
    adapter = Adapter("lora", t, 0.5)
    merged = base.double() + 0.5 * t["up"].double() @ t["down"].double()
    axis = 0 if shape == (1, K) else 1
    unit = merged / merged.norm(dim=axis, keepdim=True)
    want = unit * magnitude.double().reshape((1, K) if axis == 0 else (N, 1))
    assert near(base + whole(adapter, base), want)
    if axis:
        assert near(base[4:9] + adapter.added(base[4:9], 4, 9), want[4:9])
    else:
        with pytest.raises(ValueError, match="all rows"):
            adapter.added(base[4:9], 4, 9)


def test_dora_of_a_convolution_has_a_magnitude_for_each_input_channel() -> None:
    """LyCORIS' wd_on_out=False: norms over all rows and taps of a channel."""
    base, magnitude = draw(N, K, 3, 3, seed=9), draw(1, K, 1, 1).abs() + 0.1
    t = {"up": draw(N, RANK, 1, 1), "down": draw(RANK, K, 3, 3), "magnitude": magnitude}
    delta = t["up"].double().flatten(1) @ t["down"].double().flatten(1)
    merged = base.double() + 0.5 * delta.view(N, K, 3, 3)
    norms = merged.square().sum((0, 2, 3), keepdim=True).sqrt()
    want = merged / norms * magnitude.double()
    flat = base.flatten(1)
    assert near(flat + whole(Adapter("lora", t, 0.5), flat), want.flatten(1))


def test_differences_and_new_weights() -> None:
    base, other = draw(N, K), draw(N, K, seed=5)
    assert torch.equal(whole(Adapter("diff", {"diff": other})), other)
    assert near(base + whole(Adapter("set", {"set": other}), base), other)
    assert whole(Adapter("diff", {"diff": draw(N)})).shape == (N, 1)


@pytest.mark.parametrize(
    "kind", ["lora", "rslora", "dora", "lokr", "loha", "lokr-conv", "loha-conv"]
)
def test_peft_merges_the_same(kind: str) -> None:
    import peft

    name, _, conv = kind.partition("-")
    layer = torch.nn.Conv2d(16, 8, 3) if conv else torch.nn.Linear(16, 24)
    model: Any = torch.nn.Sequential(layer)
    base = model[0].weight.detach().clone()
    own = {"r": RANK, "target_modules": ["0"]}
    if name in ("lokr", "loha"):
        make = peft.LoKrConfig if name == "lokr" else peft.LoHaConfig
        config = make(**own, alpha=6, use_effective_conv2d=bool(conv), init_weights=False)
    else:
        flags = {"use_rslora": name == "rslora", "use_dora": name == "dora"}
        config = peft.LoraConfig(**own, lora_alpha=6, init_lora_weights=False, **flags)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, config)
    if name == "dora":
        for key, one in wrapped.named_parameters():
            if "magnitude" in key:
                one.data *= torch.rand(24) + 0.5
    state = peft.get_peft_model_state_dict(wrapped)
    words = {"lora_A.weight": "down", "lora_B.weight": "up", "lora_magnitude_vector": "magnitude"}
    tensors = {}
    for key, tensor in state.items():
        short = key.removeprefix("base_model.model.0.")
        tensors[words.get(short, short)] = tensor.detach()
    found = kind_of(tensors)
    assert found is not None
    adapter = Adapter(found, tensors, scale_of(RANK, 6.0, name == "rslora"))
    merged = wrapped.merge_and_unload()[0].weight.detach()
    assert not near(merged, base)
    got = base.flatten(1) + whole(adapter, base.flatten(1))
    assert near(got.reshape(merged.shape), merged)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 9), st.integers(0, 5), st.data())
def test_any_rows_are_those_of_the_whole(
    rows: int, columns: int, rank: int, seed: int, data: st.DataObject
) -> None:
    t = {"up": draw(rows, rank, seed=seed), "down": draw(rank, columns, seed=seed)}
    adapter = Adapter("lora", t, 0.75)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start, rows))
    want = 0.75 * t["up"].double() @ t["down"].double()
    got = adapter.added(None, start, stop)
    assert got.shape == (stop - start, columns)
    assert torch.allclose(got.double(), want[start:stop], atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 16), st.integers(0, 3))
def test_recompressed_is_the_best_of_its_rank(rank: int, held: int, seed: int) -> None:
    up, down = draw(20, held, seed=seed), draw(held, 18, seed=seed + 1)
    metric = draw(18, seed=seed).abs() + 0.1
    a, b = recompressed(up, down, rank, metric)
    exact = (up.double() @ down.double()) * metric.double()
    u, s, vh = torch.linalg.svd(exact, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    got = (a.double() @ b.double()) * metric.double()
    assert a.shape[1] == b.shape[0] <= rank
    assert float((got - best).norm()) <= 1e-4 * float(exact.norm() + 1)


def test_what_does_not_go_together_is_said() -> None:
    assert kind_of(["down", "lokr_w1"]) is None and kind_of(["alpha"]) is None
    assert missing("lora", ["down"]) == ["up"]
    assert missing("lokr", ["lokr_w1"]) == ["lokr_w2_a", "lokr_w2_b"]
    assert missing("loha", ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_t1"])[0] == "hada_w2_b"
    with pytest.raises(ValueError, match="other ranks"):
        extent("lora", {"down": (4, 8), "up": (8, 3)})
    with pytest.raises(ValueError, match="halves"):
        extent("loha", {"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (5, 2),
                        "hada_w2_b": (2, 4)})  # fmt: skip
