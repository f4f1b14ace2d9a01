"""The parts of the pipeline that have weights, untrained, and the noise schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from train.diffusion.config import LATENT_CHANNELS, Config, StageConfig

TRAIN_TIMESTEPS = 1000


def norm_groups(widths: Sequence[int]) -> int:
    """Return the largest number of normalization groups, at most 32, each of two channels or more."""
    common = math.gcd(*widths)
    return max(groups for groups in range(1, 33) if common % groups == 0 and (common // groups > 1 or groups == 1))


def build_scheduler(prediction_type: str = "epsilon") -> DDPMScheduler:
    """Return Stable Diffusion v1-5's noise schedule, sampled by DDPM with the posterior variance.

    Args:
        prediction_type: what the network says of x_t: ``epsilon`` or ``v_prediction``.
    """
    return DDPMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        variance_type="fixed_small",
        clip_sample=False,
        prediction_type=prediction_type,
        timestep_spacing="leading",
        steps_offset=1,
    )


def build_vae(config: StageConfig, channels: int = 3) -> AutoencoderKL:
    """Return an untrained VAE of images with so many channels; each level but the last halves the side."""
    widths = config.vae_widths
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=norm_groups(widths),
        mid_block_add_attention=config.vae_attention,
        sample_size=config.resolution,
    )


def build_unet(config: Config) -> UNet2DConditionModel:
    """Return an untrained U-Net.

    Attention at the coarsest level alone: at the finer ones it would cost half the time. The prompt reaches those
    through the time embedding, to which a pooled text embedding is added.
    """
    widths = config.unet_widths
    finer = len(widths) - 1
    return UNet2DConditionModel(
        sample_size=config.latent_side,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=widths,
        layers_per_block=config.unet_layers,
        down_block_types=("DownBlock2D",) * finer + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * finer,
        cross_attention_dim=config.text_width,
        attention_head_dim=config.unet_heads,  # diffusers' historical name: the number of heads
        norm_num_groups=norm_groups(widths),
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=config.text_heads,
    )


def build_text_encoder(tokenizer: CLIPTokenizer, config: Config) -> CLIPTextModel:
    """Return an untrained text encoder for a tokenizer."""
    width = config.text_width
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_heads,
            max_position_embeddings=config.text_length,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
