"""The trained parts as a StableDiffusionPipeline: saved, loaded, sampled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from numpy.typing import NDArray
from transformers import CLIPTokenizer

from refine_env.trajectories.generate import sample_seed
from train.diffusion.networks import build_scheduler
from train.diffusion.unet import UnetStage
from train.diffusion.vae import batches, to_pixels


def load_pipeline(folder: Path, device: str = "cpu") -> StableDiffusionPipeline:
    """Load a saved pipeline for sampling: float32, offline, with no progress bar."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def sample(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    guidance_scale: float,
    steps: int = 50,
    batch: int = 32,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Sample one image a prompt; prompt k starts from the seed of sample k of a trajectory cache.

    Returns:
        images: uint8 array (N, 3, R, R).
        latents: x_0, float32 array (N, 4, S, S).
    """
    seeds = [sample_seed(0, k) for k in range(len(prompts))]
    images, latents = [], []
    with torch.no_grad():
        for rows in batches(torch.arange(len(prompts)), batch):
            x_0 = pipeline(
                [prompts[k] for k in rows],
                guidance_scale=guidance_scale,
                num_inference_steps=steps,
                generator=[torch.Generator().manual_seed(seeds[k]) for k in rows],
                output_type="latent",
            ).images
            decoded = pipeline.vae.decode(x_0 / pipeline.vae.config.scaling_factor).sample
            images.append(to_pixels(decoded).to(torch.uint8).cpu())
            latents.append(x_0.float().cpu())
    return torch.cat(images).numpy(), torch.cat(latents).numpy()


def save_pipeline(folder: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, stage: UnetStage) -> None:
    """Save a StableDiffusionPipeline: fp16 safetensors, the moving average of the trained weights."""
    stage.ema.copy_to(stage.parameters())
    StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=stage.text_encoder.eval(),
        tokenizer=tokenizer,
        unet=stage.unet.eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    ).to(torch.float16).save_pretrained(folder, safe_serialization=True)
