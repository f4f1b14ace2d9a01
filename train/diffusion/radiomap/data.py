"""What is trained on: maps of scenes with their conditions, written once in pieces, turned and mirrored in use.

Buildings, cars, transmitter and map of a scene are four planes of bytes, 255 being 1, as in RadioMapSeer's pictures.
Of every scene there are three maps: as it is, with its transmitter elsewhere, and with that at a third place and no
cars.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from refine_env._files import replacing
from refine_env.errors import describe_error
from refine_env.radiomap import gray
from train.diffusion.propagation import received_power
from train.diffusion.radiomap.config import CONDITION_CHANNELS, RadioMapConfig, Split, first_seed
from train.diffusion.scenes import Scene, conditions, make_scene, move_transmitter, without_cars
from train.options import unreadable_checkpoint

SHARD = 250
"""Scenes in a file."""
_OTHER_SEED = 10**9  # for the second place of the transmitter


def bytes_of(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Values in [0, 1] as bytes."""
    pixels: NDArray[np.uint8] = np.rint(np.clip(values, 0.0, 1.0) * 255.0).astype(np.uint8)
    return pixels


def planes(scene: Scene) -> NDArray[np.uint8]:
    """Buildings, cars, transmitter and map of a scene, (4, side, side)."""
    return bytes_of(np.concatenate([conditions(scene), gray(received_power(scene))[None]]))


def variants(seed: int, side: int) -> list[Scene]:
    """The three scenes that are made of a seed."""
    scene = make_scene(seed, side=side)
    return [scene, move_transmitter(scene, seed), without_cars(move_transmitter(scene, seed + _OTHER_SEED))]


def load_planes(folder: Path, split: Split, count: int, side: int) -> torch.Tensor:
    """The maps of the first scenes of a split with their conditions, drawn and written where files of them are missing.

    Args:
        folder: of the files, which other processes may write, too.
        split: of the scenes.
        count: number of scenes.
        side: of the maps in pixels.

    Returns:
        uint8 (3 · count, 4, side, side): buildings, cars, transmitter, map.

    Raises:
        ConfigurationError: if a file is there and damaged.
    """
    parts = []
    shards = range(-(-count // SHARD))
    for shard in tqdm(shards, desc=f"{split} scenes", mininterval=10):
        scenes = range(shard * SHARD, min((shard + 1) * SHARD, count))
        path = folder / f"{split}-{side}-{scenes.start}-{scenes.stop}.npy"
        if not path.is_file():
            drawn = np.stack([planes(scene) for k in scenes for scene in variants(first_seed(split) + k, side)])
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, drawn)
        parts.append(torch.from_numpy(_read(path, (3 * len(scenes), CONDITION_CHANNELS + 1, side, side))))
    return torch.cat(parts)


def _read(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    try:
        found: NDArray[np.uint8] = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise unreadable_checkpoint("--work", path, describe_error(error)) from None
    if found.shape != shape or found.dtype != np.uint8:
        raise unreadable_checkpoint("--work", path, f"{found.dtype} of shape {found.shape}, not uint8 of {shape}")
    return found


class Dataset:
    """Maps of both parts with their conditions, uint8 (N, 4, R, R) each.

    Args:
        config: the options.
        scenes: number of the training's; default all.
    """

    def __init__(self, config: RadioMapConfig, scenes: int | None = None) -> None:
        folder = config.work / "scenes"
        self.train = load_planes(folder, "train", config.scenes if scenes is None else scenes, config.resolution)
        self.held = load_planes(folder, "test", config.held_out, config.resolution)

    @staticmethod
    def maps(planes: torch.Tensor) -> torch.Tensor:
        """The maps, (N, 1, R, R)."""
        return planes[:, CONDITION_CHANNELS:]


def turned(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn and mirror images (B, C, R, R), each by one of the eight symmetries of the square at random.

    A scene's map is turned with it.
    """
    across, down, diagonal = (torch.rand(3, len(images), 1, 1, 1, generator=generator) < 0.5).to(images.device)
    images = torch.where(across, images.flip(3), images)
    images = torch.where(down, images.flip(2), images)
    return torch.where(diagonal, images.transpose(2, 3), images)


def unit(planes: torch.Tensor, device: str) -> torch.Tensor:
    """Bytes as float32 in [0, 1], on a device."""
    return planes.to(device).float() / 255


def folded(condition: torch.Tensor, fold: int) -> torch.Tensor:
    """What the U-Net sees of conditions (B, 3, R, R) in [0, 1]: (B, 3·fold², R/fold, R/fold) in [-1, 1]."""
    return torch.nn.functional.pixel_unshuffle(condition, fold) * 2 - 1
