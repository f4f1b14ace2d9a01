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
def _fill_floors(gains: NDArray[np.float64], floors: NDArray[np.float64]) -> Any:
    """floors ← 1/g_j, infinite where nothing can be received; returns the lowest. Both (K,)."""
    lowest = np.inf
    for j in range(gains.size):
        floors[j] = 1.0 / gains[j] if gains[j] > 0.0 else np.inf
        lowest = min(lowest, floors[j])
    return lowest


@kernel
def water_level(floors: NDArray[np.float64], lowest: float, power: float, heights: NDArray[np.float64]) -> Any:
    """Water level over one set of floors, by finite active-set elimination.

    Heights d_j = 1/g_j − min 1/g are taken from the lowest floor, so that nothing is lost where the power is small
    beside the floors. All subchannels start active. The level that spends the power on the m active ones is
    (power + Σ d_j)/m; a subchannel with d_j at or above it cannot be part of the optimum, and dropping it only
    lowers the level, so dropping all such and repeating ends at the optimum after at most K rounds, without a
    tolerance. The lowest floor always stays.

    Args:
        floors: 1/g_j (K,); infinite ones get nothing.
        lowest: the lowest of them, finite.
        power: total power, > 0.
        heights: (K,) scratch.

    Returns:
        The level above the lowest floor.
    """
    count = 0
    total = power
    for j in range(floors.size):
        if floors[j] < np.inf:
            heights[count] = floors[j] - lowest
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
            return level
        count = kept
        level = total / count


@kernel
def fill_powers(gains: NDArray[np.float64], power: float, out: NDArray[np.float64]) -> None:
    """Waterfilled powers of every slot; ``gains`` and ``out`` (slots, K)."""
    floors, heights = np.empty(gains.shape[1]), np.empty(gains.shape[1])
    for row in range(gains.shape[0]):
        lowest = _fill_floors(gains[row], floors)
        level = water_level(floors, lowest, power, heights) if lowest < np.inf else 0.0
        for j in range(gains.shape[1]):
            out[row, j] = max(0.0, level - (floors[j] - lowest)) if floors[j] < np.inf else 0.0


@kernel
def fill_rates(gains: NDArray[np.float64], power: float, symbols_per_slot: float, out: NDArray[np.float64]) -> None:
    """ℓ Σ_j log2(1 + p_j g_j) of every slot; ``gains`` (slots, K), ``out`` (slots,)."""
    floors, heights = np.empty(gains.shape[1]), np.empty(gains.shape[1])
    for row in range(gains.shape[0]):
        out[row] = 0.0
        lowest = _fill_floors(gains[row], floors)
        if lowest == np.inf:
            continue
        level = water_level(floors, lowest, power, heights)
        bits = 0.0
        product = 1.0
        factors = 0
        for j in range(gains.shape[1]):
            allotted = level - (floors[j] - lowest)
            if allotted <= 0.0:
                continue
            received = allotted * gains[row, j]
            if received < _SMALL_SNR:
                bits += np.log1p(received) * _BITS_PER_NAT
                continue
            # One logarithm for a few subchannels' product.
            product *= 1.0 + received
            factors += 1
            if factors == _LOGS_PER_PRODUCT:
                bits += np.log2(product)
                product = 1.0
                factors = 0
        out[row] = symbols_per_slot * (bits + np.log2(product))
