"""The whole training of the radio map model: data, VAE, U-Net, regressor, and the model folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from refine_env._files import write_atomically
from train.diffusion.config import OnStep
from train.diffusion.radiomap.config import EXTRA, RadioMapConfig
from train.options import require_extra

log = logging.getLogger("train.radiomap")


def train(config: RadioMapConfig, on_step: OnStep | None = None) -> Path:
    """Run the stages that the options name, or go on with them. Returns the model folder.

    The folder is written at the end of the U-Net's stage; the regressor stays in ``work``. A stage takes what those
    before it left in ``work``, or goes through them, so that two processes may run a stage each.

    Args:
        config: the options.
        on_step: called with the stage's name and the number of steps done, after every step and its checkpoint.

    Raises:
        MissingExtraError: if a package of the ``ldm`` extra is not installed.
        ConfigurationError: if an option differs from the checkpoint's.
    """
    require_extra("ldm", EXTRA)
    import torch

    from train.diffusion.radiomap.data import Dataset, turned
    from train.diffusion.radiomap.pipeline import SCALING_FACTOR, save_pipeline
    from train.diffusion.radiomap.stages import DecoderStage, RadioMapUnetStage, RegressorStage
    from train.diffusion.stage import Stage
    from train.diffusion.vae import VaeStage, rescale, standardize

    if config.threads:
        torch.set_num_threads(config.threads)
    chosen = config.chosen_stages
    done: dict[str, Stage] = {}
    if set(chosen) & {"vae", "decoder", "unet"}:
        few = Dataset(config, config.vae_scenes)
        images = Dataset.maps(few.train)
        vae_stage = done["vae"] = VaeStage(config, images, Dataset.maps(few.held), turned, on_step)
        vae_stage.run()
        vae = vae_stage.vae.eval().requires_grad_(False)
        standardize(vae, images, config.device)
        rescale(vae, SCALING_FACTOR)
        del few, images
    data = Dataset(config) if set(chosen) - {"vae"} else None
    if set(chosen) & {"decoder", "unet"} and data is not None:
        done["decoder"] = DecoderStage(config, data, vae, on_step)
        done["decoder"].run()
        vae.requires_grad_(False)
    if "unet" in chosen and data is not None:
        unet_stage = done["unet"] = RadioMapUnetStage(config, data, vae, on_step)
        unet_stage.run()
        save_pipeline(config, vae, unet_stage)
    if "regressor" in chosen and data is not None:
        regressor_stage = done["regressor"] = RegressorStage(config, data, on_step)
        regressor_stage.run()
        regressor_stage.regressor.save_pretrained(config.work / "regressor")
    if "unet" in chosen:
        write_metrics(config, done)
        log.info("saved to %s", config.out)
    return config.out


def write_metrics(config: RadioMapConfig, done: dict[str, Any]) -> None:
    """Write the training's figures beside the model."""
    from train.diffusion.training import versions

    metrics = {
        "command": config.command(),
        "resolution": config.resolution,
        "latent_side": config.latent_side,
        "seed": config.seed,
        "scenes_train": config.scenes,
        "scenes_held_out": config.held_out,
        "parameters": {
            name: sum(parameter.numel() for parameter in module.parameters())
            for stage in done.values()
            for name, module in stage.modules.items()
        },
        **{
            name: {
                "images_seen": stage.step * stage.batch,
                "seconds": round(stage.seconds, 1),
                **stage.history[-1],
            }
            for name, stage in done.items()
        },
        "history": {name: stage.history for name, stage in done.items()},
        "versions": versions(),
    }
    write_atomically(config.out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
