"""Is a quantized file sound? Every layer is dequantized from its packed bytes.

Without a model to compare with: the set of tensors, their shapes and dtypes, finite values, the
hashes of the manifest. With one: the strict set that the plan promises, each layer's effective
weight against the original, each kept tensor bit by bit, and the output error on the held rows of
the calibration if they are still in the cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dqconvert.calibration import store
from dqconvert.converter.canonical import CanonicalSource, open_canonical
from dqconvert.converter.job import LayerReport
from dqconvert.converter.layers import Stats, problem_of
from dqconvert.converter.plan import LayerPlan, Plan, PlanOptions, make_plan
from dqconvert.converter.reopen import PackedLayer, Reopened, reopen
from dqconvert.converter.resolve import resolve
from dqconvert.converter.statistics import cache, config_of
from dqconvert.formats.form import PackedForm
from dqconvert.formats.source import open_source
from dqconvert.quantizers import recipe, rtn
from dqconvert.quantizers.errors import CalibrationError, DQConvertError
from dqconvert.quantizers.schemes import scheme
from dqconvert.quantizers.spec import CODES
from dqconvert.quantizers.tensors import LinearProblem, QuantizedTensor

LIMITS = {4: 0.6, 8: 0.15}
"""Weight errors, by bits, that no honest quantization reaches but a wrong layout does."""


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
    problems = [*found.recognized.problems, *_hashes(found)]
    problems += [f"{name}: missing from the file" for name in found.missing()]
    problems += [f"{name}: unexpected" for name in found.unexpected()]
    reports: list[LayerReport] = []
    name = found.recognized.scheme or found.manifest.get("scheme")
    reference = _Reference(found, name, against) if against and name else None
    if against and not name:
        problems.append(f"{found.path.name}: not compared, since its scheme cannot be told")
    if reference:
        problems += reference.differences()
    for layer in found.layers:
        try:
            q = found.unpack(layer)
            report, wrong = reference.compare(layer, q) if reference else (_plain(found, layer), [])
        except (DQConvertError, KeyError, RuntimeError, ValueError) as error:
            problems.append(f"{layer.name}: cannot be unpacked ({error!r})")
            continue
        problems += [f"{layer.name}: {what}" for what in _not_finite(q)]
        reports.append(report)
        problems += wrong
    for name in found.kept:
        tensor = found.read_kept(name)
        if not _finite(tensor):
            problems.append(f"{name}: holds NaN or infinity")
        elif reference:
            problems += reference.kept(name, tensor)
    title = f"{found.family.title}, {found.recognized.scheme} for {found.target.NAME}"
    return Verdict(
        title, found.target.NAME, found.recognized.scheme, tuple(reports), tuple(problems)
    )


class _Reference:
    """The model that a file was made from, under the plan that should have made it."""

    def __init__(self, found: Reopened, scheme_name: str, model_name: str) -> None:
        self._found = found
        model = resolve(model_name)
        self.source: CanonicalSource = open_canonical(open_source(model.path), model.path)
        options = PlanOptions(
            rank=found.recognized.rank or None,
            keep=found.manifest.get("options", {}).get("keep"),
            calibrated=any(form.input_scale for form in found.recognized.forms.values()),
        )
        self.plan: Plan = make_plan(
            self.source,
            found.target,
            scheme(scheme_name),
            options,
            (model.name, config_of(model, self.source)),
        )
        self._layers: Mapping[str, LayerPlan] = {
            layer.name: layer for layer in self.plan.layers if layer.form
        }
        self._stats = _cached_stats(found)
        self._said: Mapping[str, float] = {
            layer["name"]: layer["weight_error"]
            for layer in found.manifest.get("layers", ())
            if layer["weight_error"] is not None
        }

    def differences(self) -> Iterator[str]:
        """The tensors of the file that are not the promised ones."""
        infos = self._found.source.infos
        for name, promised in self.plan.outputs.items():
            if name not in infos:
                yield f"{name}: missing"
            elif infos[name] != promised:
                yield f"{name}: is {infos[name]}, should be {promised}"
        yield from (f"{name}: unexpected" for name in infos if name not in self.plan.outputs)

    def compare(self, layer: PackedLayer, q: QuantizedTensor) -> tuple[LayerReport, list[str]]:
        """Errors of one layer, and what is wrong with it."""
        report = _plain(self._found, layer)
        planned = self._layers.get(layer.name)
        if planned is None:
            return report, []
        problem = problem_of(planned, self.source, self._stats)
        error = recipe.weight_error(q, problem.weight)
        problems = []
        if not error <= LIMITS[CODES[layer.form.spec.code].bits]:
            problems.append(
                f"{layer.name}: weight error {error:.3f}; these are not the model's weights"
            )
        elif abs(error - self._said.get(layer.name, error)) > 0.05 * error + 0.002:
            problems.append(
                f"{layer.name}: weight error {error:.4f}, the manifest says "
                f"{self._said[layer.name]:.4f}; the layer was changed"
            )
        problems += [f"{layer.name}: {what}" for what in _bias(q, problem, layer.form)]
        output = None
        if problem.stats is not None:
            activation = self.plan.target.activation(layer.form, self.plan.scheme)
            output = recipe.output_error(q, problem, activation)
        return replace(report, weight_error=error, output_error=output), problems

    def kept(self, name: str, tensor: torch.Tensor) -> list[str]:
        """Kept tensors must be the model's own, but for the cast."""
        if name not in self.source.infos:
            return [f"{name}: the model has no such tensor"]
        original = self.source.read(name).to(tensor.dtype)
        return [] if torch.equal(original, tensor) else [f"{name}: differs from the model's"]


def _plain(found: Reopened, layer: PackedLayer) -> LayerReport:
    infos = found.source.infos
    size = sum(info.nbytes for name, info in infos.items() if name.startswith(f"{layer.name}."))
    return LayerReport(layer.name, layer.form.spec.code, layer.form.shape, size, None)


def _not_finite(q: QuantizedTensor) -> Iterator[str]:
    parts = {
        "codes": q.codes,
        "scale": q.scale,
        "tensor scale": q.tensor_scale,
        "bias": q.bias,
        "smooth": q.smooth,
        "low-rank down": None if q.lowrank is None else q.lowrank.down,
        "low-rank up": None if q.lowrank is None else q.lowrank.up,
        "input scale": q.input_scale,
    }
    for name, tensor in parts.items():
        if tensor is not None and not _finite(tensor):
            yield f"{name} holds NaN or infinity"
    if q.smooth is not None and bool((q.smooth == 0).any()):
        yield "smooth holds zeros, by which the runtime divides"


def _finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    tensor = tensor.float() if tensor.element_size() == 1 else tensor  # torch has none for fp8
    return bool(torch.isfinite(tensor).all())


def _bias(q: QuantizedTensor, problem: LinearProblem, form: PackedForm) -> Iterator[str]:
    """The bias must be the model's, after the shift's share is added back.

    Biases of modulation linears may have had 1 added in bf16, which costs half a step of that.
    """
    if problem.bias is None and q.bias is None:
        return
    expected = torch.zeros(q.codes.shape[0]) if problem.bias is None else problem.bias.float()
    bias = torch.zeros_like(expected) if q.bias is None else q.bias.float()
    surplus = torch.zeros_like(expected)
    if q.shift and q.smooth is not None:
        surplus = rtn.dequantize(q) @ (q.shift / q.smooth.float())
    off = (bias + surplus - expected).norm()
    slack = 2.0**-8 * expected.numel() ** 0.5 if form.splits else 1e-6
    if bool(off > 0.02 * (expected.norm() + surplus.norm()) + slack):
        yield "its bias is not the model's"


def _hashes(found: Reopened) -> Iterator[str]:
    """Files that are not as the manifest says."""
    for name, said in found.manifest.get("files", {}).items():
        path = found.path.parent / name
        if not path.is_file():
            yield f"{name}: the manifest names it, but it is not there"
            continue
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != said["sha256"]:
                yield f"{name}: its SHA-256 is not the manifest's; the file was changed"


def _cached_stats(found: Reopened) -> Stats:
    """The statistics that the conversion used, if they are still there."""
    key = (found.manifest.get("calibration") or {}).get("key")
    path = cache() / f"{key}.safetensors"
    if key is None or not path.exists():
        return {}
    try:
        return store.LazyStats(path, key)
    except CalibrationError:
        return {}
