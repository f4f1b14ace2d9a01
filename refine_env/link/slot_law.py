"""The exact law of the bits that one slot carries, by quadrature, or by simulation where that does not converge.

Everything here is in bits per symbol, R/ℓ: the law scales with ℓ.

Quadrature. With the water level v = 1/λ, a slot spends A_v = Σ_j (v − 1/g_j)^+ and carries B_v = Σ_j ln(v g_j)^+ nats.
A_v rises with v at the rate N_v, the number of active subchannels, so the level at which the power P is spent is unique
and the characteristic function of the rate is

    ψ(t) = E[e^{itB}] = ∫ E[N_v δ(A_v − P) e^{itB_v}] dv.

A_v and B_v are sums over independent subchannels. With the delta function as a Fourier integral over w/v, y = ln(v g),
q the probability that a subchannel is inactive, and a(w, t) = E[e^{iw(1 − e^{−y}) + ity}; y > 0], this is

    ψ(t) = ∫ d(ln v) (1/2π) ∫ dw e^{−iwP/v} K a(w, t) (q + a(w, t))^{K−1}:

smooth integrands that vanish at the ends, for which the trapezoidal rule converges exponentially. One Fourier
transform gives the density. It works where many subchannels are active and the level varies moderately; each range and
step is enlarged until the result no longer changes, or else the law is simulated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from refine_env._compiled import kernel
from refine_env.link.gains import GainLaw, gain_support
from refine_env.link.kernels import Floats

__all__ = [
    "SlotLaw",
    "controlled_rates",
    "equal_power_law",
    "linear_binning",
    "log_gain_rule",
    "quadrature_law",
    "simulated_law",
    "steady_law",
]

POINTS_PER_STD = 128  # of the grid on which laws are tabulated
_TOLERANCE = 1e-7  # of P[R <= r], to which quadrature refines
_ACCEPTABLE = 1e-6  # of the same, below which it is kept
_NEGLIGIBLE = 3e-9  # size at which an integrand is cut off
_MOST_WORK = 2e9  # complex multiplications in one quadrature
_WINDOW = 32.0  # standard deviations within which quadrature tabulates, and the least period in the power
_PANELS, _ORDER = 8, 32  # Gauss–Legendre nodes over the gain


@dataclass(frozen=True)
class SlotLaw:
    """The law of R/ℓ on a uniform grid.

    Attributes:
        origin: the first grid point [bit/symbol].
        spacing: distance of the grid points [bit/symbol].
        masses: probability of each grid point, summing to 1.
        error: see :class:`refine_env.link.RateLaw`.
        simulated_slots: how many slots were simulated; 0: by quadrature.
    """

    origin: float
    spacing: float
    masses: Floats
    error: float
    simulated_slots: int


def log_gain_rule(law: GainLaw, low: float) -> tuple[Floats, Floats]:
    """Nodes ln g above ``low`` > 0 and weights with which Σ weights·value(ln g) is E[value(ln g); g > low]."""
    smallest, largest = gain_support(law)
    ends = np.linspace(math.log(max(low, smallest)), math.log(max(largest, 1.1 * low)), _PANELS + 1)
    nodes, weights = np.polynomial.legendre.leggauss(_ORDER)
    half = np.diff(ends)[:, None] / 2.0
    log_gains = (ends[:-1, None] + half + half * nodes).ravel()
    gains = np.exp(log_gains)
    return log_gains, (half * weights).ravel() * law.density(gains) * gains


def _tabulate(psi: NDArray[np.complex128], step: float, center: float, error: float) -> SlotLaw:
    """The law with characteristic function ``psi`` at 0, step, 2·step, … [1/nat] around ``center`` [nat]."""
    length = 2.0 * math.pi / step
    origin = center - length / 2.0
    points = int(_WINDOW * POINTS_PER_STD)
    spectrum = np.zeros(points // 2 + 1, dtype=np.complex128)
    count = min(psi.size, spectrum.size)
    spectrum[:count] = np.conj(psi[:count] * np.exp(-1j * origin * step * np.arange(count)))
    masses = np.maximum(np.fft.irfft(spectrum, points), 0.0)
    masses[masses < 1e-16] = 0.0
    nonzero = np.flatnonzero(masses)
    first, last = int(nonzero[0]), int(nonzero[-1])
    spacing = length / points
    masses = masses[first : last + 1] / masses.sum()
    return SlotLaw(
        (origin + first * spacing) / math.log(2.0), spacing / math.log(2.0), masses, error + count * 1e-16, 0
    )


def _sum_law(nats: Floats, weights: Floats, count: int) -> SlotLaw | None:
    """The law of a sum of ``count`` independent variables, by the power of their characteristic function.

    Args:
        nats: values of one variable at the nodes of a quadrature rule.
        weights: of the rule; what they lack to 1 is the probability that the variable is 0.
        count: how many.

    Returns:
        None where the characteristic function decays too slowly, for few variables.
    """
    atom = 1.0 - float(weights.sum())
    mean = float(weights @ nats)
    std = math.sqrt(count * (float(weights @ (nats - mean) ** 2) + atom * mean * mean))
    step = 2.0 * math.pi / (_WINDOW * std)
    times = step * np.arange(int(_WINDOW * POINTS_PER_STD) // 2 + 1)
    psi = np.zeros(times.size, dtype=np.complex128)
    for start in range(0, times.size, 64):
        part = times[start : start + 64]
        one = np.einsum("y,yt->t", weights, np.exp(1j * nats[:, None] * part))
        psi[start : start + 64] = (atom + one) ** count
        if np.abs(psi[start : start + 64]).max() < 1e-15:
            return _tabulate(psi[: start + 64], step, count * mean, 1e-12)
    return None


def equal_power_law(law: GainLaw, num_subchannels: int, total_power: float) -> SlotLaw | None:
    """The law of Σ_j log2(1 + (P/K) g_j).

    Returns:
        None for so few subchannels that the characteristic function decays too slowly.
    """
    log_gains, weights = log_gain_rule(law, 1e-30)
    share = total_power / num_subchannels
    return _sum_law(np.log1p(share * np.exp(log_gains)), weights / weights.sum(), num_subchannels)


def steady_law(law: GainLaw, num_subchannels: int, total_power: float) -> SlotLaw | None:
    """The law of the waterfilled slot at so high an SNR that waterfilling gives every subchannel the same.

    The rate is at least that of equal power, and by duality, see :func:`controlled_rates`, at most Φ at the level
    P/K: both are sums of independent terms, and the law lies between theirs.

    Returns:
        None where the two differ, or subchannels are so few that their characteristic functions decay too slowly.
    """
    log_gains, weights = log_gain_rule(law, 1e-30)
    weights = weights / weights.sum()
    log_snrs = log_gains + math.log(total_power / num_subchannels)
    nats = np.logaddexp(0.0, log_snrs)
    active = np.maximum(log_snrs, 0.0)
    excess = active + np.exp(-active) - nats  # of Φ over equal power
    mean = float(weights @ nats)
    std = math.sqrt(num_subchannels * float(weights @ (nats - mean) ** 2))
    if num_subchannels * float(weights @ excess) > math.sqrt(_TOLERANCE) * std:  # far apart: spare the work
        return None
    least = _sum_law(nats, weights, num_subchannels)
    most = _sum_law(nats + excess, weights, num_subchannels)
    if least is None or most is None:
        return None
    error = float(np.abs(np.cumsum(least.masses) - _below(most, _edges(least))).max())
    return replace(least, error=least.error + error) if error < _TOLERANCE else None


def _edges(law: SlotLaw) -> Floats:
    """The upper end of what each grid point stands for [bit/symbol]."""
    return np.asarray(law.origin + law.spacing * (np.arange(law.masses.size) + 0.5), dtype=np.float64)


def _below(law: SlotLaw, rates: Floats) -> Floats:
    """P[R/ℓ <= r] of a tabulated law."""
    return np.asarray(np.interp(rates, _edges(law), np.cumsum(law.masses), left=0.0), dtype=np.float64)


@kernel
def _add_products(left: Floats, right: Floats, real: Floats, imaginary: Floats) -> None:
    """The complex matrix product; parts of the factors (2, W, Y) and (2, Y, T), of the result (W, T) each.

    Written out so that the order of the sums, and with it every bit, is the same on any number of threads.
    """
    for w in range(left.shape[1]):
        real_row, imaginary_row = real[w], imaginary[w]
        real_row[:] = 0.0
        imaginary_row[:] = 0.0
        for y in range(left.shape[2]):
            c, s = left[0, w, y], left[1, w, y]
            right_real, right_imaginary = right[0, y], right[1, y]
            for t in range(right_real.size):
                real_row[t] += c * right_real[t] - s * right_imaginary[t]
                imaginary_row[t] += c * right_imaginary[t] + s * right_real[t]


@dataclass(frozen=True)
class _Waterfilling:
    """One waterfilled slot, and the scales of its integrals at the level that is right on average.

    Attributes:
        law: of the gains.
        num_subchannels: K.
        power: P.
        log_level: ln v at which E[A_v] = P.
        power_std: standard deviation of A_v/v at that level.
        level_std: of the slot's ln v, to first order.
        slope: of the ridge w = −slope·t along which the integrand is largest.
        rate_mean, rate_std: of the rate, to first order [nat].
    """

    law: GainLaw
    num_subchannels: int
    power: float
    log_level: float
    power_std: float
    level_std: float
    slope: float
    rate_mean: float
    rate_std: float

    @classmethod
    def at(cls, law: GainLaw, num_subchannels: int, power: float) -> _Waterfilling:
        share = power / num_subchannels

        def excess(log_level: float) -> float:
            log_gains, weights = log_gain_rule(law, math.exp(-log_level))
            return float(weights @ -np.expm1(-(log_gains + log_level))) - share * math.exp(-log_level)

        low = high = math.log(share)  # (v − 1/g)^+ <= v
        while excess(high) < 0.0:
            high += 1.0
        # At the highest SNRs the level is P/K to rounding.
        log_level = float(optimize.brentq(excess, low, high, xtol=1e-13)) if high > low else low
        log_gains, weights = log_gain_rule(law, math.exp(-log_level))
        nats = log_gains + log_level
        spent = -np.expm1(-nats)
        spent_mean, nats_mean = float(weights @ spent), float(weights @ nats)
        variance = max(0.0, float(weights @ spent**2) - spent_mean**2)
        # With the level adapting, the rate is Σ_j (y − 1 + e^{−y})^+ to first order.
        steadied = max(0.0, float(weights @ (nats - spent) ** 2) - (nats_mean - spent_mean) ** 2)
        power_std = math.sqrt(num_subchannels * variance)
        rate_std = math.sqrt(num_subchannels * steadied)
        time = 3.0 / rate_std
        slopes = np.geomspace(1e-3, 4.0 * math.exp(log_level) + 4.0, 400)
        phases = time * (nats - slopes[:, None] * spent)
        sizes = np.abs(1.0 - weights.sum() + np.einsum("y,sy->s", weights, np.exp(1j * phases)))
        return cls(
            law,
            num_subchannels,
            power,
            log_level,
            power_std,
            power_std / (num_subchannels * float(weights.sum())),
            float(slopes[int(np.argmax(sizes))]),
            num_subchannels * nats_mean,
            rate_std,
        )

    def integrand(self, log_level: float, frequencies: Floats, times: Floats) -> tuple[NDArray[np.complex128], float]:
        """(1/2π) ∫ dw … at one level (T,), and the size of its integrand at the ends.

        The variables w run along the ridge w + slope·t, on which the integrand lies.
        """
        level = math.exp(log_level)
        log_gains, weights = log_gain_rule(self.law, 1.0 / level)
        nats = np.maximum(log_gains + log_level, 0.0)
        spent = -np.expm1(-nats)
        inactive = self.law.probability_below(1.0 / level)
        weights = weights * ((1.0 - inactive) / weights.sum()) if inactive < 1.0 else weights
        left_angle = frequencies[:, None] * spent
        right_angle = (nats - self.slope * spent)[:, None] * times
        real = np.empty((frequencies.size, times.size))
        imaginary = np.empty_like(real)
        _add_products(
            np.stack([np.cos(left_angle) * weights, np.sin(left_angle) * weights]),
            np.stack([np.cos(right_angle), np.sin(right_angle)]),
            real,
            imaginary,
        )
        active = real + 1j * imaginary
        count = self.num_subchannels
        spending = np.exp(-1j * self.power / level * (frequencies[:, None] - self.slope * times))
        values = spending * (count * active * (inactive + active) ** (count - 1))
        scale = (frequencies[1] - frequencies[0]) / (2.0 * math.pi)
        return values.sum(axis=0) * scale, float(np.abs(values[[0, -1]]).max()) * scale


def _level_range(slot: _Waterfilling, frequencies: Floats, reach: float) -> tuple[float, float] | None:
    """Ends of ln v outside which its density is negligible; None if one is over ``reach`` standard deviations away."""
    lowest = math.log(slot.power / slot.num_subchannels)  # every slot's level is at least P/K

    def density(log_level: float) -> float:
        return abs(float(slot.integrand(log_level, frequencies, np.zeros(1))[0][0].real))

    peak = density(slot.log_level)
    ends = []
    for direction in (-1.0, 1.0):
        for count in range(1, int(2.0 * reach) + 1):
            end = slot.log_level + direction * count * slot.level_std / 2.0
            if end <= lowest or density(end) < _NEGLIGIBLE * peak:
                ends.append(max(end, lowest))
                break
        else:
            return None
    return ends[0], ends[1]


def _integrate(
    slot: _Waterfilling,
    frequencies: Floats,
    times: Floats,
    ends: tuple[float, float],
    most_intervals: float,
) -> tuple[NDArray[np.complex128], float] | None:
    """ψ(t), by the trapezoidal rule over ln v with ever more intervals.

    Returns:
        ψ and a bound on what it gets wrong in P[R <= r]; None if that takes more than ``most_intervals``.
    """
    low, high = ends
    intervals = 16
    width = (high - low) / intervals
    parts = [slot.integrand(low + width * i, frequencies, times) for i in range(1, intervals)]
    total = np.sum([values for values, _ in parts], axis=0)
    cut = math.fsum(end for _, end in parts)
    psi = total * width
    weights = 1.0 / (math.pi * np.maximum(np.arange(times.size), 1))
    while 2 * intervals <= most_intervals:
        parts = [slot.integrand(low + width * (i + 0.5), frequencies, times) for i in range(intervals)]
        total = total + np.sum([values for values, _ in parts], axis=0)
        cut += math.fsum(end for _, end in parts)
        intervals *= 2
        width /= 2.0
        before, psi = psi, total * width
        # What the Fourier series of P[R <= r] changed by: conservative, since convergence is exponential.
        error = float((weights * np.abs(psi - before)).sum())
        if error < _TOLERANCE:
            return psi, error + abs(float(psi[0].real) - 1.0) + cut * width
    return None


def quadrature_law(law: GainLaw, num_subchannels: int, total_power: float) -> SlotLaw | None:
    """The law of the waterfilled slot by quadrature, see the module.

    Args:
        law: of the gains, independent over subchannels.
        num_subchannels: K.
        total_power: P.

    Returns:
        None where it does not converge within reasonable work: few active subchannels, or an SNR so high that the
        level is steady but for rare deep fades.
    """
    slot = _Waterfilling.at(law, num_subchannels, total_power)
    if not slot.power_std * slot.rate_std > 0.0:  # to rounding
        return None
    time_step = 2.0 * math.pi / (_WINDOW * slot.rate_std)
    period = _WINDOW
    time_reach = frequency_reach = 9.0
    while True:
        frequency_step = 2.0 * math.pi / (period * slot.power_std)
        times = np.arange(math.ceil(time_reach / slot.rate_std / time_step) + 1, dtype=np.float64)
        times *= time_step
        half = math.ceil(frequency_reach / slot.power_std / frequency_step)
        most_intervals = _MOST_WORK / (times.size * (2.0 * half + 1.0) * _PANELS * _ORDER)
        if most_intervals < 64:
            return None
        frequencies = np.arange(-half, half + 1, dtype=np.float64)
        frequencies *= frequency_step
        # At the average level: do the ranges of both frequencies suffice? Then: does the period, for all levels?
        values, end = slot.integrand(slot.log_level, frequencies, times)
        peak = abs(values[0])
        if end > _NEGLIGIBLE * peak:
            frequency_reach *= 1.5
            continue
        if abs(values[-1]) > _NEGLIGIBLE * peak:
            time_reach *= 1.5
            continue
        ends = _level_range(slot, frequencies, period / 2.5)
        if ends is None:
            period *= 2.0
            continue
        result = _integrate(slot, frequencies, times, ends, most_intervals)
        if result is None:
            return None
        psi, error = result
        if error < _ACCEPTABLE:
            return _tabulate(psi / psi[0].real, time_step, slot.rate_mean, max(error, _NEGLIGIBLE))
        frequency_reach *= 1.5  # at other levels than the average


def linear_binning(positions: Floats, weights: Floats, num_points: int) -> Floats:
    """Weights at real positions on the grid 0 … num_points − 1, each divided between its two nearest points.

    The division keeps the mean.
    """
    below = np.clip(positions.astype(np.int64), 0, num_points - 2)
    above = positions - below
    shared = np.bincount(below, weights * (1.0 - above), num_points)
    return np.asarray(shared + np.bincount(below + 1, weights * above, num_points), dtype=np.float64)


def _histogram(rates: Floats, low: float, spacing: float, count: int) -> Floats:
    """Probability of each grid point."""
    return linear_binning((rates - low) / spacing, np.full(rates.size, 1.0 / rates.size), count)


def simulated_law(rates: Floats) -> SlotLaw:
    """The law of simulated rates [bit/symbol] (slots,), the first half independent of the second."""
    low, high, std = float(rates.min()), float(rates.max()), float(rates.std())
    if not high > low:
        return SlotLaw(low, max(abs(low), 1e-300) * 1e-6, np.ones(1), 0.0, rates.size)
    # A law with far outliers gets no more points than memory likes.
    spacing = max(std / POINTS_PER_STD, (high - low) / (1 << 18))
    count = int((high - low) / spacing) + 2
    halves = np.array_split(rates, 2)
    first, second = (_histogram(half, low, spacing, count) for half in halves)
    masses = (first * halves[0].size + second * halves[1].size) / rates.size
    error = float(np.abs(np.cumsum(first) - np.cumsum(second)).max()) / 2.0
    return SlotLaw(low, spacing, masses, error, rates.size)


def controlled_rates(
    law: GainLaw,
    num_subchannels: int,
    total_power: float,
    simulate: Callable[[Callable[[Floats], Floats]], tuple[Floats, ...]],
) -> Floats | None:
    """Simulated rates of the waterfilled slot [bit/symbol] whose randomness is mostly taken out.

    By duality the rate is the least over v of Φ_v = Σ_j φ(v g_j) + P/v, φ(x) = (ln x − 1 + 1/x)^+: so it is Φ at the
    level that is right on average, a sum whose law is known, less a small D >= 0 of second order. Simulated slots are
    sorted by Φ; each Φ is replaced by the exact quantile of its rank, its D stays.

    Args:
        law: of the gains.
        num_subchannels: K.
        total_power: P.
        simulate: takes a function of the gains (slots, K); returns the rates of many slots, and the function's values.

    Returns:
        None where the law of Φ has no convergent quadrature: few active subchannels.
    """
    slot = _Waterfilling.at(law, num_subchannels, total_power)
    level = math.exp(slot.log_level)
    log_gains, weights = log_gain_rule(law, 1.0 / level)
    nats = np.maximum(log_gains + slot.log_level, 0.0)
    control = _sum_law(nats + np.expm1(-nats), weights, num_subchannels)
    if control is None:
        return None

    def sums(gains: Floats) -> Floats:
        relative = np.maximum(level * gains, 1.0)
        return np.asarray((np.log(relative) - 1.0 + 1.0 / relative).sum(axis=1), dtype=np.float64)

    rates, phi = simulate(sums)
    phi = phi / math.log(2.0)
    halves = []
    for rates_half, phi_half in zip(np.array_split(rates, 2), np.array_split(phi, 2), strict=True):
        order = np.argsort(phi_half, kind="stable")
        ranks = (np.arange(order.size) + 0.5) / order.size
        edges = _edges(control)
        below = np.cumsum(control.masses)
        rising = np.flatnonzero(np.diff(below, prepend=0.0) > 1e-15)
        exact = np.interp(ranks, below[rising], edges[rising])
        halves.append(rates_half[order] - phi_half[order] + exact)
    return np.concatenate(halves)
