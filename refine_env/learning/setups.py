"""Registered set-ups on which agents learn with the default hyperparameters of RL libraries.

The paper's setting is hard to learn from: most slots leave no choice, the reward spans five decades, and a miss is rare
and costs a hundred times what else an action changes. These set-ups change what the agent sees and is paid, and none of
what it is scored by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
from gymnasium.vector import VectorEnv

from refine_env._validation import shown
from refine_env.env import ENV_ID, LatentRefinementEnv
from refine_env.errors import ConfigurationError
from refine_env.learning.reward import RelativeReward, VectorRelativeReward
from refine_env.vector_env import LatentRefinementVectorEnv
from refine_env.wrappers import EncodeObservation, VectorEncodeObservation

__all__ = ["make", "make_vector"]


def _check_reward(kwargs: Mapping[str, Any]) -> None:
    if "reward" in kwargs:
        raise ConfigurationError(
            f"`reward` must be left to the learning set-ups, which pay relatively, got {shown(kwargs['reward'])}. "
            f"Leave it out, or make {ENV_ID} and wrap it."
        )


def make(*, encoding: str = "summary", history: int | None = None, **kwargs: Any) -> gym.Env[Any, Any]:
    """The single environment, paid relatively (:class:`RelativeReward`) and shown as vectors.

    Args:
        encoding, history: of the observations, see :class:`refine_env.wrappers.ObservationEncoder`.
        kwargs: of :class:`refine_env.LatentRefinementEnv`.

    Raises:
        ConfigurationError, CacheError: as the environment does.
    """
    _check_reward(kwargs)
    return EncodeObservation(RelativeReward(LatentRefinementEnv(**kwargs)), encoding, history)


def make_vector(
    num_envs: int = 1, *, encoding: str = "summary", history: int | None = None, **kwargs: Any
) -> VectorEnv[Any, Any, Any]:
    """The native vector environment, with the same reward and vectors; the mean is one for all N.

    Args:
        num_envs: N.
        encoding, history: of the observations, see :class:`refine_env.wrappers.ObservationEncoder`.
        kwargs: of :class:`refine_env.LatentRefinementVectorEnv`.

    Raises:
        ConfigurationError, CacheError: as the environment does.
    """
    _check_reward(kwargs)
    envs = VectorRelativeReward(LatentRefinementVectorEnv(num_envs, **kwargs))
    return VectorEncodeObservation(envs, encoding, history)
