"""The paper's analytical rate statistics ([K] §IV-B)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import integrate, optimize, special

from refine_env._validation import check_positive
from refine_env.link.waterfilling import total_power

__all__ = ["RateStatistics", "rate_statistics"]

_LARGEST_GAIN = 745.0  # e^{−g} underflows beyond


@dataclass(frozen=True)
class RateStatistics:
    """Moments of the bits per slot, from the analytical model with a fixed waterfilling cutoff.

    Attributes:
        cutoff: γ_0, the gain below which a subchannel gets no power.
        mean: R̄ [bit/slot].
        std: σ_R [bit/slot], for the cutoff held fixed, as [K] has it.
        num_subchannels: K.
        symbols_per_slot: ℓ.
    """

    cutoff: float
    mean: float
    std: float
    num_subchannels: int
    symbols_per_slot: float

    @cached_property
    def fixed_power_std(self) -> float:
        """Standard deviation of the simulated link, which fixes the power of every slot [bit/slot].

        [K] fixes the cutoff, so the power varies and with it the rate. With the power fixed the level
        adapts and steadies the rate; by the delta method
        σ² = ℓ²K·Var[((ln(g/γ_0) − 1 + γ_0/g)/ln 2)^+].
        """
        return _slot_std(
            self.cutoff,
            self.num_subchannels,
            self.symbols_per_slot,
            lambda u: (u - 1.0 + math.exp(-u)) / math.log(2.0),
        )


def _expectation_above_cutoff(cutoff: float, value: object) -> float:
    """∫_{γ0}^∞ value(ln(g/γ_0)) e^{−g} dg, in u = ln(g/γ_0), where the integrand is smooth."""
    assert callable(value)
    upper = math.log(_LARGEST_GAIN / cutoff) if cutoff < _LARGEST_GAIN else 1.0

    def integrand(u: float) -> float:
        gain = cutoff * math.exp(u)
        return float(value(u)) * math.exp(-gain) * gain

    # The mass lies around g = 1: split there so that no part is missed at very small cutoffs.
    knots = sorted({0.0, min(upper, max(0.0, math.log(1.0 / cutoff))), upper})
    return math.fsum(
        integrate.quad(integrand, low, high, epsabs=0.0, epsrel=1e-12, limit=200)[0]
        for low, high in itertools.pairwise(knots)
    )


def _slot_std(cutoff: float, num_subchannels: int, symbols_per_slot: float, bits: object) -> float:
    """ℓ √(K·Var[bits]) for a per-subchannel amount that is 0 below the cutoff."""
    assert callable(bits)
    first = _expectation_above_cutoff(cutoff, bits)
    second = _expectation_above_cutoff(cutoff, lambda u: bits(u) ** 2)
    return symbols_per_slot * math.sqrt(num_subchannels * max(0.0, second - first**2))


def rate_statistics(
    snr_db: float,
    num_subchannels: int = 60,
    symbols_per_slot: float = 70.0,
    snr_reference: str = "subchannel",
) -> RateStatistics:
    """γ_0, R̄ and σ_R of the waterfilled Rayleigh link ([K] §IV-B).

    γ_0 solves ∫_{γ0}^∞ (1/γ_0 − 1/g) e^{−g} dg = E_2(γ_0)/γ_0 = SNR; R̄ = ℓK E_1(γ_0)/ln 2; σ_R² =
    ℓ²K·Var[(log2(g/γ_0))^+] by quadrature.

    Args:
        snr_db: mean SNR [dB].
        num_subchannels: K.
        symbols_per_slot: ℓ, may be fractional.
        snr_reference: what the SNR refers to, see :func:`refine_env.link.total_power`.

    Raises:
        ConfigurationError: if an argument is out of range.
    """
    symbols = check_positive("symbols_per_slot", symbols_per_slot, advice="Give ℓ, for example 70.")
    snr = total_power(snr_db, num_subchannels, snr_reference) / num_subchannels
    cutoff = math.exp(
        optimize.brentq(
            lambda x: math.log(special.expn(2, math.exp(x))) - x - math.log(snr),
            -70.0,
            math.log(700.0),
            xtol=1e-15,
            rtol=4 * np.finfo(float).eps,
        )
    )
    mean = symbols * num_subchannels * float(special.exp1(cutoff)) / math.log(2.0)
    std = _slot_std(cutoff, num_subchannels, symbols, lambda u: u / math.log(2.0))
    return RateStatistics(cutoff=cutoff, mean=mean, std=std, num_subchannels=num_subchannels, symbols_per_slot=symbols)
