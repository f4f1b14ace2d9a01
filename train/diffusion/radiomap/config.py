"""The options of ``python -m train.radiomap``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from refine_env.commands import parse_list
from refine_env.errors import ConfigurationError
from train.diffusion.config import LATENT_CHANNELS, StageConfig
from train.diffusion.scenes import FIRST_TEST_SEED
from train.options import FREE, parse_numbers

__all__ = ["CONDITION_CHANNELS", "EXTRA", "MODEL", "SHEET", "STAGES", "RadioMapConfig", "Split", "first_seed"]

EXTRA = ("torch", "diffusers", "transformers", "accelerate", "PIL")
"""Packages of the ``ldm`` extra without which nothing is trained or assessed."""

CONDITION_CHANNELS = 3
"""Of a scene: buildings, cars, and the gray value of the transmitter's power in free space."""

Split = Literal["train", "test"]
STAGES = ("data", "vae", "decoder", "unet", "regressor")
MODEL = Path("refine_env/models/radiomap")
SHEET = Path("docs/figures/radiomap-samples.png")


def first_seed(split: Split) -> int:
    """The seed of a split's first scene."""
    return 0 if split == "train" else FIRST_TEST_SEED


@dataclass(frozen=True)
class RadioMapConfig(StageConfig):
    """Every option of ``python -m train.radiomap``. The defaults made the bundled model.

    Raises:
        ConfigurationError: if an option is out of its bounds.
    """

    MODULE = "train.radiomap"
    UNET_PREFIXES = (*StageConfig.UNET_PREFIXES, "static_", "regressor_")

    out: Annotated[Path, typer.Option(help="Folder the pipeline is saved in."), FREE] = MODEL
    work: Annotated[Path, typer.Option(help="Folder of the data and of the checkpoints."), FREE] = Path("runs/radiomap")
    sheet: Annotated[Path, typer.Option(help="File for the sheet of samples."), FREE] = SHEET
    stages: Annotated[
        str,
        typer.Option(help=f"Stages to run, with commas between: {', '.join(STAGES)}. Two processes may share."),
        FREE,
    ] = ",".join(STAGES)

    scenes: Annotated[int, typer.Option(help="Scenes of the training, three maps of each.", min=1, max=10**6)] = 16000
    held_out: Annotated[int, typer.Option(help="Scenes held out, three maps of each.", min=1, max=10**5)] = 256
    vae_scenes: Annotated[int, typer.Option(help="Scenes of those that the VAE is trained on.", min=1, max=10**6)] = (
        4000
    )
    vae_steps: Annotated[int, typer.Option(help="VAE steps.", min=0)] = 3400
    vae_kl: Annotated[float, typer.Option(help="Weight of the KL term, summed over a latent.", min=0, max=1e6)] = 2e-7
    decoder_steps: Annotated[int, typer.Option(help="Further steps of the VAE's decoder alone.", min=0)] = 1500
    decoder_lr: Annotated[float, typer.Option(help="Their peak learning rate (cosine decay to 0).", min=0, max=1)] = (
        6e-4
    )
    unet_channels: Annotated[str, typer.Option(help="U-Net channels, one number a level.")] = "64,128,192"
    unet_heads: Annotated[int, typer.Option(help="Attention heads.", min=1, max=65536)] = 4
    unet_steps: Annotated[int, typer.Option(help="U-Net steps.", min=0)] = 4600
    snr_gamma: Annotated[
        float, typer.Option(help="Bound of the SNR in the loss's weight; 0: none.", min=0, max=1e12)
    ] = 20.0
    static_part: Annotated[
        float, typer.Option(help="Part of the samples whose cars and transmitter the U-Net does not see.", min=0, max=1)
    ] = 0.2
    regressor_channels: Annotated[str, typer.Option(help="Regressor's channels, one number a level.")] = (
        "16,32,64,128,192"
    )
    regressor_steps: Annotated[int, typer.Option(help="Regressor steps.", min=0)] = 2400
    regressor_batch: Annotated[int, typer.Option(help="Regressor's maps a step.", min=1, max=65536)] = 16
    regressor_lr: Annotated[
        float, typer.Option(help="Regressor's peak learning rate (cosine decay to 0).", min=0, max=1)
    ] = 1e-3

    def __post_init__(self) -> None:
        """Refuse what the options' bounds exclude, and what does not go together."""
        super().__post_init__()
        levels = max(len(self.vae_widths) + len(self.unet_widths) - 1, len(self.regressor_widths))
        step = 2 ** (levels - 1)
        if self.resolution % step:
            raise ConfigurationError(
                f"`resolution` must be a multiple of {step}, got {self.resolution}. Use 64 or 128."
            )
        if self.vae_scenes > self.scenes:
            raise ConfigurationError(
                f"`vae_scenes` must be at most `scenes`, {self.scenes}, got {self.vae_scenes}. Give fewer."
            )
        _ = self.chosen_stages

    @property
    def chosen_stages(self) -> tuple[str, ...]:
        """The stages that are to run."""
        return parse_list(
            "stages",
            self.stages,
            str,
            what=f"of {', '.join(STAGES)}, with commas between",
            advice="Leave it out for all of them.",
            valid=set(STAGES).issuperset,
        )

    @property
    def regressor_widths(self) -> tuple[int, ...]:
        """Channels of the regressor, one number a level."""
        return parse_numbers("regressor_channels", self.regressor_channels, int)

    @property
    def fold(self) -> int:
        """Side of the squares of pixels that an element of the latent has the condition of, each pixel a channel."""
        return self.resolution // self.latent_side

    @property
    def unet_inputs(self) -> int:
        """Channels that the U-Net sees: the latent's, and the condition's at the latent's resolution."""
        return LATENT_CHANNELS + CONDITION_CHANNELS * self.fold**2

    def trained_stage_with(self, stage: str) -> dict[str, Any]:
        """The options that the weights of a stage ("vae", "decoder", "unet" or "regressor") depend on, by name."""
        options = super().trained_stage_with(stage)
        left_out = {
            "vae": ("scenes", "decoder_"),
            "decoder": self.UNET_PREFIXES,
            "unet": ("decoder_", "regressor_"),
            "regressor": (*self.UNET_PREFIXES[:-1], "vae_", "decoder_"),
        }[stage]
        return {name: value for name, value in options.items() if not name.startswith(left_out)}
