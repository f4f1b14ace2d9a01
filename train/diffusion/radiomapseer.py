"""Reader of RadioMapSeer, the data set of RadioUNet [1]: its maps and conditions as those of our own scenes.

Of its folder these files are read, all of them gray 8-bit PNGs of 256 × 256 pixels, a metre each:

- ``png/buildings_complete/MAP.png`` and ``png/cars/MAP.png``: white inside buildings, and inside cars;
- ``png/antennas/MAP_TRANSMITTER.png``: one white pixel;
- ``gain/SIMULATION/MAP_TRANSMITTER.png``: the gray level of the path gain, on the scale of :mod:`refine_env.radiomap`;
  ``carsDPM``, ``carsIRT2`` and ``carsIRT4`` are those with cars, ``DPM``, ``IRT2`` and ``IRT4`` those without.

[1] R. Levie, Ç. Yapar, G. Kutyniok, G. Caire, "RadioUNet: Fast Radio Map Estimation with Convolutional Neural
Networks", IEEE Transactions on Wireless Communications, 2021; arXiv:1911.09002.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refine_env._validation import check_choice
from refine_env.errors import ConfigurationError, import_extra
from train.diffusion.scene import Scene
from train.diffusion.scenes import conditions

__all__ = ["SIMULATIONS", "RadioMap", "maps", "read"]

SIMULATIONS = ("DPM", "IRT2", "IRT4", "carsDPM", "carsIRT2", "carsIRT4")


class RadioMap(NamedTuple):
    """One map with what it depends on.

    Attributes:
        conditions: float32 of shape (3, S, S), as :func:`train.diffusion.scenes.conditions` gives them.
        gray: gray levels of the received power, float32 of shape (S, S), in [0, 1]; 0 inside buildings.
    """

    conditions: NDArray[np.float32]
    gray: NDArray[np.float32]


def maps(folder: Path, simulation: str = "carsDPM") -> list[tuple[int, int]]:
    """Numbers of all maps of a simulation in the folder, (map, transmitter), in their order.

    Scenes are told apart by the first of them: it is that by which maps are split into those to train and to test on.

    Raises:
        ConfigurationError: if there are none, or the simulation has another name.
    """
    check_choice("simulation", simulation, SIMULATIONS)
    names = [path.stem.split("_") for path in (folder / "gain" / simulation).glob("*_*.png")]
    found = sorted((int(scene), int(transmitter)) for scene, transmitter in names)
    if not found:
        raise ConfigurationError(
            f"`folder` must be RadioMapSeer's and hold maps in gain/{simulation}, got none in {str(folder)!r}. "
            "Give the folder that holds gain and png."
        )
    return found


def read(folder: Path, scene: int, transmitter: int, simulation: str = "carsDPM", static: bool = False) -> RadioMap:
    """Read one map.

    Args:
        folder: the one that holds ``gain`` and ``png``.
        scene: number of the map.
        transmitter: number of the transmitter in it.
        simulation: which of the simulations; without cars channel 1 of the conditions is zero.
        static: tell the buildings alone, as :func:`train.diffusion.scenes.conditions` does.

    Raises:
        ConfigurationError: if a file is missing, is no picture of the size of the others, or shows something else.
        MissingExtraError: if Pillow is not installed.
    """
    check_choice("simulation", simulation, SIMULATIONS)
    pair = f"{scene}_{transmitter}.png"
    gain = _picture(folder, f"gain/{simulation}/{pair}")
    buildings = _picture(folder, f"png/buildings_complete/{scene}.png", gain.shape) > 127
    cars = np.zeros_like(buildings)
    if simulation.startswith("cars"):
        cars = (_picture(folder, f"png/cars/{scene}.png", gain.shape) > 127) & ~buildings
    antenna = f"png/antennas/{pair}"
    places = np.argwhere(_picture(folder, antenna, gain.shape) > 127)
    if len(places) != 1:
        raise ConfigurationError(f"`{antenna}` must have one white pixel, got {len(places)}. Fetch it again.")
    if buildings.any() and gain[buildings].mean() > gain[~buildings].mean():
        raise ConfigurationError(
            f"`png/buildings_complete/{scene}.png` must be white where gain/{simulation}/{pair} is black, got more "
            "gain inside than outside. Invert the pictures of buildings."
        )
    row, column = map(int, places[0])
    told = Scene(buildings, cars, (), (), (), (column + 0.5, row + 0.5), len(gain))
    return RadioMap(conditions(told, static), gain.astype(np.float32) / np.float32(255))


def _picture(folder: Path, name: str, shape: tuple[int, ...] | None = None) -> NDArray[np.uint8]:
    """A square gray picture, uint8 of shape (S, S); of the given shape, if one is given."""
    image = import_extra("PIL.Image", "ldm")
    path = folder / name
    try:
        with image.open(path) as opened:
            pixels = np.asarray(opened.convert("L"), dtype=np.uint8)
    except OSError as error:
        raise ConfigurationError(f"`{path}` must be a picture of RadioMapSeer, got {error}. Give its folder.") from None
    expected = (len(pixels),) * 2 if shape is None else shape
    if pixels.shape != expected:
        raise ConfigurationError(
            f"`{path}` must be {expected[0]} × {expected[1]} pixels, got {pixels.shape[0]} × {pixels.shape[1]}. "
            "Fetch it again."
        )
    return pixels
