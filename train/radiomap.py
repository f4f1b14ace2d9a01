"""Train a latent diffusion model of radio maps, conditioned on the scene; save a StableDiffusionUpscalePipeline.

One command, ``python -m train.radiomap``, goes through the stages

1. data: street scenes and their received power (:mod:`train.diffusion.scenes`, :mod:`train.diffusion.propagation`);
2. VAE (``AutoencoderKL``): maps to latents; then its decoder alone, on more maps;
3. U-Net (``UNet2DConditionModel``) on the VAE's latents, with buildings, cars and transmitter as channels beside them;
   of a part of the samples it sees the buildings alone, so that it is its own static model;
4. the regressor that it is compared with, a U-Net from the scene to the map;
5. the evaluation of what was saved (:mod:`train.diffusion.radiomap.assess`): figures, sheet of maps, model card.

The stages 1 to 4 write files that the same command goes on from, and passes over where they are finished. ``--stages``
runs some of them; the evaluation follows where all are finished.
"""

from __future__ import annotations

from typing import Any

from refine_env.commands import command, run
from train.diffusion.radiomap.config import EXTRA, STAGES, RadioMapConfig
from train.diffusion.radiomap.training import train
from train.options import require_extra, show_log, takes_options

__all__ = ["RadioMapConfig", "main", "train"]


@takes_options(RadioMapConfig)
@command
def main(**options: Any) -> None:
    """Train and evaluate the radio map model, or go on where an interrupted run with the same options stopped.

    Exit codes: 0 done, 2 an argument is wrong, 3 a file is missing or cannot be written, 4 the ldm extra is not
    installed.
    """
    show_log()
    config = RadioMapConfig(**options)
    require_extra("ldm", EXTRA)
    train(config)
    if set(config.chosen_stages) == set(STAGES):
        from train.diffusion.radiomap.assess import assess

        assess(config.out, config.work, config.sheet, device=config.device)


if __name__ == "__main__":
    run(main)
