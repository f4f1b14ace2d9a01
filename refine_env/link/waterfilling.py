"""Waterfilling over parallel subchannels ([K] §II-A), exact."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refine_env._validation import check_choice, check_integer, check_positive, check_snr_db
from refine_env.errors import ConfigurationError
from refine_env.link.kernels import fill_powers

__all__ = ["SNR_REFERENCES", "total_power", "waterfill"]

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


def check_gains(gains: ArrayLike) -> NDArray[np.float64]:
    """Gains as float64 (..., K), contiguous; raises ConfigurationError if they are no power gains."""
    try:
        values = np.array(gains, dtype=np.float64, order="C")
    except (TypeError, ValueError):
        values = np.empty(())
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ConfigurationError(
            f"`gains` must be numbers of shape (..., K) with K >= 1, got {gains!r:.60}. Put subchannels last."
        )
    if not (np.isfinite(values).all() and (values >= 0.0).all()):
        raise ConfigurationError(
            "`gains` must be finite and >= 0, got a value that is not. Give power gains |h|², not amplitudes."
        )
    return values


def check_power(total_power: float) -> float:
    """A total power as a finite float > 0; raises ConfigurationError otherwise."""
    return check_positive("total_power", total_power, advice="Give K·SNR (see refine_env.link.total_power).")


def waterfill(gains: ArrayLike, total_power: float) -> NDArray[np.float64]:
    """Optimal powers p_j = (1/λ − 1/g_j)^+ with Σ_j p_j = ``total_power`` ([K] §II-A).

    Args:
        gains: noise-normalized subchannel gains, shape (..., K), finite and >= 0.
        total_power: Σ_j p_j of every slot, noise-normalized, > 0.

    Returns:
        Powers, shape (..., K); all 0 in a slot in which every gain is 0 (or so small that 1/g_j overflows).

    Raises:
        ConfigurationError: if a gain is negative or not finite, the power is not positive and finite,
            or ``gains`` has no subchannel axis.
    """
    values = check_gains(gains)
    power = check_power(total_power)
    powers = np.empty_like(values)
    columns = values.shape[-1]
    slots = values.reshape(-1, columns)
    fill_powers(slots, np.full(len(slots), power), powers.reshape(-1, columns))
    return powers
