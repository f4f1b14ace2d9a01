"""Gray levels of a radio map, and the received power that they stand for, as RadioMapSeer scales them.

RadioMapSeer's files hold the path gain, -147 dB as black and -47 dB as white. With its transmit power of 23 dBm that is
a received power of -124 to -24 dBm. Its noise floor, -104 dBm in a bandwidth of 10 MHz, is the gray level 0.2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["BLACK_DBM", "NOISE_FLOOR_DBM", "TRANSMIT_POWER_DBM", "WHITE_DBM", "dbm", "gray"]

TRANSMIT_POWER_DBM = 23.0
BLACK_DBM = -147.0 + TRANSMIT_POWER_DBM  # gray level 0, and what stands for "inside a building"
WHITE_DBM = -47.0 + TRANSMIT_POWER_DBM  # gray level 1
NOISE_FLOOR_DBM = -104.0  # thermal noise, -174 dBm/Hz, in 10 MHz


def gray(power_dbm: ArrayLike) -> NDArray[np.float32]:
    """Gray levels in [0, 1], float32, of received powers in dBm; powers beyond the two limits are clipped to them."""
    level = (np.asarray(power_dbm, dtype=np.float64) - BLACK_DBM) / (WHITE_DBM - BLACK_DBM)
    return np.clip(level, 0.0, 1.0).astype(np.float32)


def dbm(level: ArrayLike) -> NDArray[np.float32]:
    """Received powers in dBm, float32, that gray levels stand for: the inverse of :func:`gray` in between its limits.

    Levels outside of [0, 1], which a model may give, are continued on the same line.
    """
    return (BLACK_DBM + np.asarray(level, dtype=np.float64) * (WHITE_DBM - BLACK_DBM)).astype(np.float32)
