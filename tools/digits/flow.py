"""The transformer and how it learns: rectified flow on latents, exactly as FluxPipeline samples it.

Contract: a latent x0 and noise e meet at x = (1 - sigma) x0 + sigma e, the transformer predicts
e - x0 and is told the time sigma (the pipeline divides the scheduler's 0...1000 by 1000). Sigmas
are drawn with the shift that the pipeline's dynamic shifting gives to 16 image tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from digits.images import LATENT_CHANNELS
from digits.text import WIDTH, TextParts
from digits.words import NOTHING

SIDE = 4  # image tokens per side: 32 pixels / 4 (VAE) / 2 (packing)
BATCH = 32
RATE = 1e-3
EMA = 0.998
SPIKE_SHARE, SPIKE_GAIN = 0.02, 8.0
UNCONDITIONAL = 0.08  # share of samples that see the empty prompt
# (T5 length, batch, how often): most prompts are short, a pipeline's default call pads to 512
LENGTHS = ((16, BATCH, 0.86), (48, BATCH // 2, 0.07), (160, BATCH // 4, 0.04), (512, 4, 0.03))


@dataclass(frozen=True)
class Lesson:
    """What the transformer learns from: packed latents, their digits, the prompts and theirs."""

    latents: Tensor
    digits: Tensor
    prompts: list[str]
    labels: Tensor
    text: TextParts


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's scheduler settings."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def sigma_shift() -> float:
    """The factor by which the scheduler above bends the sigmas of a 4x4-token image."""
    slope = (1.15 - 0.5) / (4096 - 256)
    return math.exp(0.5 + slope * (SIDE * SIDE - 256))


def build_transformer() -> FluxTransformer2DModel:
    """FLUX in miniature: one double block, three single ones, 256 wide, and spiky first MLP rows.

    The modulations and the last projection start at zero. Two per cent of the rows of each MLP's
    first linear start eight times larger: outliers behind the GELU are learnt, for nothing can be
    put in there afterwards.
    """
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=3,
        num_attention_heads=2,
        attention_head_dim=128,
        axes_dims_rope=(16, 56, 56),
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
    )
    with torch.no_grad():
        for name, module in model.named_modules():
            if name == "proj_out" or name.endswith(".linear"):  # the norms' modulations
                module.weight.zero_()
                module.bias.zero_()
            if name.endswith(("ff.net.0.proj", "ff_context.net.0.proj", "proj_mlp")):
                rows = torch.randperm(module.out_features)
                module.weight[rows[: round(SPIKE_SHARE * len(rows))]] *= SPIKE_GAIN
    return model


def pack(latents: Tensor) -> Tensor:
    """(N, 4, 8, 8) as the transformer reads it: (N, 16, 16), two by two pixels a token."""
    packed: Tensor = FluxPipeline._pack_latents(
        latents, len(latents), LATENT_CHANNELS, 2 * SIDE, 2 * SIDE
    )
    return packed


def image_ids() -> Tensor:
    """(16, 3): zero, row, column of each image token."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()


class Prompter:
    """Draws a prompt for each digit of a batch and embeds it; the short form is computed once."""

    def __init__(self, lesson: Lesson) -> None:
        self._lesson = lesson
        labels = range(NOTHING + 1)
        self._by_label = [torch.nonzero(lesson.labels == label)[:, 0] for label in labels]
        with torch.no_grad():
            self._short, self._pooled = lesson.text.embed(lesson.prompts, LENGTHS[0][0])

    def draw(self, digits: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """(T5 sequence of `length` tokens, CLIP pooled) for each digit; now and then no prompt."""
        labels = torch.where(torch.rand(len(digits)) < UNCONDITIONAL, NOTHING, digits)
        choices = [self._by_label[int(label)] for label in labels]
        picked = torch.stack([ids[torch.randint(len(ids), ())] for ids in choices])
        if length == LENGTHS[0][0]:
            return self._short[picked], self._pooled[picked]
        with torch.no_grad():
            return self._lesson.text.embed([self._lesson.prompts[int(i)] for i in picked], length)


def _loss(model: Any, x0: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
    sequence, pooled = text
    uniform, shift = torch.rand(len(x0)), sigma_shift()
    sigma = shift * uniform / (1 + (shift - 1) * uniform)
    noise = torch.randn_like(x0)
    where = sigma[:, None, None]
    velocity = model(
        hidden_states=(1 - where) * x0 + where * noise,
        encoder_hidden_states=sequence,
        pooled_projections=pooled,
        timestep=sigma,
        img_ids=image_ids(),
        txt_ids=torch.zeros(sequence.shape[1], 3),
        return_dict=False,
    )[0]
    return F.mse_loss(velocity.float(), noise - x0)


def train_transformer(
    lesson: Lesson, steps: int, tell: Callable[[str], None]
) -> FluxTransformer2DModel:
    """The averaged (EMA) transformer after `steps` updates; in bf16 where the CPU has it."""
    model: Any = build_transformer()
    average: Any = copy.deepcopy(model).requires_grad_(False).eval()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, RATE, total_steps=steps, pct_start=min(0.3, 100 / steps), div_factor=20
    )
    prompter = Prompter(lesson)
    shares = torch.tensor([share for _, _, share in LENGTHS])
    fast, running = torch.cpu._is_avx512_bf16_supported(), 0.0
    for step in range(steps):
        length, batch, _ = LENGTHS[int(torch.multinomial(shares, 1))]
        picked = torch.randint(len(lesson.latents), (batch,))
        text = prompter.draw(lesson.digits[picked], length)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            loss = _loss(model, lesson.latents[picked], text)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        decay = min(EMA, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 99 or step == steps - 1:
            tell(f"step {step + 1}/{steps}  loss {running:.4f}")
    result: FluxTransformer2DModel = average
    return result
