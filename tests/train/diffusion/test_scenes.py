"""Street scenes: what holds for all of them, what each change leaves alone, and their sheet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from refine_env.errors import ConfigurationError
from refine_env.radiomap import gray
from train.diffusion import scene_sheet, scenes
from train.diffusion.propagation import free_space_power
from train.diffusion.scene import Scene
from train.diffusion.scenes import conditions, make_scene

CHANGES = (
    scenes.move_transmitter,
    scenes.change_cars,
    scenes.with_cars,
    scenes.change_buildings,
    lambda scene, seed: scenes.without_cars(scene),
)


def check_is_valid(scene: Scene) -> None:
    side = scene.side
    streets = scenes._street_mask(scene)
    column, row = map(int, scene.transmitter)
    assert scene.buildings.shape == scene.cars.shape == (side, side)
    assert 0.15 <= scene.buildings.mean() <= 0.5
    assert scene.transmitter == (column + 0.5, row + 0.5)
    assert streets[row, column]
    assert not scenes._near(scene.buildings | scene.cars, 1.0)[row, column]
    assert not (scene.buildings & scene.cars).any()
    assert not (scene.buildings & streets).any()
    assert not (scene.cars & ~streets).any()
    np.testing.assert_array_equal(scene.buildings, scenes._built(scene.polygons, side))
    np.testing.assert_array_equal(scene.cars, scenes._mask(scene.car_polygons, side))
    for car in scene.car_polygons:
        length, width = np.hypot(*(car[1] - car[0])), np.hypot(*(car[2] - car[1]))
        assert 4.2 <= length <= 5.2
        assert 1.8 <= width <= 2.1
    for rings in scene.polygons:
        for k, ring in enumerate(rings):
            x, y = ring.T
            area = np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)) / 2
            assert (area > 0) == (k == 0)  # the building is on the left of all its rings


def same(one: Scene, other: Scene) -> bool:
    return (
        np.array_equal(one.buildings, other.buildings)
        and np.array_equal(one.cars, other.cars)
        and one.transmitter == other.transmitter
        and all(map(np.array_equal, one.car_polygons, other.car_polygons))
        and all(np.array_equal(a[0], b[0]) for a, b in zip(one.polygons, other.polygons, strict=True))
    )


def test_scenes_are_valid() -> None:
    shares, cars, angles = [], [], set()
    for seed in range(200):
        scene = make_scene(seed)
        check_is_valid(scene)
        assert scene.car_polygons
        shares.append(scene.buildings.mean())
        cars.append(len(scene.car_polygons))
        along = scene.streets[0][1] - scene.streets[0][0]
        angles.add(round(float(np.arctan2(along[1], along[0])), 6))
    assert np.ptp(shares) > 0.15  # dense and open ones
    assert np.ptp(cars) > 10
    assert 100 < len(angles) < 170  # a third stand straight, every other at an angle of its own


@pytest.mark.parametrize("side", [128, 256])
def test_larger_scenes_are_valid(side: int) -> None:
    scene = make_scene(0, side)
    check_is_valid(scene)
    assert scene.side == side
    assert conditions(scene).shape == (3, side, side)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_scenes_are_valid(change: Callable[[Scene, int], Scene]) -> None:
    for seed in range(20):
        check_is_valid(change(make_scene(seed), seed + 100))


@pytest.mark.parametrize("change", [make_scene, *CHANGES])
def test_the_same_seed_gives_the_same_scene(change: Callable[..., Scene]) -> None:
    seeds = (7,) if change is make_scene else (make_scene(4), 7)
    other = (8,) if change is make_scene else (make_scene(4), 8)
    assert same(change(*seeds), change(*seeds))
    assert same(change(*seeds), change(*other)) == (change is CHANGES[-1])


def test_a_transmitter_moves_alone() -> None:
    for seed in range(20):
        scene = make_scene(seed)
        moved = scenes.move_transmitter(scene, seed)
        assert np.hypot(*np.subtract(moved.transmitter, scene.transmitter)) >= 8.0
        assert moved.buildings is scene.buildings
        assert moved.cars is scene.cars


def test_cars_come_and_go_alone() -> None:
    scene = make_scene(2)
    empty = scenes.without_cars(scene)
    assert not empty.cars.any()
    assert not empty.car_polygons
    filled = scenes.with_cars(empty, 9)
    assert filled.cars.any()
    assert not np.array_equal(filled.cars, scene.cars)
    assert filled.buildings is scene.buildings
    assert filled.transmitter == scene.transmitter
    assert same(filled, scenes.change_cars(scene, 9))


def test_one_or_two_buildings_change_and_nothing_else() -> None:
    counts = []
    for seed in range(30):
        scene = make_scene(seed)
        changed = scenes.change_buildings(scene, seed)
        assert changed.cars is scene.cars
        assert changed.transmitter == scene.transmitter
        assert 0.01 <= (changed.buildings ^ scene.buildings).mean() < 0.3
        kept = sum(any(rings is old for old in scene.polygons) for rings in changed.polygons)
        assert 0 <= len(scene.polygons) - kept <= 2
        assert 0 <= len(changed.polygons) - kept <= 2
        counts.append(len(changed.polygons) - len(scene.polygons))
    assert min(counts) < 0 < max(counts)  # they go and they come


def test_scenes_stay_what_they_are() -> None:
    # Models are trained on them: another draw needs another model.
    scene = make_scene(0)
    assert (scene.transmitter, int(scene.buildings.sum()), int(scene.cars.sum())) == ((28.5, 36.5), 1277, 99)


def test_conditions_are_what_is_told() -> None:
    scene = make_scene(1)
    told = conditions(scene)
    assert told.dtype == np.float32
    np.testing.assert_array_equal(told[0], scene.buildings)
    np.testing.assert_array_equal(told[1], scene.cars)
    column, row = map(int, scene.transmitter)
    assert told[2].max() == told[2, row, column] < 1.0
    assert told[2].min() > 0.5
    np.testing.assert_array_equal(told[2], gray(free_space_power(scene.transmitter, 64)))
    static = conditions(scene, static=True)
    np.testing.assert_array_equal(static[0], told[0])
    assert not static[1:].any()


def test_the_splits_share_no_seed() -> None:
    assert scenes.split(0) == scenes.split(scenes.FIRST_TEST_SEED - 1) == "train"
    assert scenes.split(scenes.FIRST_TEST_SEED) == "test"
    train = {scenes.make_scene(k).buildings.tobytes() for k in range(20)}
    test = {scenes.make_scene(scenes.FIRST_TEST_SEED + k).buildings.tobytes() for k in range(20)}
    assert len(train | test) == 40


@pytest.mark.parametrize(("arguments", "match"), [((-1,), "`seed`"), ((1.5,), "`seed`"), ((0, 65), "`side`.*got 65")])
def test_wrong_arguments_are_named(arguments: tuple[int, ...], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        make_scene(*arguments)
    if len(arguments) == 1:
        for change in CHANGES[:-1]:
            with pytest.raises(ConfigurationError, match=match):
                change(make_scene(0), *arguments)


def test_what_cannot_change_is_said() -> None:
    empty = Scene(np.zeros((64, 64), bool), np.zeros((64, 64), bool), (), (), (), (32.5, 32.5), 64)
    with pytest.raises(ConfigurationError, match="`scene` must have a building to change"):
        scenes.change_buildings(empty, 0)
    with pytest.raises(ConfigurationError, match="`scene` must have another place"):
        scenes.move_transmitter(empty, 0)


def test_the_sheet_is_drawn_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    sheets = [tmp_path / "a.png", tmp_path / "new" / "b.png"]
    for path in sheets:
        scene_sheet.draw_sheet(path, [make_scene(k) for k in range(2)])
    first, second = (path.read_bytes() for path in sheets)
    assert first == second
    assert first.startswith(b"\x89PNG")
