"""The exact law of the bits per slot, and of the slots that a payload takes."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from refine_env._store import load_arrays, store_arrays
from refine_env._validation import check_integer, check_positive, check_quantile
from refine_env.errors import ConfigurationError
from refine_env.link.channel import ChannelModel
from refine_env.link.fading import RAYLEIGH
from refine_env.link.slot_law import (
    POINTS_PER_STD,
    SlotLaw,
    controlled_rates,
    equal_power_law,
    quadrature_law,
    simulated_law,
    steady_law,
)
from refine_env.link.waterfilling import total_power

__all__ = ["RateLaw", "RateLevels", "rate_law", "simulated_moments"]

_VERSION = 1  # of the computation: laws stored by another are computed anew
_SIMULATED_SLOTS = 4_000_000
_CONTROLLED_SLOTS = 1_000_000
_SIMULATED_GAINS = 250_000_000  # at most, whatever K
_CHUNK = 1 << 20  # gains at a time
_SEED = 20261121
_WINDOW = 32  # standard deviations of S_N, at least, within which its law is kept
_FAR = 12.0  # standard deviations from the mean beyond which a sum is taken to be certain
_MOST_SUMS = 1024  # laws of sums kept in memory
_MANY = 16_384  # slots above which a sum is Gaussian but for its skewness

FOREVER = 2**31
"""A number of slots beyond any deadline, and still far from overflow when it is added to one."""


def kept_arrays(
    kind: str, key: Mapping[str, Any], compute: Callable[[], dict[str, NDArray[np.float64]]]
) -> dict[str, NDArray[np.float64]]:
    """The arrays that are stored on disk under a key, or else those that ``compute`` gives, which are then stored."""
    text = json.dumps(key)
    arrays = load_arrays(kind, text)
    if arrays is None:
        arrays = compute()
        store_arrays(kind, text, arrays)
    return arrays


def least_count(fails: Callable[[int], bool], most: int) -> int:
    """The least N >= 1 with ``fails(N)`` false, at most ``most``; ``fails`` must be false for all larger N, too."""
    low, high = 0, 1  # fails(low), not fails(high)
    while high < most and fails(high):
        low, high = high, 2 * high
    high = min(high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fails(middle) else (low, middle)
    return high


@dataclass(frozen=True)
class RateLevels:
    """The rate of a slot, quantized to levels.

    Attributes:
        rates: representative rate of each level, its conditional mean, ascending [bit/slot] (L,).
        edges: level i lies between edges[i − 1] (included) and edges[i]; ``np.searchsorted(edges, rate, "right")`` is
            the level of a rate (L − 1,).
        probabilities: of each level (L,).
        transition: probability of the next slot's level (columns), given this slot's (rows) (L, L).
    """

    rates: NDArray[np.float64]
    edges: NDArray[np.float64]
    probabilities: NDArray[np.float64]
    transition: NDArray[np.float64]

    def level_of(self, rates: ArrayLike) -> NDArray[np.int64]:
        """The level of each rate [bit/slot]."""
        return np.asarray(np.searchsorted(self.edges, rates, side="right"), dtype=np.int64)


class _UnitLaw:
    """Law of R/ℓ and of its partial sums, shared by every ℓ."""

    def __init__(self, law: SlotLaw) -> None:
        self.law = law
        self.points = law.origin + law.spacing * np.arange(law.masses.size)
        # Plain sums: a matrix product's order may depend on the number of threads.
        self.mean = float((law.masses * self.points).sum())
        self.std = math.sqrt(max(0.0, float((law.masses * (self.points - self.mean) ** 2).sum())))
        third = float((law.masses * (self.points - self.mean) ** 3).sum())
        self.skewness = third / self.std**3 if self.std > 0.0 else 0.0
        self.below = np.cumsum(law.masses)
        self._sums: dict[int, tuple[float, float, NDArray[np.float64]]] = {}
        self._spectra: dict[int, NDArray[np.complex128]] = {}

    def _spectrum(self, coarseness: int) -> NDArray[np.complex128]:
        """Fourier transform of the masses, without the frequencies that a sum does not have at that coarseness."""
        if coarseness not in self._spectra:
            size = 2 ** math.ceil(math.log2(max(_WINDOW * POINTS_PER_STD, self.law.masses.size)))
            transform = np.fft.rfft(self.law.masses, size * coarseness)
            self._spectra[coarseness] = transform[: size // 2 + 1]
        return self._spectra[coarseness]

    def _sum_law(self, count: int) -> tuple[float, float, NDArray[np.float64]]:
        """First point, spacing and P[S_N <= point] of the sum of ``count`` slots, at midpoints of a grid.

        The grid is as fine relative to the sum's standard deviation as the slot's is to its own, to a factor of two.
        The transforms are cyclic; the window holds all but a negligible mass, so that unrolling it is exact.
        """
        if count not in self._sums:
            if len(self._sums) >= _MOST_SUMS:
                self._sums.clear()
            coarseness = 2 ** math.ceil(math.log2(count) / 2.0)
            spectrum = self._spectrum(coarseness)
            size = 2 * (spectrum.size - 1)
            spacing = self.law.spacing * coarseness
            masses = np.fft.irfft(spectrum**count, size)
            origin = count * self.law.origin
            reach = 1.25 * _FAR * math.sqrt(count) * self.std
            first = max(0, math.floor((count * self.mean - reach - origin) / spacing))
            masses = np.roll(masses, -(first % size))
            below = np.maximum.accumulate(np.clip(np.cumsum(masses), 0.0, 1.0))
            self._sums[count] = origin + (first + 0.5) * spacing, spacing, below
        return self._sums[count]

    def sum_below(self, count: int, amounts: NDArray[np.float64]) -> NDArray[np.float64]:
        """P[S_N < amount] for each amount [bit/symbol]."""
        if count == 0:
            return (amounts > 0.0).astype(np.float64)
        far = _FAR * math.sqrt(count) * self.std
        # A sum far above its amounts, or below all: certain, and not computed.
        lowest, highest = count * self.points[0], count * self.points[-1]
        certain = amounts > min(highest + self.law.spacing, count * self.mean + 2.0 * far)
        impossible = amounts <= max(lowest, count * self.mean - far)
        result: NDArray[np.float64] = certain.astype(np.float64)
        open_ones = ~(certain | impossible)
        if open_ones.any() and count > _MANY:
            z = (amounts[open_ones] - count * self.mean) / (math.sqrt(count) * self.std)
            skewed = self.skewness / (6.0 * math.sqrt(count)) * (z * z - 1.0) * np.exp(-0.5 * z * z)
            result[open_ones] = np.clip(special.ndtr(z) - skewed / math.sqrt(2.0 * math.pi), 0.0, 1.0)
        elif open_ones.any():
            first, spacing, below = self._sum_law(count)
            position = (amounts[open_ones] - first) / spacing
            result[open_ones] = np.interp(position, np.arange(below.size), below, left=0.0)
        return result


@dataclass(frozen=True, eq=False)
class RateLaw:
    """The law of the bits R_n that a slot carries, with the power fixed in every slot.

    Attributes:
        symbols_per_slot: ℓ.
        independent: whether the rates of different slots are independent, as sums over several slots require.
    """

    symbols_per_slot: float
    independent: bool
    _unit: _UnitLaw

    def __repr__(self) -> str:
        return f"RateLaw(mean={self.mean:.6g}, std={self.std:.6g}, error={self.error:.1g})"

    @property
    def mean(self) -> float:
        """E[R_n] [bit/slot]."""
        return self.symbols_per_slot * self._unit.mean

    @property
    def std(self) -> float:
        """Standard deviation of R_n [bit/slot]."""
        return self.symbols_per_slot * self._unit.std

    @property
    def error(self) -> float:
        """Error of the probabilities P[R_n <= r], at the rate r where it is largest.

        By quadrature it is what the last refinement changed plus what was cut off, which is far above the true error.
        Of a simulated law it is half the largest difference between the laws of the two halves of the slots.
        """
        return self._unit.law.error

    @property
    def simulated_slots(self) -> int:
        """How many slots were simulated; 0 if the law was computed by quadrature."""
        return self._unit.law.simulated_slots

    @property
    def grid(self) -> NDArray[np.float64]:
        """Rates at which the law is tabulated, evenly spaced [bit/slot] (G,)."""
        return np.asarray(self.symbols_per_slot * self._unit.points, dtype=np.float64)

    @property
    def pmf(self) -> NDArray[np.float64]:
        """Probability of each grid point, which stands for the rates half a spacing around it (G,)."""
        return self._unit.law.masses.copy()

    def sum_below(self, num_slots: int, bits: ArrayLike) -> NDArray[np.float64]:
        """P[R_1 + … + R_N < B].

        Args:
            num_slots: N >= 0.
            bits: B, any shape.

        Returns:
            Probabilities, of the shape of ``bits``.

        Raises:
            ConfigurationError: if ``num_slots`` is no integer >= 0, or > 1 on a link whose slots are not independent.
        """
        count = check_integer("num_slots", num_slots, 0, advice="Give a number of slots.")
        self._check_independent(count)
        amounts = np.asarray(bits, dtype=np.float64) / self.symbols_per_slot
        return self._unit.sum_below(count, np.atleast_1d(amounts)).reshape(amounts.shape)

    def _check_independent(self, num_slots: int) -> None:
        if num_slots > 1 and not self.independent:
            raise ConfigurationError(
                f"`num_slots` must be <= 1 on a link whose slots depend on each other, got {num_slots}. "
                "Use refine_env.link.rate_chain."
            )

    def cdf(self, rates: ArrayLike) -> NDArray[np.float64]:
        """P[R_n < r] for each rate [bit/slot]."""
        return self.sum_below(1, rates)

    def quantile(self, probability: ArrayLike) -> NDArray[np.float64]:
        """Quantiles of R_n: the rates that it stays below with the given probabilities [bit/slot]."""
        wanted = np.asarray(probability, dtype=np.float64)
        edges = self._unit.points + self._unit.law.spacing / 2.0
        below = self._unit.below / self._unit.below[-1]
        rising = np.concatenate([[True], np.diff(below) > 0.0])
        rates = np.interp(wanted, np.append(0.0, below[rising]), np.append(self._unit.points[0], edges[rising]))
        return np.asarray(self.symbols_per_slot * rates, dtype=np.float64)

    def latency_sf(self, bits: ArrayLike, max_slots: int, first_rate: ArrayLike | None = None) -> NDArray[np.float64]:
        """Survival function of the latency, P[T_dl > k] = P[R_1 + … + R_k < B] for k = 0 … max_slots.

        Args:
            bits: payloads B > 0, any shape.
            max_slots: the last k.
            first_rate: R_1, where the transmitter knows its current slot; broadcast against ``bits``.

        Returns:
            Shape (*broadcast shape of the arguments, max_slots + 1); entry 0 is 1.

        Raises:
            ConfigurationError: if a payload is not > 0 or a rate negative, or ``max_slots`` no integer >= 0;
                or > 1 on a link whose slots are not independent.
        """
        slots = check_integer("max_slots", max_slots, 0, advice="Give a number of slots.")
        self._check_independent(slots)
        amounts = np.asarray(bits, dtype=np.float64) / self.symbols_per_slot
        if not (amounts > 0.0).all():
            raise ConfigurationError(f"`bits` must be > 0, got {bits!r:.100}. Give the payload in bits, M·b.")
        known = 0
        if first_rate is not None:
            rates = np.asarray(first_rate, dtype=np.float64) / self.symbols_per_slot
            if not (rates >= 0.0).all():
                raise ConfigurationError(
                    f"`first_rate` must be >= 0, got {first_rate!r:.100}. Give the current slot's bits."
                )
            amounts = amounts - rates
            known = 1
        flat = np.atleast_1d(amounts).reshape(-1)
        survival = np.ones((flat.size, slots + 1))
        for count in range(known, slots + 1):
            # Once N slots are certain to suffice, more slots are, too.
            if count > known and not survival[:, count - 1].any():
                survival[:, count:] = 0.0
                break
            if count > 0:
                survival[:, count] = np.where(flat > 0.0, self._unit.sum_below(count - known, flat), 0.0)
        # The laws of different sums are rounded differently, so that the function might rise by a rounding error.
        return np.minimum.accumulate(survival, axis=1).reshape(*amounts.shape, slots + 1)

    def latency_tail(self, bits: ArrayLike, max_slots: int, first_rate: ArrayLike | None = None) -> NDArray[np.float64]:
        """The former, deprecated name of :meth:`latency_sf`."""
        warnings.warn("`latency_tail` is now called `latency_sf`. Use that name.", DeprecationWarning, stacklevel=2)
        return self.latency_sf(bits, max_slots, first_rate)

    def latency_pmf(self, bits: ArrayLike, max_slots: int, first_rate: ArrayLike | None = None) -> NDArray[np.float64]:
        """P[T_dl = k] for k = 0 … max_slots, where T_dl is the first N with R_1 + … + R_N >= B.

        Arguments and errors are those of :meth:`latency_sf`.

        Returns:
            Shape (*broadcast shape of the arguments, max_slots + 1); entry 0 is 0, and what is missing from 1 is the
            probability of more than ``max_slots``, the last entry of :meth:`latency_sf`.
        """
        survival = self.latency_sf(bits, max_slots, first_rate)
        pmf = np.zeros_like(survival)
        pmf[..., 1:] = survival[..., :-1] - survival[..., 1:]
        return pmf

    def latency_quantile(self, bits: float, quantile: float = 0.9) -> int:
        """The least N with P[T_dl <= N] >= q, the exact counterpart of [K] Eq. 11 [slots].

        Raises:
            ConfigurationError: if ``bits`` is not positive and finite or ``quantile`` not in (0, 1).
        """
        payload = check_positive("bits", bits, advice="Give the payload in bits, M·b.") / self.symbols_per_slot
        allowed = 1.0 - check_quantile(quantile)
        amount = np.array([payload])
        self._check_independent(2)

        def fails(count: int) -> bool:
            return float(self._unit.sum_below(count, amount)[0]) > allowed

        if not self._unit.mean > 0.0:
            raise ConfigurationError(
                "`bits` must be within reach of the link, got a link that carries nothing. Raise the SNR."
            )
        center = payload / self._unit.mean
        if not center < 2**53:  # the law of large numbers: more digits than an integer has in floating point
            return math.ceil(center)
        return least_count(fails, 2**60)

    def quantize(self, num_levels: int) -> RateLevels:
        """Levels of equal probability, for a policy with the current slot's rate in its state.

        Args:
            num_levels: L >= 1.

        Raises:
            ConfigurationError: if it is no integer >= 1, or the slots are not independent.
        """
        self._check_independent(2)
        count = check_integer("num_levels", num_levels, 1, 10_000, advice="Give a number of levels, for example 8.")
        edges = self.quantile(np.arange(1, count) / count)
        masses, rates = self.split(edges)
        probabilities = masses / masses.sum()
        return RateLevels(rates, edges, probabilities, np.tile(probabilities, (count, 1)))

    def split(self, edges: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Probability and conditional mean of the rate between neighboring edges.

        Args:
            edges: ascending [bit/slot] (N − 1,).

        Returns:
            Probabilities (N,) and means [bit/slot] (N,), from below the first edge to above the last.
        """
        spacing = self._unit.law.spacing
        # Mass and first moment below each edge; the masses are spread evenly over their cells.
        ends = self._unit.points[0] - spacing / 2.0 + spacing * np.arange(self._unit.points.size + 1)
        mass = np.append(0.0, self._unit.below)
        moment = np.append(0.0, np.cumsum(self._unit.law.masses * self._unit.points))
        inner = edges / self.symbols_per_slot
        masses = np.diff(np.concatenate([[0.0], np.interp(inner, ends, mass), [mass[-1]]]))
        moments = np.diff(np.concatenate([[0.0], np.interp(inner, ends, moment), [moment[-1]]]))
        means = np.divide(moments, masses, out=np.zeros_like(masses), where=masses > 0.0)
        # Of a part that is less likely than rounding the quotient is anything.
        means = np.clip(
            means, np.append(0.0, np.maximum(inner, 0.0)), np.append(inner, self._unit.points[-1]).clip(0.0)
        )
        return masses, self.symbols_per_slot * means


def _simulate(
    channel: ChannelModel,
    num_subchannels: int,
    power: float,
    slots: int,
    summarize: Callable[[NDArray[np.float64]], NDArray[np.float64]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rates of independent slots [bit/symbol], the same in every call, and a function's value for each slot's gains."""
    chunk = max(1, _CHUNK // num_subchannels)
    rng = np.random.default_rng(_SEED)
    rates, summaries = np.empty(slots), np.empty(slots)
    delay = channel.csi_delay
    drawn = replace(channel, csi_delay=min(delay, 1))  # of the slots between, none matters
    for start in range(0, slots, chunk):
        part = rates[start : start + chunk]
        if delay == 0:
            gains = channel.gain_law.draw(rng, (part.size, 1, num_subchannels))
        else:
            gains = np.stack(channel.draw_lagged_gains(rng, part.size, num_subchannels, delay), axis=1)
        drawn.fill_rates(gains, np.full(part.size, power), 1.0, part[:, None])
        summaries[start : start + chunk] = summarize(gains[:, -1])
    return rates, summaries


def simulated_moments(channel: ChannelModel, num_subchannels: int, power: float, slots: int) -> tuple[float, float]:
    """Mean and standard deviation of the rate [bit/symbol] of simulated, independent slots, the same in every call.

    Args:
        channel: which link.
        num_subchannels: K.
        power: Σ_j p_j in every slot.
        slots: how many; the deviation's relative standard error is about 1/√(2·slots).
    """
    rates, _ = _simulate(channel, num_subchannels, power, slots, lambda gains: np.zeros(len(gains)))
    return float(rates.mean()), float(rates.std())


def _compute(channel: ChannelModel, num_subchannels: int, power: float) -> SlotLaw:
    gains = channel.gain_law
    rates = None
    if channel.power_allocation == "equal":
        law = equal_power_law(gains, num_subchannels, power)
        if law is not None:
            return law
    elif channel.csi_delay == 0:
        law = steady_law(gains, num_subchannels, power) or quadrature_law(gains, num_subchannels, power)
        if law is not None:
            return law
        few = max(10_000, min(_CONTROLLED_SLOTS, _SIMULATED_GAINS // num_subchannels))
        rates = controlled_rates(
            gains, num_subchannels, power, lambda summarize: _simulate(channel, num_subchannels, power, few, summarize)
        )
    if rates is None:
        most = _CONTROLLED_SLOTS if channel.csi_delay else _SIMULATED_SLOTS
        many = max(10_000, min(most, _SIMULATED_GAINS // num_subchannels))
        rates, _ = _simulate(channel, num_subchannels, power, many, lambda drawn: np.zeros(len(drawn)))
    return simulated_law(rates)


@lru_cache(maxsize=64)
def _unit_law(channel: ChannelModel, num_subchannels: int, power: float) -> _UnitLaw:
    """The law for ℓ = 1, from memory, from disk, or computed and kept."""

    def compute() -> dict[str, NDArray[np.float64]]:
        law = _compute(channel, num_subchannels, power)
        return {"masses": law.masses, "numbers": np.array([law.origin, law.spacing, law.error, law.simulated_slots])}

    key = {"version": _VERSION, "num_subchannels": num_subchannels, "power": power.hex(), **channel.settings()}
    stored = kept_arrays("rate-law", key, compute)
    origin, spacing, error, slots = stored["numbers"].tolist()
    return _UnitLaw(SlotLaw(origin, spacing, stored["masses"], error, int(slots)))


def _without_correlation(channel: ChannelModel) -> ChannelModel:
    """The channel with the same law of one slot, as plain as possible."""
    if channel.csi_delay:
        return channel
    return replace(channel, correlation="iid", correlation_coefficient=None, doppler=None)


def rate_law(
    snr_db: float,
    num_subchannels: int = 60,
    symbols_per_slot: float = 70.0,
    snr_reference: str = "subchannel",
    channel: ChannelModel = RAYLEIGH,
) -> RateLaw:
    """The exact law of the bits per slot, beside the paper's Gaussian one (:func:`refine_env.link.rate_statistics`).

    By quadrature, see :mod:`refine_env.link.slot_law`, from about −8 to 15 dB at K = 60; elsewhere from a million
    simulated slots with most of their randomness taken out; and where that is impossible (few active subchannels, as at
    a small K or below −10 dB; delayed channel knowledge) from 4 million slots as they are (1 million of a delayed
    link). Computed once, then kept in memory and in the user's cache folder (``REFINE_ENV_CACHE`` names another; empty:
    none). The same arguments give the same law, whatever the number of threads.

    Of a link whose slots depend on each other this is the law of one slot; :func:`refine_env.link.rate_chain` describes
    several.

    Args:
        snr_db, num_subchannels, symbols_per_slot, snr_reference, channel: as those of
            :func:`refine_env.link.rate_statistics`.

    Raises:
        ConfigurationError: if an argument is out of range.
    """
    symbols = check_positive("symbols_per_slot", symbols_per_slot, advice="Give ℓ, for example 70.")
    power = total_power(snr_db, num_subchannels, snr_reference)
    unit = _unit_law(_without_correlation(channel), int(num_subchannels), power)
    return RateLaw(symbols, channel.independent, unit)
