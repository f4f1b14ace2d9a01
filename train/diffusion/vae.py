"""The VAE stage: pixels to latents and back."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Iterator

import torch
from diffusers import AutoencoderKL

from train.diffusion.config import LATENT_CHANNELS, OnStep, StageConfig
from train.diffusion.networks import build_vae
from train.diffusion.stage import Stage, digest


def to_signal(images: torch.Tensor, device: str) -> torch.Tensor:
    """Map uint8 pixels to float32 in [-1, 1]."""
    return images.to(device).float() / 127.5 - 1


def to_pixels(signal: torch.Tensor) -> torch.Tensor:
    """Map [-1, 1] to whole numbers 0 - 255, as float32: the inverse of ``to_signal``."""
    return ((signal.clamp(-1, 1) + 1) * 127.5).round()


def augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return images (B, 3, R, R) changed at random; no prompt is involved, so anything a glyph could be will do.

    Half of them are mirrored, all are shifted by up to R/8 pixels each way (the border is repeated), and in a
    quarter of them the color channels change places.
    """
    count, _, side, _ = images.shape
    reach = side // 8
    columns = torch.arange(side).expand(count, side)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    down, right = torch.randint(-reach, reach + 1, (2, count, 1), generator=generator)
    rows = (torch.arange(side) + down).clamp(0, side - 1)
    columns = columns.gather(1, (torch.arange(side) + right).clamp(0, side - 1))
    order = torch.rand(count, 3, generator=generator).argsort(1)
    recolored = torch.rand(count, 1, generator=generator) < 0.25
    order = torch.where(recolored, order, torch.arange(3))
    image = torch.arange(count)
    return images[image[:, None, None, None], order[:, :, None, None], rows[:, None, :, None], columns[:, None, None]]


Augment = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
"""Changes images (B, C, R, R) at random, by the draws of a generator."""


class VaeStage(Stage):
    """Mean squared error plus a little KL, on augmented images.

    Args:
        config: the options.
        images: those of the training, uint8 (N, C, R, R).
        held_images: those held out, likewise.
        augment: what changes a batch of images at random; None leaves them as they are.
        on_step: see :class:`Stage`.
    """

    name = "vae"

    def __init__(
        self,
        config: StageConfig,
        images: torch.Tensor,
        held_images: torch.Tensor,
        augment: Augment | None,
        on_step: OnStep | None,
    ) -> None:
        super().__init__(config, on_step)
        self.steps, self.batch = config.vae_steps, config.vae_batch
        self.images, self.held_images, self.augment = images, held_images, augment
        self.data_digest = digest(images)
        torch.manual_seed(config.seed)
        self.vae = build_vae(config, images.shape[1]).to(config.device)
        self.modules = {"vae": self.vae}
        self.use_optimizer(config.vae_lr, warmup=min(100, config.vae_steps // 10))

    def loss(self) -> torch.Tensor:
        """Draw a batch and return its loss."""
        index = torch.randint(len(self.images), (self.batch,), generator=self.generator)
        noise = torch.randn(self._latent_shape(), generator=self.generator).to(self.config.device)
        images = self.images[index]
        if self.augment is not None:
            images = self.augment(images, self.generator)
        signal = to_signal(images, self.config.device)
        with self.autocast():
            posterior = self.vae.encode(signal).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
            decoded = self.vae.decode(mean + std * noise).sample.float()
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).sum(dim=(1, 2, 3)).mean()
        error: torch.Tensor = torch.nn.functional.mse_loss(decoded, signal)
        return error + self.config.vae_kl * typing.cast("torch.Tensor", kl)

    def _latent_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, LATENT_CHANNELS, self.config.latent_side, self.config.latent_side)

    def evaluate(self) -> dict[str, float]:
        """Return the figures for the log."""
        return {"held_psnr_db": psnr_db(self.vae, self.held_images, self.config.device)}


def batches(rows: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Yield a tensor in pieces of at most ``size`` rows."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def psnr_db(vae: AutoencoderKL, images: torch.Tensor, device: str) -> float:
    """Return 10 log10(255² / MSE), images decoded from the posterior mean, the MSE over all of them."""
    total = 0.0
    with torch.no_grad():
        for part in batches(images, 256):
            decoded = vae.decode(vae.encode(to_signal(part, device)).latent_dist.mode()).sample
            total += float(((to_pixels(decoded) - part.to(device).float()) ** 2).sum())
    return 10 * math.log10(255**2 / max(total / images.numel(), 1e-12)) if len(images) else math.nan


def latent_moments(vae: AutoencoderKL, images: torch.Tensor, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and standard deviation of the posterior of every image, (N, 4, S, S) each, unscaled."""
    means, stds = [], []
    with torch.no_grad():
        for part in batches(images, 256):
            posterior = vae.encode(to_signal(part, device)).latent_dist
            means.append(posterior.mean)
            stds.append(posterior.std)
    return torch.cat(means), torch.cat(stds)


def standardize(vae: AutoencoderKL, images: torch.Tensor, device: str) -> None:
    """Give the latents of the images zero mean in every channel, and E‖x_0‖²/M = 1 by the scaling factor.

    The shift goes into the biases of the two 1x1 convolutions at the latent, so what the VAE reconstructs
    does not change. Without it the white background is a constant in x_0 that x_T does not hold, and samples
    come out grey.
    """
    mean, std = latent_moments(vae, images, device)
    shift = mean.mean(dim=(0, 2, 3))
    scale = float(((mean - shift[:, None, None]) ** 2 + std**2).mean()) ** 0.5
    with torch.no_grad():
        vae.quant_conv.bias[:LATENT_CHANNELS] -= shift
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ shift
    vae.register_to_config(scaling_factor=1 / scale)


def rescale(vae: AutoencoderKL, scaling_factor: float) -> None:
    """Give a VAE another scaling factor, its scaled latents and what it reconstructs being the same.

    The ratio goes into the two 1x1 convolutions at the latent.
    """
    ratio = vae.config.scaling_factor / scaling_factor
    with torch.no_grad():
        vae.quant_conv.weight[:LATENT_CHANNELS] *= ratio
        vae.quant_conv.bias[:LATENT_CHANNELS] *= ratio
        vae.quant_conv.bias[LATENT_CHANNELS:] += 2 * math.log(ratio)  # the logarithm of the variance
        vae.post_quant_conv.weight /= ratio
    vae.register_to_config(scaling_factor=scaling_factor)
