"""Rayleigh block fading and the bits that a slot carries ([K] §II-A)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refine_env._compiled import kernel
from refine_env.link.waterfilling import water_level

__all__ = ["draw_gains", "draw_rates", "slot_rates"]

_LOGS_PER_PRODUCT = 4


@kernel
def _fill_slot_rates(
    gains: NDArray[np.float64], power: float, symbols_per_slot: float, out: NDArray[np.float64]
) -> None:
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


def slot_rates(gains: ArrayLike, total_power: float, symbols_per_slot: float) -> NDArray[np.float64]:
    """R_n = ℓ Σ_j log2(1 + p_j g_j) under waterfilling ([K] §II-A).

    Args:
        gains: noise-normalized gains, shape (slots, K), >= 0.
        total_power: Σ_j p_j in every slot, noise-normalized, > 0.
        symbols_per_slot: ℓ, may be fractional.

    Returns:
        Bits per slot, shape (slots,).
    """
    values = np.ascontiguousarray(gains, dtype=np.float64)
    rates = np.empty(values.shape[0])
    _fill_slot_rates(values, float(total_power), float(symbols_per_slot), rates)
    return rates


def draw_gains(rng: np.random.Generator, num_slots: int, num_subchannels: int) -> NDArray[np.float64]:
    """Rayleigh power gains g ~ Exp(mean 1), independent over slots and subchannels.

    Returns:
        Gains, shape (num_slots, num_subchannels).
    """
    return rng.standard_exponential((num_slots, num_subchannels))


def draw_rates(
    rng: np.random.Generator,
    num_slots: int,
    num_subchannels: int,
    total_power: float,
    symbols_per_slot: float,
) -> NDArray[np.float64]:
    """Draw the channel of an episode, then apply it: bits per slot, shape (num_slots,)."""
    return slot_rates(draw_gains(rng, num_slots, num_subchannels), total_power, symbols_per_slot)
