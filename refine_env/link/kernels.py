"""Compiled loops over slots and subchannels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refine_env._compiled import kernel

__all__ = ["fill_powers", "fill_rates", "water_level"]

_LOGS_PER_PRODUCT = 4


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
def fill_powers(gains: NDArray[np.float64], power: float, out: NDArray[np.float64]) -> None:
    """Waterfilled powers of every slot; ``gains`` and ``out`` (slots, K)."""
    floors = np.empty(gains.shape[1])
    for row in range(gains.shape[0]):
        level = water_level(gains[row], power, floors)
        for j in range(gains.shape[1]):
            gain = gains[row, j]
            out[row, j] = max(0.0, level - 1.0 / gain) if gain > 0.0 else 0.0


@kernel
def fill_rates(gains: NDArray[np.float64], power: float, symbols_per_slot: float, out: NDArray[np.float64]) -> None:
    """ℓ Σ_j log2(1 + p_j g_j) of every slot; ``gains`` (slots, K), ``out`` (slots,)."""
    floors = np.empty(gains.shape[1])
    for row in range(gains.shape[0]):
        level = water_level(gains[row], power, floors)
        # p_j g_j + 1 = level · g_j where p_j > 0; one logarithm for a few subchannels' product.
        bits = 0.0
        product = 1.0
        factors = 0
        for j in range(gains.shape[1]):
            factor = level * gains[row, j]
            if factor > 1.0:
                product *= factor
                factors += 1
                if factors == _LOGS_PER_PRODUCT:
                    bits += np.log2(product)
                    product = 1.0
                    factors = 0
        out[row] = symbols_per_slot * (bits + np.log2(product))
