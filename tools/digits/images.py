"""The pictures and their autoencoder: scikit-learn's digits at 32x32, and a VAE to 8x8x4.

Contract: `load_pictures` gives (N, 3, 32, 32) in [-1, 1] and the labels; `to_digits8` undoes it for
a judge that knows only the original 8x8 images. `train_vae` sets shift_factor and scaling_factor so
that (latent - shift) * scaling has zero mean and unit variance over the data.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from sklearn.datasets import load_digits
from torch import Tensor

SIZE = 32
LATENT_CHANNELS = 4
BATCH = 32
KL_WEIGHT = 5e-4


def load_pictures() -> tuple[Tensor, Tensor]:
    """All 1797 digits as (N, 3, 32, 32) in [-1, 1], and their labels."""
    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    large = F.interpolate(small, size=(SIZE, SIZE), mode="bicubic", align_corners=False)
    return large.clamp(-1, 1).repeat(1, 3, 1, 1), torch.tensor(data.target)


def to_digits8(images: Tensor) -> Tensor:
    """(N, 3, 32, 32) in [0, 1] as the data set has them: (N, 64) in 0...16."""
    return F.avg_pool2d(images.mean(1, keepdim=True), SIZE // 8).flatten(1) * 16


def build_vae() -> AutoencoderKL:
    """An untrained autoencoder: three levels, a downscale factor of four."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def train_vae(pictures: Tensor, steps: int) -> AutoencoderKL:
    """A trained, frozen autoencoder whose config normalises the latents."""
    vae: Any = build_vae()
    optimiser = torch.optim.AdamW(vae.parameters(), lr=4e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    for _ in range(steps):
        batch = pictures[torch.randint(len(pictures), (BATCH,))]
        posterior = vae.encode(batch).latent_dist
        restored = vae.decode(posterior.sample()).sample
        surprise = posterior.kl().mean() / posterior.mean[0].numel()
        loss = F.mse_loss(restored, batch) + KL_WEIGHT * surprise
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    vae.requires_grad_(False).eval()
    raw = encode_raw(vae, pictures)
    vae.register_to_config(
        shift_factor=round(raw.mean().item(), 5), scaling_factor=round(1 / raw.std().item(), 5)
    )
    return vae


@torch.no_grad()
def encode_raw(vae: Any, pictures: Tensor) -> Tensor:
    """Mean latents as the encoder gives them, before shift and scale."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(256)])


def encode(vae: Any, pictures: Tensor) -> Tensor:
    """Normalised latents (N, 4, 8, 8): what the transformer learns to draw."""
    normal: Tensor = (
        encode_raw(vae, pictures) - vae.config.shift_factor
    ) * vae.config.scaling_factor
    return normal
