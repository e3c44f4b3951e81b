"""The digits before and after: what the full-precision and the quantized pipeline draw.

    python tools/pictures.py OUT -o digits.png

One column for each digit, same prompt and noise; first row full precision, second row the packed
file's bytes (emulate.py), third row plain W4A4 without any of it.
"""

from __future__ import annotations

from pathlib import Path

import click
import emulate
import torch
from digits import judge
from digits.words import judging_prompts
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from dqconvert.calibration.quiet import quiet
from dqconvert.converter.reopen import reopen
from dqconvert.converter.resolve import embedded

SCALE, GAP = 3, 2


def pipeline() -> object:
    """flux-digits in fp32."""
    with quiet():
        from diffusers import FluxPipeline

        return FluxPipeline.from_pretrained(embedded()["flux-digits"])


def one_of_each() -> tuple[list[str], list[int]]:
    """A prompt for each digit that calibration did not see."""
    prompts, digits = judging_prompts()
    places = [digits.index(digit) for digit in range(10)]
    return [prompts[place] for place in places], list(range(10))


def sheet(rows: list[Tensor]) -> Image.Image:
    """Rows of pictures [N, 3, H, W] in [0, 1] as one image."""
    framed = [pad(row, (GAP, GAP, GAP, GAP), value=0.3) for row in rows]
    pixels = torch.cat([torch.cat(list(row), dim=2) for row in framed], dim=1)
    array = pixels.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(array)
    size = (picture.width * SCALE, picture.height * SCALE)
    return picture.resize(size, Image.Resampling.NEAREST)


@click.command()
@click.argument("out", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("digits.png"))
def main(out: Path, output: Path) -> None:
    """Draw the ten digits with flux-digits, with OUT, and with plain W4A4."""
    prompts, wanted = one_of_each()
    found = reopen(out)
    before, after, naive = pipeline(), pipeline(), pipeline()
    emulate.install_file(after.transformer, found)  # type: ignore[attr-defined]
    judge.break_naively(naive.transformer)  # type: ignore[attr-defined]
    rows = [judge.draw(pipe, prompts, seed=7) for pipe in (before, after, naive)]
    for title, row in zip(
        ("full precision", str(found.recognized.scheme), "plain W4A4"), rows, strict=True
    ):
        right = sum(a == b for a, b in zip(judge.read(row), wanted, strict=True))
        loss = "" if row is rows[0] else f", {judge.psnr(row, rows[0]):.1f} dB"
        click.echo(f"{title:16} {right} of 10 digits recognised{loss}")
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows).save(output)
    click.echo(f"pictures: {output}")


if __name__ == "__main__":
    main()
