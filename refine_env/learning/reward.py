"""A reward on one scale for all SNRs: the latent MSE relative to what the policy scores now at that SNR.

The latent MSE at the deadline spans five orders of magnitude between 0 and 24 dB, so a learner that is paid in MSE
looks at the lowest SNRs alone. The logarithm (``reward="log"``) weighs all SNRs alike, but it is another objective:
an average of logarithms forgives a rare miss that an average of errors does not. Divided by its own mean at the
episode's SNR, the MSE keeps its meaning, and all SNRs weigh alike: the gradient of E[MSE | SNR] / c at
c = E[MSE | SNR] is that of log E[MSE | SNR], so what is minimized over a range of SNRs is the geometric mean of the
mean squared errors. The reward knows the SNR; the policy, which sees no reward where it acts, does not.

What a miss costs is averaged out (:class:`refine_env.learning.MissProbability`). A message that is sent at a
device whose error is m is late with a known probability p; the episode then ends with m. Its sender is paid −p·m
at once, and nothing when it comes to a miss: for every policy the same in expectation (undiscounted), with rare
large losses replaced by frequent small ones.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from refine_env.config import SystemConfig
from refine_env.learning.deadline_miss import MissProbability
from refine_env.wrappers import RefinementVectorWrapper, check_shows_dictionary

__all__ = ["FLOOR", "RelativeCost", "RelativeReward", "VectorRelativeReward"]

FLOOR = 2e-7
"""Added to both MSEs, so that differences below it do not count."""

_BINS_PER_DB = 2
_CAP, _POWER, _MEMORY = 50.0, 1.0, 300


class RelativeCost:
    """What N episodes cost: min((MSE + floor)/(mean + floor), cap)^p/p each, of which misses take their average part.

    The mean is a running one over the episodes played so far, by their SNR, interpolated between bins of 0.5 dB.

    Args:
        config: the system, with one SNR or a range.
        num_envs: N.
        cap: largest ratio.
        power: p; below 1 it is a step towards the logarithm: typical episodes weigh more, misses less.
        memory: episodes of one bin over which the mean is taken.
        expected_misses: count for a miss what it costs on average, when the message is sent.

    Attributes:
        means: running mean of the MSE in every bin, NaN where no episode was.

    Raises:
        ConfigurationError: if misses are to be averaged out on a link whose slots are not independent.
    """

    def __init__(
        self,
        config: SystemConfig,
        num_envs: int,
        *,
        cap: float = _CAP,
        power: float = _POWER,
        memory: int = _MEMORY,
        expected_misses: bool = True,
    ) -> None:
        self.cap = cap
        self.power = power
        self.memory = memory
        self._deadline = config.deadline
        self._sizes = np.append(0.0, config.message_bits)
        self._low, high = config.snr_range_db
        size = int(np.ceil((high - self._low) * _BINS_PER_DB)) + 2
        self.sums = np.zeros(size)
        self.weights = np.zeros(size)
        self._miss = MissProbability(config) if expected_misses else None
        self._expected = np.zeros(num_envs)  # MSE times probability of the misses that an episode risked so far
        self._slots = np.zeros(num_envs, dtype=np.int64)
        self._mse = np.zeros(num_envs)
        self._legal = np.zeros(num_envs, dtype=np.bool_)

    @property
    def means(self) -> NDArray[np.float64]:
        """Running mean of the MSE in every bin (NaN: no episode there yet)."""
        with np.errstate(invalid="ignore"):
            means: NDArray[np.float64] = self.sums / self.weights
        return means

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What the costs to come depend on, apart from the environment: by name, to be read or filled in place."""
        return {
            "sums": self.sums,
            "weights": self.weights,
            "expected": self._expected,
            "slots": self._slots,
            "mse": self._mse,
            "legal": self._legal,
        }

    def begin(self, begun: NDArray[np.bool_]) -> None:
        """Forget the risks of the episodes that these (N,) replace."""
        self._expected[begun] = 0.0

    def note(
        self,
        shown: NDArray[np.bool_],
        slots: NDArray[np.int64],
        mse: NDArray[np.float64],
        masks: NDArray[np.int8],
    ) -> None:
        """What the next senders are charged by.

        Args:
            shown: of which episodes this says anything; a partial reset leaves the others alone (N,).
            slots: n (N,).
            mse: latent MSE of what the device holds (N,).
            masks: legal actions (N, n).
        """
        np.copyto(self._slots, slots, where=shown)
        np.copyto(self._mse, mse, where=shown)
        np.copyto(self._legal, masks[:, 1] > 0, where=shown)

    def of_sending(
        self, actions: NDArray[np.int64], rates: NDArray[np.float64], snrs_db: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """What these actions cost at once: of a TRANSMIT its expected miss (N,).

        Args:
            actions: (N,), in the state that was noted last.
            rates: bits that every slot of these episodes carries (N, T_d); that of the current slot alone is read.
            snrs_db: of these episodes (N,).
        """
        costs = np.zeros(actions.size)
        senders = np.flatnonzero(self._legal & (actions > 0))
        if self._miss is None or senders.size == 0:
            return costs
        slots = self._slots[senders]
        later = self._sizes[actions[senders]] - rates[senders, slots - 1]
        miss = self._miss(snrs_db[senders], self._deadline - slots, later)
        mse = self._mse[senders]
        self._expected[senders] += miss * mse
        costs[senders] = miss * self._cost(mse, snrs_db[senders])
        return costs

    def of_ending(
        self,
        ended: NDArray[np.int64],
        mse: NDArray[np.float64],
        in_flight: NDArray[np.bool_],
        uplink_slots: NDArray[np.int64],
        snrs_db: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """What episodes cost that ended, K of the N; they are taken into the mean.

        Args:
            ended: which (K,).
            mse: latent MSE at the deadline (K,).
            in_flight: whether a message, or the prompt, had not arrived (K,).
            uplink_slots: T_ul, 0 where the prompt did not arrive (K,).
            snrs_db: of these episodes (K,).
        """
        # Charged when it was sent; the prompt's own bits, before the first slot of the server, were not.
        missed = in_flight & (uplink_slots > 0) & (self._miss is not None)
        costs: NDArray[np.float64] = np.where(missed, 0.0, self._cost(mse, snrs_db))
        self._remember(np.where(missed, 0.0, mse) + self._expected[ended], snrs_db)
        self._expected[ended] = 0.0
        return costs

    def _place(self, snrs_db: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        place = (snrs_db - self._low) * _BINS_PER_DB
        low = np.clip(place.astype(np.int64), 0, self.sums.size - 2)
        return low, place - low

    def _remember(self, mse: NDArray[np.float64], snrs_db: NDArray[np.float64]) -> None:
        low, share = self._place(snrs_db)
        for bins, weights in ((low, 1.0 - share), (low + 1, share)):
            count = np.bincount(bins, weights, self.sums.size)
            keep = np.maximum(1.0 - count / self.memory, 0.0)
            self.sums[:] = self.sums * keep + np.bincount(bins, weights * mse, self.sums.size)
            self.weights[:] = self.weights * keep + count

    def _cost(self, mse: NDArray[np.float64], snrs_db: NDArray[np.float64]) -> NDArray[np.float64]:
        """What an MSE costs at an SNR."""
        low, share = self._place(snrs_db)
        # Neighboring bins joined in the logarithm: the MSE falls by decades within a few dB.
        below, above = self.means[low], self.means[low + 1]
        below, above = np.where(np.isnan(below), above, below), np.where(np.isnan(above), below, above)
        mean = np.exp((1.0 - share) * np.log(below + FLOOR) + share * np.log(above + FLOOR))
        ratio = np.minimum((mse + FLOOR) / np.where(np.isnan(mean), 1.0, mean), self.cap)
        cost: NDArray[np.float64] = ratio**self.power / self.power
        return cost


class RelativeReward(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """The single environment, paid −:class:`RelativeCost`.

    Like Gymnasium's ``NormalizeReward`` it remembers the episodes before: what an episode is paid depends on them.

    Args:
        env: a :class:`refine_env.LatentRefinementEnv`, wrapped or not, whose observation is still the dictionary.
        cap, power, memory, expected_misses: see :class:`RelativeCost`.

    Attributes:
        cost: the :class:`RelativeCost`.

    Raises:
        ConfigurationError: if the environment is another one, its observation is not the dictionary, or misses are to
            be averaged out on a link whose slots are not independent.
    """

    def __init__(
        self,
        env: gym.Env[dict[str, Any], Any],
        *,
        cap: float = _CAP,
        power: float = _POWER,
        memory: int = _MEMORY,
        expected_misses: bool = True,
    ) -> None:
        given: Any = env
        check_shows_dictionary(given, "VectorRelativeReward" if isinstance(given, VectorEnv) else None)
        options: dict[str, Any] = {"cap": cap, "power": power, "memory": memory, "expected_misses": expected_misses}
        gym.utils.RecordConstructorArgs.__init__(self, **options)
        super().__init__(env)
        self.cost = RelativeCost(given.unwrapped.config, 1, **options)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        self.cost.begin(np.ones(1, dtype=np.bool_))
        self._note(observation, info)
        return observation, info

    def _note(self, observation: dict[str, Any], info: dict[str, Any]) -> None:
        everyone, slots = np.ones(1, dtype=np.bool_), np.array([observation["slot"]])
        self.cost.note(everyone, slots, np.array([info["latent_mse"]]), info["action_mask"][None])

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Act; the reward relative."""
        inner: Any = self.env.unwrapped
        observation, _, terminated, truncated, info = self.env.step(action)
        snrs_db = np.array([inner.episode_snr_db])
        cost = self.cost.of_sending(np.array([int(action)]), inner.episode_rates[None], snrs_db)
        self._note(observation, info)
        if terminated:
            mse, slots = np.array([info["latent_mse"]]), np.array([info["uplink_slots"]])
            in_flight = observation["remaining_bits"] > 0.0
            cost += self.cost.of_ending(np.zeros(1, dtype=np.int64), mse, in_flight, slots, snrs_db)
        return observation, -float(cost[0]), bool(terminated), bool(truncated), info

    def action_masks(self) -> NDArray[np.bool_]:
        """Which actions are legal now, bool (n,)."""
        masks: NDArray[np.bool_] = self.env.get_wrapper_attr("action_masks")()
        return masks


class VectorRelativeReward(RefinementVectorWrapper):
    """The native vector environment, paid −:class:`RelativeCost`, with one mean for all N.

    Args:
        env: a :class:`refine_env.LatentRefinementVectorEnv`, wrapped or not, whose observation is still the dictionary.
        cap, power, memory, expected_misses: see :class:`RelativeCost`.

    Attributes:
        cost: the :class:`RelativeCost`.

    Raises:
        ConfigurationError: as for :class:`RelativeReward`.
    """

    def __init__(
        self,
        env: VectorEnv[Any, Any, NDArray[Any]],
        *,
        cap: float = _CAP,
        power: float = _POWER,
        memory: int = _MEMORY,
        expected_misses: bool = True,
    ) -> None:
        check_shows_dictionary(env, None if isinstance(env, VectorEnv) else "RelativeReward")
        super().__init__(env)
        config = env.unwrapped.config  # type: ignore[attr-defined]
        self.cost = RelativeCost(
            config, env.num_envs, cap=cap, power=power, memory=memory, expected_misses=expected_misses
        )
        self._same_step = self.autoreset_mode == AutoresetMode.SAME_STEP
        self._over = np.zeros(env.num_envs, dtype=np.bool_)  # ended in the last step, and begin anew in the next

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Start episodes."""
        observations, infos = self.env.reset(seed=seed, options=options)
        begun = infos["_latent_mse"]
        self._over[begun] = False
        self.cost.begin(begun)
        self._note(begun, observations, infos)
        return observations, infos

    def _note(self, shown: NDArray[np.bool_], observations: dict[str, NDArray[Any]], infos: dict[str, Any]) -> None:
        self.cost.note(shown, observations["slot"], infos["latent_mse"], infos["action_mask"])

    def step(self, actions: Any) -> tuple[Any, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Act; rewards relative."""
        inner: Any = self.env.unwrapped
        snrs_db, rates = inner.episode_snrs_db, inner.episode_rates
        observations, _, terminated, truncated, infos = self.env.step(actions)
        costs = self.cost.of_sending(np.where(self._over, 0, actions), rates, snrs_db)
        self._note(infos["_latent_mse"], observations, infos)
        if terminated.any():
            ended = np.flatnonzero(terminated)
            if self._same_step:
                last = infos["final_info"]
                in_flight = np.array([infos["final_obs"][i]["remaining_bits"][0] > 0.0 for i in ended])
            else:
                last, in_flight = infos, observations["remaining_bits"][ended, 0] > 0.0
            costs[ended] += self.cost.of_ending(
                ended, last["latent_mse"][ended], in_flight, last["uplink_slots"][ended], snrs_db[ended]
            )
        if not self._same_step:
            self._over = terminated.copy()
        return observations, -costs, terminated, truncated, infos
