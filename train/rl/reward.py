"""A reward on one scale for all SNRs: the latent MSE relative to what the policy scores now at that SNR.

The latent MSE at the deadline spans five orders of magnitude between 0 and 24 dB, so a learner that is paid in MSE
looks at the lowest SNRs alone. The logarithm (``reward="log"``) weighs all SNRs alike, but it is another objective:
an average of logarithms forgives a rare miss that an average of errors does not. Divided by its own mean at the
episode's SNR, the MSE keeps its meaning, and all SNRs weigh alike: the gradient of E[MSE | SNR] / c at
c = E[MSE | SNR] is that of log E[MSE | SNR], so what is minimized over a range of SNRs is the geometric mean of the
mean squared errors. The reward knows the SNR; the policy, which sees no reward where it acts, does not.

What a miss costs is averaged out (:class:`train.rl.deadline_miss.MissProbability`). A message that is sent at a
device whose error is m is late with a known probability p; the episode then ends with m. Its sender is paid −p·m
at once, and nothing when it comes to a miss: for every policy the same in expectation (undiscounted), with rare
large losses replaced by frequent small ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from refine_env.wrappers import AnyVectorWrapper, check_same_step
from train.rl.deadline_miss import MissProbability

__all__ = ["FLOOR", "RelativeReward"]

FLOOR = 2e-7
"""Added to both MSEs, so that differences below it do not count."""

_BINS_PER_DB = 2


class RelativeReward(AnyVectorWrapper):
    """Pay −min((MSE + floor)/(mean + floor), cap)^p/p after the last slot.

    The mean is a running one over the episodes played so far, by their SNR, interpolated between bins of 0.5 dB.

    Args:
        env: the native vector environment with ``autoreset_mode="SameStep"``, its observation still the dictionary.
        cap: largest ratio.
        power: p; below 1 it is a step towards the logarithm: typical episodes weigh more, misses less.
        memory: episodes of one bin over which the mean is taken.
        expected_misses: pay for a miss what it costs on average, when the message is sent.

    Attributes:
        means: running mean of the MSE in every bin, NaN where no episode was.

    Raises:
        ConfigurationError: if the environment resets itself one step late, or misses are to be averaged out on a link
            whose slots are not independent.
    """

    def __init__(
        self,
        env: VectorEnv[Any, Any, NDArray[Any]],
        *,
        cap: float = 50.0,
        power: float = 1.0,
        memory: int = 300,
        expected_misses: bool = True,
    ) -> None:
        check_same_step(env)
        super().__init__(env)
        self.cap = cap
        self.power = power
        self.memory = memory
        config = env.unwrapped.config  # type: ignore[attr-defined]
        self._deadline = config.deadline
        self._sizes = np.append(0.0, config.message_bits)
        self._low, high = config.snr_range_db
        size = int(np.ceil((high - self._low) * _BINS_PER_DB)) + 2
        self._sums = np.zeros(size)
        self._weights = np.zeros(size)
        self._miss = MissProbability(config) if expected_misses else None
        self._expected = np.zeros(env.num_envs)  # MSE times probability of the misses that an episode risked so far
        self._slots = np.zeros(env.num_envs, dtype=np.int64)
        self._mse = np.zeros(env.num_envs)

    @property
    def means(self) -> NDArray[np.float64]:
        """Running mean of the MSE in every bin (NaN: no episode there yet)."""
        with np.errstate(invalid="ignore"):
            means: NDArray[np.float64] = self._sums / self._weights
        return means

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What the rewards to come depend on, apart from the environment: by name, to be read or filled in place."""
        return {
            "sums": self._sums,
            "weights": self._weights,
            "expected": self._expected,
            "slots": self._slots,
            "mse": self._mse,
        }

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Start episodes."""
        observations, infos = self.env.reset(seed=seed, options=options)
        self._expected[infos["_latent_mse"]] = 0.0
        self._note(observations, infos)
        return observations, infos

    def _note(self, observations: dict[str, NDArray[Any]], infos: dict[str, Any]) -> None:
        """What the next senders are paid by; infos hold nothing of episodes that a partial reset left alone."""
        self._slots = observations["slot"]
        self._mse = np.where(infos["_latent_mse"], infos["latent_mse"], self._mse)

    def step(self, actions: Any) -> tuple[Any, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Act; rewards relative."""
        snrs_db = self.env.unwrapped.episode_snrs_db  # type: ignore[attr-defined]
        paid = np.zeros(self.num_envs)
        if self._miss is not None:
            self._pay_for_misses(np.asarray(actions), snrs_db, paid)
        observations, _, terminated, truncated, infos = self.env.step(actions)
        self._note(observations, infos)
        if terminated.any():
            ended = np.flatnonzero(terminated)
            final = infos["final_info"]
            mse = final["latent_mse"][ended]
            if self._miss is not None:
                in_flight = np.array([infos["final_obs"][i]["remaining_bits"][0] > 0.0 for i in ended])
                # Paid for when it was sent; the prompt's own bits, before the first slot of the server, were not.
                missed = in_flight & (final["uplink_slots"][ended] > 0)
            else:
                missed = np.zeros(ended.size, dtype=np.bool_)
            paid[ended] += np.where(missed, 0.0, self._paid(mse, snrs_db[ended]))
            self._remember(np.where(missed, 0.0, mse) + self._expected[ended], snrs_db[ended])
            self._expected[ended] = 0.0
        return observations, -paid, terminated, truncated, infos

    def _pay_for_misses(self, actions: NDArray[Any], snrs_db: NDArray[np.float64], paid: NDArray[np.float64]) -> None:
        legal = self.env.unwrapped.action_masks()[np.arange(self.num_envs), actions]  # type: ignore[attr-defined]
        senders = np.flatnonzero(legal & (actions > 0))
        if senders.size == 0:
            return
        slots = self._slots[senders]
        rates = self.env.unwrapped.episode_rates  # type: ignore[attr-defined]
        later = self._sizes[actions[senders]] - rates[senders, slots - 1]
        miss = self._miss(snrs_db[senders], self._deadline - slots, later)  # type: ignore[misc]
        mse = self._mse[senders]
        self._expected[senders] += miss * mse
        paid[senders] = miss * self._paid(mse, snrs_db[senders])

    def _place(self, snrs_db: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        place = (snrs_db - self._low) * _BINS_PER_DB
        low = np.clip(place.astype(np.int64), 0, self._sums.size - 2)
        return low, place - low

    def _remember(self, mse: NDArray[np.float64], snrs_db: NDArray[np.float64]) -> None:
        low, share = self._place(snrs_db)
        for bins, weights in ((low, 1.0 - share), (low + 1, share)):
            count = np.bincount(bins, weights, self._sums.size)
            keep = np.maximum(1.0 - count / self.memory, 0.0)
            self._sums = self._sums * keep + np.bincount(bins, weights * mse, self._sums.size)
            self._weights = self._weights * keep + count

    def _paid(self, mse: NDArray[np.float64], snrs_db: NDArray[np.float64]) -> NDArray[np.float64]:
        """What an MSE costs at an SNR."""
        low, share = self._place(snrs_db)
        # Neighboring bins joined in the logarithm: the MSE falls by decades within a few dB.
        below, above = self.means[low], self.means[low + 1]
        below, above = np.where(np.isnan(below), above, below), np.where(np.isnan(above), below, above)
        mean = np.exp((1.0 - share) * np.log(below + FLOOR) + share * np.log(above + FLOOR))
        ratio = np.minimum((mse + FLOOR) / np.where(np.isnan(mean), 1.0, mean), self.cap)
        cost: NDArray[np.float64] = ratio**self.power / self.power
        return cost
