"""The stage of U-Net and text encoder: noise prediction on the VAE's latents, under prompts."""

from __future__ import annotations

import math
import typing
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.training_utils import EMAModel, compute_snr
from transformers import CLIPTokenizer

from train.diffusion import emoji
from train.diffusion.config import Config, OnStep, StageConfig
from train.diffusion.data import Dataset
from train.diffusion.networks import TRAIN_TIMESTEPS, build_scheduler, build_text_encoder, build_unet
from train.diffusion.stage import Stage, digest
from train.diffusion.tokenizer import tokens
from train.diffusion.vae import batches, latent_moments


def spread_timesteps(share: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw timesteps (count,) by their shares (T,), which sum to 1: one from each of ``count`` equal parts of the mass.

    They are in random order, and each by itself has the distribution of the shares; together they are spread, so
    that the loss of a batch varies less.
    """
    place = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator, dtype=torch.float64)
    return torch.searchsorted(share.double().cumsum(0), place / count, right=True).clamp(max=len(share) - 1)


def noise_loss_weight(snr: torch.Tensor, gamma: float, power: float) -> torch.Tensor:
    """Return the weight of the noise prediction error, min(SNR, gamma)^power / SNR, by timestep.

    An error of the noise is sqrt(SNR) times one of x_0, so the error of x_0 weighs min(SNR, gamma)^power. Power 1
    is Min-SNR. What a picture shows is settled at high noise: glyphs that lie d apart are told apart from about
    SNR = 8 log(number) / d² on, here 0.04. With power 1 the steps before, where the prompt alone can say it, hardly
    count, and the more elements a latent has, the less; a smaller power lets them count.
    """
    bounded = snr.clamp(max=gamma) if gamma else snr
    return bounded**power / snr


class DenoisingStage(Stage):
    """A U-Net at all timesteps, weighted by their SNR; evaluated and saved is the moving average of the weights."""

    name = "unet"

    def __init__(self, config: StageConfig, on_step: OnStep | None) -> None:
        super().__init__(config, on_step)
        self.steps, self.batch = config.unet_steps, config.unet_batch

    def use_modules(
        self,
        modules: dict[str, torch.nn.Module],
        noising: DDPMScheduler,
        weight: Callable[[torch.Tensor, float, float], torch.Tensor],
    ) -> None:
        """Set the networks, the noise schedule, and by the weight of the loss at an SNR how often a timestep is drawn.

        Args:
            modules: the networks, by name.
            noising: the noise schedule.
            weight: the loss's weight of SNRs, of ``snr_gamma`` and ``snr_power``.
        """
        config = self.config
        self.modules = modules
        self.use_optimizer(config.unet_lr, config.unet_warmup)
        self.ema = EMAModel(self.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
        self.noising = noising
        snr = compute_snr(self.noising, torch.arange(TRAIN_TIMESTEPS))
        weights = weight(snr, config.snr_gamma, config.snr_power)
        # Half of the weight, on the log scale, is in how often a timestep is drawn: less noise in the gradient.
        self.timestep_share = weights.sqrt() / weights.sqrt().sum()
        self.loss_weight = (weights / (self.timestep_share * TRAIN_TIMESTEPS)).to(config.device)

    def after_update(self) -> None:
        """Do what follows an optimizer step."""
        self.ema.step(self.parameters())

    def evaluate(self) -> dict[str, float]:
        """Return the figures for the log."""
        self.ema.store(self.parameters())
        self.ema.copy_to(self.parameters())
        figures = self.figures()
        self.ema.restore(self.parameters())
        return figures

    @abstractmethod
    def figures(self) -> dict[str, float]:
        """Return the figures for the log, of the weights that the networks have."""

    def extra_state(self) -> dict[str, Any]:
        """Return further state for the checkpoint."""
        return {"ema": self.ema.state_dict()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what ``extra_state`` returned."""
        self.ema.load_state_dict(state["ema"])


class UnetStage(DenoisingStage):
    """Noise prediction, Min-SNR weighted, under prompts."""

    def __init__(
        self,
        config: Config,
        data: Dataset,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        on_step: OnStep | None,
    ) -> None:
        super().__init__(config, on_step)
        self.prompt_dropout = config.prompt_dropout
        device, scale = config.device, vae.config.scaling_factor
        self.mean, self.std = (scale * moment for moment in latent_moments(vae, data.train_images, device))
        self.held_mean = scale * latent_moments(vae, data.held_images, device)[0] if data.held else self.mean[:0]
        self.ids = tokens(tokenizer, [glyph.prompt for glyph in data.train]).to(device)
        self.data_digest = digest(data.train_images, self.ids)
        self.held_ids = tokens(tokenizer, [glyph.prompt for glyph in data.held] or [""]).to(device)
        self.no_prompt = tokens(tokenizer, [""]).to(device)
        families = [glyph.family for glyph in data.train]
        size = {family: families.count(family) for family in set(families)}
        self.draw_weight = torch.tensor(
            [
                size[glyph.family] ** -config.family_power
                * (1 if emoji.is_picture(glyph.prompt) else config.prompt_signs)
                for glyph in data.train
            ]
        )
        torch.manual_seed(config.seed)
        self.unet = build_unet(config).to(device)
        self.text_encoder = build_text_encoder(tokenizer, config).to(device)
        modules = {"unet": self.unet, "text_encoder": self.text_encoder}
        self.use_modules(modules, build_scheduler(), noise_loss_weight)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return the predicted noise of latents x_t (B, 4, S, S) at timesteps t (B,) under prompts (B, L)."""
        with self.autocast():
            embedded = self.text_encoder(ids).last_hidden_state
            return typing.cast("torch.Tensor", self.unet(x_t, t, embedded).sample.float())

    def loss(self) -> torch.Tensor:
        """Draw a batch and return its loss."""
        device, draw = self.config.device, self.generator
        index = torch.multinomial(self.draw_weight, self.batch, replacement=True, generator=draw)
        t = spread_timesteps(self.timestep_share, self.batch, draw).to(device)
        latent_noise, noise = (
            torch.randn(self.batch, *self.mean.shape[1:], generator=draw).to(device) for _ in range(2)
        )
        emptied = (torch.rand(self.batch, generator=draw) < self.prompt_dropout).to(device)
        index = index.to(device)
        x_0 = self.mean[index] + self.std[index] * latent_noise
        ids = torch.where(emptied[:, None], self.no_prompt, self.ids[index])
        predicted = self.predict(self.noising.add_noise(x_0, noise, t), t, ids)
        return (self.loss_weight[t] * ((predicted - noise) ** 2).mean(dim=(1, 2, 3))).mean()

    def figures(self) -> dict[str, float]:
        """Return the figures for the log, of the weights that the networks have."""
        count = max(1, len(self.held_mean))
        stride = max(1, len(self.mean) // count)
        return {
            "train_noise_mse": self._noise_mse(self.mean[::stride][:count], self.ids[::stride][:count]),
            "held_noise_mse": self._noise_mse(self.held_mean, self.held_ids),
        }

    def _noise_mse(self, x_0: torch.Tensor, ids: torch.Tensor, timesteps_each: int = 4) -> float:
        """Return the unweighted noise prediction error: the same noise at every call, t evenly spread."""
        if not len(x_0):
            return math.nan
        draw = torch.Generator().manual_seed(self.config.seed + 1)
        offsets = torch.randperm(len(x_0), generator=draw).float() / len(x_0)
        errors = []
        with torch.no_grad():
            for k in range(timesteps_each):
                t_all = ((k + offsets) * TRAIN_TIMESTEPS / timesteps_each).long()
                noise_all = torch.randn(x_0.shape, generator=draw)
                for rows in batches(torch.arange(len(x_0)), self.batch):
                    t, noise = t_all[rows].to(x_0.device), noise_all[rows].to(x_0.device)
                    predicted = self.predict(self.noising.add_noise(x_0[rows], noise, t), t, ids[rows])
                    errors.append(((predicted - noise) ** 2).mean(dim=(1, 2, 3)))
        return float(torch.cat(errors).mean())
