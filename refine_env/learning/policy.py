"""What an RL library has learned, as a policy of this package: for paired evaluations, figures and pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from refine_env.config import SystemConfig
from refine_env.errors import ConfigurationError
from refine_env.evaluation import Table, roll_out
from refine_env.wrappers import EncodeObservation, VectorEncodeObservation

__all__ = ["LearnedPolicy", "evaluate", "find_wrapper"]

Choose = Callable[[Any, NDArray[np.bool_]], Any]
"""Actions (N,) for N observations as the environment shows them, and the masks of legal actions (N, n)."""

_OF_TRAINING = ("split", "reward", "decision_epochs", "illegal_action", "render_decoder")


def find_wrapper(env: Any, kind: type) -> Any:
    """The wrapper of that kind around an environment, single or vector; None if there is none."""
    inner = env
    while not isinstance(inner, kind):
        if not hasattr(inner, "env"):
            return None
        inner = inner.env
    return inner


class LearnedPolicy:
    """A function of the observations of an environment as a policy.

    Args:
        choose: see :data:`Choose`.
        env: the environment that it was learned in, or one made alike; single or vector, and its encoding is found.
        name: of the policy in tables and figures.

    Attributes:
        name: as given.
        shown: the space of the observations that ``choose`` gets.

    Raises:
        ConfigurationError: if the environment is none of this package.
    """

    def __init__(self, choose: Choose, env: Any, *, name: str = "learned") -> None:
        inner: Any = getattr(env, "unwrapped", None)
        if not isinstance(getattr(inner, "config", None), SystemConfig):
            raise ConfigurationError(
                f"`env` must be the environment of this package that the policy was learned in, got {env!r:.200}. "
                "Pass it, or one made alike."
            )
        self.name = name
        self._choose = choose
        self._inner = inner
        wrapper = find_wrapper(env, VectorEncodeObservation) or find_wrapper(env, EncodeObservation)
        self._encoder = None if wrapper is None else wrapper.encoder
        own = inner.single_observation_space if isinstance(inner, VectorEnv) else inner.observation_space
        self.shown = own if self._encoder is None else self._encoder.space

    @property
    def env_kwargs(self) -> dict[str, Any]:
        """Arguments of the environment, but for those that say how something is learned in it."""
        settings = self._inner.settings
        names = [field.name for field in dataclasses.fields(settings) if field.name not in _OF_TRAINING]
        return {name: getattr(settings, name) for name in names}

    def reset(self, num_envs: int = 1) -> None:
        """Nothing is remembered from one slot to the next."""

    def check_config(self, config: SystemConfig) -> None:
        """Refuse a system in which the numbers would mean something else; the SNR may be another.

        Raises:
            ConfigurationError: naming the first setting that differs.
        """
        mine, theirs = self._inner.config.to_dict(), config.to_dict()
        for key in {**mine, **theirs}:
            if key != "snr_db" and mine.get(key) != theirs.get(key):
                raise ConfigurationError(
                    f"`config` must be, but for the SNR, the one that {self.name} was trained for, got another {key}. "
                    "Train it for that system, or evaluate it in its own."
                )

    def select_action(self, observation: Mapping[str, Any], info: Mapping[str, Any]) -> Any:
        """The action for an observation of the single or of the vector environment; WAIT where nothing else is legal.

        Returns:
            An int where the observation's scalar fields are scalars, else int64 (N,).
        """
        single = np.ndim(observation["slot"]) == 0
        batch = {key: np.asarray(value)[None] if single else np.asarray(value) for key, value in observation.items()}
        masks = np.atleast_2d(info["action_mask"]).astype(np.bool_)
        shown = batch if self._encoder is None else self._encoder.encode(batch)
        actions = np.where(masks[:, 1], np.asarray(self._choose(shown, masks)), 0)
        return int(actions[0]) if single else actions


def evaluate(
    policy: LearnedPolicy,
    *,
    episodes: int = 1000,
    seed: int = 0,
    split: str = "test",
    snr_db: float | None = None,
    **env_kwargs: Any,
) -> Table:
    """Play episodes with a policy: episode k has the same draws as that of every policy with the same seed.

    Args:
        policy: what was learned.
        episodes: how many.
        seed: of the evaluation, as that of :func:`refine_env.evaluation.roll_out`.
        split: trajectories that it was not trained on, by default.
        snr_db: in dB; None: that of the training, where it is one.
        **env_kwargs: further arguments of the environment that are not the training's.

    Returns:
        One row an episode, with ``latent_mse`` and the other columns of :func:`refine_env.evaluation.roll_out`.

    Raises:
        ConfigurationError: if the policy was learned for another system, or for a range of SNRs and none is given.
    """
    arguments = {**policy.env_kwargs, "split": split, **env_kwargs}
    if snr_db is not None:
        arguments["snr_db"] = snr_db
    return roll_out(lambda config: policy, env_kwargs=arguments, episodes=episodes, seed=seed)
