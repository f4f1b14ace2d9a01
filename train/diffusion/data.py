"""What is trained on: the glyphs of both parts, and the prompt lists that are written of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from refine_env._files import write_atomically
from refine_env.errors import ConfigurationError
from train.diffusion import emoji
from train.diffusion.config import Config


@dataclass(frozen=True)
class Dataset:
    """The glyphs of both parts with their images, (N, 3, R, R), uint8."""

    train: list[emoji.Glyph]
    held: list[emoji.Glyph]
    train_images: torch.Tensor
    held_images: torch.Tensor


def load_data(config: Config, glyphs: Sequence[emoji.Glyph] | None) -> Dataset:
    """Return the data set: of the font, or of the glyphs given.

    Raises:
        ConfigurationError: if the resolution does not fit the VAE and the U-Net.
    """
    step = 2 ** (len(config.vae_widths) + len(config.unet_widths) - 2)
    if config.resolution < step or config.resolution % step:
        raise ConfigurationError(f"`resolution` must be a multiple of {step}, got {config.resolution}. Use 32 or 64.")
    if glyphs is None:
        glyphs = emoji.read_glyphs(emoji.FONT.find(config.font))
    train, held = emoji.split(glyphs, config.held_out, config.split_seed)
    return Dataset(
        train,
        held,
        torch.from_numpy(emoji.pixels(train, config.resolution)),
        torch.from_numpy(emoji.pixels(held, config.resolution)),
    )


def write_prompts(config: Config, data: Dataset) -> None:
    """Write the two prompt lists of the model folder and the 64 + 64 prompts of the cached trajectories."""
    half = 64
    chosen = [
        *emoji.diverse_prompts(data.train, half, config.split_seed),
        *emoji.diverse_prompts(data.held, half, config.split_seed),
    ]
    for path, prompts in (
        (config.out / "prompts_train.txt", [glyph.prompt for glyph in data.train]),
        (config.out / "prompts_heldout.txt", [glyph.prompt for glyph in data.held]),
        (config.trajectory_prompts, chosen),
    ):
        write_atomically(path, "".join(f"{prompt}\n" for prompt in prompts))
