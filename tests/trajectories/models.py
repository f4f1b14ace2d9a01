"""Stable Diffusion pipelines with random weights: a tiny one, and Stable Diffusion v1-5's own architecture, narrow."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refine_env.radiomap import PowerScale, write_scale

TINY_LATENT_SHAPE = (4, 4, 4)
CONDITION_SHAPE = (12, 4, 4)
"""What the tiny conditioned pipeline sees: images (3, 8, 8), each 2 by 2 pixels the channels of one element."""
SD15_LATENT_SHAPE = (4, 64, 64)

# What the configuration files of stable-diffusion-v1-5 say beside the widths.
SD15_UNET: Mapping[str, Any] = {
    "sample_size": SD15_LATENT_SHAPE[1],
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
}
SD15_VAE: Mapping[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
}
SD15_SCHEDULER: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
SD15_TOKENS = 77
SD15_CHECKER = {
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "requires_safety_checker": True,
}


def save_tiny(folder: Path) -> Path:
    """A pipeline of two levels, M = 64."""
    return _save(
        folder,
        tokens=12,
        hidden=16,
        layers=1,
        unet={
            "sample_size": TINY_LATENT_SHAPE[1],
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        vae={
            "block_out_channels": (8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 4,
            "latent_channels": 4,
            "sample_size": 2 * TINY_LATENT_SHAPE[1],
        },
    )


def save_conditioned(folder: Path) -> Path:
    """A pipeline of M = 64 whose network sees an image of 12 channels beside the latent, and adds no noise to it."""
    path = save_tiny(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from diffusers import (
            DDPMScheduler,
            StableDiffusionPipeline,
            StableDiffusionUpscalePipeline,
            UNet2DConditionModel,
        )

        torch.manual_seed(1)
        plain = StableDiffusionPipeline.from_pretrained(path)
        config = {**plain.unet.config, "in_channels": TINY_LATENT_SHAPE[0] + CONDITION_SHAPE[0]}
        StableDiffusionUpscalePipeline(
            vae=plain.vae,
            text_encoder=plain.text_encoder,
            tokenizer=plain.tokenizer,
            unet=UNet2DConditionModel.from_config(config),
            low_res_scheduler=DDPMScheduler(num_train_timesteps=1, trained_betas=[0.0]),
            scheduler=DDPMScheduler(**{name: SD15_SCHEDULER[name] for name in _BETAS}),
        ).save_pretrained(folder / "conditioned")
    return folder / "conditioned"


def save_map_model(folder: Path) -> Path:
    """The conditioned pipeline with a VAE of one channel: its images are radio maps, -94 dBm the gray level 0.5."""
    path = save_conditioned(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from diffusers import AutoencoderKL

        torch.manual_seed(2)
        vae = AutoencoderKL.from_pretrained(path / "vae")
        vae = AutoencoderKL.from_config({**vae.config, "in_channels": 1, "out_channels": 1})
        torch.nn.init.normal_(vae.decoder.conv_out.weight, std=0.2)  # maps of both, covered pixels and others
        vae.save_pretrained(path / "vae")
    write_scale(path, PowerScale(-134.0, -54.0))
    return path


def save_sd15(folder: Path, width: int = 32) -> Path:
    """Stable Diffusion v1-5 with the widths (width, 2·width, 4·width, 4·width) instead of 320 … 1280; M = 16384.

    Its index names a safety checker, as the original's does, and there is none.
    """
    path = _save(
        folder,
        tokens=SD15_TOKENS,
        hidden=48,
        layers=2,
        unet={**SD15_UNET, "block_out_channels": (width, 2 * width, 4 * width, 4 * width)},
        vae={**SD15_VAE, "block_out_channels": (32, 32, 32, 32)},
    )
    index = json.loads((path / "model_index.json").read_bytes())
    (path / "model_index.json").write_text(json.dumps(index | SD15_CHECKER, indent=2))
    return path


def _save(folder: Path, *, tokens: int, hidden: int, layers: int, unet: dict[str, Any], vae: dict[str, Any]) -> Path:
    with warnings.catch_warnings():
        # Importing and saving, these libraries warn of their own and each other's deprecations.
        warnings.simplefilter("ignore")
        import torch
        from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

        torch.manual_seed(0)
        folder.mkdir(parents=True, exist_ok=True)
        pieces = [chr(code) for code in range(ord("a"), ord("z") + 1)]
        words = ["<|startoftext|>", "<|endoftext|>", *pieces, *(piece + "</w>" for piece in pieces)]
        (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer(
            str(folder / "vocab.json"),
            str(folder / "merges.txt"),
            model_max_length=tokens,
            pad_token="<|endoftext|>",
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=2,
                max_position_embeddings=tokens,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
        StableDiffusionPipeline(
            vae=AutoencoderKL(**vae),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(**unet, cross_attention_dim=hidden),
            scheduler=PNDMScheduler(**SD15_SCHEDULER),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder / "model")
    return folder / "model"
