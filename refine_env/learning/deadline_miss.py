"""How likely a message is to be late, by the exact law of the link: to average a miss out of what a training is paid.

A miss is rare and costs a hundred times what else an action changes: one in five hundred is worth avoiding, and a
learner that is paid when it happens sees one in ten thousand steps. Its probability is known to whoever knows the link.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import special

from refine_env.config import SystemConfig
from refine_env.errors import ConfigurationError

__all__ = ["MissProbability"]

_SPACING_DB = 3.0  # between the SNRs at which the law is computed
_SCORES = np.linspace(-8.0, 8.0, 65)  # distances from the mean, in standard deviations, of the table
_LEAST = 1e-13  # probability that the table holds


class MissProbability:
    """P[R_{n+1} + … + R_{n+k} < B]: k slots carry less than B bits, at any SNR of a range.

    The exact law (:meth:`refine_env.link.RateLaw.sum_below`) is tabulated every 3 dB at most. In between, the
    logarithms of the rate's mean and standard deviation are interpolated by splines, and the law's normal score as a
    function of the distance from the mean, in standard deviations, linearly.

    Args:
        config: the system, with one SNR or a range; its slots must be independent.

    Raises:
        ConfigurationError: if they are not.
    """

    def __init__(self, config: SystemConfig) -> None:
        if not config.link.channel.independent:
            raise ConfigurationError(
                f"`link` must have independent slots for expected misses, got {config.link!r}. "
                "Pay for misses as they come, with expected_misses=False."
            )
        from scipy.interpolate import make_interp_spline  # here, since it takes longer to import than all else

        low, high = config.snr_range_db
        count = 1 if low == high else max(4, 1 + int(np.ceil((high - low) / _SPACING_DB)))
        self._knots = np.linspace(low, high, count)
        laws = [replace(config, snr_db=float(knot)).rate_law for knot in self._knots]
        logs = np.log([[law.mean, law.std] for law in laws])
        self._moments = make_interp_spline(self._knots, logs, k=3) if count > 1 else None
        self._only = logs[0]
        self._table = np.zeros((count, config.deadline + 1, _SCORES.size))
        for g, law in enumerate(laws):
            for k in range(1, config.deadline + 1):
                amounts = k * law.mean + np.sqrt(k) * law.std * _SCORES
                below = np.where(amounts > 0.0, law.sum_below(k, np.maximum(amounts, 0.0)), 0.0)
                self._table[g, k] = special.ndtri(np.clip(below, _LEAST, 1.0 - _LEAST))

    def __call__(
        self, snrs_db: NDArray[np.float64], num_slots: NDArray[np.int64], bits: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The probabilities (N,).

        Args:
            snrs_db: within the range (N,).
            num_slots: k in 0 … T_d (N,).
            bits: B, what the current slot's known rate carries already taken off (N,).
        """
        logs = self._only if self._moments is None else self._moments(snrs_db)
        mean, std = np.exp(logs[..., 0]), np.exp(logs[..., 1])
        slots = np.maximum(num_slots, 1)
        score = np.clip((bits - slots * mean) / (np.sqrt(slots) * std), _SCORES[0], _SCORES[-1])
        column = (score - _SCORES[0]) / (_SCORES[1] - _SCORES[0])
        left = np.minimum(column.astype(np.int64), _SCORES.size - 2)
        if self._knots.size > 1:
            row = (snrs_db - self._knots[0]) / (self._knots[1] - self._knots[0])
            low = np.clip(row.astype(np.int64), 0, self._knots.size - 2)
            high = low + 1
        else:
            row, low, high = np.zeros(len(score)), 0, 0
        right_share, high_share = column - left, row - low
        normal = np.zeros(len(score))
        for knot, weight in ((low, 1.0 - high_share), (high, high_share)):
            normal += weight * (
                (1.0 - right_share) * self._table[knot, slots, left] + right_share * self._table[knot, slots, left + 1]
            )
        probability = special.ndtr(normal)
        # Beyond the table it is certain; without a further slot, the current one decides.
        probability[(score <= _SCORES[0]) | (bits <= 0.0)] = 0.0
        probability[(score >= _SCORES[-1]) | ((num_slots == 0) & (bits > 0.0))] = 1.0
        return np.asarray(probability)
