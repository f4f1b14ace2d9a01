"""Links whose slots depend on each other: a Markov chain of rate levels."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refine_env._validation import check_integer, check_positive, check_quantile
from refine_env.errors import ConfigurationError
from refine_env.link.channel import ChannelModel
from refine_env.link.fading import RAYLEIGH, draw_rates_of_many
from refine_env.link.law import FOREVER, RateLevels, kept_arrays, least_count
from refine_env.link.slot_law import linear_binning
from refine_env.link.waterfilling import total_power

__all__ = ["RateChain", "rate_chain"]

_VERSION = 1  # of the computation: chains stored by another are computed anew
_SEED = 20261122
_TRANSITIONS = 64  # of one simulated episode
_EPISODES = 8192
_SIMULATED_GAINS = 60_000_000  # at most, whatever K
_GROUPS = 8  # of episodes, whose spread gives the error
_POINTS_PER_STD = 16  # of the grid of bits
_MOST_POINTS = 1 << 16
_MOST_SUM_POINTS = 1 << 14  # of the law of one sum


@dataclass(frozen=True, eq=False)
class RateChain:
    """The rates of a link as a Markov chain of levels: given its level, a slot's rate is independent of all others.

    That is an approximation, better the more levels: of a link with a memory longer than one slot, such as the Jakes
    process, it keeps the law of one slot and of two neighboring ones.

    Attributes:
        levels: representative rates, edges, stationary probabilities and transition matrix.
        error: largest standard error of an entry of the transition matrix, from the spread over eight groups of the
            simulated episodes.
        spacing: of the grid of the levels' laws [bit/slot].
        origin: its first point [bit/slot].
        masses: law of the rate within each level on that grid (L, G).
    """

    levels: RateLevels
    error: float
    spacing: float
    origin: float
    masses: NDArray[np.float64]

    def __repr__(self) -> str:
        return f"RateChain({self.levels.rates.size} levels, mean={self.mean:.6g}, error={self.error:.1g})"

    @property
    def mean(self) -> float:
        """E[R_n] [bit/slot]."""
        return float(self.levels.probabilities @ self.levels.rates)

    def latency_pmf(self, bits: ArrayLike, max_slots: int) -> NDArray[np.float64]:
        """Joint law of a transmission's slots and of the level that it leaves the channel in.

        Args:
            bits: payloads B > 0, any shape.
            max_slots: the last number of slots.

        Returns:
            Shape (*shape of bits, L, max_slots + 1, L): entry [i, k, j] is P[T_dl = k, the slot after the
            transmission's last has level j | its first slot has level i], 0 for k = 0. What is missing from 1 is the
            probability of more than ``max_slots``.

        Raises:
            ConfigurationError: if a payload is not > 0, or ``max_slots`` no integer >= 0.
        """
        slots = check_integer("max_slots", max_slots, 0, advice="Give a number of slots.")
        amounts = np.asarray(bits, dtype=np.float64)
        if not (amounts > 0.0).all():
            raise ConfigurationError(f"`bits` must be > 0, got {bits!r:.100}. Give the payload in bits, M·b.")
        flat = np.atleast_1d(amounts).reshape(-1)
        transition = self.levels.transition
        count = transition.shape[0]
        pmf = np.zeros((flat.size, count, slots + 1, count))
        # Below: P[S_N < B, level of slot N + 1 | level of slot 1], N = 0: everything, the level unchanged.
        below = np.tile(np.eye(count), (flat.size, 1, 1))
        grid, spacing = self.masses, self.spacing
        size = 2 ** math.ceil(math.log2(max(2, slots) * grid.shape[1]))
        if size > _MOST_POINTS:  # coarser, since sums of many slots are wide
            factor = math.ceil(size / _MOST_POINTS)
            positions = np.arange(grid.shape[1]) / factor
            points = int(positions[-1]) + 2
            coarse = np.array([linear_binning(positions, row, points) for row in grid])
            grid, spacing, size = coarse, spacing * factor, 2 * _MOST_POINTS
        step = np.fft.rfft(grid, size).T[:, :, None] * transition
        spectrum = np.tile(np.eye(count, dtype=np.complex128), (step.shape[0], 1, 1))
        edges = np.arange(size)
        for k in range(1, slots + 1):
            spectrum = spectrum @ step
            sums = np.cumsum(np.fft.irfft(np.moveaxis(spectrum, 0, 2), size), axis=2)
            position = (flat - k * self.origin) / spacing - 0.5
            index = np.clip(np.floor(position).astype(np.int64), -1, size - 2)
            weight = np.clip(position - index, 0.0, 1.0)
            low = np.where(index >= 0, sums[:, :, np.maximum(index, 0)], 0.0)
            high = sums[:, :, np.minimum(index + 1, edges[-1])]
            now = np.moveaxis(np.where(position < -1.0, 0.0, low * (1.0 - weight) + high * weight), 2, 0)
            now = np.where(now > 1e-14, now, 0.0)
            pmf[:, :, k] = np.maximum(below @ transition - now, 0.0)
            below = now
            if not below.any():
                break
        return pmf.reshape(*amounts.shape, count, slots + 1, count)

    def latency_sf(self, bits: ArrayLike, max_slots: int) -> NDArray[np.float64]:
        """Survival function of the latency, P[T_dl > k] for k = 0 … max_slots, from a stationary first slot.

        Args:
            bits: payloads B > 0, any shape.
            max_slots: the last k.

        Returns:
            Shape (*shape of bits, max_slots + 1).

        Raises:
            ConfigurationError: as :meth:`latency_pmf`.
        """
        pmf = np.einsum("i,...ikj->...k", self.levels.probabilities, self.latency_pmf(bits, max_slots))
        return np.maximum(1.0 - np.cumsum(pmf, axis=-1), 0.0)

    def latency_tail(self, bits: ArrayLike, max_slots: int) -> NDArray[np.float64]:
        """The former, deprecated name of :meth:`latency_sf`."""
        warnings.warn("`latency_tail` is now called `latency_sf`. Use that name.", DeprecationWarning, stacklevel=2)
        return self.latency_sf(bits, max_slots)

    def _sum_below(self, count: int, amounts: NDArray[np.float64]) -> NDArray[np.float64]:
        """P[R_1 + … + R_N < B] for each amount B, from a stationary first slot.

        All slots at once: the spectrum of one to the N-th power, at the low frequencies that so wide a sum has.
        """
        from scipy.signal import czt

        levels, grid = self.levels, self.masses
        lowest, last = count * self.origin, count * (grid.shape[1] - 1)
        certain = amounts > lowest + (last + 1) * self.spacing
        if (certain | (amounts <= lowest)).all():
            return np.asarray(certain, dtype=np.float64)
        points = np.arange(grid.shape[1])
        own = levels.probabilities @ grid
        std = math.sqrt(max(0.0, float(own @ (points - own @ points) ** 2)))
        coarseness = max(int(std * math.sqrt(count) / _POINTS_PER_STD), math.ceil(last / _MOST_SUM_POINTS), 1)
        size = 2 ** math.ceil(math.log2(last / coarseness + 2.0))
        spectrum = czt(grid, size // 2 + 1, np.exp(-2j * math.pi / (size * coarseness)), axis=1)
        power = np.linalg.matrix_power(spectrum.T[:, :, None] * levels.transition, count)
        below = np.cumsum(np.fft.irfft(np.einsum("i,fij->f", levels.probabilities, power), size))
        position = (amounts - lowest) / (self.spacing * coarseness) - 0.5
        return np.asarray(np.interp(position, np.arange(size), np.clip(below, 0.0, 1.0), left=0.0), dtype=np.float64)

    def latency_quantiles(self, bits: ArrayLike, quantile: float = 0.9, max_slots: int = FOREVER) -> NDArray[np.int64]:
        """The least N with P[T_dl <= N] >= q, from a stationary first slot [slots], but at most ``max_slots``.

        Args:
            bits: payloads B > 0 (B,).
            quantile: q.
            max_slots: beyond which nobody asks; the work grows with it.

        Raises:
            ConfigurationError: if a payload is not positive and finite, ``quantile`` not in (0, 1), or ``max_slots``
                no integer >= 1.
        """
        payloads = [check_positive("bits", size, advice="Give the payload in bits, M·b.") for size in np.ravel(bits)]
        allowed = 1.0 - check_quantile(quantile)
        most = check_integer("max_slots", max_slots, 1, advice="Give a number of slots.")
        late = cache(lambda count: self._sum_below(count, np.array(payloads)) > allowed)

        def slots(i: int) -> int:
            return least_count(lambda count: bool(late(count)[i]), most)

        return np.array([slots(i) for i in range(len(payloads))], dtype=np.int64)

    def latency_quantile(self, bits: float, quantile: float = 0.9, max_slots: int = FOREVER) -> int:
        """:meth:`latency_quantiles` of one payload."""
        return int(self.latency_quantiles([bits], quantile, max_slots)[0])


def _simulate(
    channel: ChannelModel, num_subchannels: int, power: float, num_levels: int
) -> dict[str, NDArray[np.float64]]:
    """The arrays of a chain, for ℓ = 1."""
    slots = _TRANSITIONS + 1
    episodes = max(_GROUPS * 8, min(_EPISODES, _SIMULATED_GAINS // (slots * num_subchannels)))
    rngs = [np.random.default_rng(sequence) for sequence in np.random.SeedSequence(_SEED).spawn(episodes)]
    rates = draw_rates_of_many(rngs, slots, num_subchannels, np.full(episodes, power), 1.0, channel)
    edges = np.quantile(rates, np.arange(1, num_levels) / num_levels)
    level = np.searchsorted(edges, rates, side="right")

    def transitions(part: NDArray[np.int64]) -> NDArray[np.float64]:
        pairs = np.bincount((part[:, :-1] * num_levels + part[:, 1:]).reshape(-1), minlength=num_levels**2)
        counts = pairs.reshape(num_levels, num_levels).astype(np.float64)
        shares: NDArray[np.float64] = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
        return shares

    transition = transitions(level)
    groups = np.array([transitions(part) for part in np.array_split(level, _GROUPS)])
    error = groups.std(axis=0, ddof=1).max() / math.sqrt(_GROUPS)
    # Stationary: p (T − 1) = 0 and Σ p = 1.
    system = np.vstack([transition.T - np.eye(num_levels), np.ones(num_levels)])
    probabilities = np.linalg.lstsq(system, np.append(np.zeros(num_levels), 1.0), rcond=None)[0]
    origin = float(rates.min())
    spacing = max(float(rates.std()), 1e-12 * abs(origin), 1e-300) / _POINTS_PER_STD
    spacing = max(spacing, float(np.ptp(rates)) / 4096.0)
    positions = (rates - origin) / spacing
    points = int(positions.max()) + 2
    inside = [positions[level == i] for i in range(num_levels)]
    masses = np.array([linear_binning(own, np.full(own.size, 1.0 / own.size), points) for own in inside])
    return {
        "edges": edges,
        "rates": origin + spacing * (masses @ np.arange(points)),
        "probabilities": probabilities,
        "transition": transition,
        "masses": masses,
        "numbers": np.array([error, spacing, origin]),
    }


@lru_cache(maxsize=32)
def _unit_chain(
    channel: ChannelModel, num_subchannels: int, power: float, num_levels: int
) -> dict[str, NDArray[np.float64]]:
    """The arrays of the chain for ℓ = 1, from memory, from disk, or computed and kept."""
    key = {
        "version": _VERSION,
        "num_subchannels": num_subchannels,
        "power": power.hex(),
        "num_levels": num_levels,
        **channel.settings(),
    }
    return kept_arrays("rate-chain", key, lambda: _simulate(channel, num_subchannels, power, num_levels))


def rate_chain(
    snr_db: float,
    num_subchannels: int = 60,
    symbols_per_slot: float = 70.0,
    snr_reference: str = "subchannel",
    channel: ChannelModel = RAYLEIGH,
    num_levels: int = 8,
) -> RateChain:
    """A Markov chain of rate levels, for links whose slots depend on each other.

    Levels of equal probability and their transitions are estimated from 8192 simulated episodes of 65 slots; the same
    arguments give the same chain. Kept as :func:`refine_env.link.rate_law` keeps its laws. Independent slots need no
    simulation: :meth:`refine_env.link.RateLaw.quantize`.

    Args:
        snr_db, num_subchannels, symbols_per_slot, snr_reference, channel: as those of
            :func:`refine_env.link.rate_statistics`.
        num_levels: L, 1 … 64.

    Raises:
        ConfigurationError: if an argument is out of range.
    """
    symbols = check_positive("symbols_per_slot", symbols_per_slot, advice="Give ℓ, for example 70.")
    power = total_power(snr_db, num_subchannels, snr_reference)
    count = check_integer("num_levels", num_levels, 1, 64, advice="Give a number of levels, for example 8.")
    unit = _unit_chain(channel, int(num_subchannels), power, count)
    error, spacing, origin = unit["numbers"].tolist()
    levels = RateLevels(symbols * unit["rates"], symbols * unit["edges"], unit["probabilities"], unit["transition"])
    return RateChain(levels, error, symbols * spacing, symbols * origin, unit["masses"])
