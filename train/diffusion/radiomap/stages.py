"""The stages of the U-Net, conditioned on images of the scene, and of the regressor that it is compared with."""

from __future__ import annotations

import typing

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel, UNet2DModel

from train.diffusion.config import LATENT_CHANNELS, OnStep
from train.diffusion.networks import build_scheduler, norm_groups
from train.diffusion.radiomap.config import CONDITION_CHANNELS, RadioMapConfig
from train.diffusion.radiomap.data import Dataset, folded, turned, unit
from train.diffusion.stage import Stage, digest
from train.diffusion.unet import DenoisingStage, spread_timesteps
from train.diffusion.vae import batches, psnr_db, to_signal

LOGGED_MAPS = 48
"""Held-out maps that the log's figures are of."""
SAMPLING_STEPS = 50


def build_unet(config: RadioMapConfig) -> UNet2DConditionModel:
    """Return an untrained U-Net that sees the condition beside the latent, and no prompt.

    Attention at all levels but the finest: a wall's shadow is long.
    """
    widths = config.unet_widths
    coarser = len(widths) - 1
    return UNet2DConditionModel(
        sample_size=config.latent_side,
        in_channels=config.unet_inputs,
        out_channels=LATENT_CHANNELS,
        block_out_channels=widths,
        layers_per_block=config.unet_layers,
        down_block_types=("DownBlock2D",) + ("AttnDownBlock2D",) * coarser,
        mid_block_type="UNetMidBlock2D",
        up_block_types=("AttnUpBlock2D",) * coarser + ("UpBlock2D",),
        attention_head_dim=max(1, min(widths) // config.unet_heads),
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=norm_groups(widths),
        resnet_time_scale_shift="scale_shift",
    )


TEXT_WIDTH = 8
"""Of the text encoder, which the U-Net does not look at."""


def build_regressor(config: RadioMapConfig) -> UNet2DModel:
    """Return an untrained U-Net from a scene to its map, as RadioUNet is one, of the same blocks as the diffusion's."""
    widths = config.regressor_widths
    finer = len(widths) - 1
    return UNet2DModel(
        sample_size=config.resolution,
        in_channels=CONDITION_CHANNELS,
        out_channels=1,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * finer + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * finer,
        attention_head_dim=max(1, widths[-1] // 4),
        norm_num_groups=norm_groups(widths),
    )


def velocity_loss_weight(snr: torch.Tensor, gamma: float, power: float) -> torch.Tensor:
    """Return the weight of the velocity prediction error, min(SNR, gamma)^power / (SNR + 1), by timestep.

    An error of the velocity is sqrt(SNR + 1) times one of x_0, so the error of x_0 weighs min(SNR, gamma)^power, as in
    :func:`train.diffusion.unet.noise_loss_weight`. The condition says nearly all of the map, so the network's task is
    the same at every noise beyond what the condition leaves open: there the error of x_0 is what counts.
    """
    bounded = snr.clamp(max=gamma) if gamma else snr
    return bounded**power / (snr + 1)


def normalized_error(estimate: torch.Tensor, truth: torch.Tensor) -> float:
    """NMSE: the sum of squared errors over that of squared truths."""
    return float(((estimate - truth) ** 2).sum() / (truth**2).sum())


class RadioMapUnetStage(DenoisingStage):
    """Velocity prediction on the VAE's latents of turned and mirrored maps, under conditions.

    Of a part of the samples the condition lacks cars and transmitter: under such conditions the network is the static
    model, which sees the buildings alone.
    """

    def __init__(self, config: RadioMapConfig, data: Dataset, vae: AutoencoderKL, on_step: OnStep | None) -> None:
        super().__init__(config, on_step)
        self.options_of_maps = config
        self.vae = vae
        self.planes = data.train
        self.held = data.held[:LOGGED_MAPS]
        self.data_digest = digest(data.train)
        torch.manual_seed(config.seed)
        self.unet = build_unet(config).to(config.device)
        self.use_modules({"unet": self.unet}, build_scheduler("v_prediction"), velocity_loss_weight)
        self.nothing = torch.zeros(1, 1, TEXT_WIDTH, device=config.device)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Return the predicted velocity of latents x_t (B, 4, S, S) at timesteps t (B,), under folded conditions."""
        with self.autocast():
            output = self.unet(torch.cat([x_t, condition], dim=1), t, self.nothing.expand(len(x_t), 1, -1))
            return typing.cast("torch.Tensor", output.sample.float())

    def encode(self, maps: torch.Tensor) -> torch.Tensor:
        """Return x_0 (B, 4, S, S) of maps as bytes, the mean of the posterior."""
        with torch.no_grad(), self.autocast():
            mean = self.vae.encode(to_signal(maps, self.config.device)).latent_dist.mean
        return typing.cast("torch.Tensor", mean.float() * self.vae.config.scaling_factor)

    def loss(self) -> torch.Tensor:
        """Draw a batch and return its loss."""
        device, draw, config = self.config.device, self.generator, self.options_of_maps
        index = torch.randint(len(self.planes), (self.batch,), generator=draw)
        t = spread_timesteps(self.timestep_share, self.batch, draw).to(device)
        side = config.latent_side
        noise = torch.randn(self.batch, LATENT_CHANNELS, side, side, generator=draw).to(device)
        static = (torch.rand(self.batch, 1, 1, 1, generator=draw) < config.static_part).to(device)
        planes = turned(self.planes[index], draw)
        x_0 = self.encode(Dataset.maps(planes))
        condition = unit(planes[:, :CONDITION_CHANNELS], device)
        condition[:, 1:] = torch.where(static, 0.0, condition[:, 1:])
        predicted = self.predict(self.noising.add_noise(x_0, noise, t), t, folded(condition, config.fold))
        wanted = self.noising.get_velocity(x_0, noise, t)
        loss: torch.Tensor = (self.loss_weight[t] * ((predicted - wanted) ** 2).mean(dim=(1, 2, 3))).mean()
        return loss

    def figures(self) -> dict[str, float]:
        """Return the NMSE on held-out maps: of samples, of the estimate from noise alone, and of the VAE."""
        truth = unit(Dataset.maps(self.held), self.config.device)
        condition = folded(unit(self.held[:, :CONDITION_CHANNELS], self.config.device), self.options_of_maps.fold)
        with torch.no_grad():
            first, last = self._sample(condition)
            return {
                "held_vae_nmse": normalized_error(self._decode(self.encode(Dataset.maps(self.held))), truth),
                "held_first_estimate_nmse": normalized_error(self._decode(first), truth),
                "held_sample_nmse": normalized_error(self._decode(last), truth),
            }

    def _sample(self, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first estimate of x_0, of noise alone, and x_0 of the whole reverse process."""
        scheduler = DDPMScheduler.from_config(self.noising.config)
        scheduler.set_timesteps(SAMPLING_STEPS)
        draw = torch.Generator().manual_seed(self.config.seed + 1)
        side = self.options_of_maps.latent_side
        x_t = torch.randn(len(condition), LATENT_CHANNELS, side, side, generator=draw).to(self.config.device)
        estimates = []
        for t in scheduler.timesteps:
            velocity = torch.cat(
                [
                    self.predict(x_t[rows], t.expand(len(rows)), condition[rows])
                    for rows in batches(torch.arange(len(x_t)), 32)
                ]
            )
            step = scheduler.step(velocity, t, x_t, generator=draw)
            x_t = step.prev_sample
            estimates.append(step.pred_original_sample)
        return estimates[0], x_t

    def _decode(self, x_0: torch.Tensor) -> torch.Tensor:
        decoded = self.vae.decode(x_0 / self.vae.config.scaling_factor).sample
        return typing.cast("torch.Tensor", (decoded.float() / 2 + 0.5).clamp(0, 1))


class DecoderStage(Stage):
    """Mean squared error of what the decoder makes of the posterior's mean, the encoder being as it is.

    So the latents, which the U-Net is trained on, stay the same, and the two may be trained at once.
    """

    name = "decoder"

    def __init__(self, config: RadioMapConfig, data: Dataset, vae: AutoencoderKL, on_step: OnStep | None) -> None:
        super().__init__(config, on_step)
        self.steps, self.batch = config.decoder_steps, config.vae_batch
        self.vae = vae
        self.maps, self.held = Dataset.maps(data.train), Dataset.maps(data.held)
        self.data_digest = digest(data.train)
        self.modules = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
        for module in self.modules.values():
            module.requires_grad_(True)
        self.use_optimizer(config.decoder_lr, warmup=min(50, self.steps // 10))

    def loss(self) -> torch.Tensor:
        """Draw a batch and return its loss."""
        index = torch.randint(len(self.maps), (self.batch,), generator=self.generator)
        signal = to_signal(turned(self.maps[index], self.generator), self.config.device)
        with self.autocast():
            with torch.no_grad():
                mean = self.vae.encode(signal).latent_dist.mean
            decoded = self.vae.decode(mean).sample.float()
        return torch.nn.functional.mse_loss(decoded, signal)

    def evaluate(self) -> dict[str, float]:
        """Return the figures for the log."""
        return {"held_psnr_db": psnr_db(self.vae, self.held, self.config.device)}


class RegressorStage(Stage):
    """Mean squared error of the map, under the condition: what a network of the same data says at once."""

    name = "regressor"

    def __init__(self, config: RadioMapConfig, data: Dataset, on_step: OnStep | None) -> None:
        super().__init__(config, on_step)
        self.steps, self.batch = config.regressor_steps, config.regressor_batch
        self.planes, self.held = data.train, data.held[:LOGGED_MAPS]
        self.data_digest = digest(data.train)
        torch.manual_seed(config.seed)
        self.regressor = build_regressor(config).to(config.device)
        self.modules = {"regressor": self.regressor}
        self.use_optimizer(config.regressor_lr, warmup=min(100, self.steps // 10))

    def predict(self, condition: torch.Tensor) -> torch.Tensor:
        """Return maps (B, 1, R, R) of conditions (B, 3, R, R), both in [0, 1], the former about so."""
        with self.autocast():
            return typing.cast("torch.Tensor", self.regressor(condition * 2 - 1, 0).sample.float())

    def loss(self) -> torch.Tensor:
        """Draw a batch and return its loss."""
        index = torch.randint(len(self.planes), (self.batch,), generator=self.generator)
        values = unit(turned(self.planes[index], self.generator), self.config.device)
        predicted = self.predict(values[:, :CONDITION_CHANNELS])
        return torch.nn.functional.mse_loss(predicted, values[:, CONDITION_CHANNELS:])

    def evaluate(self) -> dict[str, float]:
        """Return the figures for the log."""
        values = unit(self.held, self.config.device)
        with torch.no_grad():
            predicted = torch.cat(
                [self.predict(part[:, :CONDITION_CHANNELS]).clamp(0, 1) for part in batches(values, 32)]
            )
        return {"held_nmse": normalized_error(predicted, values[:, CONDITION_CHANNELS:])}
