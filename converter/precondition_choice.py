"""Which inputs of a model are folded and centered: those whose output error falls by it.

Every candidate of a place is tried on the layers that read it, as they will be quantized but
rounded to nearest, and judged by the squared output error on held rows; none is always among
them. What a fold does to the layers before it counts too: the rounding of modulation rows that
stay in 16 bit, and weights whose scales span rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dqconvert.converter.layers import problem_of
from dqconvert.converter.plan import LayerPlan
from dqconvert.converter.precondition import Place, Precondition, places, site_of
from dqconvert.converter.work import Recipe
from dqconvert.quantizers import precondition as exact
from dqconvert.quantizers import recipe
from dqconvert.quantizers.forward import apply
from dqconvert.quantizers.precondition import Transform
from dqconvert.quantizers.spec import Scheme
from dqconvert.quantizers.tensors import TORCH_DTYPES, LayerStats, LinearProblem, QuantizedTensor

KINDS: Mapping[str, tuple[str, ...]] = {
    "off": (),
    "auto": ("fold", "center", "fold+center"),
    "fold": ("fold",),
    "center": ("center",),
}
"""What `--precondition` allows."""

MARGIN, FLOAT_MARGIN, STEP = 1.0, 3.0, 0.5
"""The dB that a transform must gain over none, and over a simpler one.

The trial rounds to nearest, and GPTQ takes part of a gain away. Where 8 bit floats meet 8 bit
floats, layers that gained 1 to 2 dB cost flux-digits, as trained, 0.6 dB of velocity SQNR.
"""

ROWS = 1024
"""Output channels of a layer that judge a candidate, evenly spaced."""

AWQ_EXPONENTS = tuple(i / 20 for i in range(1, 21))


@dataclass(frozen=True, slots=True)
class Outcome:
    """The best transform of one place, None where none helps.

    before, after: squared output errors relative to the outputs, summed over its layers.
    """

    place: Place
    transform: Transform | None
    before: float
    after: float


def choose(work: Recipe, mode: str, listen: Callable[[int, int], None]) -> list[Outcome]:
    """The best transform of every place that quantized layers read. mode: a key of KINDS.

    Schemes that fold by themselves (AWQ) do so in any mode. listen(done, total) counts places.
    """
    found = [place for place in places(work.source) if readers_of(place, work)]
    outcomes = []
    for done, place in enumerate(found, start=1):
        outcomes.append(judge(place, work, mode))
        listen(done, len(found))
    return outcomes


def precondition_of(outcomes: Sequence[Outcome]) -> Precondition | None:
    """What was chosen, None where that is nothing."""
    chosen = [(one.place, one.transform) for one in outcomes if one.transform is not None]
    return Precondition(chosen) if chosen else None


def judge(place: Place, work: Recipe, mode: str) -> Outcome:
    """Try all candidates of one place."""
    site = work.stats.get(site_of(place.name, work.source.family))
    if site is None or not len(site.rows):
        return Outcome(place, None, 0.0, 0.0)
    readers = [_Reader(layer, place, work) for layer in readers_of(place, work)]
    makers = _Makers(place, work)
    before = _error(readers, None) + makers.error(None, readers)
    margin, step = FLOAT_MARGIN if all(map(_floats, readers)) else MARGIN, STEP
    if any(map(_learned, readers)):
        margin = step = 0.0
    best, least = None, before * _share(margin)
    for transform in _candidates(place, readers, work, mode):
        transform = makers.snapped(transform)
        error = _error(readers, transform) + makers.error(transform, readers)
        if error < (least * _share(step) if best else least):
            best, least = transform, error
    return Outcome(place, best, before, least if best else before)


def _share(decibels: float) -> float:
    return float(10 ** (-decibels / 10))


def _learned(reader: _Reader) -> bool:
    """Whether the scheme folds by itself (AWQ)."""
    return "fold" in reader.steps


def _floats(reader: _Reader) -> bool:
    """Whether weight and input are floats of 8 bits, whose error follows each value's own size."""
    activation, weight = reader.scheme.activation, reader.scheme.weight
    return activation is not None and {activation.code, weight.code} <= {"e4m3", "e5m2"}


def readers_of(place: Place, work: Recipe) -> list[LayerPlan]:
    """Quantized layers that read a place's columns."""
    return [
        layer
        for layer in work.plan.layers
        if layer.form
        and set(layer.modules) & set(place.consumers)
        and (layer.columns is None or layer.columns[0] < place.stop)
    ]


class _Reader:
    """A layer that reads the place, and a sample of its rows."""

    def __init__(self, layer: LayerPlan, place: Place, work: Recipe) -> None:
        self.layer, self.place = layer, place
        self.start = place.start - (layer.columns or (0, 0))[0]
        self.scheme = scheme_of(layer, work)
        self.steps = (layer.scheme or work.plan.scheme).steps
        self.options = replace(work.options, rounding="rtn", refinements=0)
        whole = problem_of(layer, work.source, work.stats)
        step = -(-whole.weight.shape[0] // ROWS)
        bias = None if whole.bias is None else whole.bias[::step].float()
        self.problem = replace(whole, weight=whole.weight[::step].float(), bias=bias, parts=())
        assert whole.stats is not None
        stats = replace(whole.stats, second_moment=None)  # rounding to nearest needs none
        self.problem = replace(self.problem, stats=stats)
        self.outputs = float((whole.stats.rows.float() @ self.problem.weight.T).square().sum())

    def under(self, transform: Transform | None) -> LinearProblem:
        """The problem as the transform leaves it."""
        problem = self.problem
        if transform is None:
            return problem
        assert problem.stats is not None
        weight, bias = problem.weight, problem.bias
        if bias is not None:
            bias = exact.consumer_bias(bias, weight, transform, self.start)
        return replace(
            problem,
            weight=exact.consumer_weight(weight, transform, self.start),
            bias=bias,
            stats=exact.statistics(problem.stats, transform, self.start),
        )


def scheme_of(layer: LayerPlan, work: Recipe) -> Scheme:
    """A layer's scheme with what the runtime makes of its inputs, without the costly steps."""
    assert layer.form is not None
    scheme = layer.scheme or work.plan.scheme
    steps = tuple(step for step in scheme.steps if step not in ("fold", "clip"))
    return replace(scheme, steps=steps, activation=work.plan.target.activation(layer.form, scheme))


def _error(readers: Sequence[_Reader], transform: Transform | None) -> float:
    """Squared output error relative to the outputs, summed over layers."""
    groups: dict[str, list[_Reader]] = {}
    for reader in readers:
        groups.setdefault(reader.layer.group or reader.layer.name, []).append(reader)
    total = 0.0
    for group in groups.values():
        problems = [reader.under(transform) for reader in group]
        found = recipe.quantize_group(problems, group[0].scheme, group[0].options)
        for reader, problem, q in zip(group, problems, found, strict=True):
            total += _off(reader.layer, problem, q, reader.scheme) / (reader.outputs or 1.0)
    return total


def _off(layer: LayerPlan, problem: LinearProblem, q: QuantizedTensor, scheme: Scheme) -> float:
    """Squared error of the outputs on held rows."""
    return float(_difference(layer, problem, q, scheme).square().sum())


def _difference(
    layer: LayerPlan, problem: LinearProblem, q: QuantizedTensor, scheme: Scheme
) -> Tensor:
    """What is lost of the outputs on held rows, the rounding of the bias included."""
    assert layer.form is not None and problem.stats is not None
    if not layer.form.input_scale:
        q = replace(q, input_scale=None)
    x = problem.stats.rows.float()
    outputs = x @ problem.weight.float().T
    if problem.bias is not None:
        outputs = outputs + problem.bias.float()
    if q.bias is not None:
        q = replace(q, bias=q.bias.to(TORCH_DTYPES[layer.form.bias_dtype]).float())
    return apply(q, x, scheme.activation) - outputs


class _Makers:
    """The linears that make a place's input: what the fold costs there."""

    def __init__(self, place: Place, work: Recipe) -> None:
        self.place, self.work = place, work
        self.kept = self.dtype = None
        layers = {module: layer for layer in work.plan.layers for module in layer.modules}
        self.spread = [
            (layer, module)
            for module in place.producers
            if (layer := layers.get(module))
            and layer.form
            and _spans_rows(layer, scheme_of(layer, work))
        ]
        modulation = place.modulation
        if modulation is None or f"{modulation}.bias" not in work.source.infos:
            return
        info = work.source.infos[f"{modulation}.bias"]
        self.dtype = TORCH_DTYPES[info.dtype]
        self.bias = work.source.read(f"{modulation}.bias").float()
        layer = layers.get(modulation)
        if layer is not None and layer.form is None and self.dtype.itemsize < 4:
            self.kept = work.source.read(f"{modulation}.weight").float()
            self.inputs = work.stats[site_of(modulation, work.source.family)].rows.float()

    def snapped(self, transform: Transform) -> Transform:
        """With the biases of the modulation exact in 16 bit."""
        if self.place.modulation is None or self.dtype is None:
            return transform
        shift, scale = (self.bias[self.place.rows(n)] for n in self._chunks)
        return exact.snapped(transform, shift, scale, self.dtype)

    def error(self, transform: Transform | None, readers: Sequence[_Reader]) -> float:
        """What it adds to the readers' errors, in the same units."""
        total = sum(self._spread(layer, module, transform) for layer, module in self.spread)
        if transform is None or self.kept is None:
            return total
        noise = self._rounding(transform, readers[0])
        for reader in readers:
            weight = reader.problem.weight[:, reader.start : reader.start + len(noise)]
            rows = len(reader.problem.stats.rows) if reader.problem.stats else 0
            total += float((weight.square() @ noise).sum()) * rows / (reader.outputs or 1.0)
        return total

    @property
    def _chunks(self) -> tuple[int, int]:
        return self.place.fold.shift, self.place.fold.scale

    def _rounding(self, transform: Transform, reader: _Reader) -> Tensor:
        """Mean square [K] of what rounding the new rows adds to the input, in its old units.

        The norm's output is known by its mean square alone: that of the input over that of
        1 + scale.
        """
        assert self.kept is not None and self.dtype is not None and reader.problem.stats is not None
        shift, scale = (self.kept[self.place.rows(n)] for n in self._chunks)
        off: list[Tensor] = []
        for rows, change in ((shift, exact.shift_bias), (scale, exact.scale_bias)):
            chunk = self.place.rows(self._chunks[len(off)])
            bias = change(self.bias[chunk], transform)
            rows = exact.producer_weight(rows, transform)
            lost = self.inputs @ (rows.to(self.dtype).float() - rows).T
            lost = lost + (bias.to(self.dtype).float() - bias)
            off.append((lost * transform.smooth).square().mean(0))
        gain = 1 + self.inputs @ scale.T + self.bias[self.place.rows(self._chunks[1])]
        cut = slice(reader.start, reader.start + len(transform.smooth))
        normed = reader.problem.stats.mean_square[cut] / gain.square().mean(0).clamp(min=1e-6)
        return off[0] + off[1] * normed

    def _spread(self, layer: LayerPlan, module: str, transform: Transform | None) -> float:
        """Squared relative error of a maker whose rows share something, in its old units."""
        problem = problem_of(layer, self.work.source, self.work.stats)
        if problem.stats is None or not len(problem.stats.rows):
            return 0.0
        units = torch.ones(problem.weight.shape[0])
        if transform is not None:
            infos = self.work.source.infos
            sizes = [infos[f"{one}.weight"].shape[0] for one in layer.modules]
            first = sum(sizes[: layer.modules.index(module)])
            for chunk in self._chunks if self.place.modulation else (0,):
                rows = self.place.rows(chunk)
                units[first + rows.start : first + rows.stop] = transform.smooth
        step = -(-len(units) // ROWS)
        weight, units = problem.weight[::step].float(), units[::step]
        stats = replace(problem.stats, second_moment=None)
        problem = replace(problem, weight=weight / units[:, None], bias=None, parts=(), stats=stats)
        options = replace(self.work.options, rounding="rtn", refinements=0)
        scheme = scheme_of(layer, self.work)
        (q,) = recipe.quantize_group([problem], scheme, options)
        off = _difference(layer, problem, q, scheme) * units
        outputs = float((stats.rows.float() @ weight.T).square().sum())
        return float(off.square().sum()) / (outputs or 1.0)


def _spans_rows(layer: LayerPlan, scheme: Scheme) -> bool:
    """Whether rows share something, so that factors of rows change how they are rounded."""
    assert layer.form is not None
    spec = layer.form.spec
    shared = {"smooth", "lowrank"} & set(scheme.steps) and not layer.form.splits
    return spec.tile[0] != 1 or spec.tensor_scale is not None or bool(shared)


def _candidates(
    place: Place, readers: Sequence[_Reader], work: Recipe, mode: str
) -> Iterator[Transform]:
    """Transforms to try, of the kinds that are allowed and possible."""
    infos = work.source.infos
    biased = all(f"{one}.bias" in infos for one in place.producers)
    centered = biased and all(f"{one}.bias" in infos for one in place.consumers)
    foldable = biased or place.modulation is None
    kinds = KINDS[mode]
    learned = any(map(_learned, readers))
    ones = torch.ones(place.stop - place.start)
    center = Transform(ones, _mean(readers, len(ones)))
    if foldable and learned:
        yield from (Transform(s) for s in _activation_aware(readers, len(ones)))
    if foldable and (learned or "fold" in kinds):
        yield Transform(_closed(readers, None, len(ones)))
    if centered and "center" in kinds:
        yield center
    if foldable and centered and "fold+center" in kinds:
        yield Transform(_closed(readers, center, len(ones)), center.center)


def _mean(readers: Sequence[_Reader], width: int) -> Tensor:
    """The mean input [K] over all rows of all sites."""
    found = [_stats(reader, None, width) for reader in _by_site(readers)]
    total = torch.stack([stats.mean.double() * stats.count for stats in found]).sum(0)
    return (total / sum(stats.count for stats in found)).float()


def _stats(reader: _Reader, transform: Transform | None, width: int) -> LayerStats:
    stats = reader.under(transform).stats
    assert stats is not None
    return stats.columns(reader.start, reader.start + width)


def _closed(readers: Sequence[_Reader], transform: Transform | None, width: int) -> Tensor:
    """The closed form [K] over all readers, of the input as the transform leaves it.

    The exponents that smoothing searches brought nothing more on flux-digits (0.0 dB), at seven
    times the work.
    """
    stats = [_stats(reader, transform, width) for reader in _by_site(readers)]
    square = torch.stack([one.mean_square.double() * one.count for one in stats]).sum(0)
    weights = torch.cat([r.problem.weight[:, r.start : r.start + width] for r in readers])
    rms = (square / sum(one.count for one in stats)).sqrt().float()
    found = exact.ratio(rms, weights.square().mean(0).sqrt())
    return _level(found, readers)


def _level(smooth: Tensor, readers: Sequence[_Reader]) -> Tensor:
    """Factors that are none on average where the common one counts.

    It does where a reader has columns that stay as they are, and among the values, whose rows
    share a low-rank branch or a scale with those of q and k.
    """
    reader = readers[0]
    part = reader.problem.weight.shape[1] > len(smooth)
    apart = part or reader.place.modulation is None
    return exact.bounded(smooth, exact.level(smooth) if apart else None)


def _by_site(readers: Sequence[_Reader]) -> list[_Reader]:
    """One reader of each input that was observed."""
    return list({reader.layer.site: reader for reader in readers}.values())


def _activation_aware(readers: Sequence[_Reader], width: int) -> Iterator[Tensor]:
    """AWQ's: powers of the mean magnitude of the input, on held rows."""
    rows = [_stats(reader, None, width).rows.float().abs() for reader in readers]
    magnitude = torch.cat(rows).mean(0)
    return (_level(magnitude**a, readers) for a in AWQ_EXPONENTS)
