"""Rayleigh block fading and the bits that a slot carries ([K] §II-A)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refine_env._validation import check_positive
from refine_env.errors import ConfigurationError
from refine_env.link.kernels import fill_rates
from refine_env.link.waterfilling import check_gains, check_power

__all__ = ["draw_gains", "draw_rates", "slot_rates"]


def slot_rates(gains: ArrayLike, total_power: float, symbols_per_slot: float) -> NDArray[np.float64]:
    """R_n = ℓ Σ_j log2(1 + p_j g_j) under waterfilling ([K] §II-A).

    Args:
        gains: noise-normalized gains, shape (slots, K), >= 0.
        total_power: Σ_j p_j in every slot, noise-normalized, > 0.
        symbols_per_slot: ℓ, may be fractional.

    Returns:
        Bits per slot, shape (slots,).

    Raises:
        ConfigurationError: if the gains are not of that form, or a number is not finite and > 0.
    """
    values = check_gains(gains)
    if values.ndim != 2:
        raise ConfigurationError(
            f"`gains` must have shape (slots, K), got {values.shape}. Reshape, or give one slot as (1, K)."
        )
    power = check_power(total_power)
    symbols = check_positive("symbols_per_slot", symbols_per_slot, advice="Give ℓ, for example 70.")
    rates = np.empty(values.shape[0])
    fill_rates(values, power, symbols, rates)
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
