"""Laws of a subchannel's power gain, all of mean 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import special

__all__ = ["GainLaw", "NakagamiGains", "RayleighGains", "RicianGains", "gain_support"]


class GainLaw(Protocol):
    """The law of g = |h|², E[g] = 1."""

    def __hash__(self) -> int:
        """A hash of the law's parameters: laws are keys of caches."""
        ...

    def density(self, gains: NDArray[np.float64]) -> NDArray[np.float64]:
        """f(g), of the shape of ``gains``, > 0."""
        ...

    def probability_below(self, gain: float) -> float:
        """P[g <= ``gain``]."""
        ...

    def draw(
        self, rng: np.random.Generator, shape: tuple[int, ...], out: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """Independent gains of a shape, into ``out`` where it is given."""
        ...


@dataclass(frozen=True)
class RayleighGains:
    """g ~ Exp(mean 1): h is complex Gaussian ([K] §II-A)."""

    def density(self, gains: NDArray[np.float64]) -> NDArray[np.float64]:
        """f(g) = e^{−g}."""
        return np.exp(-gains)

    def probability_below(self, gain: float) -> float:
        """1 − e^{−g}."""
        return -math.expm1(-gain)

    def draw(
        self, rng: np.random.Generator, shape: tuple[int, ...], out: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """Independent gains of a shape, into ``out`` where it is given."""
        return rng.standard_exponential(shape, out=out)


@dataclass(frozen=True)
class RicianGains:
    """A constant part beside the scattered one: g = |√(κ/(κ+1)) + √(1/(κ+1)) z|², z ~ CN(0, 1).

    Attributes:
        k_factor: κ, linear: power of the constant part over that of the scattered part.
    """

    k_factor: float

    def density(self, gains: NDArray[np.float64]) -> NDArray[np.float64]:
        """f(g) = (1+κ) e^{−κ−(1+κ)g} I_0(2√(κ(1+κ)g)), scaled so that nothing overflows."""
        kappa = self.k_factor
        root = np.sqrt((1.0 + kappa) * gains)
        scaled = special.i0e(2.0 * math.sqrt(kappa) * root)
        return np.asarray((1.0 + kappa) * scaled * np.exp(-((root - math.sqrt(kappa)) ** 2)), dtype=np.float64)

    def probability_below(self, gain: float) -> float:
        """The distribution function of a scaled noncentral χ² variable with two degrees of freedom."""
        return float(special.chndtr(2.0 * (1.0 + self.k_factor) * gain, 2.0, 2.0 * self.k_factor))

    def draw(
        self, rng: np.random.Generator, shape: tuple[int, ...], out: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """Independent gains of a shape, into ``out`` where it is given."""
        scale = math.sqrt(0.5 / (1.0 + self.k_factor))
        parts = rng.standard_normal((*shape, 2))
        parts *= scale
        parts[..., 0] += math.sqrt(self.k_factor / (1.0 + self.k_factor))
        return np.sum(np.square(parts, out=parts), axis=-1, out=out)


@dataclass(frozen=True)
class NakagamiGains:
    """g ~ Gamma(shape m, mean 1): Rayleigh at m = 1, worse below, steadier above.

    Attributes:
        m: the shape, >= 0.5.
    """

    m: float

    def density(self, gains: NDArray[np.float64]) -> NDArray[np.float64]:
        """f(g) = m^m g^{m−1} e^{−mg}/Γ(m)."""
        log_density = special.xlogy(self.m - 1.0, gains) - self.m * gains
        return np.asarray(
            np.exp(log_density + self.m * math.log(self.m) - float(special.gammaln(self.m))), dtype=np.float64
        )

    def probability_below(self, gain: float) -> float:
        """The regularized incomplete gamma function P(m, mg)."""
        return float(special.gammainc(self.m, self.m * gain))

    def draw(
        self, rng: np.random.Generator, shape: tuple[int, ...], out: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """Independent gains of a shape, into ``out`` where it is given."""
        gains = rng.standard_gamma(self.m, shape, out=out)
        gains /= self.m
        return gains


@lru_cache(maxsize=64)
def gain_support(law: GainLaw) -> tuple[float, float]:
    """Gains below and above which there is less than rounding: P[g < low] <= 1e-17, P[g <= high] = 1."""
    certain = min(1.0, law.probability_below(1e6))  # in some versions of SciPy a Rician law ends just below 1
    step = 1.05
    while True:
        low, high = 1.0, 1.0
        while law.probability_below(low) > 1e-17:
            low /= step
        while law.probability_below(high) < certain:
            high *= step
        if high > low * step**20:
            return low, step * high
        step = math.sqrt(step)
