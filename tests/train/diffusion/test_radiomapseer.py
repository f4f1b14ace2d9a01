"""The reader of RadioMapSeer, on a folder of its layout that is written here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refine_env.errors import ConfigurationError
from refine_env.radiomap import dbm, gray
from train.diffusion.propagation import free_space_power, received_power
from train.diffusion.radiomapseer import maps, read
from train.diffusion.scene import Scene
from train.diffusion.scenes import conditions, make_scene, without_cars

Image: Any = pytest.importorskip("PIL.Image", reason="the ldm extra is not installed")


def write(path: Path, level: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.rint(255 * np.asarray(level, dtype=np.float64)).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return make_scene(6, 256)


@pytest.fixture
def folder(tmp_path: Path, scene: Scene) -> Path:
    """Two maps of one scene as RadioMapSeer has them: with cars and without."""
    antenna = np.zeros((256, 256))
    antenna[int(scene.transmitter[1]), int(scene.transmitter[0])] = 1.0
    write(tmp_path / "png/buildings_complete/17.png", scene.buildings)
    write(tmp_path / "png/cars/17.png", scene.cars)
    write(tmp_path / "png/antennas/17_3.png", antenna)
    level = gray(free_space_power(scene.transmitter, 256)) * ~scene.buildings
    write(tmp_path / "gain/DPM/17_3.png", level)
    write(tmp_path / "gain/carsDPM/17_3.png", 0.5 * level)
    write(tmp_path / "gain/carsDPM/9_12.png", level)
    return tmp_path


def test_a_map_is_read_as_our_own_scenes_are(folder: Path, scene: Scene) -> None:
    told, level = read(folder, 17, 3)
    assert told.dtype == level.dtype == np.float32
    np.testing.assert_array_equal(told, conditions(scene))
    assert level.shape == (256, 256)
    assert (level[scene.buildings] == 0.0).all()
    np.testing.assert_allclose(read(folder, 17, 3, "DPM").gray, 2 * level, atol=1.01 / 255)


def test_levels_are_received_powers(folder: Path, scene: Scene) -> None:
    level = read(folder, 17, 3, "DPM").gray
    free = free_space_power(scene.transmitter, 256)
    np.testing.assert_allclose(dbm(level)[~scene.buildings], free[~scene.buildings], atol=0.51 * 100 / 255)


def test_without_cars_none_are_told(folder: Path, scene: Scene) -> None:
    np.testing.assert_array_equal(read(folder, 17, 3, "DPM").conditions, conditions(without_cars(scene)))
    np.testing.assert_array_equal(read(folder, 17, 3, static=True).conditions, conditions(scene, static=True))


def test_maps_are_listed(folder: Path) -> None:
    assert maps(folder) == [(9, 12), (17, 3)]
    assert maps(folder, "DPM") == [(17, 3)]
    with pytest.raises(ConfigurationError, match="must be RadioMapSeer's and hold maps in gain/IRT4, got none"):
        maps(folder, "IRT4")
    with pytest.raises(ConfigurationError, match="`simulation` must be one of"):
        maps(folder, "dpm")


def test_what_is_wrong_is_named(folder: Path, scene: Scene) -> None:
    with pytest.raises(ConfigurationError, match=r"17_4.png` must be a picture of RadioMapSeer, got"):
        read(folder, 17, 4)
    with pytest.raises(ConfigurationError, match="`simulation` must be one of"):
        read(folder, 17, 3, "cars")
    write(folder / "png/antennas/17_3.png", np.zeros((256, 256)))
    with pytest.raises(ConfigurationError, match=r"png/antennas/17_3.png` must have one white pixel, got 0"):
        read(folder, 17, 3)
    write(folder / "png/buildings_complete/17.png", ~scene.buildings)
    write(folder / "png/antennas/17_3.png", np.arange(256 * 256).reshape(256, 256) == 5)
    with pytest.raises(ConfigurationError, match=r"17.png` must be white where gain/carsDPM/17_3.png is black"):
        read(folder, 17, 3)
    write(folder / "png/cars/17.png", np.zeros((128, 128)))
    with pytest.raises(ConfigurationError, match=r"must be 256 × 256 pixels, got 128 × 128"):
        read(folder, 17, 3)


def test_the_truth_of_a_large_scene_lies_on_the_scale(scene: Scene) -> None:
    level = gray(received_power(scene))
    assert level.min() == 0.0
    assert 0.9 < level.max() < 1.0
