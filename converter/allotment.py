"""Each layer the scheme of a menu that it needs, so that all layers err least at a given size.

Every layer is quantized with every scheme of the menu, rounded by least squares; what it then errs
is its output's error on held rows where calibration ran, its weight's otherwise.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from dqconvert.converter.job import Progress
from dqconvert.converter.layers import problem_of
from dqconvert.converter.plan import LayerPlan, Plan
from dqconvert.converter.prepare import Prepared
from dqconvert.converter.work import Stats
from dqconvert.quantizers import knapsack, recipe, schemes
from dqconvert.quantizers.errors import PlanError
from dqconvert.quantizers.recipe import RecipeOptions
from dqconvert.quantizers.spec import QuantSpec, Scheme
from dqconvert.quantizers.tensors import LinearProblem

BITS = 4.5
"""Of a weight, unless told otherwise: the size of Q4_K."""


def allot(
    prepared: Prepared, stats: Stats, listen: Callable[[Progress], None]
) -> Mapping[str, str]:
    """The scheme of each canonical linear. Layers that the user gave another one stay out of it.

    Raises PlanError where nothing on the menu is that small.
    """
    plan = prepared.plan
    layers = [one for one in plan.layers if one.form and _is_free(one, plan)]
    menu = [schemes.scheme(name) for name in plan.scheme.menu]
    budget = (prepared.options.bits or BITS) * sum(_weights(layer) for layer in layers)
    errors: list[list[float]] = []

    def measure(layer: LayerPlan) -> list[float]:
        return _errors(problem_of(layer, prepared.source, stats), layer, menu, plan)

    workers = prepared.job.workers or os.cpu_count() or 1
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for found in pool.map(measure, layers):
            errors.append(found)
            listen(Progress("measure", len(errors), len(layers)))
    sizes = [[8.0 * _size(layer, one, plan) for one in menu] for layer in layers]
    try:
        chosen = knapsack.choose(errors, sizes, budget)
    except ValueError:
        least = sum(map(min, sizes)) / max(sum(map(_weights, layers)), 1)
        raise PlanError(
            [f"--bits: these layers take {math.ceil(least * 100) / 100} at least"]
        ) from None
    return {
        module: menu[pick].name
        for layer, pick in zip(layers, chosen, strict=True)
        for module in layer.modules
    }


def _is_free(layer: LayerPlan, plan: Plan) -> bool:
    """Whether a layer has the scheme of the plan as a whole, or what its shape makes of it."""
    return layer.scheme is not None and layer.scheme.name == plan.scheme.name


def _errors(
    problem: LinearProblem, layer: LayerPlan, menu: Sequence[Scheme], plan: Plan
) -> list[float]:
    """Squared relative error of a layer under each scheme."""
    assert layer.form is not None
    found = []
    for one in menu:
        spec = _fitting(layer, one, plan)
        scheme = replace(one, weight=spec)
        (q,) = recipe.quantize_group([problem], scheme, RecipeOptions(rounding="mse"))
        if problem.stats is None:
            off, whole = recipe.squared_error(q, problem.weight)
            found.append(off / whole if whole else 0.0)
        else:
            found.append(recipe.output_error(q, problem, None) ** 2)
    return found


def _fitting(layer: LayerPlan, scheme: Scheme, plan: Plan) -> QuantSpec:
    """The weight format that a layer's shape makes of a scheme."""
    assert layer.form is not None
    fitting = getattr(plan.target, "fitting", None)  # of some targets only
    found: QuantSpec = fitting(scheme.weight, layer.form.shape) if fitting else scheme.weight
    return found


def _size(layer: LayerPlan, scheme: Scheme, plan: Plan) -> int:
    assert layer.form is not None
    form = replace(layer.form, spec=_fitting(layer, scheme, plan), bias=False)
    return sum(info.nbytes for info in plan.target.promise(form).values())


def _weights(layer: LayerPlan) -> int:
    return layer.form.shape[0] * layer.form.shape[1] if layer.form else 0
