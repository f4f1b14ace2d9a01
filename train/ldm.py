"""Train a small text-to-image latent diffusion model on emoji glyphs; save a StableDiffusionPipeline.

One command, ``python -m train.ldm``, goes through the stages

1. glyphs: read the font, hold families out, render the images;
2. VAE (``AutoencoderKL``): pixels to latents;
3. U-Net and text encoder (``UNet2DConditionModel``, ``CLIPTextModel``), jointly, on the VAE's latents;
4. the pipeline's folder: fp16 weights, prompt lists, metrics;
5. the evaluation of what was saved (:mod:`train.diffusion.assess`): figures, table, sheet of samples, model card.

Stages 2 and 3 write checkpoints. The same command goes on from the last one, and passes over a finished
stage.

Notation: x_0 is a latent in the diffusion model's units (scaling factor applied), M its number of elements.
"""

from __future__ import annotations

from typing import Any

from refine_env.commands import command, run
from train.diffusion.assess import assess, sources
from train.diffusion.config import EXTRA, Config
from train.diffusion.training import train
from train.options import require_extra, show_log, takes_options

__all__ = ["Config", "main", "train"]


@takes_options(Config)
@command
def main(**options: Any) -> None:
    """Train and evaluate the emoji model, or go on where an interrupted run with the same options stopped.

    Exit codes: 0 done, 2 an argument is wrong, 3 a file is missing or cannot be written, 4 the ldm extra is not
    installed.
    """
    show_log()
    config = Config(**options)
    require_extra("ldm", EXTRA)
    glyphs, groups = sources(config.font, config.emoji_test)  # what is missing is said before the training
    folder = train(config, glyphs)
    assess(folder, config.trajectory_prompts, config.sheet, glyphs, groups, device=config.device)


if __name__ == "__main__":
    run(main)
