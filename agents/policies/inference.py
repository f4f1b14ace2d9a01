"""Dynamic programming for a link whose SNR is not known: inferred from the rates seen so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from agents.base import Agent
from agents.policies.dynamic_programming import Solution, best_actions, independent_slots, part_of
from refine_env import ConfigurationError, SystemConfig
from refine_env.link import RateLaw

__all__ = ["PRIOR_SNRS_DB", "InferringDynamicProgramming"]

PRIOR_SNRS_DB = (-3.0, 27.0)
"""The prior where the configuration has no range: the SNR is uniformly distributed between these two [dB]."""

_SPACING_DB = 0.2  # a schedule that is right for one SNR may be late at one 0.5 dB lower
_MOMENT_SPACING_DB = 3.0  # of the SNRs between which logarithms of mean and standard deviation are interpolated
_LAW_SPACING_DB = 1.0  # of the laws that are scaled to the SNRs in between
_UNLIKELY = 0.01  # relative to the likeliest SNR, below which an SNR does not count
_POINTS_PER_DECADE = 6  # of the policies' grids, of which there are many


class _Rates:
    """The law of a slot's rate as a function of the SNR.

    A law is computed at whole SNRs, when it is first needed, and scaled to the SNRs in between.

    Args:
        config: the system. Its own SNR does not matter.
        snrs_db: the SNRs at which the law is wanted, ascending [dB] (G,).
    """

    def __init__(self, config: SystemConfig, snrs_db: NDArray[np.float64]) -> None:
        from scipy.interpolate import CubicSpline

        self._config = config
        self._solutions: dict[float, Solution] = {}
        count = max(3, round((snrs_db[-1] - snrs_db[0]) / _MOMENT_SPACING_DB) + 1)
        knots = np.linspace(snrs_db[0], snrs_db[-1], count)
        laws = [self._law(knot) for knot in knots]
        self._means = CubicSpline(knots, np.log([law.mean for law in laws]))
        self._stds = CubicSpline(knots, np.log([law.std for law in laws]))
        self.means = np.exp(self._means(snrs_db)) / config.latent_dim
        self.stds = np.exp(self._stds(snrs_db)) / config.latent_dim

    def _law(self, snr_db: float) -> RateLaw:
        return replace(self._config, snr_db=float(snr_db)).rate_law

    def solution(self, snr_db: float) -> Solution:
        """The optimal policy at an SNR, computed at the first call."""
        if snr_db not in self._solutions:
            self._solutions[snr_db] = self._solve(snr_db)
        return self._solutions[snr_db]

    def _solve(self, snr_db: float) -> Solution:
        law = self._law(round(snr_db / _LAW_SPACING_DB) * _LAW_SPACING_DB)
        scale = float(np.exp(self._means(snr_db))) / law.mean
        knowledge = independent_slots(law, self._config, 1, rate_scale=scale)
        return Solution(self._config, knowledge, _POINTS_PER_DECADE)


@lru_cache(maxsize=8)
def _rates(config: SystemConfig, snrs_db: tuple[float, ...]) -> _Rates:
    return _Rates(config, np.array(snrs_db))


class InferringDynamicProgramming(Agent):
    """The optimal policies of all SNRs, weighted by the posterior probability of each SNR, given the rates seen so far.

    The rate of a slot is a sum over many subchannels and nearly Gaussian, so the likelihood is that of a Gaussian with
    the rate's mean and standard deviation. The action has the least expected distortion if the SNR becomes known in
    the next slot. Where the configuration has a single SNR, the policy does not use it.

    Args:
        config: the system, with one SNR or a range.
        snrs_db: the prior is uniform on this pair (low, high) [dB]; None: on the configuration's range, or on
            :data:`PRIOR_SNRS_DB`.

    Attributes:
        snrs_db: the SNRs that the policy distinguishes [dB] (G,).

    Raises:
        ConfigurationError: if ``snrs_db`` is not such a pair, or the link's slots are not independent.
    """

    env_kwargs: ClassVar[Mapping[str, Any]] = {"coder": "closed_loop", "payload": "latent"}
    plans_with_errors: ClassVar[bool] = True

    def __init__(self, config: SystemConfig, *, snrs_db: Sequence[float] | None = None) -> None:
        super().__init__(config, name="dp-inferred")
        if snrs_db is not None and (len(snrs_db) != 2 or not snrs_db[0] < snrs_db[1]):
            raise ConfigurationError(
                f"`snrs_db` must be a pair (low, high) with low < high, got {snrs_db!r}. Give for example (0, 24)."
            )
        own = config.snr_db if isinstance(config.snr_db, tuple) else PRIOR_SNRS_DB
        low, high = own if snrs_db is None else snrs_db
        self.snrs_db = np.linspace(low, high, max(2, round((high - low) / _SPACING_DB) + 1))
        # Whatever the configuration's SNR, the policies are the same, and shared.
        self._unknown = replace(config, snr_db=float(self.snrs_db[0]))
        if not config.link.channel.independent:
            raise ConfigurationError(
                f"`link` must have independent slots for {self.name}, which takes the rates seen so far for samples of "
                f"one law, got {config.link!r}. Use dp, with a single SNR."
            )

    @property
    def _known_rates(self) -> _Rates:
        return _rates(self._unknown, tuple(self.snrs_db.tolist()))

    def posterior(self, observation: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        """Probability of each of the agent's SNRs, given the channel history, (N, G).

        Args:
            observation: of N episodes.
        """
        means, stds = self._known_rates.means, self._known_rates.stds
        history = observation["channel_history"].astype(np.float64)
        count = np.minimum(observation["slot"], min(history.shape[1], self.config.deadline))
        total = history.sum(axis=1)  # 0 before slot 1
        squares = (history**2).sum(axis=1)
        deviation = squares[:, None] - 2.0 * means * total[:, None] + count[:, None] * means**2
        log_likelihood = -0.5 * deviation / stds**2 - count[:, None] * np.log(stds)
        weights: NDArray[np.float64] = np.exp(log_likelihood - log_likelihood.max(axis=1, keepdims=True))
        weights[weights < _UNLIKELY] = 0.0
        weights /= weights.sum(axis=1, keepdims=True)
        return weights

    def decide(self, observation: Mapping[str, NDArray[Any]], legal: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The actions of the least distortion that is expected over the SNRs."""
        actions = np.zeros(legal.size, dtype=np.int64)
        if not legal.any():
            return actions
        part = part_of(observation, legal)
        posterior = self.posterior(part)
        expected = np.zeros((len(posterior), self.config.num_actions))
        for g in np.flatnonzero(posterior.any(axis=0)).tolist():
            own = posterior[:, g] > 0.0
            policy = self._known_rates.solution(float(self.snrs_db[g]))
            expected[own] += posterior[own, g, None] * policy.expected_cost(part_of(part, own))
        actions[legal] = best_actions(expected)
        return actions
