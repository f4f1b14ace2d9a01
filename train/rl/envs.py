"""Stable-Baselines3 on the native vector environment.

SB3 has a vector interface of its own and rejects Gymnasium's. :class:`RefinementVecEnv` is the adapter: what SB3's
``DummyVecEnv`` over N single environments gives, from one compiled loop. ``tests/train/rl/test_envs.py`` compares the
two episode by episode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

import refine_env
from refine_env.errors import ConfigurationError
from refine_env.wrappers import VectorEncodeObservation, check_same_step
from train.rl.config import Config
from train.rl.critic import PrivilegedObservation
from train.rl.reward import RelativeReward

__all__ = ["INFOS", "RefinementVecEnv", "find_wrapper", "make_envs", "make_vec_env"]

INFOS = ("episode", "all")
_SPECIAL_INFOS = ("final_obs", "final_info")


class RefinementVecEnv(VecEnv):
    """The native vector environment, as Stable-Baselines3 wants it.

    Observations, rewards (float32), dones, masks and seeds are those of ``DummyVecEnv`` over N single environments.
    Every episode's end also tells its return and length, as SB3's ``Monitor`` does.

    Args:
        envs: the vector environment, wrapped or not, with ``autoreset_mode="SameStep"``.
        infos: ``"episode"`` fills the infos of ended episodes alone (the others share one empty dictionary: read, do
            not write); ``"all"`` gives every environment's at every step, as ``DummyVecEnv`` does, a Python loop.
        reward_scale: factor on every reward.

    Raises:
        ConfigurationError: if the environment resets itself one step late.
    """

    def __init__(self, envs: VectorEnv[Any, Any, Any], *, infos: str = "episode", reward_scale: float = 1.0) -> None:
        check_same_step(envs)
        if infos not in INFOS:
            raise ConfigurationError(f"`infos` must be one of {', '.join(INFOS)}, got {infos!r}. Choose one of them.")
        self.envs = envs
        self.reward_scale = reward_scale
        self._all_infos = infos == "all"
        self._nothing: list[dict[str, Any]] = [{}] * envs.num_envs
        self._returns = np.zeros(envs.num_envs)
        self._lengths = np.zeros(envs.num_envs, dtype=np.int64)
        self._actions: NDArray[Any] = np.zeros(envs.num_envs, dtype=np.int64)
        deadline = envs.unwrapped.config.deadline  # type: ignore[attr-defined]
        self._taken = np.full((envs.num_envs, deadline), -1, dtype=np.int8)  # in the running episodes; -1: not yet
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> Any:
        """Start an episode everywhere, with the seeds and options set before."""
        seeds: Any = None if all(seed is None for seed in self._seeds) else list(self._seeds)
        observations, infos = self.envs.reset(seed=seeds, options=self._merged_options())
        self._returns[:] = 0.0
        self._lengths[:] = 0
        self._taken[:] = -1
        self.reset_infos = self._split(infos, range(self.num_envs)) if self._all_infos else list(self._nothing)
        self._reset_seeds()
        self._reset_options()
        return observations

    def _merged_options(self) -> dict[str, Any] | None:
        """Options of all environments as the vector environment takes them: one value an environment."""
        keys = set(self._options[0])
        if any(set(options) != keys for options in self._options):
            raise ConfigurationError(
                f"`options` must have the same keys in every environment, got {[sorted(o) for o in self._options]}. "
                "Replay in all of them, or in none."
            )
        return {key: np.stack([options[key] for options in self._options]) for key in keys} or None

    def step_async(self, actions: NDArray[Any]) -> None:
        """Note the actions (N,)."""
        self._actions = np.asarray(actions)

    def step_wait(self) -> tuple[Any, NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Act: observations, rewards (N,), dones (N,), infos."""
        observations, rewards, dones, _, vector_infos = self.envs.step(self._actions)
        rewards = (self.reward_scale * rewards).astype(np.float32)
        self._returns += rewards
        self._taken[np.arange(self.num_envs), self._lengths] = self._actions
        self._lengths += 1
        infos = list(self._nothing)
        if self._all_infos:
            infos = self._split(vector_infos, range(self.num_envs))
            for info in infos:
                info["TimeLimit.truncated"] = False
        if dones.any():
            ended = np.flatnonzero(dones).tolist()
            last = self._split(vector_infos["final_info"], ended)
            for i, info in zip(ended, last, strict=True):
                info["TimeLimit.truncated"] = False
                info["terminal_observation"] = vector_infos["final_obs"][i]
                info["episode"] = {"r": float(self._returns[i]), "l": int(self._lengths[i]), "t": 0.0}
                infos[i] = info
            self._returns[ended] = 0.0
            self._lengths[ended] = 0
            self._taken[ended] = -1
        return observations, rewards, dones, infos

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What the running episodes are made of, in copies: :meth:`resume` goes on with them."""
        inner: Any = self.envs.unwrapped
        return {
            "trajectories": inner.episode_trajectories,
            "rates": inner.episode_rates,
            "snrs_db": inner.episode_snrs_db,
            "taken": self._taken.copy(),
            "returns": self._returns.copy(),
        }

    def resume(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Go on in the middle of the episodes that :meth:`arrays` described, instead of :meth:`reset`.

        Raises:
            ConfigurationError, ActionError: if they are not such episodes.
            KeyError, ValueError: if an array is missing or has another shape.
        """
        taken = arrays["taken"]
        self.envs.unwrapped.resume(  # type: ignore[attr-defined]
            arrays["trajectories"], arrays["rates"], arrays["snrs_db"], taken
        )
        self._taken[:] = taken
        self._lengths[:] = (taken >= 0).sum(axis=1)
        self._returns[:] = arrays["returns"]

    @staticmethod
    def _split(infos: dict[str, Any], indices: Sequence[int]) -> list[dict[str, Any]]:
        """Each environment's own info."""
        keys = [key for key in infos if not key.startswith("_") and key not in _SPECIAL_INFOS]
        columns = [infos[key] if infos[key].ndim > 1 else infos[key].tolist() for key in keys]
        return [{key: column[i] for key, column in zip(keys, columns, strict=True)} for i in indices]

    def action_masks(self) -> NDArray[np.bool_]:
        """Which actions are legal now, bool (N, n)."""
        masks: NDArray[np.bool_] = self.envs.unwrapped.action_masks()  # type: ignore[attr-defined]
        return masks

    def close(self) -> None:
        """Close the environments."""
        self.envs.close()

    def has_attr(self, attr_name: str) -> bool:
        """Whether the environments have an attribute."""
        return hasattr(self.envs.unwrapped, attr_name)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of the vector environment, once for every index."""
        value = getattr(self.envs.unwrapped, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Refused: an attribute belongs to all environments at once.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("The environments of a vector environment have no attributes of their own to set.")

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call a method of the vector environment; each environment gets its row of what that returns.

        Raises:
            AttributeError: if there is no such method, or it does not give a row for each environment.
        """
        result = getattr(self.envs.unwrapped, method_name)(*method_args, **method_kwargs)
        if np.shape(result)[:1] != (self.num_envs,):
            raise AttributeError(f"`{method_name}` must give one value per environment, got {np.shape(result)}.")
        return list(result) if indices is None else [result[i] for i in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Any = None) -> list[bool]:
        """Whether each environment reports what that wrapper does: ``Monitor``'s returns and lengths, no other's."""
        return [issubclass(wrapper_class, Monitor) for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[NDArray[np.uint8] | None]:
        """A frame of every environment."""
        frames = self.envs.render()
        return [None] * self.num_envs if frames is None else list(frames)  # type: ignore[arg-type]


def make_vec_env(
    num_envs: int,
    env_kwargs: dict[str, Any],
    *,
    encoding: str | None = "summary",
    history: int | None = None,
    infos: str = "episode",
) -> RefinementVecEnv:
    """N native environments for Stable-Baselines3.

    Args:
        num_envs: N.
        env_kwargs: the environment's arguments.
        encoding: of the observations, see :class:`refine_env.wrappers.ObservationEncoder`; None leaves the dictionary.
        history: likewise.
        infos: see :class:`RefinementVecEnv`.

    Raises:
        ConfigurationError, CacheError: as the environment does.
    """
    envs: Any = gym.make_vec(refine_env.ENV_ID, num_envs=num_envs, autoreset_mode="SameStep", **env_kwargs)
    if encoding is not None:
        envs = VectorEncodeObservation(envs, encoding, history)
    return RefinementVecEnv(envs, infos=infos)


def make_envs(config: Config) -> RefinementVecEnv:
    """The training's environments, wrapped as the options say."""
    envs: Any = gym.make_vec(
        refine_env.ENV_ID, num_envs=config.num_envs, autoreset_mode="SameStep", **config.env_kwargs()
    )
    if config.reward == "relative":
        envs = RelativeReward(
            envs, cap=config.relative_cap, power=config.relative_power, expected_misses=config.expected_misses
        )
    envs = VectorEncodeObservation(envs, config.encoding, None if config.history < 0 else config.history)
    if config.hindsight and config.algorithm != "dqn":
        envs = PrivilegedObservation(envs)
    return RefinementVecEnv(envs, reward_scale=config.reward_scale)


def find_wrapper(adapter: Any, kind: type) -> Any:
    """The wrapper of that kind among those behind a :class:`RefinementVecEnv`; None if there is none."""
    inner = adapter.envs
    while not isinstance(inner, kind):
        if not hasattr(inner, "env"):
            return None
        inner = inner.env
    return inner
