"""Compiled loops over slots and subchannels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refine_env._compiled import kernel

__all__ = ["fill_powers", "fill_rates", "water_level"]

_LOGS_PER_PRODUCT = 4
_SMALL_SNR = 1e-2  # below, 1 + p g loses digits
_BITS_PER_NAT = 1.0 / np.log(2.0)


@kernel
def water_level(gains: NDArray[np.float64], power: float, heights: NDArray[np.float64]) -> Any:
    """Water level over one set of gains, by finite active-set elimination, above the lowest floor.

    The floors are 1/g_j; heights d_j = 1/g_j − min 1/g are taken from the lowest one, so that nothing is lost where
    the power is small beside the floors. All subchannels start active. The level that spends the power on the m
    active ones is (power + Σ d_j)/m; a subchannel with d_j at or above it cannot be part of the optimum, and
    dropping it only lowers the level, so dropping all such and repeating ends at the optimum after at most K
    rounds, without a tolerance. The lowest floor always stays.

    Args:
        gains: (K,), noise-normalized, >= 0.
        power: total power, > 0.
        heights: (K,) scratch.

    Returns:
        The level above the lowest floor, and that floor; 0 and infinity if no gain has a finite floor.
    """
    lowest = np.inf
    for j in range(gains.size):
        if gains[j] > 0.0:
            lowest = min(lowest, 1.0 / gains[j])
    if lowest == np.inf:
        return 0.0, lowest
    count = 0
    total = power
    for j in range(gains.size):
        if gains[j] > 0.0 and 1.0 / gains[j] < np.inf:
            heights[count] = 1.0 / gains[j] - lowest
            total += heights[count]
            count += 1
    level = total / count
    while True:
        kept = 0
        total = power
        for j in range(count):
            if heights[j] < level:
                heights[kept] = heights[j]
                total += heights[j]
                kept += 1
        if kept == count:
            return level, lowest
        count = kept
        level = total / count


@kernel
def _power(gain: float, level: float, lowest: float) -> Any:
    """p_j = (level − d_j)^+ of one subchannel."""
    return max(0.0, level - (1.0 / gain - lowest)) if gain > 0.0 else 0.0


@kernel
def fill_powers(gains: NDArray[np.float64], power: float, out: NDArray[np.float64]) -> None:
    """Waterfilled powers of every slot; ``gains`` and ``out`` (slots, K)."""
    heights = np.empty(gains.shape[1])
    for row in range(gains.shape[0]):
        level, lowest = water_level(gains[row], power, heights)
        for j in range(gains.shape[1]):
            out[row, j] = _power(gains[row, j], level, lowest)


@kernel
def fill_rates(gains: NDArray[np.float64], power: float, symbols_per_slot: float, out: NDArray[np.float64]) -> None:
    """ℓ Σ_j log2(1 + p_j g_j) of every slot; ``gains`` (slots, K), ``out`` (slots,)."""
    heights = np.empty(gains.shape[1])
    for row in range(gains.shape[0]):
        level, lowest = water_level(gains[row], power, heights)
        bits = 0.0
        product = 1.0
        factors = 0
        for j in range(gains.shape[1]):
            received = _power(gains[row, j], level, lowest) * gains[row, j]
            if received >= _SMALL_SNR:
                # One logarithm for a few subchannels' product.
                product *= 1.0 + received
                factors += 1
                if factors == _LOGS_PER_PRODUCT:
                    bits += np.log2(product)
                    product = 1.0
                    factors = 0
            elif received > 0.0:
                bits += np.log1p(received) * _BITS_PER_NAT
        out[row] = symbols_per_slot * (bits + np.log2(product))
