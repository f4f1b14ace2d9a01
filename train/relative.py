"""A reward on one scale for all SNRs: the latent MSE relative to what the policy scores now on channels as good.

The latent MSE at the deadline spans five orders of magnitude between 0 and 24 dB, so a learner that is paid in MSE
looks at the lowest SNRs alone. The logarithm (``reward="log"``) weighs all SNRs alike, but it is another objective:
an average of logarithms forgives a rare miss that an average of errors does not. Divided by its own mean at the
episode's SNR, the MSE keeps its meaning, and all SNRs weigh alike: the gradient of E[MSE | SNR] / c at
c = E[MSE | SNR] is that of log E[MSE | SNR], so what is minimized over a range of SNRs is the geometric mean of the
mean squared errors. The SNR is not known; the mean of the episode's rates, which no action changes, stands for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv, VectorWrapper
from numpy.typing import NDArray

__all__ = ["FLOOR", "RelativeReward"]

FLOOR = 2e-7
"""Added to both MSEs, so that differences below it do not count."""

_OCTAVES = (-8.0, 8.0)  # of the mean rate, bits per dimension and slot
_BINS_PER_OCTAVE = 20


class RelativeReward(VectorWrapper[Any, Any, Any, Any, NDArray[Any]]):
    """Pay −min((MSE + floor)/(mean + floor), cap)^p/p after the last slot, and 0 before.

    The mean is a running one over the episodes played so far, by their mean rate, interpolated between bins of 1/20
    octave.

    Args:
        env: the native vector environment with ``autoreset_mode="SameStep"``, its observation still the dictionary.
        cap: largest ratio; a miss that costs thousands of means would drown all else in a batch.
        power: p; below 1 it is a step towards the logarithm: typical episodes weigh more, misses less.
        memory: episodes of one bin over which the mean is taken.

    Attributes:
        means: running mean of the MSE in every bin, NaN where no episode was.
    """

    def __init__(
        self, env: VectorEnv[Any, Any, NDArray[Any]], *, cap: float = 50.0, power: float = 1.0, memory: int = 300
    ) -> None:
        super().__init__(env)
        self.cap = cap
        self.power = power
        self.memory = memory
        size = int((_OCTAVES[1] - _OCTAVES[0]) * _BINS_PER_OCTAVE) + 1
        self._sums = np.zeros(size)
        self._weights = np.zeros(size)

    @property
    def means(self) -> NDArray[np.float64]:
        """Running mean of the MSE in every bin (NaN: no episode there yet)."""
        with np.errstate(invalid="ignore"):
            means: NDArray[np.float64] = self._sums / self._weights
        return means

    def step(self, actions: Any) -> tuple[Any, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Act; rewards relative."""
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        rewards = np.zeros_like(rewards)
        if terminated.any():
            ended = np.flatnonzero(terminated)
            mse = infos["final_info"]["latent_mse"][ended]
            rates = np.array([infos["final_obs"][i]["channel_history"].mean() for i in ended])
            rewards[ended] = -(self.relative(mse, rates) ** self.power) / self.power
        return observations, rewards, terminated, truncated, infos

    def relative(self, mse: NDArray[np.float64], rates: NDArray[np.float64]) -> NDArray[np.float64]:
        """Relative MSE of finished episodes; they enter the running means.

        Args:
            mse: at the deadline (E,).
            rates: mean bits per dimension and slot (E,).
        """
        place = (np.log2(np.maximum(rates, 1e-9)) - _OCTAVES[0]) * _BINS_PER_OCTAVE
        place = np.clip(place, 0.0, self._sums.size - 1.001)
        low = place.astype(np.int64)
        share = place - low
        for bins, weights in ((low, 1.0 - share), (low + 1, share)):
            count = np.bincount(bins, weights, self._sums.size)
            keep = np.maximum(1.0 - count / self.memory, 0.0)
            self._sums = self._sums * keep + np.bincount(bins, weights * mse, self._sums.size)
            self._weights = self._weights * keep + count
        # Neighboring bins joined in the logarithm: the MSE falls by decades within an octave.
        below, above = self.means[low], self.means[low + 1]
        below, above = np.where(np.isnan(below), above, below), np.where(np.isnan(above), below, above)
        mean = np.exp((1.0 - share) * np.log(below + FLOOR) + share * np.log(above + FLOOR))
        ratio: NDArray[np.float64] = np.minimum((mse + FLOOR) / mean, self.cap)
        return ratio
