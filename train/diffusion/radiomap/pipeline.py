"""The trained parts as a StableDiffusionUpscalePipeline, which sees an image beside the latent."""

from __future__ import annotations

from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionUpscalePipeline
from transformers import CLIPTextConfig, CLIPTextModel

from refine_env.radiomap import write_scale
from train.diffusion.config import Config
from train.diffusion.networks import build_scheduler
from train.diffusion.radiomap.config import RadioMapConfig
from train.diffusion.radiomap.stages import TEXT_WIDTH, RadioMapUnetStage
from train.diffusion.tokenizer import build_tokenizer

SCALING_FACTOR = 0.08333
"""That the pipeline gives every VAE, whatever it had."""

TEXT_LENGTH = 16


def noiseless_scheduler() -> DDPMScheduler:
    """The scheduler of the noise that the pipeline adds to the image: none, where the noise level is 0."""
    return DDPMScheduler(num_train_timesteps=1, trained_betas=[0.0])


def build_text_parts() -> tuple[CLIPTextModel, object]:
    """A text encoder and a tokenizer of no use: the pipeline takes a prompt, which the U-Net does not look at."""
    tokenizer = build_tokenizer([], Config(text_length=TEXT_LENGTH))
    encoder = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=TEXT_WIDTH,
            intermediate_size=TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=TEXT_LENGTH,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return encoder, tokenizer


def save_pipeline(config: RadioMapConfig, vae: AutoencoderKL, stage: RadioMapUnetStage) -> None:
    """Save the pipeline: fp16 safetensors, the moving average of the trained weights."""
    import torch

    stage.ema.copy_to(stage.parameters())
    torch.manual_seed(config.seed)
    text_encoder, tokenizer = build_text_parts()
    StableDiffusionUpscalePipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=stage.unet.eval(),
        low_res_scheduler=noiseless_scheduler(),
        scheduler=build_scheduler("v_prediction"),
        max_noise_level=0,
    ).to(torch.float16).save_pretrained(config.out, safe_serialization=True)
    write_scale(config.out)
