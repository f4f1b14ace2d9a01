"""The whole training: data, VAE, U-Net and text encoder, and the model folder."""

from __future__ import annotations

import itertools
import json
import logging
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from refine_env._files import write_atomically
from train.diffusion import emoji
from train.diffusion.config import EXTRA, Config, OnStep
from train.options import require_extra

log = logging.getLogger("train.ldm")


def train(config: Config, glyphs: Sequence[emoji.Glyph] | None = None, on_step: OnStep | None = None) -> Path:
    """Train, or go on training, and save the model and its training figures. Returns the model folder.

    Args:
        config: the options.
        glyphs: the data set; the font's glyphs if not given.
        on_step: called with the stage's name and the number of steps done, after every step and its checkpoint.

    Raises:
        MissingExtraError: if a package of the ``ldm`` extra is not installed.
        FileNotFoundError: if the font is not there.
        ConfigurationError: if an option cannot be used or differs from the checkpoint's.
    """
    require_extra("ldm", EXTRA)
    import torch

    from train.diffusion.data import load_data, write_prompts
    from train.diffusion.pipeline import save_pipeline
    from train.diffusion.tokenizer import build_tokenizer
    from train.diffusion.unet import UnetStage
    from train.diffusion.vae import VaeStage, augmented, standardize

    if config.threads:
        torch.set_num_threads(config.threads)
    data = load_data(config, glyphs)
    log.info("%d glyphs for training, %d held out", len(data.train), len(data.held))
    write_prompts(config, data)

    augment = augmented if config.vae_augment else None
    vae_stage = VaeStage(config, data.train_images, data.held_images, augment, on_step)
    vae_stage.run()
    vae = vae_stage.vae.eval().requires_grad_(False)
    standardize(vae, data.train_images, config.device)

    tokenizer = build_tokenizer([glyph.prompt for glyph in data.train], config)
    unet_stage = UnetStage(config, data, vae, tokenizer, on_step)
    unet_stage.run()

    save_pipeline(config.out, vae, tokenizer, unet_stage)
    metrics = {
        "command": config.command(),
        "resolution": config.resolution,
        "latent_side": config.latent_side,
        "seeds": {"seed": config.seed, "split_seed": config.split_seed},
        "glyphs": len(data.train) + len(data.held),
        "families": len({glyph.family for glyph in itertools.chain(data.train, data.held)}),
        "glyphs_train": len(data.train),
        "glyphs_held_out": len(data.held),
        "parameters": {
            name: sum(parameter.numel() for parameter in module.parameters())
            for name, module in (("vae", vae), *unet_stage.modules.items())
        },
        "vae": {
            "scaling_factor": vae.config.scaling_factor,
            "images_seen": vae_stage.step * vae_stage.batch,
            "seconds": round(vae_stage.seconds, 1),
            **vae_stage.history[-1],
        },
        "unet": {
            "images_seen": unet_stage.step * unet_stage.batch,
            "seconds": round(unet_stage.seconds, 1),
            **unet_stage.history[-1],
        },
        "history": {"vae": vae_stage.history, "unet": unet_stage.history},
        "versions": versions(),
    }
    write_atomically(config.out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    log.info("saved to %s", config.out)
    return config.out


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that shape the weights."""
    names = ("torch", "diffusers", "transformers", "tokenizers", "fonttools", "pillow", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
