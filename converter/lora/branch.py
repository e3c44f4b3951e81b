"""LoRAs beside quantized weights, in the low-rank branches of SVDQuant: nothing is requantized.

The branch reads the raw input, before the smooth vector and the shift, so a LoRA's factors go into
it as they are: down below down, up beside up. The rank grows by that of the LoRA, is filled up with
zeros to a multiple of 16, and is the same in all layers, since loaders have one rank for a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dqconvert.converter.canonical import Infos
from dqconvert.converter.lora.match import Patch
from dqconvert.converter.lora.merged import MergedSource
from dqconvert.converter.options import PlanOptions
from dqconvert.converter.plan import LayerPlan, Plan
from dqconvert.quantizers.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor

    from dqconvert.quantizers.tensors import LinearProblem, LowRank, QuantizedTensor

STEP = 16
"""Ranks of the kernels' branches are multiples of this."""


@dataclass(frozen=True, slots=True)
class Branch:
    """What is appended to the branches of a new conversion.

    rank: that the base is quantized with; total: that the file has; cap: what branches are
    re-compressed to, or None; patches: what goes into them; source: the model without these;
    observed: with them, as calibration sees it.
    """

    rank: int
    total: int
    cap: int | None
    patches: tuple[Patch, ...]
    source: MergedSource
    observed: MergedSource

    def appended(
        self, layer: LayerPlan, problem: LinearProblem, q: QuantizedTensor
    ) -> tuple[LinearProblem, QuantizedTensor]:
        """A layer with its LoRA: the weight that it stands for, and what the file will hold."""
        assert layer.form is not None
        if q.lowrank is None:
            return problem, q
        found = factors(self.patches, layer.modules, self.source.infos, layer.columns)
        if found is not None:
            problem = replace(problem, weight=problem.weight.float() + found[0] @ found[1])
        return problem, replace(q, lowrank=joined(q, found, self.total, self.cap))


def branched(
    plan: Plan, source: MergedSource, options: PlanOptions, cap: int | None
) -> tuple[Branch, PlanOptions]:
    """Decide what goes into the branches of a plan, and what is merged into the weights instead.

    source: the model with all LoRAs. Returns options for the plan with the rank that it takes.
    """
    layers = [layer for layer in plan.layers if layer.form and layer.form.rank]
    held = {module for layer in layers for module in layer.modules}
    inside = tuple(patch for patch in source.loras.patches if fits(patch, held))
    rest = [patch for patch in source.loras.patches if patch not in inside]
    rank = plan.context.rank
    most = max((rank_in(inside, layer.modules) for layer in layers), default=0)
    total = total_rank(rank, most, cap)
    if not inside:
        raise PlanError(["--lora-mode branch: the LoRA is of no layer that has a branch; merge it"])
    base = MergedSource(source.inner, source.loras, rest)
    return Branch(rank, total, cap, inside, base, source), replace(options, rank=total)


def total_rank(rank: int, more: int, cap: int | None) -> int:
    """Rank of branches that get more, a multiple of 16."""
    total = -(-(rank + more) // STEP) * STEP
    return total if cap is None else min(total, cap)


def fits(patch: Patch, held: Iterable[str]) -> bool:
    """Whether a patch is a plain product of linears that all have a branch."""
    weights = all(part.endswith(".weight") for part in patch.home.parts)
    plain = patch.rank is not None and patch.home.plain and weights
    return plain and set(patch.home.modules) <= set(held)


def touching(patches: Sequence[Patch], modules: Sequence[str]) -> list[Patch]:
    """Patches of the weights of stacked linears."""
    return [patch for patch in patches if not set(modules).isdisjoint(patch.home.modules)]


def rank_in(patches: Sequence[Patch], modules: Sequence[str]) -> int:
    """What patches add to the rank of stacked linears: one that is stacked itself counts once."""
    return sum(patch.rank or 0 for patch in touching(patches, modules))


def factors(
    patches: Sequence[Patch],
    modules: Sequence[str],
    infos: Infos,
    columns: tuple[int, int] | None,
) -> tuple[Tensor, Tensor] | None:
    """up [N, r] and down [r, K] fp32 of all patches of stacked linears; None if there are none."""
    import torch

    found = touching(patches, modules)
    if not found:
        return None
    starts, total = {}, 0
    for module in modules:
        starts[module] = total
        total += infos[f"{module}.weight"].shape[0]
    ups, downs = [], []
    for patch in found:
        t = patch.adapter.tensors
        own = t["up"].flatten(1).float() * (patch.adapter.scale * patch.strength)
        up = torch.zeros(total, own.shape[1])
        for part, start, stop in patch.home.rows(infos):
            first = starts.get(part.removesuffix(".weight"))
            if first is not None:
                up[first : first + stop - start] = own[start:stop]
        ups.append(up)
        down = t["down"].flatten(1).float()
        downs.append(down if columns is None else down[:, slice(*columns)])
    return torch.cat(ups, dim=1), torch.cat(downs)


def joined(
    q: QuantizedTensor, found: tuple[Tensor, Tensor] | None, total: int, cap: int | None
) -> LowRank:
    """A branch and what is appended to it, of that rank: zeros beyond, or re-compressed.

    The best for the smoothed input is what a cap keeps, as when the branch was made.
    """
    import torch
    from torch.nn.functional import pad

    from dqconvert.quantizers.adapters import recompressed
    from dqconvert.quantizers.tensors import LowRank

    assert q.lowrank is not None
    up, down = q.lowrank.up, q.lowrank.down
    dtype = up.dtype
    if found is not None:
        up, down = torch.cat([up, found[0].to(dtype)], 1), torch.cat([down, found[1].to(dtype)])
    if cap is not None and up.shape[1] > total:
        wide = found or (up[:, :0], down[:0])
        up = torch.cat([q.lowrank.up.float(), wide[0].float()], 1)
        down = torch.cat([q.lowrank.down.float(), wide[1].float()])
        metric = torch.ones(down.shape[1]) if q.smooth is None else q.smooth.float()
        up, down = (one.to(dtype) for one in recompressed(up, down, total, metric))
    more = total - up.shape[1]
    return LowRank(down=pad(down, (0, 0, 0, more)), up=pad(up, (0, more)))
