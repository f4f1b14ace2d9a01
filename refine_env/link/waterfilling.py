"""Waterfilling over parallel subchannels ([K] §II-A), exact."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refine_env._compiled import kernel
from refine_env._validation import check_choice, check_integer, check_snr_db
from refine_env.errors import ConfigurationError

__all__ = ["SNR_REFERENCES", "total_power", "water_level", "waterfill"]

SNR_REFERENCES = ("subchannel", "total")


def total_power(snr_db: float, num_subchannels: int, snr_reference: str = "subchannel") -> float:
    """Noise-normalized power Σ_j p_j of one slot.

    Args:
        snr_db: mean SNR [dB].
        num_subchannels: K.
        snr_reference: ``"subchannel"``, the SNR of one subchannel under equal power, Σ p_j = K·SNR;
            or ``"total"``, the formula as [K] prints it, Σ p_j = SNR.

    Returns:
        The total power, relative to the noise of one subchannel at mean gain 1.

    Raises:
        ConfigurationError: if an argument is out of range.
    """
    snr = math.pow(10.0, check_snr_db(snr_db) / 10.0)
    count = check_integer("num_subchannels", num_subchannels, 1, advice="Give K, for example 60.")
    reference = check_choice("snr_reference", snr_reference, SNR_REFERENCES)
    return count * snr if reference == "subchannel" else snr


@kernel
def water_level(gains: NDArray[np.float64], power: float, floors: NDArray[np.float64]) -> Any:
    """Water level 1/λ over one set of gains, by finite active-set elimination.

    All subchannels with a gain above 0 start active. The level that spends the power on the active
    set is (power + Σ 1/g_j)/m; a subchannel whose floor 1/g_j lies at or above it cannot be part of
    the optimum, and dropping it only lowers the level, so dropping all such and repeating ends at the
    optimum after at most K rounds, without a tolerance.

    Args:
        gains: (K,), noise-normalized, >= 0.
        power: total power, > 0.
        floors: (K,) scratch.

    Returns:
        The level; 0 if no gain is above 0.
    """
    count = 0
    total = power
    for j in range(gains.size):
        if gains[j] > 0.0:
            floors[count] = 1.0 / gains[j]
            total += floors[count]
            count += 1
    if count == 0:
        return 0.0
    level = total / count
    while True:
        kept = 0
        total = power
        for j in range(count):
            if floors[j] < level:
                floors[kept] = floors[j]
                total += floors[j]
                kept += 1
        if kept == count:
            return level
        count = kept
        level = total / count


@kernel
def _waterfill_rows(gains: NDArray[np.float64], power: float, out: NDArray[np.float64]) -> None:
    floors = np.empty(gains.shape[1])
    for row in range(gains.shape[0]):
        level = water_level(gains[row], power, floors)
        for j in range(gains.shape[1]):
            gain = gains[row, j]
            out[row, j] = max(0.0, level - 1.0 / gain) if gain > 0.0 else 0.0


def waterfill(gains: ArrayLike, total_power: float) -> NDArray[np.float64]:
    """Optimal powers p_j = (1/λ − 1/g_j)^+ with Σ_j p_j = ``total_power`` ([K] §II-A).

    Args:
        gains: noise-normalized subchannel gains, shape (..., K), finite and >= 0.
        total_power: Σ_j p_j of every slot, noise-normalized, > 0.

    Returns:
        Powers, shape (..., K); all 0 in a slot in which every gain is 0.

    Raises:
        ConfigurationError: if a gain is negative or not finite, the power is not positive and finite,
            or ``gains`` has no subchannel axis.
    """
    values = np.array(gains, dtype=np.float64, order="C")
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ConfigurationError(
            f"`gains` must have shape (..., K) with K >= 1, got {values.shape}. Put subchannels last."
        )
    if not (np.isfinite(values).all() and (values >= 0.0).all()):
        raise ConfigurationError(
            "`gains` must be finite and >= 0, got a value that is not. Give power gains |h|², not amplitudes."
        )
    if not (np.isfinite(total_power) and total_power > 0.0):
        raise ConfigurationError(
            f"`total_power` must be finite and > 0, got {total_power!r}. Give K·SNR (see refine_env.link.total_power)."
        )
    powers = np.empty_like(values)
    columns = values.shape[-1]
    _waterfill_rows(values.reshape(-1, columns), float(total_power), powers.reshape(-1, columns))
    return powers
