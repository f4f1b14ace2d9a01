"""The options of ``python -m train.ldm``, and those that it shares with other latent diffusion models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from train.options import FREE, Options, parse_numbers

EXTRA = ("torch", "diffusers", "transformers", "accelerate", "fontTools", "PIL")
"""Packages of the ``ldm`` extra without which nothing is trained or assessed."""

LATENT_CHANNELS = 4

OnStep = Callable[[str, int], None]
"""Called with a stage's name and the number of steps done."""

# Options of the training that the assessment has, too.
FontOption = Annotated[
    Path | None, typer.Option(help="NotoColorEmoji.ttf with bitmaps; looked for in the font folders if not given.")
]
GroupsOption = Annotated[
    Path | None,
    typer.Option(help="Unicode's emoji-test.txt, for the groups; looked for in the usual folders if not given."),
]
DeviceOption = Annotated[str, typer.Option(help="Torch device: cpu, cuda, ...")]
SheetOption = Annotated[Path, typer.Option(help="File for the sheet of samples.")]
MODEL = Path("refine_env/models/emoji")
PROMPTS = Path("cached_trajectories/default.prompts.txt")
SHEET = Path("docs/figures/emoji-samples.png")


@dataclass(frozen=True)
class StageConfig(Options):
    """Options of every training of a latent diffusion model: of the VAE's stage, the U-Net's, and their loop.

    Attributes:
        UNET_PREFIXES: beginnings of the names of the options that the VAE does not depend on, beside the free ones: a
            finished VAE serves other U-Nets.

    Raises:
        ConfigurationError: if an option is out of its bounds.
    """

    UNET_PREFIXES: ClassVar[tuple[str, ...]] = ("unet_", "ema_", "snr_")

    work: Annotated[Path, typer.Option(help="Folder of checkpoints."), FREE] = Path("runs")
    device: Annotated[DeviceOption, FREE] = "cpu"
    threads: Annotated[int, typer.Option(help="Torch threads; 0 leaves torch's own choice.", min=0, max=1024), FREE] = 0
    bf16: Annotated[bool, typer.Option(help="Run the networks under bfloat16 autocast.")] = True
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and noise.", min=0)] = 0
    resolution: Annotated[
        int, typer.Option(help="Image side in pixels; the latents' side is a quarter of it.", min=8, max=1024)
    ] = 64
    log_every: Annotated[int, typer.Option(help="Steps between log lines with held-out figures.", min=1), FREE] = 500
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1), FREE] = 250

    vae_channels: Annotated[str, typer.Option(help="VAE channels, one number a level.")] = "16,32,64"
    vae_attention: Annotated[bool, typer.Option(help="Attention in the middle of the VAE's encoder and decoder.")] = (
        False
    )
    vae_steps: Annotated[int, typer.Option(help="VAE steps.", min=0)] = 4000
    vae_batch: Annotated[int, typer.Option(help="VAE images a step.", min=1, max=65536)] = 16
    vae_lr: Annotated[float, typer.Option(help="VAE peak learning rate (cosine decay to 0).", min=0, max=1)] = 2.5e-3
    vae_kl: Annotated[float, typer.Option(help="Weight of the KL term, summed over a latent.", min=0, max=1e6)] = 1e-6

    unet_channels: Annotated[str, typer.Option(help="U-Net channels, one number a level.")] = "64,112,144"
    unet_layers: Annotated[int, typer.Option(help="Residual layers a level.", min=1, max=65536)] = 1
    unet_heads: Annotated[int, typer.Option(help="Attention heads.", min=1, max=65536)] = 3
    unet_steps: Annotated[int, typer.Option(help="U-Net steps.", min=0)] = 7000
    unet_batch: Annotated[int, typer.Option(help="U-Net samples a step.", min=1, max=65536)] = 32
    unet_lr: Annotated[float, typer.Option(help="U-Net peak learning rate (cosine decay to 0).", min=0, max=1)] = 1e-3
    unet_warmup: Annotated[int, typer.Option(help="Warm-up steps of the learning rate.", min=0)] = 300
    ema_decay: Annotated[float, typer.Option(help="Largest decay of the moving average.", min=0, max=1)] = 0.999
    snr_gamma: Annotated[float, typer.Option(help="Bound of the Min-SNR weight; 0: none.", min=0, max=1e12)] = 5.0
    snr_power: Annotated[
        float,
        typer.Option(help="The error of x_0 weighs as the bounded SNR to this power; 1 is Min-SNR.", min=0, max=1),
    ] = 0.25

    @property
    def vae_widths(self) -> tuple[int, ...]:
        """Channels of the VAE, one number a level."""
        return parse_numbers("vae_channels", self.vae_channels, int)

    @property
    def unet_widths(self) -> tuple[int, ...]:
        """Channels of the U-Net, one number a level."""
        return parse_numbers("unet_channels", self.unet_channels, int)

    @property
    def latent_side(self) -> int:
        """Side of the latents in elements."""
        return self.resolution >> len(self.vae_widths) - 1

    def trained_stage_with(self, stage: str) -> dict[str, Any]:
        """The options that the weights of a stage ("vae" or "unet") depend on, by name."""
        options = self.trained_with()
        if stage == "vae":
            return {name: value for name, value in options.items() if not name.startswith(self.UNET_PREFIXES)}
        return options

    def command(self) -> str:
        """The command line of this run: the options that shape the weights and are not the defaults."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return self.command_line(name for name, value in self.trained_with().items() if value != defaults[name])


@dataclass(frozen=True)
class Config(StageConfig):
    """Every option of ``python -m train.ldm``. The defaults made the bundled model.

    Raises:
        ConfigurationError: if an option is out of its bounds.
    """

    MODULE = "train.ldm"
    UNET_PREFIXES = (*StageConfig.UNET_PREFIXES, "text_", "prompt_", "family_")

    out: Annotated[Path, typer.Option(help="Folder the pipeline is saved in."), FREE] = MODEL
    work: Annotated[Path, typer.Option(help="Folder of checkpoints."), FREE] = Path("runs/emoji")
    sheet: Annotated[SheetOption, FREE] = SHEET
    trajectory_prompts: Annotated[
        Path, typer.Option(help="File for the 128 prompts of the cached trajectories."), FREE
    ] = PROMPTS
    font: Annotated[FontOption, FREE] = None
    emoji_test: Annotated[GroupsOption, FREE] = None
    split_seed: Annotated[int, typer.Option(help="Seed of the held-out families and of the prompt choice.", min=0)] = 0
    held_out: Annotated[float, typer.Option(help="Part of the glyphs held out, by family.", min=0, max=0.5)] = 0.05
    vae_augment: Annotated[
        bool, typer.Option(help="Mirror, shift and recolor the VAE's training images at random.")
    ] = True

    text_vocab: Annotated[int, typer.Option(help="Largest vocabulary of the tokenizer.", min=1, max=65536)] = 1536
    text_length: Annotated[int, typer.Option(help="Tokens a prompt is padded or cut to.", min=4, max=65536)] = 32
    text_width: Annotated[int, typer.Option(help="Width of the text encoder.", min=1, max=65536)] = 128
    text_layers: Annotated[int, typer.Option(help="Layers of the text encoder.", min=1, max=65536)] = 2
    text_heads: Annotated[int, typer.Option(help="Attention heads of the text encoder.", min=1, max=65536)] = 4
    prompt_dropout: Annotated[float, typer.Option(help="Part of the prompts left empty.", min=0, max=1)] = 0.1
    family_power: Annotated[
        float,
        typer.Option(
            help="A glyph is drawn with weight (family size)^-power: variants do not crowd out the rest.",
            min=-10,
            max=10,
        ),
    ] = 1.0
    prompt_signs: Annotated[
        float,
        typer.Option(help="Weight with which a flag, sign or letter is drawn, a picture's being 1.", min=0, max=1e6),
    ] = 0.25
