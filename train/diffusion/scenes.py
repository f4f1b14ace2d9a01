"""Street scenes: blocks of buildings, cars on the streets between them, and a transmitter, all from one seed.

A scene is a square window on a neighborhood that goes on outside of it: a grid of streets and blocks, turned by an
angle of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from refine_env._compiled import kernel
from refine_env._validation import check_integer, shown
from refine_env.errors import ConfigurationError
from train.diffusion.propagation import free_space_power, gray
from train.diffusion.scene import Points, Scene

__all__ = [
    "BUILT_SHARE",
    "FIRST_TEST_SEED",
    "SIDES",
    "Scene",
    "change_buildings",
    "change_cars",
    "conditions",
    "make_scene",
    "move_transmitter",
    "split",
    "with_cars",
    "without_cars",
]

Buildings = list[tuple[Points, ...]]

SIDES = (64, 128, 256)
BUILT_SHARE = (0.15, 0.5)  # least and most of a scene that buildings cover
FIRST_TEST_SEED = 1_000_000

_GAP_M = 1.5  # the least between two buildings
_CLEARANCE_M = 1.0  # the least between a transmitter and a building


@kernel
def _fill(mask: NDArray[np.bool_], ring: Points) -> None:
    """Turn over all pixels of a mask whose centre is inside a ring: a second ring within the first cuts it out."""
    rows, columns = mask.shape
    top, bottom, left, right = rows, 0, columns, 0  # the pixels that may be inside
    for x, y in ring:
        top, bottom = min(top, max(int(y), 0)), max(bottom, min(int(y) + 1, rows))
        left, right = min(left, max(int(x), 0)), max(right, min(int(x) + 1, columns))
    for row in range(top, bottom):
        for column in range(left, right):
            x, y = column + 0.5, row + 0.5
            inside = False
            for k in range(len(ring)):
                ax, ay = ring[k - 1]
                bx, by = ring[k]
                if (ay > y) != (by > y) and x < ax + (y - ay) * (bx - ax) / (by - ay):
                    inside = not inside
            if inside:
                mask[row, column] = not mask[row, column]


def _mask(rings: Sequence[Points], side: int) -> NDArray[np.bool_]:
    """Pixels inside an odd number of rings; bool of shape (side, side)."""
    mask = np.zeros((side, side), dtype=np.bool_)
    for ring in rings:
        _fill(mask, ring)
    return mask


def _built(polygons: Iterable[Sequence[Points]], side: int) -> NDArray[np.bool_]:
    """Pixels inside buildings."""
    return _mask([ring for rings in polygons for ring in rings], side)


def _rectangle(x0: float, y0: float, x1: float, y1: float) -> Points:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], dtype=np.float64)


def _turned(points: Points, angle: float, centre: Points) -> Points:
    """Points turned about the origin and moved."""
    cos, sin = np.cos(angle), np.sin(angle)
    turned: Points = points @ np.array([[cos, sin], [-sin, cos]]) + centre
    return turned


@kernel
def _separation(one: Points, other: Points) -> float:
    """How far two rings are apart along the best of the directions across their edges; a lower bound of the distance.

    For convex rings it is negative just where they overlap.
    """
    best = -np.inf
    for ring in (one, other):
        for k in range(len(ring)):
            ux, uy = ring[k, 1] - ring[k - 1, 1], ring[k - 1, 0] - ring[k, 0]
            norm = math.sqrt(ux * ux + uy * uy)
            low, high, other_low, other_high = np.inf, -np.inf, np.inf, -np.inf
            for i in range(len(one)):
                at = (one[i, 0] * ux + one[i, 1] * uy) / norm
                low, high = min(low, at), max(high, at)
            for i in range(len(other)):
                at = (other[i, 0] * ux + other[i, 1] * uy) / norm
                other_low, other_high = min(other_low, at), max(other_high, at)
            best = max(best, other_low - high, low - other_high)
    return best


def _cuts(rng: np.random.Generator, reach: float) -> list[tuple[float, float]]:
    """Streets across one axis of the grid, from -reach to reach: (begin, end) of each."""
    at = -reach - rng.uniform(0.0, 30.0)
    cuts = []
    while at < reach:
        at += rng.uniform(18.0, 32.0)
        width = rng.uniform(12.0, 16.0) if rng.random() < 0.1 else rng.uniform(6.5, 10.0)
        cuts.append((at, at + width))
        at += width
    return cuts


def _courtyard(rng: np.random.Generator, w: float, h: float) -> tuple[Points, ...]:
    """A ring of houses around a courtyard, which is closed, or has a passage to the street."""
    depth = rng.uniform(0.24, 0.34) * min(w, h)
    if rng.random() < 0.4:
        return _rectangle(0, 0, w, h), _rectangle(depth, depth, w - depth, h - depth)[::-1]
    gap = rng.uniform(2.5, 5.0)
    at = rng.uniform(depth, max(w - depth - gap, depth))
    inner = [
        [at + gap, depth],
        [w - depth, depth],
        [w - depth, h - depth],
        [depth, h - depth],
        [depth, depth],
        [at, depth],
    ]
    ring = np.array([[w, 0], [w, h], [0, h], [0, 0], [at, 0], *inner[::-1], [at + gap, 0]])
    keep = np.hypot(*(ring - np.roll(ring, 1, axis=0)).T) > 0.05  # the passage may begin in the corner
    return (ring[keep],)


def _angular(rng: np.random.Generator, w: float, h: float) -> tuple[Points, ...]:
    """An L, or a U that is open to one side."""
    a, b = rng.uniform(0.35, 0.6) * w, rng.uniform(0.35, 0.6) * h
    if rng.random() < 0.65:
        return (np.array([[0, 0], [w, 0], [w, b], [a, b], [a, h], [0, h]]),)
    a = rng.uniform(0.25, 0.35) * w
    return (np.array([[0, 0], [w, 0], [w, h], [w - a, h], [w - a, b], [a, b], [a, h], [0, h]]),)


def _footprint(rng: np.random.Generator, w: float, h: float) -> tuple[Points, ...]:
    """A building that fills a lot of w times h metres: its rings, from (0, 0) to (w, h)."""
    if min(w, h) >= 14.0 and rng.random() < 0.5:
        rings = _courtyard(rng, w, h)
    elif min(w, h) >= 8.0 and rng.random() < 0.45:
        rings = _angular(rng, w, h)
    else:
        rings = (_rectangle(0, 0, w, h),)
    if rng.random() < 0.5:  # mirrored, around the same way
        rings = tuple((ring * [-1, 1] + [w, 0])[::-1] for ring in rings)
    if rng.random() < 0.5:
        rings = tuple((ring * [1, -1] + [0, h])[::-1] for ring in rings)
    return rings


def _lots(rng: np.random.Generator, w: float, h: float) -> list[tuple[float, float, float, float, float]]:
    """How a block of w times h metres is built on: (x, y, width, height, own angle) of each building."""
    kind = rng.choice(5, p=[0.3, 0.34, 0.12, 0.18, 0.06])
    if kind == 0 or min(w, h) < 9.0:  # one building
        return [(0.0, 0.0, w, h, 0.0)]
    if kind == 4:  # a square with nothing, or a pavilion
        size = rng.uniform(4.0, 7.0)
        if rng.random() < 0.4:
            return []
        return [(rng.uniform(1.0, w - size - 1.0), rng.uniform(1.0, h - size - 1.0), size, size, rng.uniform(0.0, 1.5))]
    lots = []
    if kind == 3:  # detached houses, each at an angle of its own
        columns, rows = max(int(w // 10.0), 1), max(int(h // 10.0), 1)
        for i in range(columns):
            for j in range(rows):
                if rng.random() < 0.12:
                    continue
                cell_w, cell_h = w / columns, h / rows
                angle = rng.normal(0.0, 0.15) if rng.random() < 0.6 else 0.0
                shrink = _GAP_M + 1.2 * abs(np.sin(angle)) * max(cell_w, cell_h)
                a, b = rng.uniform(0.7, 1.0) * (cell_w - shrink), rng.uniform(0.7, 1.0) * (cell_h - shrink)
                if min(a, b) >= 3.5:
                    lots.append((i * cell_w + (cell_w - a) / 2, j * cell_h + (cell_h - b) / 2, a, b, angle))
        return lots
    # A row of houses along the longer side; in deep blocks two rows, back to back around a yard.
    along, deep = max(w, h), min(w, h)
    strips = [(0.0, deep)] if deep < 15.0 or kind == 2 else [(0.0, 0.36 * deep), (0.64 * deep, deep)]
    for begin, end in strips:
        at = 0.0
        while along - at >= 5.0:
            width = min(rng.uniform(7.0, 15.0), along - at)
            if along - at - width < 7.0:
                width = along - at
            if rng.random() < 0.9:
                depth = rng.uniform(0.75, 1.0) * (end - begin)
                y = begin if begin == 0.0 else end - depth  # the front stands at the street
                lots.append((at, y, width, depth, 0.0) if w >= h else (y, at, depth, width, 0.0))
            at += width + rng.uniform(_GAP_M + 0.3, 4.5)
    return lots


def _neighborhood(rng: np.random.Generator, side: int) -> tuple[Buildings, list[Points]]:
    """Buildings and streets that reach into the window."""
    reach = 0.75 * side + 20.0
    angle = 0.0 if rng.random() < 0.35 else rng.uniform(0.0, np.pi / 2)
    centre = np.full(2, side / 2)
    across, down = _cuts(rng, reach), _cuts(rng, reach)
    streets = [_rectangle(a, -2 * reach, b, 2 * reach) for a, b in across]
    streets += [_rectangle(-2 * reach, a, 2 * reach, b) for a, b in down]
    polygons = []
    for (_, x0), (x1, _) in itertools.pairwise(across):
        for (_, y0), (y1, _) in itertools.pairwise(down):
            setback = rng.uniform(0.3, 1.5)
            x, y = x0 + setback, y0 + setback
            for u, v, w, h, own in _lots(rng, x1 - x0 - 2 * setback, y1 - y0 - 2 * setback):
                middle = np.array([x + u + w / 2, y + v + h / 2])
                rings = tuple(_turned(ring - [w / 2, h / 2], own, middle) for ring in _footprint(rng, w, h))
                polygons.append(tuple(_turned(ring, angle, centre) for ring in rings))
    streets = [_turned(street, angle, centre) for street in streets]
    window = _rectangle(0, 0, side, side)
    return (
        [rings for rings in polygons if _separation(rings[0], window) < 0.0],
        [street for street in streets if _separation(street, window) < -1.0],
    )


def _near(mask: NDArray[np.bool_], metres: float) -> NDArray[np.bool_]:
    """Pixels whose centre is within some metres of that of a pixel in a mask."""
    near, k = mask.copy(), int(metres)
    padded = np.pad(mask, k)
    n = len(mask)
    for i in range(-k, k + 1):
        for j in range(-k, k + 1):
            if i * i + j * j <= metres * metres:
                near |= padded[k + i : k + i + n, k + j : k + j + n]
    return near


def _place_transmitter(
    rng: np.random.Generator, scene: Scene, apart_from: tuple[float, float] | None = None
) -> tuple[float, float] | None:
    """A pixel's centre on a street, off buildings, cars and the scene's border; None where there is none."""
    free = _street_mask(scene) & ~_near(scene.buildings, _CLEARANCE_M) & ~_near(scene.cars, _CLEARANCE_M)
    border = scene.side // 8
    free[:border], free[-border:], free[:, :border], free[:, -border:] = False, False, False, False
    rows, columns = np.nonzero(free)
    if apart_from is not None:
        far = np.hypot(columns + 0.5 - apart_from[0], rows + 0.5 - apart_from[1]) >= border
        rows, columns = rows[far], columns[far]
    if not len(rows):
        return None
    k = rng.integers(len(rows))
    return float(columns[k] + 0.5), float(rows[k] + 0.5)


def _street_mask(scene: Scene) -> NDArray[np.bool_]:
    mask = np.zeros((scene.side, scene.side), dtype=np.bool_)
    for street in scene.streets:
        mask |= _mask([street], scene.side)
    return mask


def _check_seed(seed: int) -> int:
    return check_integer("seed", seed, 0, advice="Choose a number from 0 on.")


def make_scene(seed: int, side: int = 64) -> Scene:
    """The scene of a seed, with cars.

    Args:
        seed: of everything in it, >= 0; the same seed gives the same scene.
        side: its side in metres and pixels, 64, 128 or 256.

    Raises:
        ConfigurationError: an argument is none of these.
    """
    seed = _check_seed(seed)
    if side not in SIDES:
        listed = ", ".join(map(str, SIDES))
        raise ConfigurationError(f"`side` must be one of {listed}, got {shown(side)}. Choose one of them.")
    rng = np.random.default_rng((seed, side))
    while True:
        polygons, streets = _neighborhood(rng, side)
        buildings = _built(polygons, side)
        if not BUILT_SHARE[0] <= buildings.mean() <= BUILT_SHARE[1]:
            continue
        scene = Scene(buildings, np.zeros_like(buildings), tuple(polygons), (), tuple(streets), (0.0, 0.0), side)
        transmitter = _place_transmitter(rng, scene)
        if transmitter is not None:
            return _park(rng, replace(scene, transmitter=transmitter))


def move_transmitter(scene: Scene, seed: int) -> Scene:
    """The scene with its transmitter elsewhere on the streets, at least an eighth of the side away.

    Raises:
        ConfigurationError: if the seed is negative, or the streets have no other place.
    """
    rng = np.random.default_rng((_check_seed(seed), 1))
    transmitter = _place_transmitter(rng, scene, apart_from=scene.transmitter)
    if transmitter is None:
        raise ConfigurationError(
            f"`scene` must have another place for its transmitter, got none beside {scene.transmitter}. "
            "Take another scene."
        )
    return replace(scene, transmitter=transmitter)


def without_cars(scene: Scene) -> Scene:
    """The scene without its cars."""
    return replace(scene, cars=np.zeros_like(scene.cars), car_polygons=())


def with_cars(scene: Scene, seed: int) -> Scene:
    """The scene with cars drawn anew, in the place of those that it has, none of them near the transmitter.

    Raises:
        ConfigurationError: if the seed is negative.
    """
    return _park(np.random.default_rng((_check_seed(seed), 2)), without_cars(scene))


def change_cars(scene: Scene, seed: int) -> Scene:
    """The scene with other cars: those of :func:`with_cars`."""
    return with_cars(scene, seed)


def _park(rng: np.random.Generator, scene: Scene) -> Scene:
    """Cars along the curbs and in the lanes of all streets, at least one where any has room."""
    walls = _near(scene.buildings, _CLEARANCE_M)
    x, y = scene.transmitter
    cars: list[Points] = []
    for _ in range(20):
        for number, street in enumerate(scene.streets):
            along, across = street[1] - street[0], street[3] - street[0]
            if np.hypot(*along) < np.hypot(*across):
                along, across = across, along
            length, width = float(np.hypot(*along)), float(np.hypot(*across))
            angle = float(np.arctan2(along[1], along[0]))
            crossings = [other for k, other in enumerate(scene.streets) if k != number]
            parked, driving = rng.uniform(0.1, 0.7), rng.uniform(0.05, 0.3)
            lanes = [(1.6, parked, True), (width - 1.6, parked, True)]
            if width >= 8.5:
                lanes += [(width / 2 - 1.7, driving, False), (width / 2 + 1.7, driving, False)]
            for offset, density, is_parked in lanes:
                at = rng.uniform(0.0, 6.0)
                while at < length:
                    size = np.array([rng.uniform(4.2, 5.2), rng.uniform(1.8, 2.1)])
                    taken, sway, tilt = rng.random() < density, rng.normal(0.0, 0.12), rng.normal(0.0, 0.02)
                    middle = street[0] + along / length * at + across / width * (offset + sway)
                    at += size[0] + rng.uniform(0.8, 2.5 if is_parked else 9.0)
                    if not taken or not ((middle > 1.0) & (middle < scene.side - 1.0)).all():
                        continue
                    car = _turned(_rectangle(0, 0, *size) - size / 2, angle + tilt, middle)
                    # The transmitter keeps free, crossings too where cars park, and no two cars touch.
                    if _separation(car, np.array([[x, y], [x + 1e-3, y], [x, y + 1e-3]])) < 1.2:
                        continue
                    if is_parked and any(_separation(car, other) < 1.5 for other in crossings):
                        continue
                    if any(_separation(car, other) < 0.6 for other in cars):
                        continue
                    mask = _mask([car], scene.side)
                    if mask.any() and not (mask & walls).any():
                        cars.append(car)
        if cars:
            break
    return replace(scene, cars=_mask(cars, scene.side), car_polygons=tuple(cars))


def change_buildings(scene: Scene, seed: int) -> Scene:
    """The scene with one or two buildings gone, changed or come, and all else as it is.

    At least 1 % of the pixels change. The streets stay free, and so do the cars and the transmitter.

    Raises:
        ConfigurationError: if the seed is negative, or no such change is found in a hundred.
    """
    rng = np.random.default_rng((_check_seed(seed), 3))
    streets = _street_mask(scene)
    for _ in range(100):
        polygons: Buildings | None = list(scene.polygons)
        for k in rng.integers(3, size=rng.integers(1, 3)):
            polygons = None if polygons is None else (_go, _rebuild, _come)[k](rng, scene, polygons, streets)
        if polygons is None:
            continue
        buildings = _built(polygons, scene.side)
        if (buildings ^ scene.buildings).mean() >= 0.01 and BUILT_SHARE[0] <= buildings.mean() <= BUILT_SHARE[1]:
            return replace(scene, buildings=buildings, polygons=tuple(polygons))
    raise ConfigurationError(
        f"`scene` must have a building to change, got none for seed {seed}. Take another seed or another scene."
    )


def _pick(rng: np.random.Generator, scene: Scene, polygons: Buildings) -> int | None:
    """Number of a building of the scene that is seen; None if there is none."""
    old = {id(rings) for rings in scene.polygons}
    seen = [k for k, rings in enumerate(polygons) if id(rings) in old and _built([rings], scene.side).sum() >= 12]
    return seen[rng.integers(len(seen))] if seen else None


def _stands(rings: tuple[Points, ...], others: Buildings, streets: NDArray[np.bool_]) -> bool:
    """Whether a building stands in the scene, off the streets and apart from others."""
    built = _built([rings], len(streets))
    apart = all(_separation(rings[0], other[0]) >= _GAP_M for other in others)
    return apart and bool(built.any()) and not (built & streets).any()


def _go(rng: np.random.Generator, scene: Scene, polygons: Buildings, streets: NDArray[np.bool_]) -> Buildings | None:
    """One building less; None if there is none."""
    k = _pick(rng, scene, polygons)
    return None if k is None else polygons[:k] + polygons[k + 1 :]


def _rebuild(
    rng: np.random.Generator, scene: Scene, polygons: Buildings, streets: NDArray[np.bool_]
) -> Buildings | None:
    """One building in the place of another, on its lot; None if none was found."""
    k = _pick(rng, scene, polygons)
    if k is None:
        return None
    others = polygons[:k] + polygons[k + 1 :]
    middle, angle, w, h = _frame(polygons[k][0])
    for _ in range(20):
        a, b = rng.uniform(0.45, 1.0) * w, rng.uniform(0.45, 1.0) * h
        corner = np.array([rng.uniform(0.0, w - a) - w / 2, rng.uniform(0.0, h - b) - h / 2])
        rings = tuple(_turned(ring + corner, angle, middle) for ring in _footprint(rng, a, b))
        if _stands(rings, others, streets):
            return [*others, rings]
    return None


def _come(rng: np.random.Generator, scene: Scene, polygons: Buildings, streets: NDArray[np.bool_]) -> Buildings | None:
    """One building more, on free ground and in line with a neighbor; None if none was found."""
    k = _pick(rng, scene, polygons)
    rows, columns = np.nonzero(~streets & ~_near(_built(polygons, scene.side), 4.0))
    if k is None or not len(rows):
        return None
    _, angle, _, _ = _frame(polygons[k][0])
    for _ in range(100):
        place = rng.integers(len(rows))
        w, h = rng.uniform(5.0, 14.0, 2)
        middle = np.array([columns[place], rows[place]]) + rng.uniform(0.0, 1.0, 2)
        rings = tuple(_turned(ring - [w / 2, h / 2], angle, middle) for ring in _footprint(rng, w, h))
        if _stands(rings, polygons, streets):
            return [*polygons, rings]
    return None


def _frame(outline: Points) -> tuple[Points, float, float, float]:
    """The oriented box around an outline along its longest wall: middle, angle, width, height."""
    along = np.roll(outline, -1, axis=0) - outline
    longest = along[int(np.argmax(np.hypot(*along.T)))]
    angle = float(np.arctan2(longest[1], longest[0]))
    flat = _turned(outline, -angle, np.zeros(2))
    low, high = flat.min(axis=0), flat.max(axis=0)
    middle = _turned(((low + high) / 2)[None], angle, np.zeros(2))[0]
    return middle, angle, float(high[0] - low[0]), float(high[1] - low[1])


def conditions(scene: Scene, static: bool = False) -> NDArray[np.float32]:
    """What a model is told of a scene: float32 of shape (3, S, S), in [0, 1].

    Args:
        scene: the scene.
        static: tell the buildings alone; channels 1 and 2 are zero.

    Returns:
        the buildings (1 inside), the cars (1 inside), and the gray level of the power that the transmitter would give
        in free space, which is above 0 everywhere and greatest at the transmitter.
    """
    told = np.zeros((3, scene.side, scene.side), dtype=np.float32)
    told[0] = scene.buildings
    if not static:
        told[1] = scene.cars
        told[2] = gray(free_space_power(scene.transmitter, scene.side))
    return told


def split(seed: int) -> str:
    """``"train"`` or ``"test"``: the split of the scene of a seed and of all that is made from it."""
    return "train" if seed < FIRST_TEST_SEED else "test"
