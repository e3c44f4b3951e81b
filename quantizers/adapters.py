"""Adapters: what a LoRA and its relatives add to a weight, for any rows of it, in fp32.

Weights are [N, K]; those of convolutions [N, C, ...] with K the product of all but the first.

    LoRA    scale · up down; with a mid of a convolution, up · (mid x down)
    LoHa    scale · (w1_a w1_b) ∘ (w2_a w2_b); Tucker form with t1, t2
    LoKr    scale · w1 ⊗ w2, each a product of two where it is decomposed
    diff    the difference itself; set: the new weight itself
    DoRA    W' = m (W + D) / ||W + D||, norms over each row, or over each column for a row of m,
            which is an input channel of a convolution

scale is alpha / rank, or alpha / sqrt(rank) where the rank stabilises; 1 without alpha, and for
LoKr of two whole matrices. Formulas: LyCORIS (lycoris/modules/{loha,lokr,locon}.py), PEFT
tuners/lora/dora.py (the norm is that of the merged weight), comfy/weight_adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod, sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
LORA = ("down", "up")
LOKR = (
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_w2_b",
    "lokr_t2",
)
HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
PARTS = {"lora": (*LORA, "mid"), "loha": HADA, "lokr": LOKR, "diff": ("diff",), "set": ("set",)}
"""The tensors that each kind is made of, some of them optional."""


def kind_of(roles: Collection[str]) -> str | None:
    """The kind of adapter that tensors of these roles are, whole or not; None: not of one kind."""
    found = [kind for kind, parts in PARTS.items() if not set(parts).isdisjoint(roles)]
    return found[0] if len(found) == 1 else None


def missing(kind: str, roles: Collection[str]) -> list[str]:
    """The tensors that an adapter lacks."""
    needed: tuple[str, ...]
    if kind == "loha":
        needed = HADA[:4] if not {"hada_t1", "hada_t2"} & set(roles) else HADA
    elif kind == "lokr":
        needed = (*_half("lokr_w1", roles), *_half("lokr_w2", roles))
    else:
        needed = LORA if kind == "lora" else PARTS[kind]
    return [role for role in needed if role not in roles]


def _half(name: str, roles: Collection[str]) -> tuple[str, ...]:
    return (name,) if name in roles else (f"{name}_a", f"{name}_b")


def extent(kind: str, shapes: Mapping[str, Shape]) -> tuple[int, int]:
    """Rows and columns of what an adapter adds. ValueError where its tensors do not go together."""
    if kind == "lora":
        down, up = shapes["down"], shapes["up"]
        mid = shapes.get("mid", (down[0], down[0]))
        if (prod(up[1:]), down[0]) != mid[:2]:
            raise ValueError(f"down {list(down)} and up {list(up)} have other ranks")
        return up[0], prod(down[1:]) * prod(mid[2:])
    if kind == "loha":
        halves = [_product(f"hada_w{n}", f"hada_t{n}", shapes) for n in (1, 2)]
        if halves[0] != halves[1]:
            raise ValueError(f"its halves are {list(halves[0])} and {list(halves[1])}")
        return halves[0]
    if kind == "lokr":
        one, two = _product("lokr_w1", "", shapes), _product("lokr_w2", "lokr_t2", shapes)
        return one[0] * two[0], one[1] * two[1]
    shape = shapes[kind]
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def _product(name: str, core: str, shapes: Mapping[str, Shape]) -> tuple[int, int]:
    """Rows and columns of a matrix that may be decomposed, with a Tucker core or without."""
    if name in shapes:
        return shapes[name][0], prod(shapes[name][1:])
    a, b, t = shapes[f"{name}_a"], shapes[f"{name}_b"], shapes.get(core)
    if t is not None:
        if (t[0], t[1]) != (a[0], b[0]):
            raise ValueError(f"{core} {list(t)} does not join {list(a)} and {list(b)}")
        return a[1], b[1] * prod(t[2:])
    if a[1] != b[0]:
        raise ValueError(f"{name}: {list(a)} and {list(b)} have other ranks")
    return a[0], prod(b[1:])


def rank_of(kind: str, shapes: Mapping[str, Shape]) -> int | None:
    """The rank that alpha is divided by; None where there is no such division."""
    if kind == "lora":
        return shapes["down"][0]
    if kind == "loha":
        return shapes["hada_w1_b"][0]
    if kind == "lokr":
        found = [shapes[f"{half}_b"] for half in ("lokr_w2", "lokr_w1") if f"{half}_b" in shapes]
        return found[0][0] if found else None
    return None


def scale_of(rank: int | None, alpha: float | None, stabilised: bool = False) -> float:
    """What an adapter's product is multiplied by. alpha: None where nothing says one."""
    if rank is None or alpha is None:
        return 1.0
    return alpha / (sqrt(rank) if stabilised else rank)


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter of one weight: its tensors by role, as the file has them."""

    kind: str
    tensors: Mapping[str, Tensor]
    scale: float = 1.0

    def added(self, base: Tensor | None, start: int, stop: int) -> Tensor:
        """What is added to rows start .. stop, [rows, K] fp32.

        base: the weight's own rows [rows, K] fp32, which set and DoRA need. DoRA over columns
        goes by `norms`, and takes no rows alone: ValueError.
        """
        delta = self._delta(start, stop)
        if self.kind == "set":
            assert base is not None
            return delta - base
        if "magnitude" not in self.tensors:
            return delta
        assert base is not None
        whole = base + delta
        if self.by_columns:
            if whole.shape[0] != self.rows:
                raise ValueError("norms over columns need all rows")
            magnitude = self.tensors["magnitude"].float().reshape(1, -1)
            taps = whole.shape[1] // magnitude.shape[1]
            channels = whole.view(whole.shape[0], -1, taps)
            norms = channels.square().sum((0, 2)).sqrt()[None].repeat_interleave(taps, dim=1)
            magnitude = magnitude.repeat_interleave(taps, dim=1)
        else:
            norms = whole.norm(dim=1, keepdim=True)
            magnitude = self.tensors["magnitude"].float().reshape(-1, 1)[start:stop]
        factors: Tensor = magnitude / norms.clamp(min=1e-30)
        return whole * factors - base

    @property
    def rows(self) -> int:
        """Rows of the whole weight."""
        return extent(self.kind, {name: tuple(t.shape) for name, t in self.tensors.items()})[0]

    @property
    def by_columns(self) -> bool:
        """Whether a DoRA has a magnitude for each column instead of each row."""
        found = self.tensors.get("magnitude")
        return found is not None and columnwise(tuple(found.shape))

    def _delta(self, start: int, stop: int) -> Tensor:
        cut, t = slice(start, stop), self.tensors
        if self.kind == "lora":
            down, up = _mixed(t), t["up"].flatten(1)[cut].float()
            return (up * self.scale) @ down
        if self.kind == "loha":
            one, two = (_hadamard_half(t, n, cut) for n in (1, 2))
            return one * two * self.scale
        if self.kind == "lokr":
            return _kron(t, start, stop) * self.scale
        found = t[self.kind][cut].float()
        return found.flatten(1) if found.ndim > 1 else found[:, None]


def columnwise(magnitude: Shape) -> bool:
    """Whether magnitudes of a shape are [1, K] rather than [N, 1] or [N]."""
    return len(magnitude) > 1 and magnitude[0] == 1 and magnitude[1] > 1


def _mixed(t: Mapping[str, Tensor]) -> Tensor:
    """The down projection [r, K] fp32, behind the mid of a convolution where there is one."""
    down = t["down"].float()
    if "mid" not in t:
        return down.flatten(1)
    import torch

    mixed: Tensor = torch.einsum("mn...,nj->mj...", t["mid"].float(), down.flatten(1))
    return mixed.flatten(1)


def _hadamard_half(t: Mapping[str, Tensor], number: int, cut: slice) -> Tensor:
    a, b = t[f"hada_w{number}_a"].float(), t[f"hada_w{number}_b"].float()
    core = t.get(f"hada_t{number}")
    if core is None:
        return a[cut] @ b.flatten(1)
    return _tucker(core, a[:, cut], b)


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """core [i, j, ...], a [i, rows], b [j, columns] -> [rows, columns ...]."""
    import torch

    return torch.einsum("ij...,jr,ip->pr...", core.float(), b, a).flatten(1)


def _kron(t: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
    """Rows start .. stop of w1 ⊗ w2; a row of w1 makes as many as w2 has."""
    import torch

    one, two = _factor(t, "lokr_w1"), _factor(t, "lokr_w2")
    each = two.shape[0]
    first, last = start // each, -(-stop // each)
    whole: Tensor = torch.kron(one[first:last].contiguous(), two.contiguous())
    return whole[start - first * each : stop - first * each]


def _factor(t: Mapping[str, Tensor], name: str) -> Tensor:
    """One factor of a Kronecker product, [rows, columns] fp32."""
    if name in t:
        return t[name].float().flatten(1)
    a, b = t[f"{name}_a"].float(), t[f"{name}_b"].float()
    core = t.get("lokr_t2") if name == "lokr_w2" else None
    return a @ b.flatten(1) if core is None else _tucker(core, a, b)


def recompressed(up: Tensor, down: Tensor, rank: int, metric: Tensor) -> tuple[Tensor, Tensor]:
    """up [N, R] and down [R, K] as the best factors of a rank, R or less, fp32.

    Best for inputs whose channels are as large as metric [K] says. Exact: by QR of both factors.
    """
    import torch

    left, a = torch.linalg.qr(up.float())
    right, b = torch.linalg.qr((down.float() * metric).T)
    u, s, vh = torch.linalg.svd(a @ b.T, full_matrices=False)
    keep = min(rank, len(s))
    root = s[:keep].sqrt()
    return (left @ u[:, :keep]) * root, root[:, None] * (vh[:keep] @ right.T) / metric
