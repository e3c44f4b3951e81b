"""Each layer the scheme of a menu that it needs, so that all layers err least at a given size.

A layer's error under a scheme is ||X (W' - W)ᵀ||² / ||X Wᵀ||², rounded as the conversion will be.
X are the held rows where calibration ran, diag(sqrt(mean square of the inputs)) where those alone
are known, and I where nothing is: the weight's error. The sum over the layers is the least.

The norm of the output holds its mean, which other errors here leave out: a layer whose outputs are
mostly constant disturbs what follows less. On flux-digits that gains up to a decibel of velocity,
with and without planted outliers; to count layers by their weights as well gains nothing. To
measure GPTQ by what rounding without it leaves costs 1 to 2 dB: how much GPTQ makes up for
depends on the layer.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from dqconvert.converter.job import Progress
from dqconvert.converter.layers import problem_of
from dqconvert.converter.plan import LayerPlan, Plan
from dqconvert.converter.prepare import Prepared
from dqconvert.converter.work import Stats
from dqconvert.formats.targets import fitted
from dqconvert.quantizers import knapsack, recipe, schemes
from dqconvert.quantizers.errors import PlanError
from dqconvert.quantizers.forward import effective_weight
from dqconvert.quantizers.recipe import RecipeOptions
from dqconvert.quantizers.rounding import Inputs
from dqconvert.quantizers.spec import Scheme
from dqconvert.quantizers.tensors import LayerStats, LinearProblem

BITS = 4.5
"""Of a weight, unless told otherwise: the size of Q4_K."""

ROWS = 512
"""Of a weight's rows about so many are measured, at equal distances: they tell types apart almost
as well as all do (2 % of the error on flux-digits), and neither time nor memory grows with them."""

MAX_WORKERS = 8
"""Layers in hand at once."""

Menu = Mapping[int, Scheme]
"""What a layer can have, by its bytes."""


def allot(prepared: Prepared, stats: Stats, listen: Callable[[Progress], None]) -> Prepared:
    """The job with a scheme for each linear, and a note of how many have which.

    Layers that the user gave another scheme stay out of it. Raises PlanError where the smallest
    schemes of the menu are larger than asked for.
    """
    layers = [one for one in prepared.plan.layers if one.form and _is_free(one, prepared.plan)]
    menus = [_menu(layer, prepared.plan) for layer in layers]
    chosen = _chosen(layers, menus, _measured(layers, menus, prepared, stats, listen), prepared)
    schemes_of = {
        module: scheme.name
        for layer, scheme in zip(layers, chosen, strict=True)
        for module in layer.modules
    }
    note = _note(layers, menus, chosen, bool(stats))
    return replace(prepared.replan(schemes_of), found=(*prepared.found, note))


def _is_free(layer: LayerPlan, plan: Plan) -> bool:
    """Whether a layer has the scheme of the plan as a whole, or what its shape makes of it."""
    return layer.scheme is not None and layer.scheme.name == plan.scheme.name


def _menu(layer: LayerPlan, plan: Plan) -> Menu:
    """What a layer can have as it stands on the menu; of equal size, the first.

    What its shape makes of the scheme of the plan where that is nothing.
    """
    assert layer.form is not None and layer.scheme is not None
    found: dict[int, Scheme] = {}
    for name in plan.scheme.menu:
        scheme = schemes.scheme(name)
        form = replace(layer.form, spec=scheme.weight, bias=False)
        if fitted(plan.target, scheme.weight, form.shape) == scheme.weight:
            size = sum(info.nbytes for info in plan.target.promise(form).values())
            found.setdefault(size, scheme)
    return found or {sum(info.nbytes for info in layer.outputs.values()): layer.scheme}


def _measured(
    layers: Sequence[LayerPlan],
    menus: Sequence[Menu],
    prepared: Prepared,
    stats: Stats,
    listen: Callable[[Progress], None],
) -> list[list[float]]:
    """The error of each layer under all that it can have."""

    def measure(layer: LayerPlan, menu: Menu) -> list[float]:
        if len(menu) == 1:
            return [0.0]
        problem = _sample(problem_of(layer, prepared.source, stats)).to(prepared.job.device)
        return _errors(problem, list(menu.values()), prepared.rounding)

    found: list[list[float]] = []
    workers = prepared.job.workers or min(os.cpu_count() or 1, MAX_WORKERS)
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for errors in pool.map(measure, layers, menus):
            found.append(errors)
            listen(Progress("measure", len(found), len(layers)))
    return found


def _sample(problem: LinearProblem) -> LinearProblem:
    """Rows of a layer at equal distances, about ROWS of them."""
    apart = math.ceil(problem.weight.shape[0] / ROWS)
    return replace(problem, weight=problem.weight[::apart].float(), bias=None, parts=())


def _errors(problem: LinearProblem, menu: Sequence[Scheme], rounding: str) -> list[float]:
    """Squared relative errors of a layer under some schemes."""
    stats = problem.stats
    inputs = None if stats is None else Inputs(stats, None, 0)
    options = RecipeOptions(rounding=rounding)
    whole = _energy(problem.weight, stats)
    found = []
    for scheme in menu:
        q = recipe.quantize_linear(problem, scheme, options, inputs=inputs)
        off = _energy(effective_weight(q) - problem.weight, stats)
        found.append(off / whole if whole else off)
    return found


def _energy(weight: Tensor, stats: LayerStats | None) -> float:
    """||X Wᵀ||², of a weight [N, K] fp32 and what is known of its inputs."""
    if stats is None:
        return float(weight.square().sum())
    if not len(stats.rows):
        return float((weight.square() @ stats.mean_square.float()).sum())
    return float((stats.rows.float() @ weight.T).square().sum())


def _chosen(
    layers: Sequence[LayerPlan],
    menus: Sequence[Menu],
    errors: Sequence[Sequence[float]],
    prepared: Prepared,
) -> list[Scheme]:
    sizes = [[8 * size for size in menu] for menu in menus]
    weights = sum(map(_weights, layers))
    bits = prepared.options.bits or BITS
    try:
        picks = knapsack.choose(errors, sizes, bits * weights)
    except ValueError:
        least = sum(map(min, sizes)) / max(weights, 1)
        raise PlanError(
            [f"--bits: these layers take {math.ceil(least * 100) / 100} at least"]
        ) from None
    return [list(menu.values())[pick] for menu, pick in zip(menus, picks, strict=True)]


def _note(
    layers: Sequence[LayerPlan], menus: Sequence[Menu], chosen: Sequence[Scheme], calibrated: bool
) -> str:
    """4.50 bits of a weight: 2 Q3_K, 12 Q4_K, 5 Q5_K."""
    sizes = [
        next(size for size, one in menu.items() if one is scheme)
        for menu, scheme in zip(menus, chosen, strict=True)
    ]
    counts = Counter(
        (8 * size / _weights(layer), scheme.weight.code.upper())
        for layer, size, scheme in zip(layers, sizes, chosen, strict=True)
    )
    types = ", ".join(f"{count} {code}" for (_, code), count in sorted(counts.items()))
    note = f"{8 * sum(sizes) / max(sum(map(_weights, layers)), 1):.2f} bits of a weight: {types}"
    if sizes == [max(menu) for menu in menus]:
        note += ", the largest there are"
    if not calibrated:
        note += "; by errors of weights alone, --calib goes by those of outputs"
    return note


def _weights(layer: LayerPlan) -> int:
    return layer.form.shape[0] * layer.form.shape[1] if layer.form else 0
