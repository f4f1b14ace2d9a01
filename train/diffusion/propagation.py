"""The truth behind a scene: received power at every pixel, from the dominant path in the horizontal plane.

Of all paths from the transmitter to a pixel the one of least loss counts. These are the straight line, through whatever
stands in its way, and the paths around up to :data:`MAX_CORNERS` corners of buildings. ``docs/radiomap.md`` states the
model, its constants and where each comes from.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refine_env._compiled import kernel
from refine_env.radiomap import BLACK_DBM, TRANSMIT_POWER_DBM, dbm, gray
from train.diffusion.scene import Scene

__all__ = [
    "ANTENNA_HEIGHT_M",
    "CAR_HEIGHT_M",
    "FREQUENCY_HZ",
    "INSIDE_LOSS_DB_PER_M",
    "MAX_BUILDING_LOSS_DB",
    "MAX_CORNERS",
    "WALL_LOSS_DB",
    "dbm",
    "free_space_loss",
    "free_space_power",
    "gray",
    "knife_edge_loss",
    "received_power",
]

FREQUENCY_HZ = 5.9e9
WAVELENGTH_M = 299_792_458.0 / FREQUENCY_HZ
ANTENNA_HEIGHT_M = 1.5
CAR_HEIGHT_M = 1.75
NEAREST_M = 1.0  # nearer than this, the power is that at this distance
WALL_LOSS_DB = 13.4  # TR 38.901, Table 7.4.3-2, low-loss model at 5.9 GHz
INSIDE_LOSS_DB_PER_M = 1.2  # 0.5 dB/m of TR 38.901, and a light inner wall of 3.4 dB every 5 m
MAX_BUILDING_LOSS_DB = 50.0  # of one passage through a building, from wall to wall
MAX_CORNERS = 3  # of one path

_MAX_LOSS_DB = TRANSMIT_POWER_DBM - BLACK_DBM
_FREE_SPACE_1M_DB = 20.0 * math.log10(4.0 * math.pi / WAVELENGTH_M)
_ROOF_M = CAR_HEIGHT_M - ANTENNA_HEIGHT_M
_GRAZING_DB = 6.9 + 20.0 * math.log10(math.sqrt(0.1**2 + 1.0) - 0.1)  # J(0)
_EPS = 1e-9
_MAX_CROSSINGS = 64


class _City(NamedTuple):
    """What stands in the way, as the kernels take it.

    Attributes:
        edges: the walls, (x, y, x, y) each, those of one building after those of another.
        first: the first edge of each building, and the number of all edges at the end.
        circles: a circle around each building, (x, y, radius).
        corners: the corners that a path may bend around, (x, y) of each and of the corners before and after it.
        corner_edges: the two edges that meet in each.
        car_edges: four edges of each car, one car after the other.
        car_circles: a circle around each car.
    """

    edges: NDArray[np.float64]
    first: NDArray[np.int64]
    circles: NDArray[np.float64]
    corners: NDArray[np.float64]
    corner_edges: NDArray[np.int64]
    car_edges: NDArray[np.float64]
    car_circles: NDArray[np.float64]


@kernel
def free_space_loss(distance: float) -> float:
    """Free-space path loss in dB over a distance in metres, 20 lg(4 pi d / lambda); below one metre, that at one."""
    return _FREE_SPACE_1M_DB + 20.0 * math.log10(max(distance, NEAREST_M))


@kernel
def knife_edge_loss(v: float) -> float:
    """Loss J(v) in dB of a single knife edge, ITU-R P.526 Eq. (31), for v > -0.78; 0 below."""
    if v <= -0.78:
        return 0.0
    return 6.9 + 20.0 * math.log10(math.sqrt((v - 0.1) ** 2 + 1.0) + v - 0.1)


@kernel
def _fresnel(d1: float, d2: float) -> float:
    """v per metre of an edge's height, ITU-R P.526 Eq. (26), for the distances to either side of it."""
    return math.sqrt(2.0 / WAVELENGTH_M * (d1 + d2) / max(d1 * d2, 1e-12))


@kernel
def _corner_loss(angle: float, length: float, d1: float, d2: float) -> float:
    """What a corner adds to the loss of a path in dB, without that of free space.

    The knife-edge loss of the angle in radians, ITU-R P.526 Eq. (27), with the distances d1 and d2 to the points before
    and after it; and by how much the correction for several edges in a row, -20 lg C_N, grows with the corner, of the
    path's length before it. At the first corner that is nothing.
    """
    v = angle * math.sqrt(2.0 / WAVELENGTH_M * d1 * d2 / max(d1 + d2, 1e-12))
    return knife_edge_loss(v) + 10.0 * math.log10((d1 + d2) * length / (d1 * (length + d2)))


@kernel
def _in_order(px: float, py: float, qx: float, qy: float) -> bool:
    """Whether two points are in lexicographic order; a segment is always walked so, to be the same both ways."""
    return px < qx or (px == qx and py <= qy)


@kernel
def _misses(px: float, py: float, dx: float, dy: float, circle: NDArray[np.float64]) -> bool:
    """Whether a segment from p along d keeps out of a circle."""
    ex, ey = circle[0] - px, circle[1] - py
    t = min(max((ex * dx + ey * dy) / (dx * dx + dy * dy), 0.0), 1.0)
    away: bool = (ex - t * dx) ** 2 + (ey - t * dy) ** 2 > circle[2] * circle[2]
    return away


@kernel
def _crossing(px: float, py: float, dx: float, dy: float, edge: NDArray[np.float64]) -> float:
    """Where a segment crosses an edge, as a share of its length in [0, 1]; -1 where it does not.

    An edge holds one of the two sides on which its ends may lie, so that a line through a vertex crosses both of the
    edges that meet there, or none.
    """
    sa = dx * (edge[1] - py) - dy * (edge[0] - px)
    sb = dx * (edge[3] - py) - dy * (edge[2] - px)
    if (sa > 0.0) == (sb > 0.0):
        return -1.0
    ex, ey = edge[2] - edge[0], edge[3] - edge[1]
    t = ((edge[0] - px) * ey - (edge[1] - py) * ex) / (dx * ey - dy * ex)
    return t if 0.0 <= t <= 1.0 else -1.0


@kernel
def _building_loss(px: float, py: float, qx: float, qy: float, city: _City, most: float) -> float:
    """Penetration loss in dB of the segment between two points, or anything from ``most`` on once it is reached."""
    if not _in_order(px, py, qx, qy):
        px, py, qx, qy = qx, qy, px, py
    dx, dy = qx - px, qy - py
    length = math.sqrt(dx * dx + dy * dy)
    crossings = np.empty(_MAX_CROSSINGS)
    loss = 0.0
    for building in range(len(city.circles)):
        if length == 0.0 or _misses(px, py, dx, dy, city.circles[building]):
            continue
        n = 0
        for e in range(city.first[building], city.first[building + 1]):
            t = _crossing(px, py, dx, dy, city.edges[e])
            if t >= 0.0 and n < _MAX_CROSSINGS:
                k = n  # insertion sort
                while k > 0 and crossings[k - 1] > t:
                    crossings[k] = crossings[k - 1]
                    k -= 1
                crossings[k] = t
                n += 1
        for k in range(0, n - 1, 2):
            inside = (crossings[k + 1] - crossings[k]) * length
            loss += min(2.0 * WALL_LOSS_DB + INSIDE_LOSS_DB_PER_M * inside, MAX_BUILDING_LOSS_DB)
        if loss >= most:
            return loss
    return loss


@kernel
def _car_loss(px: float, py: float, qx: float, qy: float, city: _City) -> float:
    """Loss in dB of all cars between two points: each the least of three edges, its roof and its two sides.

    A car on which one of the two points lies does not count: that antenna is on its roof.
    """
    if not _in_order(px, py, qx, qy):
        px, py, qx, qy = qx, qy, px, py
    dx, dy = qx - px, qy - py
    length = math.sqrt(dx * dx + dy * dy)
    loss = 0.0
    for car in range(len(city.car_circles)):
        if length == 0.0 or _misses(px, py, dx, dy, city.car_circles[car]):
            continue
        crossed = 0
        middle, left, right = 0.0, 0.0, 0.0  # where the car is, and how far it reaches to either side of the line
        for e in range(4 * car, 4 * car + 4):
            t = _crossing(px, py, dx, dy, city.car_edges[e])
            if t >= 0.0:
                crossed += 1
                middle += 0.5 * t
            beside = (dx * (city.car_edges[e, 1] - py) - dy * (city.car_edges[e, 0] - px)) / length
            left, right = max(left, beside), max(right, -beside)
        if crossed == 2:
            d1, d2 = max(middle * length, NEAREST_M), max((1.0 - middle) * length, NEAREST_M)
            loss += knife_edge_loss(min(_ROOF_M, left, right) * _fresnel(d1, d2))
    return loss


@kernel
def _sees(px: float, py: float, qx: float, qy: float, city: _City, p: int, q: int) -> bool:
    """Whether no wall is between two points; p and q are their numbers as corners, -1 for other points."""
    if not _in_order(px, py, qx, qy):
        px, py, qx, qy = qx, qy, px, py
    dx, dy = qx - px, qy - py
    for building in range(len(city.circles)):
        if _misses(px, py, dx, dy, city.circles[building]):
            continue
        for e in range(city.first[building], city.first[building + 1]):
            # A path touches the walls of its corners there, and keeps on their outer side.
            if p >= 0 and (e == city.corner_edges[p, 0] or e == city.corner_edges[p, 1]):
                continue
            if q >= 0 and (e == city.corner_edges[q, 0] or e == city.corner_edges[q, 1]):
                continue
            if _crossing(px, py, dx, dy, city.edges[e]) >= 0.0:
                return False
    return True


@kernel
def _side(px: float, py: float, corner: NDArray[np.float64]) -> float:
    """On which side of the line from p to a corner its building lies, +1 or -1; 0 where the line enters it."""
    ux, uy = corner[0] - px, corner[1] - py
    scale = _EPS * (abs(ux) + abs(uy) + 1.0)
    before = ux * (corner[3] - corner[1]) - uy * (corner[2] - corner[0])
    after = ux * (corner[5] - corner[1]) - uy * (corner[4] - corner[0])
    if before >= -scale and after >= -scale:
        return 1.0
    return -1.0 if before <= scale and after <= scale else 0.0


@kernel
def _bend(path: NDArray[np.float64], corner: NDArray[np.float64], x: float, y: float) -> float:
    """Angle in radians by which a path bends around its corner to go on to (x, y); -1 where it is not taut there."""
    ux, uy, vx, vy = corner[0] - path[0], corner[1] - path[1], x - corner[0], y - corner[1]
    side = path[2]
    cross = side * (ux * vy - uy * vx)
    if cross <= 0.0:
        return -1.0
    scale = -_EPS * (abs(vx) + abs(vy) + 1.0)
    if side * (vx * (corner[3] - corner[1]) - vy * (corner[2] - corner[0])) < scale:
        return -1.0
    if side * (vx * (corner[5] - corner[1]) - vy * (corner[4] - corner[0])) < scale:
        return -1.0
    return math.atan2(cross, ux * vx + uy * vy)


@kernel
def _paths(tx: float, ty: float, city: _City, sees: NDArray[np.int8]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """All taut paths from the transmitter to a corner that may still lead to a power above the least one.

    Args:
        tx, ty: the transmitter.
        city: what stands in the way.
        sees: for each pair of corners whether one is seen from the other, 0 or 1, and -1 where nobody asked yet.

    Returns:
        for each path x and y of the point before the corner, the side of the building, the length up to the corner, and
        the loss before the corner without that of free space; and the corner's number. What is lost at the corner
        itself depends on where the path goes on.
    """
    capacity = 256
    paths, at = np.empty((capacity, 5)), np.empty(capacity, dtype=np.int64)
    count = 0
    begin, end = -1, 0  # the paths of the round before: at first one without a corner, that to the transmitter
    for _ in range(MAX_CORNERS):
        for path in range(begin, end):
            for c in range(len(city.corners)):
                px, py, p, length, loss, bends = tx, ty, -1, 0.0, 0.0, 1
                if path >= 0:
                    p, length, loss, bends = at[path], paths[path, 3], paths[path, 4], 2
                    px, py = city.corners[p, 0], city.corners[p, 1]
                x, y = city.corners[c, 0], city.corners[c, 1]
                d = math.sqrt((x - px) ** 2 + (y - py) ** 2)
                side = _side(px, py, city.corners[c])
                if c == p or side == 0.0 or d < _EPS:
                    continue
                if loss + bends * _GRAZING_DB + free_space_loss(length + d) >= _MAX_LOSS_DB:
                    continue
                if path >= 0:
                    angle = _bend(paths[path], city.corners[p], x, y)
                    if angle < 0.0:
                        continue
                    d1 = math.sqrt((px - paths[path, 0]) ** 2 + (py - paths[path, 1]) ** 2)
                    loss += _corner_loss(angle, length, d1, d)
                    if sees[p, c] < 0:
                        sees[p, c] = sees[c, p] = _sees(px, py, x, y, city, p, c)
                    if sees[p, c] == 0:
                        continue
                elif not _sees(px, py, x, y, city, p, c):
                    continue
                loss += _car_loss(px, py, x, y, city)
                if loss + _GRAZING_DB + free_space_loss(length + d) >= _MAX_LOSS_DB:
                    continue
                if count == capacity:
                    capacity *= 2
                    more, more_at = np.empty((capacity, 5)), np.empty(capacity, dtype=np.int64)
                    for k in range(count):
                        more_at[k] = at[k]
                        for i in range(5):
                            more[k, i] = paths[k, i]
                    paths, at = more, more_at
                paths[count, 0], paths[count, 1], paths[count, 2] = px, py, side
                paths[count, 3], paths[count, 4] = length + d, loss
                at[count] = c
                count += 1
        begin, end = max(end, 0), count
    return paths[:count], at[:count]


@kernel
def _fill_power(
    power: NDArray[np.float32], built: NDArray[np.bool_], tx: float, ty: float, city: _City,
    paths: NDArray[np.float64], at: NDArray[np.int64],
) -> None:  # fmt: skip
    """Write the power at all pixels that are not built on; paths are those of :func:`_paths`, of least loss first."""
    rows, columns = power.shape
    for row in range(rows):
        for column in range(columns):
            if built[row, column]:
                continue
            x, y = column + 0.5, row + 0.5
            free = free_space_loss(math.sqrt((x - tx) ** 2 + (y - ty) ** 2))
            best = free + _building_loss(tx, ty, x, y, city, _MAX_LOSS_DB - free)
            if best < _MAX_LOSS_DB:
                best += _car_loss(tx, ty, x, y, city)
            best = min(best, _MAX_LOSS_DB)
            for k in range(len(at)):
                if paths[k, 4] + _GRAZING_DB + free >= best:
                    break  # the paths that follow lost as much before their corner
                corner = city.corners[at[k]]
                angle = _bend(paths[k], corner, x, y)
                if angle < 0.0:
                    continue
                d1 = math.sqrt((corner[0] - paths[k, 0]) ** 2 + (corner[1] - paths[k, 1]) ** 2)
                d2 = math.sqrt((x - corner[0]) ** 2 + (y - corner[1]) ** 2)
                loss = paths[k, 4] + _corner_loss(angle, paths[k, 3], d1, d2) + free_space_loss(paths[k, 3] + d2)
                if loss < best and _sees(corner[0], corner[1], x, y, city, at[k], -1):
                    best = min(best, loss + _car_loss(corner[0], corner[1], x, y, city))
            power[row, column] = TRANSMIT_POWER_DBM - best


def free_space_power(transmitter: tuple[float, float], side: int) -> NDArray[np.float32]:
    """Received power of a transmitter at (x, y) without anything in its way, dBm at pixel centres, float32 (S, S)."""
    centre = np.arange(side) + 0.5
    distance = np.hypot(centre[None, :] - transmitter[0], centre[:, None] - transmitter[1])
    loss = _FREE_SPACE_1M_DB + 20.0 * np.log10(np.maximum(distance, NEAREST_M))
    power: NDArray[np.float32] = (TRANSMIT_POWER_DBM - loss).astype(np.float32)
    return power


def received_power(scene: Scene) -> NDArray[np.float32]:
    """Received power of a scene's transmitter, dBm at pixel centres, float32 of shape (S, S).

    It is :data:`refine_env.radiomap.BLACK_DBM` inside buildings, as RadioMapSeer has it, and nowhere less.
    """
    city = _city(scene)
    x, y = map(float, scene.transmitter)
    paths, at = _paths(x, y, city, np.full((len(city.corners),) * 2, -1, dtype=np.int8))
    order = np.argsort(paths[:, 4], kind="stable")
    power = np.full((scene.side, scene.side), BLACK_DBM, dtype=np.float32)
    _fill_power(power, scene.buildings, x, y, city, paths[order], at[order])
    return power


def _edges(ring: NDArray[np.float64]) -> NDArray[np.float64]:
    """The edges of a ring, (x, y, x, y) each."""
    return np.hstack([ring, np.roll(ring, -1, axis=0)])


def _circle(ring: NDArray[np.float64]) -> list[float]:
    """A circle around a ring, (x, y, radius)."""
    centre = (ring.min(axis=0) + ring.max(axis=0)) / 2
    return [*centre, np.hypot(*(ring - centre).T).max() + 1e-6]


def _city(scene: Scene) -> _City:
    """What stands in a scene."""
    edges, first, corners, corner_edges = (
        [np.empty((0, 4))],
        [0],
        [np.empty((0, 6))],
        [np.empty((0, 2), dtype=np.int64)],
    )
    for rings in scene.polygons:
        last = first[-1]
        for ring in rings:
            before, after = np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0)
            (ax, ay), (bx, by) = (ring - before).T, (after - ring).T
            # The building is on the left of all its rings, so where they turn left it can be gone around.
            convex = (ax * by - ay * bx > 0.0) & ((ring > 0.0) & (ring < scene.side)).all(axis=1)
            numbers = last + np.arange(len(ring))
            edges.append(_edges(ring))
            corners.append(np.hstack([ring, before, after])[convex])
            corner_edges.append(np.column_stack([np.roll(numbers, 1), numbers])[convex])
            last += len(ring)
        first.append(last)
    return _City(
        np.concatenate(edges),
        np.array(first, dtype=np.int64),
        np.array([_circle(rings[0]) for rings in scene.polygons], dtype=np.float64).reshape(-1, 3),
        np.concatenate(corners),
        np.concatenate(corner_edges),
        np.concatenate([np.empty((0, 4)), *map(_edges, scene.car_polygons)]),
        np.array([_circle(car) for car in scene.car_polygons], dtype=np.float64).reshape(-1, 3),
    )
