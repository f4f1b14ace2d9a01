"""Block fading and the bits that a slot carries ([K] §II-A)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refine_env._validation import check_positive
from refine_env.errors import ConfigurationError
from refine_env.link.channel import ChannelModel
from refine_env.link.kernels import fill_rates
from refine_env.link.waterfilling import check_gains, check_power

__all__ = ["draw_gains", "draw_rates", "draw_rates_of_many", "slot_rates"]

RAYLEIGH = ChannelModel()
"""The link of [K]."""


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
    fill_rates(values, np.full(len(values), power), symbols, rates)
    return rates


def draw_gains(
    rng: np.random.Generator, num_slots: int, num_subchannels: int, out: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Rayleigh power gains g ~ Exp(mean 1), independent over slots and subchannels.

    Args:
        rng: the generator.
        num_slots: how many slots.
        num_subchannels: K.
        out: where to draw them, of the result's shape.

    Returns:
        Gains, shape (num_slots, num_subchannels).
    """
    return RAYLEIGH.draw_gains(rng, num_slots, num_subchannels, out=out)


def draw_rates(
    rng: np.random.Generator,
    num_slots: int,
    num_subchannels: int,
    total_power: float,
    symbols_per_slot: float,
    channel: ChannelModel = RAYLEIGH,
) -> NDArray[np.float64]:
    """Draw the channel of an episode, then apply it: bits per slot, shape (num_slots,)."""
    powers = np.array([check_power(total_power)])
    symbols = check_positive("symbols_per_slot", symbols_per_slot, advice="Give ℓ, for example 70.")
    rates: NDArray[np.float64] = draw_rates_of_many((rng,), num_slots, num_subchannels, powers, symbols, channel)[0]
    return rates


_CHUNK = 1 << 15  # gains drawn before they are used: they stay in the second-level cache


def draw_rates_of_many(
    rngs: Sequence[np.random.Generator],
    num_slots: int,
    num_subchannels: int,
    total_powers: NDArray[np.float64],
    symbols_per_slot: float,
    channel: ChannelModel = RAYLEIGH,
) -> NDArray[np.float64]:
    """:func:`draw_rates` of many episodes, each from its own generator.

    Args:
        rngs: one generator an episode (N,).
        num_slots: T_d.
        num_subchannels: K.
        total_powers: Σ_j p_j in every slot of an episode, noise-normalized, > 0 (N,).
        symbols_per_slot: ℓ, may be fractional.
        channel: which link.

    Returns:
        Bits per slot, shape (N, num_slots).
    """
    rates = np.empty((len(rngs), num_slots))
    drawn = num_slots + channel.csi_delay
    chunk = max(1, min(len(rngs), _CHUNK // (drawn * num_subchannels)))
    gains = np.empty((chunk, drawn, num_subchannels))
    for start in range(0, len(rngs), chunk):
        part = slice(start, start + chunk)
        for rng, own in zip(rngs[part], gains, strict=False):
            channel.draw_gains(rng, drawn, num_subchannels, out=own)
        channel.fill_rates(gains[: len(rngs[part])], total_powers[part], symbols_per_slot, rates[part])
    return rates
