"""What an evaluation asks of a policy, and the one loop that plays an episode with it in the single environment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from refine_env.config import SystemConfig

__all__ = ["EpisodeStep", "Policy", "play_episode", "reset_policy"]


class Policy(Protocol):
    """What a roll-out asks of a policy.

    One with the attribute ``needs_rates`` set is no policy but a bound: ``reset(num_envs, rates=...)`` hands it the
    whole episode's channel, bits per slot (N, T_d).
    """

    name: str

    def reset(self, num_envs: int = 1) -> None:
        """Forget all episodes; ``num_envs`` new ones begin."""

    def select_action(self, observation: Mapping[str, Any], info: Mapping[str, Any]) -> Any:
        """Actions (N,) for the vector environment's observation."""

    def check_config(self, config: SystemConfig) -> None:
        """Raise if the policy was not made for that system."""


def reset_policy(policy: Policy, num_envs: int, rates: NDArray[np.float64]) -> None:
    """Begin new episodes; a bound that says it ``needs_rates`` is handed the whole channel, a policy is not.

    Args:
        policy: the policy.
        num_envs: N.
        rates: bits that every slot of every episode will carry (N, T_d).
    """
    if getattr(policy, "needs_rates", False):
        policy.reset(num_envs, rates=rates)  # type: ignore[call-arg]
    else:
        policy.reset(num_envs)


class EpisodeStep(NamedTuple):
    """An episode after its reset, or after one of its steps.

    Attributes:
        observation: the environment's observation now.
        info: the environment's info now.
        action: the action of the step; None after the reset.
        before: the observation on which that action was chosen; None after the reset.
    """

    observation: dict[str, Any]
    info: dict[str, Any]
    action: int | None = None
    before: dict[str, Any] | None = None


def play_episode(
    env: gym.Env[Any, Any], policy: Policy, *, seed: int | None = None, options: dict[str, Any] | None = None
) -> Iterator[EpisodeStep]:
    """Play one episode with a policy, from the reset to the deadline.

    The environment and the policy are reset when the first item is asked for, and a step is made for each further one.

    Args:
        env: a :class:`refine_env.LatentRefinementEnv`, with or without wrappers that keep its observations.
        policy: chooses the actions.
        seed: the seed of the episode, see ``env.reset``.
        options: the options of the episode, see ``env.reset``.

    Yields:
        The episode after its reset, without an action, and then after each of its steps.

    Raises:
        ConfigurationError: if the seed or an option is unknown or out of range.
        ActionError: if the policy gives what is not in the action space.
    """
    observation, info = env.reset(seed=seed, options=options)
    reset_policy(policy, 1, env.get_wrapper_attr("episode_rates")[None])
    yield EpisodeStep(observation, info)
    terminated = False
    while not terminated:
        before = observation
        action = policy.select_action(before, info)
        observation, _, terminated, _, info = env.step(action)
        yield EpisodeStep(observation, info, int(action), before)
