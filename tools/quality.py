"""What each recipe costs in pictures: image PSNR on flux-digits against full precision.

    python tools/quality.py [--images 32] [--untouched] [--only REGEX]

Every recipe goes through the plan, the packer and the unpacker of its target, and the unpacked
bytes run in the real pipeline (emulate.py). The same prompts and seeds for all; none of them
calibrated. Recipes that no runtime has a file for (no low-rank branch, or rank 4) travel in the
SVDQuant layout with a branch of zeros.

PSNR is the mean over images; velocity SQNR compares the transformer's predictions along the
reference trajectory, so errors do not add up over steps: the quieter of the two figures.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import emulate
import torch
from digits import judge
from digits.folder import write_untouched
from digits.words import judging_prompts
from torch import Tensor
from torch.nn.functional import pad

from dqconvert.calibration.quiet import quiet
from dqconvert.converter.job import Job
from dqconvert.converter.layers import problem_of
from dqconvert.converter.plan import LayerPlan
from dqconvert.converter.prepare import Prepared, prepare
from dqconvert.converter.reopen import PackedLayer
from dqconvert.converter.resolve import embedded
from dqconvert.converter.statistics import statistics
from dqconvert.quantizers import recipe
from dqconvert.quantizers.recipe import RecipeOptions
from dqconvert.quantizers.spec import Scheme
from dqconvert.quantizers.tensors import LinearProblem, LowRank, QuantizedTensor

FOLDER = embedded()["flux-digits"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A row of the table. steps: None for the scheme's; rank: None for the scheme's."""

    title: str
    scheme: str
    rounding: str = "rtn"
    calibrated: bool = True
    steps: tuple[str, ...] | None = None
    rank: int | None = None
    smooth: str = "auto"


INT4, NVFP4 = "svdquant-w4a4", "svdquant-nvfp4"
RECIPES = (
    Recipe("int8", "int8"),
    Recipe("fp8-tensor", "fp8-tensor"),
    Recipe("W4A4 g64, RTN", INT4, steps=()),
    Recipe("W4A4 g64, smoothing", INT4, steps=("smooth",)),
    Recipe("W4A4 g64, smoothing + GPTQ", INT4, "gptq", steps=("smooth",)),
    Recipe("svdquant-w4a4 r4, RTN", INT4, rank=4),
    Recipe("svdquant-w4a4 r4, GPTQ", INT4, "gptq", rank=4),
    Recipe("svdquant-w4a4 r32, data-free", INT4, calibrated=False),
    Recipe("svdquant-w4a4 r32, RTN, no smoothing", INT4, smooth="off"),
    Recipe("svdquant-w4a4 r32, RTN", INT4),
    Recipe("svdquant-w4a4 r32, GPTQ (default)", INT4, "gptq"),
    Recipe("NVFP4, RTN", NVFP4, steps=()),
    Recipe("svdquant-nvfp4 r4, RTN", NVFP4, rank=4),
    Recipe("svdquant-nvfp4 r4, GPTQ", NVFP4, "gptq", rank=4),
    Recipe("svdquant-nvfp4 r32, data-free", NVFP4, calibrated=False),
    Recipe("svdquant-nvfp4 r32, RTN", NVFP4),
    Recipe("svdquant-nvfp4 r32, GPTQ (default)", NVFP4, "gptq"),
)


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


def layers_of(row: Recipe, prepared: Prepared) -> Iterator[tuple[PackedLayer, QuantizedTensor]]:
    """Every layer of a recipe, packed for its target and unpacked again."""
    plan = prepared.plan
    chosen = plan.scheme if row.steps is None else replace(plan.scheme, steps=row.steps)
    options = RecipeOptions(row.rank or plan.context.rank, row.rounding, row.smooth)
    stats = {}
    if prepared.calibration is not None and row.calibrated:
        stats = statistics(prepared.calibration, prepared.model, prepared.source, lambda _: None)
    for group in plan.groups:
        if group[0].form is None:
            continue
        problems = [problem_of(layer, prepared.source, stats) for layer in group]
        for layer, q in zip(group, _quantize(group, problems, chosen, options), strict=True):
            assert layer.form is not None
            packed = plan.target.pack(layer.form, _completed(q, layer))
            again = plan.target.unpack(layer.form, packed)
            yield PackedLayer(layer.name, layer.entry, layer.index, layer.form), again


def _quantize(
    group: list[LayerPlan], problems: list[LinearProblem], scheme: Scheme, options: RecipeOptions
) -> list[QuantizedTensor]:
    form = group[0].form
    assert form is not None
    if form.splits and scheme.modulation is not None:
        return [recipe.quantize_modulation(problem, form.spec, options) for problem in problems]
    return recipe.quantize_group(problems, scheme, options)


def _completed(q: QuantizedTensor, layer: LayerPlan) -> QuantizedTensor:
    """With a low-rank branch of the file's rank, zeros where the recipe has less."""
    assert layer.form is not None
    rank, (rows, columns) = layer.form.rank, layer.form.shape
    if not layer.form.input_scale:
        q = replace(q, input_scale=None)
    if not rank:
        return q
    if q.lowrank is None:
        zeros = LowRank(torch.zeros(rank, columns), torch.zeros(rows, rank))
        return replace(q, lowrank=zeros)
    missing = rank - q.lowrank.up.shape[1]
    return replace(
        q, lowrank=LowRank(pad(q.lowrank.down, (0, 0, 0, missing)), pad(q.lowrank.up, (0, missing)))
    )


def measure(row: Recipe, reference: Reference) -> tuple[float, float]:
    """(PSNR, velocity SQNR) of one recipe."""
    job = Job(
        model=str(reference.folder),
        scheme=row.scheme,
        calib=FOLDER / "prompts.txt",
        output=Path(tempfile.gettempdir()) / "dqconvert-quality",
        overwrite=True,
    )
    pipe = reference.pipeline()
    prepared = prepare(job)
    plan = prepared.plan
    emulate.install(pipe.transformer, layers_of(row, prepared), plan.target, plan.scheme)
    return reference.score(pipe)


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
        click.echo(f"| recipe |{heads} seconds |")
        click.echo("|---|" + "---|" * (2 * len(references) + 1))
        for row in RECIPES:
            if not re.search(only, row.title):
                continue
            start = time.perf_counter()
            scores = [measure(row, reference) for reference in references.values()]
            cells = "".join(f" {psnr:.1f} | {sqnr:.1f} |" for psnr, sqnr in scores)
            click.echo(f"| {row.title} |{cells} {time.perf_counter() - start:.0f} |")


if __name__ == "__main__":
    main()
