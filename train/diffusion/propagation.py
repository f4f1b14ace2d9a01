"""The truth behind a scene: received power at every pixel, from the dominant path in the horizontal plane.

Of all paths from the transmitter to a pixel the one of least loss counts. These are the straight line, through whatever
stands in its way, and the paths around up to :data:`MAX_CORNERS` corners of buildings. ``docs/radiomap.md`` states the
model, its constants and where each comes from.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from refine_env._compiled import kernel
from refine_env.radiomap import BLACK_DBM, TRANSMIT_POWER_DBM, dbm, gray

if TYPE_CHECKING:
    from train.diffusion.scenes import Scene

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
MAX_CORNERS = 3

_MAX_LOSS_DB = TRANSMIT_POWER_DBM - BLACK_DBM
_FREE_SPACE_1M_DB = 20.0 * math.log10(4.0 * math.pi / WAVELENGTH_M)
_ROOF_M = CAR_HEIGHT_M - ANTENNA_HEIGHT_M
_GRAZING_DB = 6.9 + 20.0 * math.log10(math.sqrt(0.1**2 + 1.0) - 0.1)  # J(0)
_EPS = 1e-9
_MAX_CROSSINGS = 64


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
    """The square root in ITU-R P.526 Eq. (26): v per metre of height, for the distances to either side of an edge."""
    return math.sqrt(2.0 / WAVELENGTH_M * (d1 + d2) / max(d1 * d2, 1e-12))


@kernel
def _corner_loss(angle: float, length: float, d1: float, d2: float) -> float:
    """What a corner adds to the loss of a path in dB, without that of free space.

    The knife-edge loss of the angle in radians, ITU-R P.526 Eq. (28), with the distances d1 and d2 to the points before
    and after it; and by how much the correction for several edges in a row, -20 lg C_N of Eq. (44), grows with the
    corner, of the path's length before it. At the first corner that is nothing.
    """
    v = angle * math.sqrt(2.0 / WAVELENGTH_M * d1 * d2 / max(d1 + d2, 1e-12))
    return knife_edge_loss(v) + 10.0 * math.log10((d1 + d2) * length / (d1 * (length + d2)))


@kernel
def _in_order(px: float, py: float, qx: float, qy: float) -> bool:
    """Whether two points are in lexicographic order; a segment is always walked so, to be the same both ways."""
    return px < qx or (px == qx and py <= qy)


@kernel
def _misses(px: float, py: float, dx: float, dy: float, square: float, circle: NDArray[np.float64]) -> bool:
    """Whether a segment from p along d, of squared length ``square``, keeps out of a circle (x, y, radius)."""
    ex, ey = circle[0] - px, circle[1] - py
    t = min(max((ex * dx + ey * dy) / square, 0.0), 1.0)
    return (ex - t * dx) ** 2 + (ey - t * dy) ** 2 > circle[2] * circle[2]


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
def _building_loss(
    px: float, py: float, qx: float, qy: float, edges: NDArray[np.float64], first: NDArray[np.int64],
    circles: NDArray[np.float64], most: float,
) -> float:  # fmt: skip
    """Penetration loss in dB of the segment between two points, or anything from ``most`` on once it is reached."""
    if not _in_order(px, py, qx, qy):
        px, py, qx, qy = qx, qy, px, py
    dx, dy = qx - px, qy - py
    square = dx * dx + dy * dy
    if square == 0.0:
        return 0.0
    length = math.sqrt(square)
    crossings = np.empty(_MAX_CROSSINGS)
    loss = 0.0
    for building in range(len(first) - 1):
        if _misses(px, py, dx, dy, square, circles[building]):
            continue
        n = 0
        for e in range(first[building], first[building + 1]):
            t = _crossing(px, py, dx, dy, edges[e])
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
def _car_loss(px: float, py: float, qx: float, qy: float, cars: NDArray[np.float64]) -> float:
    """Loss in dB of all cars between two points: each the least of the three edges, its roof and its two sides.

    A car on which one of the two points lies does not count: that antenna is on its roof.
    """
    if not _in_order(px, py, qx, qy):
        px, py, qx, qy = qx, qy, px, py
    dx, dy = qx - px, qy - py
    square = dx * dx + dy * dy
    if square == 0.0:
        return 0.0
    length = math.sqrt(square)
    loss = 0.0
    for car in range(len(cars)):
        if _misses(px, py, dx, dy, square, cars[car, 8:11]):
            continue
        n = 0
        middle = 0.0
        for k in range(4):
            t = _crossing(px, py, dx, dy, cars[car, 2 * k : 2 * k + 4] if k < 3 else cars[car, 11:15])
            if t >= 0.0:
                n += 1
                middle += 0.5 * t
        if n != 2:
            continue
        left, right = 0.0, 0.0  # how far the car reaches to either side of the line
        for k in range(4):
            beside = (dx * (cars[car, 2 * k + 1] - py) - dy * (cars[car, 2 * k] - px)) / length
            left, right = max(left, beside), max(right, -beside)
        d1, d2 = max(middle * length, NEAREST_M), max((1.0 - middle) * length, NEAREST_M)
        loss += knife_edge_loss(min(_ROOF_M, left, right) * _fresnel(d1, d2))
    return loss


@kernel
def _sees(
    px: float, py: float, qx: float, qy: float, edges: NDArray[np.float64], first: NDArray[np.int64],
    circles: NDArray[np.float64], p: int, q: int, corner_edges: NDArray[np.int64],
) -> bool:  # fmt: skip
    """Whether no wall is between two points; p and q are their numbers as corners, -1 for other points."""
    if not _in_order(px, py, qx, qy):
        px, py, qx, qy = qx, qy, px, py
    dx, dy = qx - px, qy - py
    square = dx * dx + dy * dy
    for building in range(len(first) - 1):
        if _misses(px, py, dx, dy, square, circles[building]):
            continue
        for e in range(first[building], first[building + 1]):
            # A path touches the walls of its corners there, and keeps on their outer side.
            if p >= 0 and (e == corner_edges[p, 0] or e == corner_edges[p, 1]):
                continue
            if q >= 0 and (e == corner_edges[q, 0] or e == corner_edges[q, 1]):
                continue
            if _crossing(px, py, dx, dy, edges[e]) >= 0.0:
                return False
    return True


@kernel
def _side(px: float, py: float, c: NDArray[np.float64]) -> float:
    """On which side of the line from p to a corner its building lies, +1 or -1; 0 where the line enters it."""
    ux, uy = c[0] - px, c[1] - py
    scale = _EPS * (abs(ux) + abs(uy) + 1.0)
    sa = ux * (c[3] - c[1]) - uy * (c[2] - c[0])
    sb = ux * (c[5] - c[1]) - uy * (c[4] - c[0])
    if sa >= -scale and sb >= -scale:
        return 1.0
    return -1.0 if sa <= scale and sb <= scale else 0.0


@kernel
def _paths(
    tx: float, ty: float, edges: NDArray[np.float64], first: NDArray[np.int64], circles: NDArray[np.float64],
    corners: NDArray[np.float64], corner_edges: NDArray[np.int64], cars: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:  # fmt: skip
    """All taut paths from the transmitter to a corner that can still matter.

    Returns, for each, (x, y of the point before, side of the building, length up to the corner, loss before it without
    that of free space) and the number of the corner. The loss at the corner itself depends on where the path goes on.
    """
    n = len(corners)
    sees = np.full((n, n), -1, dtype=np.int8)
    capacity = 256
    paths = np.empty((capacity, 5))
    at = np.empty(capacity, dtype=np.int64)
    count = 0
    begin, end = -1, 0  # the paths of the round before: at first, the transmitter alone
    for _ in range(MAX_CORNERS):
        for path in range(begin, end):
            for c in range(n):
                if path < 0:
                    px, py, p, length, loss = tx, ty, -1, 0.0, 0.0
                else:
                    p = at[path]
                    px, py, length, loss = corners[p, 0], corners[p, 1], paths[path, 3], paths[path, 4]
                    if p == c:
                        continue
                dx, dy = corners[c, 0] - px, corners[c, 1] - py
                d = math.sqrt(dx * dx + dy * dy)
                side = _side(px, py, corners[c])
                if side == 0.0 or d < _EPS:
                    continue
                bound = loss + (_GRAZING_DB if path >= 0 else 0.0) + _GRAZING_DB + free_space_loss(length + d)
                if bound >= _MAX_LOSS_DB:
                    continue
                if path >= 0:
                    angle = _bend(paths[path], corners[p], corners[c, 0], corners[c, 1])
                    if angle < 0.0:
                        continue
                    ux, uy = px - paths[path, 0], py - paths[path, 1]
                    loss += _corner_loss(angle, length, math.sqrt(ux * ux + uy * uy), d)
                    if sees[p, c] < 0:
                        sees[p, c] = _sees(
                            px, py, corners[c, 0], corners[c, 1], edges, first, circles, p, c, corner_edges
                        )
                        sees[c, p] = sees[p, c]
                    if sees[p, c] == 0:
                        continue
                elif not _sees(px, py, corners[c, 0], corners[c, 1], edges, first, circles, -1, c, corner_edges):
                    continue
                loss += _car_loss(px, py, corners[c, 0], corners[c, 1], cars)
                if loss + _GRAZING_DB + free_space_loss(length + d) >= _MAX_LOSS_DB:
                    continue
                if count == capacity:
                    capacity *= 2
                    more, more_at = np.empty((capacity, 5)), np.empty(capacity, dtype=np.int64)
                    more[:count], more_at[:count] = paths, at
                    paths, at = more, more_at
                paths[count, 0], paths[count, 1], paths[count, 2] = px, py, side
                paths[count, 3], paths[count, 4] = length + d, loss
                at[count] = c
                count += 1
        begin, end = max(end, 0), count
        if begin == end:
            break
    return paths[:count], at[:count]


@kernel
def _bend(path: NDArray[np.float64], c: NDArray[np.float64], x: float, y: float) -> float:
    """Angle in radians by which a path bends around its corner to go on to (x, y); -1 where it is not taut there."""
    ux, uy, vx, vy = c[0] - path[0], c[1] - path[1], x - c[0], y - c[1]
    side = path[2]
    cross = side * (ux * vy - uy * vx)
    if cross <= 0.0:
        return -1.0
    scale = -_EPS * (abs(vx) + abs(vy) + 1.0)
    if side * (vx * (c[3] - c[1]) - vy * (c[2] - c[0])) < scale:
        return -1.0
    if side * (vx * (c[5] - c[1]) - vy * (c[4] - c[0])) < scale:
        return -1.0
    return math.atan2(cross, ux * vx + uy * vy)


@kernel
def _power_map(
    tx: float, ty: float, built: NDArray[np.bool_], edges: NDArray[np.float64], first: NDArray[np.int64],
    circles: NDArray[np.float64], corners: NDArray[np.float64], corner_edges: NDArray[np.int64],
    cars: NDArray[np.float64],
) -> NDArray[np.float32]:  # fmt: skip
    paths, at = _paths(tx, ty, edges, first, circles, corners, corner_edges, cars)
    order = np.argsort(paths[:, 4], kind="mergesort")
    rows, columns = built.shape
    power = np.full((rows, columns), BLACK_DBM, dtype=np.float32)
    for row in range(rows):
        for column in range(columns):
            if built[row, column]:
                continue
            x, y = column + 0.5, row + 0.5
            free = free_space_loss(math.sqrt((x - tx) ** 2 + (y - ty) ** 2))
            best = free + _building_loss(tx, ty, x, y, edges, first, circles, _MAX_LOSS_DB - free)
            if best < _MAX_LOSS_DB:
                best += _car_loss(tx, ty, x, y, cars)
            best = min(best, _MAX_LOSS_DB)
            for k in order:
                path = paths[k]
                if path[4] + _GRAZING_DB + free >= best:
                    break  # the paths that follow lost as much before their corner
                c = corners[at[k]]
                angle = _bend(path, c, x, y)
                if angle < 0.0:
                    continue
                d1 = math.sqrt((c[0] - path[0]) ** 2 + (c[1] - path[1]) ** 2)
                d2 = math.sqrt((x - c[0]) ** 2 + (y - c[1]) ** 2)
                loss = path[4] + _corner_loss(angle, path[3], d1, d2) + free_space_loss(path[3] + d2)
                if loss >= best or not _sees(c[0], c[1], x, y, edges, first, circles, at[k], -1, corner_edges):
                    continue
                best = min(best, loss + _car_loss(c[0], c[1], x, y, cars))
            power[row, column] = TRANSMIT_POWER_DBM - best
    return power


def free_space_power(scene: Scene) -> NDArray[np.float32]:
    """Received power of a scene's transmitter without anything in its way, dBm at pixel centres, shape (S, S)."""
    centre = np.arange(scene.side) + 0.5
    distance = np.hypot(centre[None, :] - scene.transmitter[0], centre[:, None] - scene.transmitter[1])
    loss = _FREE_SPACE_1M_DB + 20.0 * np.log10(np.maximum(distance, NEAREST_M))
    return (TRANSMIT_POWER_DBM - loss).astype(np.float32)


def received_power(scene: Scene) -> NDArray[np.float32]:
    """Received power of a scene's transmitter, dBm at pixel centres, float32 of shape (S, S).

    It is :data:`refine_env.radiomap.BLACK_DBM` inside buildings, as RadioMapSeer has it, and nowhere less.
    """
    edges, first, circles, corners, corner_edges = _walls(scene)
    power: NDArray[np.float32] = _power_map(
        *map(float, scene.transmitter), scene.buildings, edges, first, circles, corners, corner_edges, _car_table(scene)
    )
    return power


def _circle(points: NDArray[np.float64]) -> tuple[float, float, float]:
    """Centre and radius of a circle around points, shape (n, 2)."""
    centre = (points.min(axis=0) + points.max(axis=0)) / 2
    return float(centre[0]), float(centre[1]), float(np.hypot(*(points - centre).T).max()) + 1e-6


def _walls(
    scene: Scene,
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """A scene's walls as the kernels take them.

    Returns edges (x, y, x, y), the first edge of each building with the number of all at the end, each building's
    circle, the corners that a path may bend around (x, y and both neighbors), and the two edges that meet in each.
    """
    edges: list[NDArray[np.float64]] = []
    first, circles, corners, corner_edges = [0], [], [], []
    for rings in scene.polygons:
        for ring in rings:
            start, n = sum(map(len, edges)), len(ring)
            before, after = np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0)
            edges.append(np.hstack([ring, after]))
            (ax, ay), (bx, by) = (ring - before).T, (after - ring).T
            turn = ax * by - ay * bx  # the building is on the left of all its rings, so that a corner turns left
            within = ((ring > 0.0) & (ring < scene.side)).all(axis=1)
            for i in np.flatnonzero((turn > 0.0) & within):
                corners.append([*ring[i], *before[i], *after[i]])
                corner_edges.append([start + (i - 1) % n, start + i])
        first.append(sum(map(len, edges)))
        circles.append(_circle(rings[0]))
    return (
        np.concatenate(edges) if edges else np.empty((0, 4)),
        np.array(first, dtype=np.int64),
        np.array(circles, dtype=np.float64).reshape(-1, 3),
        np.array(corners, dtype=np.float64).reshape(-1, 6),
        np.array(corner_edges, dtype=np.int64).reshape(-1, 2),
    )


def _car_table(scene: Scene) -> NDArray[np.float64]:
    """A scene's cars as the kernels take them: four corners, the circle around them, and the edge that closes them."""
    table = [[*c.ravel(), *_circle(c), *c[3], *c[0]] for c in scene.car_polygons]
    return np.array(table, dtype=np.float64).reshape(-1, 15)
