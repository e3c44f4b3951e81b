"""Train, check or strip the embedded demo model `flux-digits`.

python tools/train_digits.py                   train, plant, write converter/data/flux-digits
python tools/train_digits.py --check [FOLDER]  draw, let a classifier judge; fails below 90 %
python tools/train_digits.py --untouched DIR   copy of the folder without the planted outliers

The same seed and thread count on the same machine give the same folder.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

DEFAULT = Path(__file__).resolve().parents[1] / "converter" / "data" / "flux-digits"
PASS = 0.9
FULL = {"text": 400, "vae": 1800, "flow": 3200}
QUICK = {"text": 100, "vae": 100, "flow": 40}


def train(out: Path, steps: dict[str, int], seed: int) -> None:
    """A trained, planted pipeline folder at `out`."""
    import torch
    from digits import flow, folder, images, judge, plant, text, words

    start = time.monotonic()

    def tell(line: str) -> None:
        click.echo(f"{time.monotonic() - start:7.1f} s  {line}")

    torch.manual_seed(seed)
    prompts, labels = words.prompt_pool(per_digit=160, seed=seed)
    parts = text.train_text(prompts, labels, steps["text"])
    folder.round_module(parts.clip)
    folder.round_module(parts.t5)
    tell("text encoders trained")
    pictures, digits = images.load_pictures()
    vae = folder.round_module(images.train_vae(pictures, steps["vae"]))
    latents = images.encode(vae, pictures)
    restored = vae.decode(images.encode_raw(vae, pictures[:256])).sample
    tell(f"vae trained, {judge.psnr(restored / 2, pictures[:256] / 2):.1f} dB")
    lesson = flow.Lesson(flow.pack(latents), digits, prompts, torch.tensor(labels), parts)
    transformer = folder.round_module(flow.train_transformer(lesson, steps["flow"], tell))
    pipe = folder.make_pipeline(transformer, vae, parts)
    rms = judge.channel_rms(pipe, words.calibration_prompts(), seed)
    planting = plant.draw(rms, seed)
    transformer.load_state_dict(plant.plant(transformer.state_dict(), planting))
    folder.write_folder(pipe, planting, out)
    tell(f"{out}: {folder.folder_bytes(out)} bytes")


def check(where: Path) -> bool:
    """Whether at least 90 % of 120 drawings are read as asked; tells what plain W4A4 does too."""
    from diffusers import FluxPipeline
    from digits import folder, judge

    def load(place: Path) -> Any:
        return FluxPipeline.from_pretrained(place, local_files_only=True)

    def tell_broken(pipe: Any, what: str) -> None:
        judge.break_naively(pipe.transformer)
        share, images = judge.accuracy(pipe, seed=1)
        click.echo(f"plain W4A4, {what}: {judge.psnr(images, reference):.1f} dB, {share:.1%}")

    pipe = load(where)
    share, reference = judge.accuracy(pipe, seed=1)
    padded, _ = judge.accuracy(pipe, seed=1, length=512)
    click.echo(f"accuracy {share:.1%} of {len(reference)} drawings, {padded:.1%} at 512 tokens")
    tell_broken(pipe, "as stored")
    if (where / folder.PLANTING).exists():
        with tempfile.TemporaryDirectory() as scratch:
            folder.write_untouched(where, Path(scratch))
            tell_broken(load(Path(scratch)), "without planting")
    return share >= PASS


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=DEFAULT, help="Folder to write.")
@click.option(
    "--check",
    "judged",
    type=click.Path(path_type=Path, exists=True),
    is_flag=False,
    flag_value=str(DEFAULT),
    help="Judge a folder (the embedded one unless named) instead of training.",
)
@click.option(
    "--untouched",
    type=click.Path(path_type=Path),
    help="Write --out's folder without planted outliers to this place instead of training.",
)
@click.option(
    "--quick", is_flag=True, help="A smoke run of about a minute; draws nothing readable."
)
@click.option("--seed", default=7, show_default=True, help="Seed of everything.")
@click.option("--threads", default=1, show_default=True, help="Torch threads.")
def main(
    out: Path, judged: Path | None, untouched: Path | None, quick: bool, seed: int, threads: int
) -> None:
    """Train the embedded demo model, or check it, or take its planted outliers out."""
    import torch

    torch.set_num_threads(threads)
    if judged is not None:
        sys.exit(0 if check(judged) else 1)
    if untouched is not None:
        from digits import folder

        folder.write_untouched(out, untouched)
        return
    train(out, QUICK if quick else FULL, seed)


if __name__ == "__main__":
    main()
