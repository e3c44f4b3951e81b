"""What only statistics can decide: preconditioning, and which layers a mixed scheme spares.

A conversion is planned from headers. With calibration, some choices are measured first, and the
plan is made once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from dqconvert.converter.allotment import allot
from dqconvert.converter.job import LayerReport, Progress
from dqconvert.converter.layers import problem_of
from dqconvert.converter.plan import LayerPlan, Plan
from dqconvert.converter.precondition import PreconditionedSource, PreconditionedStats
from dqconvert.converter.precondition_choice import choose, precondition_of
from dqconvert.converter.precondition_notes import advice, notes_of
from dqconvert.converter.prepare import Prepared
from dqconvert.converter.work import Stats, recipe_of
from dqconvert.quantizers import recipe, schemes
from dqconvert.quantizers.recipe import RecipeOptions
from dqconvert.quantizers.spec import Scheme
from dqconvert.quantizers.tensors import LinearProblem


def refine(
    prepared: Prepared, stats: Stats, listen: Callable[[Progress], None]
) -> tuple[Prepared, Stats]:
    """The job as its statistics want it, and the statistics of the inputs as they will be."""
    if prepared.plan.scheme.menu:
        prepared = allot(prepared, stats, listen)
    if prepared.calibration is None:
        return prepared, stats
    if prepared.job.precondition != "off" or prepared.plan.folds:
        prepared, stats = _precondition(prepared, stats, listen)
    if prepared.plan.scheme.better:
        prepared = prepared.replan(_mix(prepared, stats, listen))
    return prepared, stats


def _precondition(
    prepared: Prepared, stats: Stats, listen: Callable[[Progress], None]
) -> tuple[Prepared, Stats]:
    """The model folded and centered where that helps, and what is to be said of it."""
    outcomes = choose(
        recipe_of(prepared, stats),
        prepared.job.precondition,
        lambda done, total: listen(Progress("precondition", done, total)),
    )
    found = precondition_of(outcomes)
    notes = (*prepared.found, *notes_of(outcomes, prepared.plan))
    prepared = replace(prepared, found=notes, precondition=found)
    if found is None:
        return prepared, stats
    source = PreconditionedSource(prepared.source, found)
    stats = PreconditionedStats(stats, found, source.family)
    return replace(prepared, source=source), stats


def advised(prepared: Prepared, stats: Stats, reports: Sequence[LayerReport]) -> Iterator[str]:
    """What another run could do better: fold and center, where nobody asked for it."""
    if prepared.calibration is None or prepared.job.precondition != "off" or prepared.plan.folds:
        return
    found = advice(recipe_of(prepared, stats), reports)
    if found is not None:
        yield found


def _mix(prepared: Prepared, stats: Stats, listen: Callable[[Progress], None]) -> Mapping[str, str]:
    """The scheme of each canonical linear: the better one where it saves most output error.

    Greedy by the squared relative error saved for each weight, until the scheme's share of all
    weights is used up. Layers that the user gave another scheme stay out of it.
    """
    plan = prepared.plan
    base, better = plan.scheme, schemes.scheme(str(plan.scheme.better))
    better = plan.target.adapt(better, plan.target.layouts(better)[0])
    both = (base.name, better.name)
    layers = [one for one in plan.layers if one.form and one.scheme and one.scheme.name in both]
    gains: list[tuple[float, LayerPlan]] = []
    for done, layer in enumerate(layers, start=1):
        problem = problem_of(layer, prepared.source, stats)
        saved = _error(problem, layer, base, plan) - _error(problem, layer, better, plan)
        gains.append((saved / problem.weight.numel(), layer))
        listen(Progress("measure", done, len(layers)))
    left = base.share * sum(_weights(layer) for layer in layers)
    choices = dict.fromkeys((module for layer in layers for module in layer.modules), base.name)
    for _, layer in sorted(gains, key=lambda pair: -pair[0]):
        if _weights(layer) <= left:
            left -= _weights(layer)
            choices |= dict.fromkeys(layer.modules, better.name)
    return choices


def _error(problem: LinearProblem, layer: LayerPlan, scheme: Scheme, plan: Plan) -> float:
    """Squared output error of one layer under a scheme, rounded to nearest, by its outputs' energy.

    Energy with the mean: a layer whose outputs are mostly constant disturbs what follows less.
    """
    assert layer.form is not None
    if problem.stats is None or not len(problem.stats.rows):
        return 0.0  # the prompts never ran it
    form = replace(layer.form, spec=scheme.weight)
    scheme = replace(scheme, activation=plan.target.activation(form, scheme))
    (q,) = recipe.quantize_group([problem], scheme, RecipeOptions(rounding="rtn"))
    outputs = problem.stats.rows.float() @ problem.weight.float().T
    varying = (outputs - outputs.mean(0)).square().sum()
    error = recipe.output_error(q, problem, scheme.activation)
    return error**2 * float(varying / outputs.square().sum().clamp(min=1e-30))


def _weights(layer: LayerPlan) -> int:
    return layer.form.shape[0] * layer.form.shape[1] if layer.form else 0
