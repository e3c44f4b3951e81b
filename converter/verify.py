"""Is a quantized file sound? Every layer is dequantized from its packed bytes.

Without a model to compare with: the set of tensors, their shapes and dtypes, finite values, the
hashes of the manifest. With one: the strict set that the plan promises, each layer's effective
weight against the original, each kept tensor bit by bit, and the output error on the held rows of
the calibration if they are still in the cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from dqconvert.calibration import store
from dqconvert.converter.canonical import CanonicalSource
from dqconvert.converter.job import LayerReport
from dqconvert.converter.layers import problem_of
from dqconvert.converter.lora.again import again
from dqconvert.converter.opening import open_model
from dqconvert.converter.plan import LayerPlan, Plan, make_plan
from dqconvert.converter.precondition import PreconditionedSource, PreconditionedStats, load
from dqconvert.converter.reopen import PackedLayer, Reopened, reopen
from dqconvert.converter.resolve import resolve
from dqconvert.converter.statistics import cache, config_of, foreign_config
from dqconvert.converter.vocabulary import with_vocabulary
from dqconvert.converter.work import Stats
from dqconvert.converter.written import options_of, scheme_of
from dqconvert.formats import recognition
from dqconvert.formats.form import PackedForm
from dqconvert.formats.targets import Target
from dqconvert.quantizers import recipe
from dqconvert.quantizers.errors import DQConvertError, PlanError, SourceError
from dqconvert.quantizers.forward import effective_weight, row_blocks, shift_surplus
from dqconvert.quantizers.lowrank import product
from dqconvert.quantizers.schemes import scheme
from dqconvert.quantizers.spec import BLOCKS, CODES, FLOAT_DTYPES
from dqconvert.quantizers.tensors import LinearProblem, QuantizedTensor

LIMITS = {1: 0.97, 2: 0.97, 3: 0.7, 4: 0.6, 5: 0.4, 6: 0.3, 8: 0.15, 16: 0.02}
"""Weight errors, by bits, that no honest quantization reaches but a wrong layout does."""

SLACK = {1: 0.2, 2: 0.2, 3: 0.1, 4: 0.04, 5: 0.03, 6: 0.03, 8: 0.02, 16: 0.01}
"""How far from 1, by bits, the size of an honest layer's quantized weights may be.

Layers of flux-digits, of every scheme, with and without calibration, are off by 0.007 and 0.002
at most beside what their error explains.
"""

SHARE = 0.55
"""How much smaller than the model's, as a share of their noise, learned weights may be: 0.49 is the
most on flux-digits, with few calibration rows; a scale that is off by a tenth passes 0.6."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found: errors by layer, and problems, none if the file is sound."""

    title: str
    target: str
    scheme: str | None
    layers: tuple[LayerReport, ...]
    problems: tuple[str, ...]


def verify(out: Path, against: str | None = None) -> Verdict:
    """Check a file or folder of ours, against the model it was made from if one is named."""
    found = reopen(out)
    problems = [*found.problems(), *changed(found.root, found.manifest.files)]
    problems += [f"{name}: missing from the file" for name in found.missing()]
    problems += [f"{name}: unexpected" for name in found.unexpected()]
    reports: list[LayerReport] = []
    name = scheme_of(found)
    reference = _Reference(found, name, against) if against and name else None
    if against and not name:
        problems.append(f"{found.path.name}: not compared, since its scheme cannot be told")
    if reference:
        problems += reference.differences()
        try:
            reference.precondition()
        except SourceError as error:
            problems.append(str(error))
            reference = None
    for layer in found.layers:
        report, wrong = _check(found, layer, reference)
        reports += [report] if report else []
        problems += [f"{layer.name}: {what}" for what in wrong]
    for kept in found.kept:
        problems += _check_kept(found, kept, reference)
    title = f"{found.family.title}, {name} for {found.target.NAME}"
    return Verdict(title, found.target.NAME, name, tuple(reports), tuple(problems))


def _check(
    found: Reopened, layer: PackedLayer, reference: _Reference | None
) -> tuple[LayerReport | None, list[str]]:
    """One layer: its report if there is one to give, and what is wrong with it.

    What is wrong with the model or its statistics is no fault of the file, and is raised.
    """
    try:
        q = found.unpack(layer)
    except (DQConvertError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return None, [f"cannot be unpacked ({error!r})"]
    wrong = list(_not_finite(q))
    if reference is None:
        return _plain(found, layer), wrong
    try:
        report, differences = reference.compare(layer, q)
    except (KeyError, RuntimeError, ValueError) as error:
        return None, [*wrong, f"cannot be compared with the model ({error!r})"]
    return report, wrong + differences


def _check_kept(found: Reopened, name: str, reference: _Reference | None) -> list[str]:
    """What is wrong with an unquantized tensor."""
    theirs = found.kept[name][0]
    info = found.source.infos[theirs]
    if name == found.family.vocabulary and info.dtype == "U8":
        return reference.kept(name, found.source.read(theirs)) if reference else []
    known = info.dtype in FLOAT_DTYPES or info.dtype in BLOCKS
    if not known and (not info.dtype.startswith("F8") or len(info.shape) > 2):
        return [f"{theirs}: is {recognition.describe(info)}, and nothing says what that stands for"]
    try:
        tensor = found.read_kept(name)
    except SourceError as error:
        return [str(error)]
    if not _finite(tensor):
        return [f"{name}: holds NaN or infinity"]
    return reference.kept(name, tensor) if reference else []


class _Reference:
    """The model that a file was made from, under the plan that should have made it."""

    def __init__(self, found: Reopened, scheme_name: str, model_name: str) -> None:
        self._found = found
        model = resolve(model_name, component=found.manifest.component)
        base = open_model(model.path, model.config, model.part)
        whole = with_vocabulary(base, model.path, found.target)
        self.source: CanonicalSource = again(whole, found.manifest, found.path)
        identity = (model.name, config_of(model, self.source))
        config = foreign_config(model, self.source, found.target)
        options = replace(options_of(found, scheme_name), config=config)
        plan = partial(make_plan, self.source, found.target, scheme(scheme_name))
        try:
            self.plan: Plan = plan(options, identity)
        except PlanError:  # damage made layers look like some that the file cannot hold
            self.plan = plan(replace(options, choices={}), identity)
        self._layers: Mapping[str, LayerPlan] = {
            layer.name: layer for layer in self.plan.layers if layer.form
        }
        self._stats = _cached_stats(found)
        self._said = found.manifest.errors

    def precondition(self) -> None:
        """Fold and center the model as the file says. SourceError where it says nothing sane."""
        chosen = load(self._found)
        if chosen is not None:
            self.source = PreconditionedSource(self.source, chosen)
            self._stats = PreconditionedStats(self._stats, chosen, self._found.family)

    def differences(self) -> Iterator[str]:
        """Tensors, metadata and config of the file that are not the promised ones."""
        infos = self._found.source.infos
        for name, promised in self.plan.outputs.items():
            if name not in infos:
                yield f"{name}: missing"
            elif infos[name] != promised:
                found, needed = (recognition.describe(info) for info in (infos[name], promised))
                yield f"{name}: is {found}, should be {needed}"
        yield from (f"{name}: unexpected" for name in infos if name not in self.plan.outputs)
        target, metadata = self.plan.target, self._found.source.metadata
        for key, promised_text in target.metadata(self.plan.context).items():
            if _is_provenance(key, target):
                continue
            if key not in metadata:
                yield f"metadata {key}: missing"
                continue
            pair = [recognition.parsed(text) for text in (metadata[key], promised_text)]
            if key == "config":
                pair = [_without_notes(one) for one in pair]
            yield from recognition.contradictions(f"metadata {key}", *pair)
        config = target.config(self.plan.context)
        if config is not None:
            pair = [
                _without_notes(one) for one in (self._found.config, json.loads(json.dumps(config)))
            ]
            yield from recognition.contradictions("config.json", *pair)

    def compare(self, layer: PackedLayer, q: QuantizedTensor) -> tuple[LayerReport, list[str]]:
        """Errors of one layer, and what is wrong with it."""
        report = _plain(self._found, layer)
        planned = self._layers.get(layer.name)
        if planned is None:
            return report, []
        problem = problem_of(planned, self.source, self._stats)
        error = recipe.weight_error(q, problem.weight)
        bits = CODES[layer.form.spec.code].bits
        problems = []
        if not error <= LIMITS[bits]:
            problems.append(f"weight error {error:.3f}; these are not the model's weights")
        elif abs(error - self._said.get(layer.name, error)) > 0.05 * error + 0.002:
            problems.append(
                f"weight error {error:.4f}, the manifest says {self._said[layer.name]:.4f}; "
                "the layer was changed"
            )
        else:
            problems += _scale(q, problem.weight, SLACK[bits], self._learned(planned))
        problems += _bias(q, problem, layer.form)
        output = None
        if problem.stats is not None:
            chosen = planned.scheme or self.plan.scheme
            activation = self.plan.target.activation(layer.form, chosen)
            output = recipe.output_error(q, problem, activation)
        return replace(report, weight_error=error, output_error=output), problems

    def _learned(self, layer: LayerPlan) -> bool:
        """Whether a layer's weights may be smaller than the model's in favour of its outputs."""
        scheme = layer.scheme or self.plan.scheme
        said = self._found.manifest.rounding
        return "lowrank" not in scheme.steps and said != "rtn"

    def kept(self, name: str, tensor: torch.Tensor) -> list[str]:
        """Kept tensors must be the model's own, but for the cast, or what had been quantized."""
        if name not in self.source.infos:
            return [f"{name}: the model has no such tensor"]
        original = self.source.read(name).to(tensor.dtype)
        if name.rpartition(".")[0] in self._found.manifest.dequantized:
            limit = LIMITS[self.plan.scheme.weight.bits] * original.float().norm()
            near = bool((tensor.float() - original.float()).norm() <= limit)
            return [] if near else [f"{name}: these are not the model's weights"]
        return [] if torch.equal(original, tensor) else [f"{name}: differs from the model's"]


def _is_provenance(key: str, target: Target) -> bool:
    """Whether metadata only says who made a file of what."""
    beginning: str = getattr(target, "PROVENANCE", "")  # of some targets only
    if not beginning or not key.startswith(beginning):
        return False
    return key not in getattr(target, "KEYS", ())


def _plain(found: Reopened, layer: PackedLayer) -> LayerReport:
    infos = found.source.infos
    size = sum(info.nbytes for name, info in infos.items() if name.startswith(f"{layer.name}."))
    return LayerReport(layer.name, layer.form.label, layer.form.shape, size, None)


def _not_finite(q: QuantizedTensor) -> Iterator[str]:
    parts = {
        "codes": q.codes,
        "scale": q.scale,
        "tensor scale": q.tensor_scale,
        "zero": q.zero,
        "codebook": q.codebook,
        "bias": q.bias,
        "smooth": q.smooth,
        "low-rank down": None if q.lowrank is None else q.lowrank.down,
        "low-rank up": None if q.lowrank is None else q.lowrank.up,
        "input scale": q.input_scale,
    }
    for name, tensor in parts.items():
        if tensor is not None and not _finite(tensor):
            yield f"{name} holds NaN or infinity"
    blocks = row_blocks(q) if CODES[q.spec.code].block else ()  # scales are among the bytes
    if not all(_finite(effective_weight(part)) for _, part in blocks):
        yield "its blocks stand for NaN or infinity"
    if q.smooth is not None and bool((q.smooth == 0).any()):
        yield "smooth holds zeros, by which the runtime divides"
    if q.input_scale is not None and not bool((q.input_scale > 0).all()):
        yield "input scale is not positive"


def _finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    tensor = tensor.float() if tensor.element_size() == 1 else tensor  # torch has none for fp8
    return bool(torch.isfinite(tensor).all())


def _scale(q: QuantizedTensor, weight: torch.Tensor, slack: float, learned: bool) -> Iterator[str]:
    """What the codes stand for must be as large as what the low-rank branch leaves of the weight.

    Rounding to nearest, and scales by least squares, draw towards zero by no more than the square
    of their error. GPTQ may give up size for the error that it saves, as a SHARE of what is noise.
    """
    off = along = whole = 0.0
    for start, part in row_blocks(q):
        rest = weight[start : start + part.codes.shape[0]].float()
        rest = rest if part.lowrank is None else rest - product(part.lowrank)
        main = effective_weight(replace(part, lowrank=None))
        along += float((main * rest).sum())
        whole += float(rest.square().sum())
        off += float((main - rest).square().sum())
    if not whole:
        return
    size, error = along / whole, off / whole
    noise = max(error - (1 - size) ** 2, 0.0) ** 0.5
    below = max(slack + error, SHARE * noise if learned else 0.0)
    if not 1 - below <= size <= 1 + slack:
        yield f"its quantized weights are {size:.3f} times as large as the model's"


def _without_notes(config: object) -> object:
    """A config without what says only who wrote it: keys that begin with an underscore."""
    if not isinstance(config, Mapping):
        return config
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _bias(q: QuantizedTensor, problem: LinearProblem, form: PackedForm) -> Iterator[str]:
    """The bias must be the model's, after the shift's share is added back.

    Biases of modulation linears may have had 1 added in bf16, which costs half a step of that.
    """
    if problem.bias is None and q.bias is None:
        return
    expected = torch.zeros(q.codes.shape[0]) if problem.bias is None else problem.bias.float()
    bias = torch.zeros_like(expected) if q.bias is None else q.bias.float()
    surplus = shift_surplus(q)
    surplus = torch.zeros_like(expected) if surplus is None else surplus
    off = (bias + surplus - expected).norm()
    slack = 2.0**-8 * expected.numel() ** 0.5 if form.splits else 1e-6
    if bool(off > 0.02 * (expected.norm() + surplus.norm()) + slack):
        yield "its bias is not the model's"


def changed(root: Path, files: Mapping[str, str]) -> Iterator[str]:
    """Files below a folder whose SHA-256 is not what a manifest says."""
    for name, digest in files.items():
        path = root / name
        if not path.is_file():
            yield f"{name}: the manifest names it, but it is not there"
            continue
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                yield f"{name}: its SHA-256 is not the manifest's; the file was changed"


def _cached_stats(found: Reopened) -> Stats:
    """The statistics that the conversion used, {} if they are gone.

    Raises CalibrationError where they are there and broken.
    """
    key = found.manifest.calibration
    path = cache() / f"{key}.safetensors"
    return store.LazyStats(path, key) if key and path.exists() else {}
