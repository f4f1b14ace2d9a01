"""The truth of radio maps: its limits, its symmetry, and its plain twin."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from refine_env.radiomap import BLACK_DBM, TRANSMIT_POWER_DBM
from tests.train.diffusion.plain_propagation import Twin, inside
from train.diffusion import propagation
from train.diffusion.propagation import received_power
from train.diffusion.scene import Points, Scene
from train.diffusion.scenes import conditions, make_scene, with_cars, without_cars


def turned(points: list[list[float]], angle: float, x: float, y: float) -> Points:
    cos, sin = np.cos(angle), np.sin(angle)
    moved: Points = np.array(points, dtype=np.float64) @ np.array([[cos, sin], [-sin, cos]]) + [x, y]
    return moved


def built(*polygons: tuple[Points, ...], cars: tuple[Points, ...] = (), side: int = 64) -> Scene:
    """A scene of the given polygons with its transmitter in the middle of the left half."""
    centre = np.arange(side) + 0.5
    nothing = np.zeros((side, side), dtype=bool)
    twin = Twin(Scene(nothing, nothing, polygons, cars, (), (16.5, 32.5), side))
    mask = np.array([[any(inside(complex(x, y), rings) for rings in twin.buildings) for x in centre] for y in centre])
    return Scene(mask, np.zeros_like(mask), polygons, cars, (), (16.5, 32.5), side)


BOX = turned([[0, 0], [9.3, 0], [9.3, 7.1], [0, 7.1]], 0.0, 24.17, 28.41)
ELL = turned([[0, 0], [12, 0], [12, 5], [5, 5], [5, 11], [0, 11]], 0.4, 43.2, 8.7)
COURT = (
    turned([[0, 0], [16, 0], [16, 15], [0, 15]], -0.2, 40.3, 40.9),
    turned([[4, 4], [4, 11], [12, 11], [12, 4]], -0.2, 40.3, 40.9),
)
CARS = (
    turned([[0, 0], [4.8, 0], [4.8, 1.9], [0, 1.9]], 0.0, 20.3, 24.2),
    turned([[0, 0], [4.5, 0], [4.5, 2.0], [0, 2.0]], 1.2, 39.4, 33.3),
)


@pytest.fixture(scope="module")
def streets() -> Scene:
    return built((BOX,), (ELL,), COURT, cars=CARS)


def test_free_space_is_exact() -> None:
    scene = built()
    y, x = np.mgrid[:64, :64] + 0.5
    distance = np.maximum(np.hypot(x - 16.5, y - 32.5), 1.0)
    expected = 23.0 - 20.0 * np.log10(4.0 * np.pi * distance * 5.9e9 / 299_792_458.0)
    np.testing.assert_allclose(received_power(scene), expected, atol=1e-5)
    np.testing.assert_allclose(propagation.free_space_power(scene.transmitter, 64), expected, atol=1e-5)


def test_knife_edge_loss_is_that_of_p526() -> None:
    assert propagation.knife_edge_loss(0.0) == pytest.approx(6.03, abs=0.01)
    assert propagation.knife_edge_loss(1.0) == pytest.approx(13.9, abs=0.1)
    assert propagation.knife_edge_loss(-0.78) == 0.0
    assert propagation.knife_edge_loss(-0.77) == pytest.approx(0.0, abs=0.1)


def test_the_kernel_is_its_plain_twin(streets: Scene) -> None:
    twin, power = Twin(streets), received_power(streets)
    rng = np.random.default_rng(0)
    pixels = rng.integers(64, size=(60, 2))
    expected = [twin.power(column + 0.5, row + 0.5) for row, column in pixels]
    np.testing.assert_allclose(power[tuple(pixels.T)], expected, atol=2e-4)


def test_all_kinds_of_paths_are_taken(streets: Scene) -> None:
    twin, power = Twin(streets), received_power(streets)
    pixels = [
        (row, column) for row in range(1, 64, 4) for column in range(1, 64, 4) if not streets.buildings[row, column]
    ]
    gained = [power[row, column] - (23.0 - twin.straight(complex(column + 0.5, row + 0.5))) for row, column in pixels]
    assert min(gained) > -1e-4
    assert max(gained) > 10.0  # around corners
    assert power[50, 47] == pytest.approx(23.0 - twin.straight(47.5 + 50.5j), abs=1e-4)  # into the courtyard
    assert (power[streets.buildings] == BLACK_DBM).all()


@pytest.mark.parametrize("seed", range(4))
def test_transmitter_and_receiver_may_change_places(seed: int) -> None:
    scene = make_scene(seed)
    power = received_power(scene)
    places = np.argwhere(~scene.buildings)
    rng = np.random.default_rng(seed)
    x, y = scene.transmitter
    for row, column in places[rng.integers(len(places), size=25)]:
        back = received_power(replace(scene, transmitter=(column + 0.5, row + 0.5)))
        assert back[int(y), int(x)] == pytest.approx(power[row, column], abs=1e-4)


def test_a_wall_never_adds_power() -> None:
    # It reaches out of the scene on both sides, so that no path goes around it.
    wall = turned([[-90, 0], [90, 0], [90, 2], [-90, 2]], 1.3, 40.0, 32.0)
    for seed in range(5):
        scene = make_scene(seed)
        x, y = scene.transmitter
        if abs((x - 40.0) * np.sin(1.3) - (y - 32.0) * np.cos(1.3)) < 3.0:
            continue
        walled = replace(scene, polygons=(*scene.polygons, (wall,)))
        before, after = received_power(scene), received_power(walled)
        assert (after <= before + 1e-4).all()
        assert (after < before - 10.0).any()


def test_a_building_never_helps_the_straight_line() -> None:
    scene = make_scene(3)
    rng = np.random.default_rng(1)
    whole = propagation._city(scene)
    for drop in range(len(scene.polygons)):
        less = propagation._city(replace(scene, polygons=scene.polygons[:drop] + scene.polygons[drop + 1 :]))
        for px, py, qx, qy in rng.uniform(0.0, 64.0, size=(40, 4)):
            loss = propagation._building_loss(px, py, qx, qy, whole, np.inf)
            assert loss >= propagation._building_loss(px, py, qx, qy, less, np.inf) - 1e-9


def test_buildings_take_power_on_the_whole() -> None:
    for seed in range(5):
        scene = make_scene(seed)
        gone = replace(scene, polygons=(), buildings=scene.buildings)
        assert received_power(scene)[~scene.buildings].mean() < received_power(gone)[~scene.buildings].mean() - 3.0


def test_a_car_changes_only_what_lies_behind_it() -> None:
    scene = built(cars=CARS[:1])
    free, power = received_power(without_cars(scene)), received_power(scene)
    x0, y0 = scene.transmitter
    (left, top), (right, bottom) = CARS[0].min(axis=0), CARS[0].max(axis=0)
    y, x = np.mgrid[:64, :64] + 0.5
    share = np.linspace(0.0, 1.0, 2001)[:, None, None]
    along_x, along_y = x0 + share * (x - x0), y0 + share * (y - y0)
    within = (along_x > left) & (along_x < right) & (along_y > top) & (along_y < bottom)
    crosses = within.any(axis=0) & ~within[-1]
    sure = within.sum(axis=0) > 5  # rays that only touch it fall between the points
    changed = power != free
    assert not (changed & ~crosses).any()
    assert changed[crosses & sure].all()
    assert (power <= free).all()


def test_cars_never_add_power() -> None:
    scene = make_scene(5)
    empty = received_power(without_cars(scene))
    for seed in range(3):
        power = received_power(with_cars(scene, seed))
        assert (power <= empty + 1e-4).all()
        assert (power < empty - 1.0).mean() > 0.02


def test_least_power_and_determinism() -> None:
    scene = make_scene(11)
    power = received_power(scene)
    assert power.dtype == np.float32
    assert power.min() >= BLACK_DBM
    assert power.max() < TRANSMIT_POWER_DBM
    np.testing.assert_array_equal(power, received_power(make_scene(11)))
    assert np.isfinite(conditions(scene)).all()
