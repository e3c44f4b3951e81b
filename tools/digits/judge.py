"""What the drawings are worth: a classifier's verdict, and what naive 4-bit does to them.

Contract: the judge is an SVC on the real 8x8 digits; it never sees a generated image in training.
`break_naively` puts symmetric int4 (absmax / 7, groups of 64) on weights and inputs of every linear
in the blocks except the modulations, in place: no smoothing, no search, no low-rank branch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor, nn

from digits.images import SIZE, to_digits8
from digits.plant import sites
from digits.words import judging_prompts

STEPS, LENGTH, GROUP = 12, 16, 64


def train_judge() -> SVC:
    """A classifier of real digits, on pixels of 0...16."""
    data = load_digits()
    return SVC(C=10, gamma=0.001).fit(data.data, data.target)


def read(images: Tensor) -> list[int]:
    """The digits that a freshly trained judge sees."""
    return [int(digit) for digit in train_judge().predict(to_digits8(images).numpy())]


def draw(pipe: Any, prompts: list[str], seed: int, length: int = LENGTH) -> Tensor:
    """Pictures of the prompts, (N, 3, 32, 32) in [0, 1]; the same seed gives the same noise."""
    pipe.set_progress_bar_config(disable=True)
    images: Tensor = pipe(
        prompts,
        height=SIZE,
        width=SIZE,
        num_inference_steps=STEPS,
        max_sequence_length=length,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images
    return images


def accuracy(pipe: Any, seed: int, length: int = LENGTH) -> tuple[float, Tensor]:
    """Share of 120 prompted drawings that the judge reads as asked, and the drawings."""
    prompts, wanted = judging_prompts()
    images = draw(pipe, prompts, seed, length)
    hits = [seen == asked for seen, asked in zip(read(images), wanted, strict=True)]
    return sum(hits) / len(hits), images


def psnr(images: Tensor, reference: Tensor) -> float:
    """Decibels over all pixels of all images."""
    return float(-10 * torch.log10(F.mse_loss(images, reference)))


def _int4(values: Tensor) -> Tensor:
    groups = values.unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 7
    near: Tensor = (groups / scale).round().mul(scale).flatten(-2)
    return near


def _blind(linear: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (_int4(inputs[0]),)


def block_linears(transformer: Any) -> dict[str, nn.Linear]:
    """The linears that quantizers touch: all in the blocks but the modulations."""
    return {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and "transformer_blocks." in name and ".norm" not in name
    }


@torch.no_grad()
def break_naively(transformer: Any) -> None:
    """Plain W4A4 in place."""
    for linear in block_linears(transformer).values():
        linear.weight.copy_(_int4(linear.weight))
        linear.register_forward_pre_hook(_blind)


@torch.no_grad()
def channel_rms(pipe: Any, prompts: list[str], seed: int) -> dict[str, Tensor]:
    """Root mean square of each planting site's channels over a real denoising run."""
    transformer = pipe.transformer
    found = list(sites(transformer.state_dict()))
    sums: dict[str, list[Tensor]] = {site.name: [] for site in found}
    modules = dict(transformer.named_modules())
    width = transformer.inner_dim
    hooks = [
        modules[linear].register_forward_pre_hook(
            lambda _, inputs, into=sums[site.name]: into.append(
                inputs[0][..., :width].square().flatten(0, -2).mean(0)
            )
        )
        for site in found
        for linear in site.consumers
    ]
    draw(pipe, prompts, seed)
    for hook in hooks:
        hook.remove()
    return {name: torch.stack(parts).mean(0).sqrt() for name, parts in sums.items()}
