"""The paper's analytical rate statistics ([K] §IV-B), and their counterparts on other links."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from scipy import integrate, optimize, special

from refine_env._validation import check_positive
from refine_env.link.channel import ChannelModel
from refine_env.link.fading import RAYLEIGH
from refine_env.link.gains import GainLaw, RayleighGains, gain_support
from refine_env.link.law import rate_law, simulated_moments
from refine_env.link.slot_law import log_gain_rule
from refine_env.link.waterfilling import total_power

__all__ = ["RateStatistics", "rate_moments", "rate_statistics"]

_LARGEST_GAIN = 745.0  # e^{−g} underflows beyond
_DELAYED_SLOTS = 4096  # simulated for the moments of a link with delayed channel knowledge


@dataclass(frozen=True)
class RateStatistics:
    """Moments of the bits per slot, from the analytical model with a fixed waterfilling cutoff.

    Attributes:
        cutoff: γ_0, the gain below which a subchannel gets no power.
        mean: R̄ [bit/slot].
        std: σ_R [bit/slot], for the cutoff held fixed, as [K] has it.
        num_subchannels: K.
        symbols_per_slot: ℓ.
        channel: which link.
    """

    cutoff: float
    mean: float
    std: float
    num_subchannels: int
    symbols_per_slot: float
    channel: ChannelModel = RAYLEIGH

    @cached_property
    def fixed_power_std(self) -> float:
        """Standard deviation of the simulated link, which fixes the power of every slot [bit/slot].

        [K] fixes the cutoff, so the power varies and with it the rate. With the power fixed the level
        adapts and steadies the rate; by the delta method
        σ² = ℓ²K·Var[((ln(g/γ_0) − 1 + γ_0/g)/ln 2)^+]. Equal power and delayed channel knowledge have no cutoff to
        adapt to the present gains: there it is ``std``.
        """
        if self.channel.power_allocation == "equal" or self.channel.csi_delay:
            return self.std
        return _slot_std(
            self.channel.gain_law,
            self.cutoff,
            self.num_subchannels,
            self.symbols_per_slot,
            lambda u: (u - 1.0 + math.exp(-u)) / math.log(2.0),
        )


def _expectation_above_cutoff(law: GainLaw, cutoff: float, value: Callable[[float], float]) -> float:
    """∫_{γ0}^∞ value(ln(g/γ_0)) f(g) dg, in u = ln(g/γ_0), where the integrand is smooth."""
    if not isinstance(law, RayleighGains):
        log_gains, weights = log_gain_rule(law, cutoff)
        above = 1.0 - law.probability_below(cutoff)
        if above > 0.5:  # densities of very steady gains are right to nine digits
            weights = weights * (above / weights.sum())
        terms = zip(weights.tolist(), (log_gains - math.log(cutoff)).tolist(), strict=True)
        return math.fsum(weight * value(max(0.0, u)) for weight, u in terms)
    upper = math.log(_LARGEST_GAIN / cutoff) if cutoff < _LARGEST_GAIN else 1.0

    def integrand(u: float) -> float:
        gain = cutoff * math.exp(u)
        return value(u) * math.exp(-gain) * gain

    # The mass lies around g = 1: split there so that no part is missed at very small cutoffs.
    knots = sorted({0.0, min(upper, max(0.0, math.log(1.0 / cutoff))), upper})
    return math.fsum(
        integrate.quad(integrand, low, high, epsabs=0.0, epsrel=1e-12, limit=200)[0]
        for low, high in itertools.pairwise(knots)
    )


def _slot_std(
    law: GainLaw, cutoff: float, num_subchannels: int, symbols_per_slot: float, bits: Callable[[float], float]
) -> float:
    """ℓ √(K·Var[bits]) for a per-subchannel amount that is 0 below the cutoff."""
    mean = _expectation_above_cutoff(law, cutoff, bits)
    # Of a steady link at a high SNR the second moment less the mean's square would be rounding.
    above = _expectation_above_cutoff(law, cutoff, lambda u: (bits(u) - mean) ** 2)
    variance = above + law.probability_below(cutoff) * mean**2
    return symbols_per_slot * math.sqrt(num_subchannels * variance)


def rate_statistics(
    snr_db: float,
    num_subchannels: int = 60,
    symbols_per_slot: float = 70.0,
    snr_reference: str = "subchannel",
    channel: ChannelModel = RAYLEIGH,
) -> RateStatistics:
    """γ_0, R̄ and σ_R of the link ([K] §IV-B).

    With waterfilling over Rayleigh fading γ_0 solves ∫_{γ0}^∞ (1/γ_0 − 1/g) e^{−g} dg = E_2(γ_0)/γ_0 = SNR; R̄ =
    ℓK E_1(γ_0)/ln 2; σ_R² = ℓ²K·Var[(log2(g/γ_0))^+] by quadrature. Other laws of the gain take the place of e^{−g},
    everything by quadrature. With equal power γ_0 = 0 and log2(1 + SNR·g) is what a subchannel carries. With delayed
    channel knowledge R̄ and σ_R are those of the simulated slot (:func:`refine_env.link.rate_law`). Like [K]'s, none
    of these knows about correlation over time.

    Args:
        snr_db: mean SNR [dB].
        num_subchannels: K.
        symbols_per_slot: ℓ, may be fractional.
        snr_reference: what the SNR refers to, see :func:`refine_env.link.total_power`.
        channel: which link.

    Raises:
        ConfigurationError: if an argument is out of range.
    """
    symbols = check_positive("symbols_per_slot", symbols_per_slot, advice="Give ℓ, for example 70.")
    snr = total_power(snr_db, num_subchannels, snr_reference) / num_subchannels
    cutoff = 0.0 if channel.power_allocation == "equal" else _cutoff(channel.gain_law, snr)
    if channel.csi_delay:
        law = rate_law(snr_db, num_subchannels, symbols, snr_reference, channel)
        mean, std = law.mean, law.std
    elif channel.power_allocation == "equal":
        log_gains, weights = log_gain_rule(channel.gain_law, 1e-30)
        bits = np.log1p(snr * np.exp(log_gains)) / math.log(2.0)
        one = float(weights @ bits) / float(weights.sum())
        mean = symbols * num_subchannels * one
        std = symbols * math.sqrt(num_subchannels * float(weights @ (bits - one) ** 2))
    else:
        mean = symbols * num_subchannels * _mean_nats(channel.gain_law, cutoff) / math.log(2.0)
        std = _slot_std(channel.gain_law, cutoff, num_subchannels, symbols, lambda u: u / math.log(2.0))
    return RateStatistics(cutoff, mean, std, num_subchannels, symbols, channel)


@lru_cache(maxsize=256)
def rate_moments(
    snr_db: float, num_subchannels: int, symbols_per_slot: float, snr_reference: str, channel: ChannelModel
) -> tuple[float, float]:
    """Mean and standard deviation of what a slot of the simulated link carries, with its power fixed [bit/slot].

    They are ``mean`` and ``fixed_power_std`` of :class:`RateStatistics`. With delayed channel knowledge, where those
    two would take millions of simulated slots, 4096 slots are simulated: the deviation is right to about 1 %.

    Args:
        snr_db, num_subchannels, symbols_per_slot, snr_reference, channel: as those of :func:`rate_statistics`.

    Raises:
        ConfigurationError: if an argument is out of range.
    """
    if channel.csi_delay:
        power = total_power(snr_db, num_subchannels, snr_reference)
        mean, std = simulated_moments(channel, num_subchannels, power, _DELAYED_SLOTS)
        return symbols_per_slot * mean, symbols_per_slot * std
    statistics = rate_statistics(snr_db, num_subchannels, symbols_per_slot, snr_reference, channel)
    return statistics.mean, statistics.fixed_power_std


def _cutoff(law: GainLaw, snr: float) -> float:
    """γ_0: the cutoff that spends the power on average."""
    if isinstance(law, RayleighGains):

        def excess(x: float) -> float:
            return math.log(special.expn(2, math.exp(x))) - x - math.log(snr)

        ends = -70.0, math.log(700.0)
    else:

        def excess(x: float) -> float:
            log_gains, weights = log_gain_rule(law, math.exp(x))
            spent = float(weights @ -np.expm1(np.minimum(x - log_gains, 0.0)))
            return (math.log(spent) if spent > 0.0 else -750.0) - x - math.log(snr)

        high = math.log(gain_support(law)[1])
        while excess(high) > 0.0:  # an SNR below what is left of the law there
            high += 0.01
        ends = -70.0, high
    return math.exp(optimize.brentq(excess, *ends, xtol=1e-15, rtol=4 * np.finfo(float).eps))


def _mean_nats(law: GainLaw, cutoff: float) -> float:
    """E[(ln(g/γ_0))^+]."""
    if isinstance(law, RayleighGains):
        return float(special.exp1(cutoff))
    return _expectation_above_cutoff(law, cutoff, lambda u: u)
