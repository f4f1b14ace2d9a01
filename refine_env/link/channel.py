"""Which link: the law of the gains, their correlation over time, and what the transmitter makes of what it knows."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, special

from refine_env._validation import check_choice, check_finite, check_integer, check_positive, shown
from refine_env.errors import ConfigurationError
from refine_env.link.gains import GainLaw, NakagamiGains, RayleighGains, RicianGains
from refine_env.link.kernels import accumulate_states, fill_powers, fill_rates, fill_rates_at_powers, mix_slots

__all__ = ["CORRELATIONS", "FADINGS", "POWER_ALLOCATIONS", "ChannelModel"]

FADINGS = ("rayleigh", "rician", "nakagami")
CORRELATIONS = ("iid", "gauss-markov", "jakes")
POWER_ALLOCATIONS = ("waterfilling", "equal")

_PARAMETERS = {
    "k_factor_db": ("fading", "rician", "the K-factor in dB, for example 6.0"),
    "nakagami_m": ("fading", "nakagami", "the shape m, for example 2.0"),
    "correlation_coefficient": ("correlation", "gauss-markov", "the correlation of neighboring slots, for example 0.9"),
    "doppler": ("correlation", "jakes", "f_d·T_slot, for example 0.02"),
}
"""Each model's own parameter: the field and the choice that it belongs to, and how to give it."""

_LONGEST_JAKES = 4096  # slots: its factor is a matrix of that order
_REGULARIZATION = 1e-10  # of the Jakes covariance, which is singular to rounding at small Doppler


@dataclass(frozen=True, kw_only=True)
class ChannelModel:
    """How gains are drawn and powers allotted; the default is [K] §II-A. Gains have mean 1 in all of them.

    Attributes:
        fading: law of a gain, ``"rayleigh"``, ``"rician"`` or ``"nakagami"``.
        k_factor_db: of Rician fading, power of the constant part over that of the scattered part [dB].
        nakagami_m: of Nakagami fading, m >= 0.5.
        correlation: of a subchannel's scattered complex amplitude over slots: ``"iid"`` (none), ``"gauss-markov"``
            (autocorrelation a^k) or ``"jakes"`` (J_0(2π f_d T_slot k)).
        correlation_coefficient: a, in [0, 1).
        doppler: f_d·T_slot > 0, the maximum Doppler frequency in cycles per slot.
        power_allocation: ``"waterfilling"`` or ``"equal"``, P/K each.
        csi_delay: waterfilling uses the gains of so many slots ago, the rate is what the present gains carry with
            these powers.

    Raises:
        ConfigurationError: if a value is out of range, a model lacks its parameter or another's is given, or the
            combination has no model here: Nakagami fading with correlation, equal power with a delay.
    """

    fading: str = "rayleigh"
    k_factor_db: float | None = None
    nakagami_m: float | None = None
    correlation: str = "iid"
    correlation_coefficient: float | None = None
    doppler: float | None = None
    power_allocation: str = "waterfilling"
    csi_delay: int = 0

    def __post_init__(self) -> None:
        check_choice("fading", self.fading, FADINGS)
        check_choice("correlation", self.correlation, CORRELATIONS)
        check_choice("power_allocation", self.power_allocation, POWER_ALLOCATIONS)
        for name, (field, choice, advice) in _PARAMETERS.items():
            value = getattr(self, name)
            if getattr(self, field) != choice:
                if value is not None:
                    raise ConfigurationError(
                        f"`{name}` must be left out where `{field}` is not {choice!r}, got {shown(value)} with "
                        f"{getattr(self, field)!r}. Leave it out, or choose {field}={choice!r}."
                    )
                continue
            object.__setattr__(self, name, self._check_parameter(name, value, f"Give {advice}."))
        delay = check_integer("csi_delay", self.csi_delay, 0, 10_000, advice="Give a number of slots; 0: none.")
        object.__setattr__(self, "csi_delay", delay)
        if self.fading == "nakagami" and self.correlation != "iid":
            raise ConfigurationError(
                f"`correlation` must be 'iid' for Nakagami fading, which has no Gaussian amplitudes, got "
                f"{self.correlation!r}. Use fading='rician', which can be as steady."
            )
        if delay and self.power_allocation == "equal":
            raise ConfigurationError(
                f"`csi_delay` must be 0 for equal power, which does not depend on the gains, got {delay}. Leave it out."
            )

    @staticmethod
    def _check_parameter(name: str, value: Any, advice: str) -> float:
        if name == "k_factor_db":
            number = check_finite(name, value, advice=advice)
            if abs(number) > 60.0:
                raise ConfigurationError(f"`{name}` must lie in -60 … 60 dB, got {shown(value)}. {advice}")
            return number
        if name == "correlation_coefficient":
            number = check_finite(name, value, advice=advice)
            if not 0.0 <= number < 1.0:
                raise ConfigurationError(f"`{name}` must be >= 0 and < 1, got {shown(value)}. {advice}")
            return number
        number = check_positive(name, value, advice=advice)
        low, high = (0.5, 1e6) if name == "nakagami_m" else (1e-6, 1e6)
        if not low <= number <= high:
            raise ConfigurationError(f"`{name}` must lie in {low:g} … {high:g}, got {shown(value)}. {advice}")
        return number

    @property
    def independent(self) -> bool:
        """Whether the rates of different slots are independent."""
        return self.correlation == "iid" and self.csi_delay == 0

    @property
    def k_factor(self) -> float:
        """κ, linear; 0 for Rayleigh fading."""
        return 0.0 if self.k_factor_db is None else math.pow(10.0, self.k_factor_db / 10.0)

    @property
    def gain_law(self) -> GainLaw:
        """The law of one gain."""
        if self.nakagami_m is not None:
            return NakagamiGains(self.nakagami_m)
        return RayleighGains() if self.k_factor_db is None else RicianGains(self.k_factor)

    def autocorrelation(self, lag: int) -> float:
        """Autocorrelation of a subchannel's scattered complex amplitude at a distance of ``lag`` slots."""
        if lag == 0:
            return 1.0
        if self.correlation_coefficient is not None:
            return math.pow(self.correlation_coefficient, lag)
        return 0.0 if self.doppler is None else float(special.j0(2.0 * math.pi * self.doppler * lag))

    def settings(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def draw_gains(
        self,
        rng: np.random.Generator,
        num_slots: int,
        num_subchannels: int,
        out: NDArray[np.float64] | None = None,
    ) -> NDArray[np.float64]:
        """Gains of consecutive slots.

        The scattered amplitudes of correlated links are an exact stationary Gaussian process: a recursion
        (Gauss–Markov), or a Cholesky factor of the covariance matrix (Jakes) applied to white ones.

        Args:
            rng: the generator.
            num_slots: how many; where a rate is wanted in each, ``csi_delay`` more than there are rates.
            num_subchannels: K.
            out: where to draw them, of the result's shape, C-contiguous.

        Returns:
            Gains, shape (num_slots, num_subchannels).

        Raises:
            ConfigurationError: if a Jakes process is longer than 4096 slots.
        """
        if self.correlation == "iid":
            return self.gain_law.draw(rng, (num_slots, num_subchannels), out=out)
        parts = rng.standard_normal((num_slots, 2 * num_subchannels))
        if self.correlation_coefficient is not None:
            accumulate_states(parts, self.correlation_coefficient)
        else:
            assert self.doppler is not None
            mix_slots(_jakes_factor(self.doppler, num_slots), parts)
        return self._power(parts, out)

    def draw_lagged_gains(
        self, rng: np.random.Generator, num_pairs: int, num_subchannels: int, lag: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Gains of a slot and of the slot ``lag`` later, independent from pair to pair.

        Returns:
            Two arrays of shape (num_pairs, num_subchannels).
        """
        if self.correlation == "iid":
            shape = (num_pairs, num_subchannels)
            return self.gain_law.draw(rng, shape), self.gain_law.draw(rng, shape)
        rho = self.autocorrelation(lag)
        before, after = rng.standard_normal((2, num_pairs, 2 * num_subchannels))
        after *= math.sqrt(1.0 - rho * rho)
        after += rho * before
        return self._power(before), self._power(after)

    def _power(self, parts: NDArray[np.float64], out: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """|h|² of amplitudes with white parts of variance 1: real ones in the first K columns, imaginary ones after."""
        parts *= math.sqrt(0.5 / (1.0 + self.k_factor))
        real, imaginary = np.split(parts, 2, axis=-1)
        real += math.sqrt(self.k_factor / (1.0 + self.k_factor))
        return np.add(np.square(real, out=real), np.square(imaginary, out=imaginary), out=out)

    def fill_rates(
        self,
        gains: NDArray[np.float64],
        powers: NDArray[np.float64],
        symbols_per_slot: float,
        out: NDArray[np.float64],
    ) -> None:
        """Rates of many episodes.

        Args:
            gains: (N, csi_delay + slots, K), C-contiguous.
            powers: Σ_j p_j in every slot of an episode (N,).
            symbols_per_slot: ℓ.
            out: bits per slot (N, slots), C-contiguous.

        Raises:
            ConfigurationError: if the gains are of more or fewer slots or episodes.
        """
        wanted = (out.shape[0], self.csi_delay + out.shape[1])
        if gains.shape[:2] != wanted or powers.shape != wanted[:1]:
            raise ConfigurationError(
                f"`gains` must be of {wanted[0]} episodes and {wanted[1]} slots, got {gains.shape[:2]} with "
                f"{powers.shape} powers. Draw csi_delay = {self.csi_delay} slots more than there are rates."
            )
        num_subchannels = gains.shape[2]
        every = np.repeat(powers, out.shape[1])
        if self.csi_delay == 0 and self.power_allocation == "waterfilling":
            fill_rates(gains.reshape(-1, num_subchannels), every, symbols_per_slot, out.reshape(-1))
            return
        present = np.ascontiguousarray(gains[:, self.csi_delay :]).reshape(-1, num_subchannels)
        allotted = np.empty_like(present)
        if self.power_allocation == "equal":
            allotted[:] = every[:, None] / num_subchannels
        else:
            known = np.ascontiguousarray(gains[:, : out.shape[1]]).reshape(-1, num_subchannels)
            fill_powers(known, every, allotted)
        fill_rates_at_powers(present, allotted, symbols_per_slot, out.reshape(-1))


@lru_cache(maxsize=8)
def _jakes_factor(doppler: float, num_slots: int) -> NDArray[np.float64]:
    """Lower Cholesky factor of the covariance J_0(2π f_d |n − m|) of ``num_slots`` slots."""
    if num_slots > _LONGEST_JAKES:
        raise ConfigurationError(
            f"`deadline` and `csi_delay` together must be <= {_LONGEST_JAKES} slots for the Jakes process, got "
            f"{num_slots}. Use correlation='gauss-markov'."
        )
    covariance = linalg.toeplitz(special.j0(2.0 * math.pi * doppler * np.arange(num_slots)))
    factor: NDArray[np.float64] = linalg.cholesky(covariance + _REGULARIZATION * np.eye(num_slots), lower=True)
    return np.ascontiguousarray(factor)
