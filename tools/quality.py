"""What each recipe costs in pictures: image PSNR on flux-digits against full precision.

    python tools/quality.py [--images 32] [--untouched] [--only REGEX]

Every recipe goes through the plan, the packer and the unpacker of its target, and the unpacked
bytes run in the real pipeline (emulate.py). The same prompts and seeds for all; none of them
calibrated. Recipes that no runtime has a file for (no low-rank branch, or rank 4) travel in the
SVDQuant layout with a branch of zeros; schemes whose runtimes leave out layers of FLUX.1 go
unpacked, on all layers that ComfyUI quantizes.

Weight and output SQNR are means over the layers, in dB, of the last model in the row. PSNR is the
mean over images; velocity SQNR compares the transformer's predictions along the reference
trajectory, so errors do not add up over steps: the quieter of the two figures.
"""

from __future__ import annotations

import math
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import emulate
import torch
from digits import judge
from digits.folder import write_untouched
from digits.words import judging_prompts
from recipes import RECIPES, Row
from torch import Tensor
from torch.nn.functional import pad

from dqconvert.calibration.quiet import quiet
from dqconvert.converter import layers
from dqconvert.converter.job import Job
from dqconvert.converter.plan import LayerPlan
from dqconvert.converter.prepare import Prepared, prepare
from dqconvert.converter.refine import refine
from dqconvert.converter.reopen import PackedLayer
from dqconvert.converter.resolve import embedded
from dqconvert.converter.statistics import statistics
from dqconvert.converter.work import Recipe, Stats
from dqconvert.quantizers import recipe
from dqconvert.quantizers.recipe import RecipeOptions
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import DTYPE_BITS, Scheme
from dqconvert.quantizers.tensors import TORCH_DTYPES, LowRank, QuantizedTensor

FOLDER = embedded()["flux-digits"]


class Reference:
    """The full-precision pipeline: its pictures, and its predictions along their trajectories."""

    def __init__(self, folder: Path, images: int) -> None:
        self.folder = folder
        self.prompts = judging_prompts()[0][:images]
        pipe = self.pipeline()
        self.calls: list[tuple[dict[str, Any], Tensor]] = []
        handle = pipe.transformer.register_forward_hook(
            lambda _, __, kwargs, out: self.calls.append((kwargs, out[0].clone())),
            with_kwargs=True,
        )
        self.pictures = judge.draw(pipe, self.prompts, seed=7)
        handle.remove()

    def pipeline(self) -> Any:
        """A fresh pipeline in fp32."""
        with quiet():
            from diffusers import FluxPipeline

            pipe = FluxPipeline.from_pretrained(self.folder)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def score(self, pipe: Any) -> tuple[float, float]:
        """(mean image PSNR, velocity SQNR), both in dB, of a changed pipeline."""
        off = whole = 0.0
        with torch.no_grad():
            for kwargs, expected in self.calls:
                found = pipe.transformer(**kwargs)[0]
                off += float((found - expected).square().sum())
                whole += float(expected.square().sum())
        pictures = judge.draw(pipe, self.prompts, seed=7)
        errors = (pictures - self.pictures).square().flatten(1).mean(1)
        psnr = float((-10 * torch.log10(errors)).mean())
        return psnr, -10 * float(torch.log10(torch.tensor(off / whole)))


@dataclass(slots=True)
class Losses:
    """Errors of the layers as they go by, and what their weights take in the file."""

    weight: list[float] = field(default_factory=list)
    output: list[float] = field(default_factory=list)
    bits: int = 0
    weights: int = 0

    def mean(self, errors: list[float]) -> str:
        """Mean SQNR in dB of relative errors."""
        return f"{-20 * sum(map(math.log10, errors)) / len(errors):.1f}" if errors else ""


def layers_of(
    row: Row, prepared: Prepared, losses: Losses, state: Mapping[str, Tensor]
) -> Iterator[tuple[PackedLayer, QuantizedTensor, Scheme]]:
    """Every layer of a recipe, packed for its target and unpacked again.

    state: of the transformer, which gets the tensors that are kept.
    """
    stats: Stats = {}
    if prepared.calibration is not None and row.calibrated:
        stats = statistics(prepared.calibration, prepared.model, prepared.source, lambda _: None)
        prepared, stats = refine(prepared, stats, lambda _: None)
    for name in prepared.source.infos:
        dtype = TORCH_DTYPES[prepared.source.infos[name].dtype]
        state[name].copy_(prepared.source.read(name).to(dtype))  # as a file would hold it
    plan = prepared.plan
    rounding = prepared.rounding if row.rounding is None else row.rounding
    options = RecipeOptions(row.rank or plan.context.rank, rounding, row.smooth)
    for group in plan.groups:
        if group[0].form is None:
            continue
        work = Recipe(plan, prepared.source, stats, options)
        group = [_changed(layer, row) for layer in group]
        for layer in group:
            _count(layer, losses, row)
        for layer, problem, q in _quantized(group, work, row):
            assert layer.form is not None and layer.scheme is not None
            activation = plan.target.activation(layer.form, layer.scheme)
            losses.weight.append(recipe.weight_error(q, problem.weight))
            if problem.stats is not None:
                losses.output.append(recipe.output_error(q, problem, activation))
            yield PackedLayer(layer.name, layer.entry, layer.index, layer.form), q, layer.scheme


def _changed(layer: LayerPlan, row: Row) -> LayerPlan:
    """With what of the recipe is not the plan's."""
    assert layer.scheme is not None and layer.form is not None
    if row.like is not None:
        own = schemes()[row.scheme]
        return replace(layer, scheme=own, form=replace(layer.form, spec=own.weight))
    if row.steps is None:
        return layer
    return replace(layer, scheme=replace(layer.scheme, steps=row.steps))


def _quantized(
    group: list[LayerPlan], work: Recipe, row: Row
) -> Iterator[tuple[LayerPlan, layers.LinearProblem, QuantizedTensor]]:
    target = work.plan.target
    for layer, problem, q in layers.quantized_group(group, work):
        assert layer.form is not None
        if row.like is not None:
            yield layer, problem, q
            continue
        packed = target.pack(layer.form, _completed(q, layer))
        yield layer, problem, target.unpack(layer.form, packed)


def _count(layer: LayerPlan, losses: Losses, row: Row) -> None:
    """Bits of a layer but for its bias and its marker."""
    assert layer.form is not None
    spec, (n, k) = layer.form.spec, layer.form.shape
    losses.weights += n * k
    if row.like is not None:
        losses.bits += n * k * spec.bits + math.prod(spec.grid((n, k))) * DTYPE_BITS[spec.scale]
        return
    losses.bits += 8 * sum(
        info.nbytes
        for name, info in layer.outputs.items()
        if name.rpartition(".")[2] not in ("bias", "comfy_quant")
    )


def _completed(q: QuantizedTensor, layer: LayerPlan) -> QuantizedTensor:
    """With a low-rank branch of the file's rank, zeros where the recipe has less."""
    assert layer.form is not None
    rank, (rows, columns) = layer.form.rank, layer.form.shape
    if not rank:
        return q
    if q.lowrank is None:
        zeros = LowRank(torch.zeros(rank, columns), torch.zeros(rows, rank))
        return replace(q, lowrank=zeros)
    missing = rank - q.lowrank.up.shape[1]
    return replace(
        q, lowrank=LowRank(pad(q.lowrank.down, (0, 0, 0, missing)), pad(q.lowrank.up, (0, missing)))
    )


def measure(row: Row, reference: Reference) -> tuple[Losses, float, float]:
    """Losses of the layers, PSNR and velocity SQNR of one recipe."""
    job = Job(
        model=str(reference.folder),
        scheme=row.like or row.scheme,
        target=row.target,
        calib=FOLDER / "prompts.txt",
        rounding=row.rounding,
        precondition=row.precondition,
        output=Path(tempfile.gettempdir()) / "dqconvert-quality",
        overwrite=True,
        **row.more,
    )
    pipe = reference.pipeline()
    prepared = prepare(job)
    losses = Losses()
    found = layers_of(row, prepared, losses, pipe.transformer.state_dict())
    emulate.install(pipe.transformer, found, prepared.plan.target)
    return losses, *reference.score(pipe)


@click.command()
@click.option("--images", default=32, show_default=True)
@click.option("--untouched", is_flag=True, help="Also as trained, without planted outliers.")
@click.option("--only", default="", metavar="REGEX", help="Recipes whose title matches.")
def main(images: int, untouched: bool, only: str) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        references = {"planted": Reference(FOLDER, images)}
        if untouched:
            write_untouched(FOLDER, Path(scratch) / "untouched")
            references["as trained"] = Reference(Path(scratch) / "untouched", images)
        heads = "".join(f" {name} PSNR | velocity SQNR |" for name in references)
        click.echo(f"| recipe | bits | weight SQNR | output SQNR |{heads} seconds |")
        click.echo("|---|" + "---|" * (2 * len(references) + 4))
        for row in RECIPES:
            if not re.search(only, row.title):
                continue
            start = time.perf_counter()
            found = [measure(row, reference) for reference in references.values()]
            losses = found[-1][0]
            cells = "".join(f" {psnr:.1f} | {sqnr:.1f} |" for _, psnr, sqnr in found)
            click.echo(
                f"| {row.title} | {losses.bits / losses.weights:.2f} "
                f"| {losses.mean(losses.weight)} | {losses.mean(losses.output)} "
                f"|{cells} {time.perf_counter() - start:.0f} |"
            )


if __name__ == "__main__":
    main()
