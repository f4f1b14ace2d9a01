"""Radio maps as gray levels, as RadioMapSeer scales them: the power that they stand for, their colors, who is covered.

RadioMapSeer's files hold the path gain, -147 dB as black and -47 dB as white. With its transmit power of 23 dBm that is
a received power of -124 to -24 dBm. Its noise floor, -104 dBm in a bandwidth of 10 MHz, is the gray level 0.2.

A model whose images are such maps says so in a file of its folder, :data:`MAP_FILE`: that alone decides whether what it
decodes is shown as an image or as a map.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refine_env.errors import ConfigurationError

__all__ = [
    "BLACK_DBM",
    "COVERAGE_DBM",
    "MAP_FILE",
    "NOISE_FLOOR_DBM",
    "QUANTITY",
    "SCALE",
    "TRANSMIT_POWER_DBM",
    "WHITE_DBM",
    "PowerScale",
    "color",
    "color_bar",
    "dbm",
    "gray",
    "other_transmitters",
    "read_scale",
    "write_scale",
]

TRANSMIT_POWER_DBM = 23.0
BLACK_DBM = -147.0 + TRANSMIT_POWER_DBM  # gray level 0, and what stands for "inside a building"
WHITE_DBM = -47.0 + TRANSMIT_POWER_DBM  # gray level 1
NOISE_FLOOR_DBM = -104.0  # thermal noise, -174 dBm/Hz, in 10 MHz

COVERAGE_DBM = NOISE_FLOOR_DBM + 10.0
"""A place is covered where the received power is at least this: an SNR of 10 dB."""

MAP_FILE = "map.json"
QUANTITY = "received power"
"""What a scale's label calls it, and the file's field ``quantity``."""


class PowerScale(NamedTuple):
    """What the gray levels of a model's images stand for.

    Attributes:
        black_dbm: received power [dBm] of the gray level 0, and what stands for "inside a building".
        white_dbm: that of the gray level 1.
    """

    black_dbm: float
    white_dbm: float

    def gray(self, power_dbm: ArrayLike) -> NDArray[np.float32]:
        """Gray levels in [0, 1], float32, of received powers in dBm; beyond the two limits they are clipped."""
        level = (np.asarray(power_dbm, dtype=np.float64) - self.black_dbm) / (self.white_dbm - self.black_dbm)
        return np.clip(level, 0.0, 1.0).astype(np.float32)

    def dbm(self, level: ArrayLike) -> NDArray[np.float32]:
        """Received powers in dBm, float32, that gray levels stand for: the inverse of :meth:`gray` in its limits.

        Levels outside of [0, 1], which a model may give, are continued on the same line.
        """
        span = self.white_dbm - self.black_dbm
        return (self.black_dbm + np.asarray(level, dtype=np.float64) * span).astype(np.float32)


SCALE = PowerScale(BLACK_DBM, WHITE_DBM)
"""RadioMapSeer's."""

gray, dbm = SCALE.gray, SCALE.dbm


def read_scale(folder: Path) -> PowerScale | None:
    """What the images of a model stand for, as the file in its folder says; None where there is none: they are images.

    Raises:
        ConfigurationError: if the file is none of these.
    """
    file = folder / MAP_FILE
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_bytes())
        scale = PowerScale(*(float(values[name]) for name in PowerScale._fields))
        if values["quantity"] != QUANTITY or not -1e3 < scale.black_dbm < scale.white_dbm < 1e3:
            raise ValueError(values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"`{MAP_FILE}` must say `quantity`, {QUANTITY!r}, and `black_dbm` < `white_dbm`, got {file} "
            f"({type(error).__name__}: {error!s:.80}). Get the model anew."
        ) from None
    return scale


def write_scale(folder: Path, scale: PowerScale = SCALE) -> None:
    """Say in a model's folder that its images are radio maps on that scale."""
    (folder / MAP_FILE).write_text(json.dumps({"quantity": QUANTITY, **scale._asdict()}) + "\n", encoding="utf-8")


def color(images: NDArray[Any], buildings: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
    """Maps as pictures: dark blue to yellow (viridis), buildings in gray.

    Args:
        images: gray levels three times, (N, height, width, 3) in [0, 1].
        buildings: where they stand, (N, height, width).

    Returns:
        float32 (N, height, width, 3) in [0, 1].
    """
    pictures: NDArray[np.float32] = _VIRIDIS[np.rint(images[..., 0] * 255.0).astype(np.intp)]
    if buildings is not None:
        pictures[buildings] = _BUILDING
    return pictures


def color_bar() -> NDArray[np.float32]:
    """The colors of the scale, the least power first, (256, 1, 3)."""
    colors: NDArray[np.float32] = _VIRIDIS[:, None].copy()
    return colors


def other_transmitters(conditions: NDArray[Any]) -> NDArray[np.int64]:
    """For each of a scene's maps the next one of the same buildings and cars, with another transmitter.

    Args:
        conditions: of the maps, (N, 3, height, width): buildings, cars, transmitter.

    Returns:
        int64 (N,): its number; -1 where there is none.
    """
    scenes: dict[bytes, list[int]] = {}
    for number, planes in enumerate(conditions):
        scenes.setdefault(planes[:2].tobytes(), []).append(number)
    others = np.full(len(conditions), -1, dtype=np.int64)
    for numbers in scenes.values():
        if len(numbers) > 1:
            others[numbers] = np.roll(numbers, -1)
    return others


_BUILDING = np.float32(0.6)
_VIRIDIS_CODE = (
    "RAFURAJWRQRXRQVZRgdaRghcRgpdRgteRw1gRw5hRxBjRxFkRxNlSBRnSBZoSBdpSBhqSBpsSBttSBxuSB1vSB9wSCBxSCFzSCN0SCR1"
    "SCV2SCZ3SCh4SCl5Ryp6Ryx6Ry17Ry58Ry99RjB+RjJ+RjN/RjSARTWBRTeBRTiCRDmDRDqDRDuEQz2EQz6FQj+FQkCGQkGGQUKHQUSH"
    "QEWIQEaIP0eIP0iJPkmJPkqJPkyKPU2KPU6KPE+KPFCLO1GLO1KLOlOLOlSMOVWMOVaMOFiMOFmMN1qMN1uNNlyNNl2NNV6NNV+NNGCN"
    "NGGNM2KNM2ONMmSOMmWOMWaOMWeOMWiOMGmOMGqOL2uOL2yOLm2OLm6OLm+OLXCOLXGOLHGOLHKOLHOOK3SOK3WOKnaOKneOKniOKXmO"
    "KXqOKXuOKHyOKH2OJ36OJ3+OJ4COJoGOJoKOJoKOJYOOJYSOJYWOJIaOJIeOI4iOI4mOI4qNIouNIoyNIo2NIY6NIY+NIZCNIZGMIJKM"
    "IJKMIJOMH5SMH5WLH5aLH5eLH5iLH5mKH5qKHpuKHpyJHp2JH56JH5+IH6CIH6GIH6GHH6KHIKOGIKSGIaWFIaaFIqeFIqiEI6mDJKqD"
    "JauCJayCJq2BJ62BKK6AKa9/KrB/LLF+LbJ9LrN8L7R8MbV7MrZ6NLZ5Nbd5N7h4OLl3Orp2O7t1Pbx0P7xzQL1yQr5xRL9wRsBvSMFu"
    "SsFtTMJsTsNrUMRqUsVpVMVoVsZnWMdlWshkXMhjXsliYMpgY8tfZcteZ8xcac1bbM1abs5YcM9Xc9BWddBUd9FTetFRfNJQf9NOgdNN"
    "hNRLhtVJidVIi9ZGjtZFkNdDk9dBldhAmNg+m9k8ndk7oNo5oto3pds2qNs0qtwyrdwwsN0vst0ttd4ruN4put4ovd8mwN8lwt8jxeAh"
    "yOAgyuEfzeEd0OEc0uIb1eIa2OIZ2uMZ3eMY3+MY4uQY5eQZ5+QZ6uUa7OUb7+Uc8eUd9OYe9uYg+OYh++cj/ecl"
)
"""Matplotlib's table of 256 colors, red, green and blue a byte each, for where matplotlib is not installed."""
_VIRIDIS = np.frombuffer(base64.b64decode(_VIRIDIS_CODE), dtype=np.uint8).reshape(256, 3).astype(np.float32) / 255
