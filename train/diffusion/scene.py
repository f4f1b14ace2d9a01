"""What a street scene is.

It is a square of ``side`` metres, a pixel a metre. Points are (x, y) in metres, x along a row of pixels and y down the
rows; pixel (row, column) has its centre at (column + 0.5, row + 0.5).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Points", "Scene"]

Points = NDArray[np.float64]
"""Points in order, float64 of shape (n, 2)."""


@dataclass(frozen=True, eq=False)
class Scene:
    """One street scene.

    Attributes:
        buildings: True where a pixel's centre is inside a building, bool of shape (S, S).
        cars: True where it is inside a car, bool of shape (S, S); never where ``buildings`` is.
        polygons: one tuple of rings for each building: its outline, then the courtyards inside it. Every ring is
            float64 of shape (n, 2), with the building on its left in (x, y): outlines one way around, courtyards the
            other. Rings may reach out of the scene.
        car_polygons: the four corners of each car, float64 of shape (4, 2), in the order of an outline.
        streets: the four corners of each street in the same way, from house front to house front.
        transmitter: where the transmitter is, (x, y) in metres; the centre of a pixel.
        side: S, pixels and metres along a side.
    """

    buildings: NDArray[np.bool_]
    cars: NDArray[np.bool_]
    polygons: tuple[tuple[Points, ...], ...]
    car_polygons: tuple[Points, ...]
    streets: tuple[Points, ...]
    transmitter: tuple[float, float]
    side: int
