"""The twin of ``train.diffusion.propagation``: all paths, tried one by one, in plain Python. It shares no line with it.

Every sequence of up to three corners is taken as a path. Its loss is written out as in docs/radiomap.md, and nothing is
dropped on the way. Slow: for scenes of a few buildings and for some pixels.
"""

from __future__ import annotations

import cmath
import itertools
import math

from train.diffusion.scene import Scene

LAMBDA = 299792458 / 5.9e9
Polygon = list[complex]


def cross(u: complex, v: complex) -> float:
    return u.real * v.imag - u.imag * v.real


def inside(z: complex, rings: list[Polygon]) -> bool:
    count = 0
    for ring in rings:
        for a, b in zip(ring, ring[1:] + ring[:1], strict=True):
            if (a.imag > z.imag) != (b.imag > z.imag):
                count += z.real < a.real + (z.imag - a.imag) / (b.imag - a.imag) * (b.real - a.real)
    return count % 2 == 1


def crossings(p: complex, q: complex, rings: list[Polygon]) -> list[float]:
    """Where the segment crosses the rings, as shares of its length, in order."""
    found = []
    for ring in rings:
        for a, b in zip(ring, ring[1:] + ring[:1], strict=True):
            bottom = cross(q - p, b - a)
            if abs(bottom) > 1e-9:
                t, s = cross(a - p, b - a) / bottom, cross(a - p, q - p) / bottom
                if 0 < t < 1 and 0 < s < 1:
                    found.append(t)
    return sorted(found)


def free_space(d: float) -> float:
    return 20 * math.log10(4 * math.pi * max(d, 1.0) / LAMBDA)


def knife_edge(v: float) -> float:
    return 6.9 + 20 * math.log10(math.sqrt((v - 0.1) ** 2 + 1) + v - 0.1)


class Twin:
    """The received power of a scene, one pixel after the other."""

    def __init__(self, scene: Scene) -> None:
        self.buildings = [[[complex(*z) for z in ring] for ring in rings] for rings in scene.polygons]
        self.cars = [[complex(*z) for z in car] for car in scene.car_polygons]
        self.start = complex(*scene.transmitter)
        self.corners = []  # of outlines and courtyards: the corner and its neighbors, where less than half is built
        for rings in self.buildings:
            for ring in rings:
                for k, c in enumerate(ring):
                    a, b = ring[k - 1], ring[(k + 1) % len(ring)]
                    toward = (a - c) / abs(a - c) + (b - c) / abs(b - c)
                    if inside(c + 1e-4 * toward / abs(toward), rings) and 0 < c.real < scene.side > c.imag > 0:
                        self.corners.append((c, a, b))

    def cars_loss(self, p: complex, q: complex) -> float:
        loss = 0.0
        for car in self.cars:
            at = crossings(p, q, [car])
            if len(at) != 2:
                continue
            d1 = max(abs(q - p) * sum(at) / 2, 1.0)
            d2 = max(abs(q - p) * (1 - sum(at) / 2), 1.0)
            beside = [cross(z - p, q - p) / abs(q - p) for z in car]
            height = min(1.75 - 1.5, max(beside), -min(beside))
            loss += knife_edge(height * math.sqrt(2 / LAMBDA * (1 / d1 + 1 / d2)))
        return loss

    def straight(self, q: complex) -> float:
        p, loss = self.start, 0.0
        for rings in self.buildings:
            at = crossings(p, q, rings)
            for a, b in zip(at[::2], at[1::2], strict=True):
                loss += min(2 * 13.4 + 1.2 * (b - a) * abs(q - p), 50.0)
        return free_space(abs(q - p)) + loss + self.cars_loss(p, q)

    def is_free(self, p: complex, q: complex) -> bool:
        short = (q - p) * 1e-7
        if any(crossings(p + short, q - short, rings) for rings in self.buildings):
            return False
        if any(c == p and q in (a, b) for c, a, b in self.corners):
            return True  # along a wall
        return not any(inside((p + q) / 2, rings) for rings in self.buildings)

    def is_taut(self, p: complex, corner: tuple[complex, complex, complex], q: complex) -> bool:
        c, a, b = corner
        side = math.copysign(1.0, cross(c - p, q - c))
        return all(side * cross(line, z - c) > -1e-7 for line in (c - p, q - c) for z in (a, b))

    def around(self, corners: tuple[tuple[complex, complex, complex], ...], q: complex) -> float:
        points = [self.start, *(c for c, _, _ in corners), q]
        if not all(self.is_taut(points[k], c, points[k + 2]) for k, c in enumerate(corners)):
            return math.inf
        legs = list(itertools.pairwise(points))
        if not all(self.is_free(*leg) for leg in legs):
            return math.inf
        s = [abs(b - a) for a, b in legs]
        loss = free_space(sum(s)) + sum(self.cars_loss(*leg) for leg in legs)
        for k in range(len(corners)):
            angle = abs(cmath.phase((points[k + 2] - points[k + 1]) / (points[k + 1] - points[k])))
            loss += knife_edge(angle * math.sqrt(2 / (LAMBDA * (1 / s[k] + 1 / s[k + 1]))))
        pairs = math.prod(a + b for a, b in itertools.pairwise(s))
        return loss + 10 * math.log10(pairs / (math.prod(s[1:-1]) * sum(s)))

    def power(self, x: float, y: float) -> float:
        q = complex(x, y)
        if any(inside(q, rings) for rings in self.buildings):
            return -124.0
        paths = (path for n in (1, 2, 3) for path in itertools.permutations(self.corners, n))
        least = min([self.straight(q), *(self.around(path, q) for path in paths)])
        return max(23.0 - least, -124.0)
