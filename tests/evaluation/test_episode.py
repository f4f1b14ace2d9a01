"""One episode of one policy, for every policy: the loop that recordings, traces and senders share."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import agents
from agents import registry
from refine_env import ConfigurationError
from refine_env.errors import ActionError
from refine_env.evaluation import play_episode, roll_out

MakeEnv = Callable[..., gym.Env[Any, Any]]


@pytest.mark.parametrize("name", registry.names())
def test_it_is_the_episode_of_the_evaluation(make_env: MakeEnv, gaussian_cache: Any, name: str) -> None:
    kwargs = {"snr_db": 9.0, "split": "test", **agents.env_kwargs(name)}
    make_policy = partial(agents.make, name)
    (row,) = roll_out(make_policy, env_kwargs={**kwargs, "cache": str(gaussian_cache)}, episodes=1, seed=5)
    env = make_env(**kwargs)
    steps = list(play_episode(env, make_policy(env.get_wrapper_attr("config")), seed=row["seed"]))
    assert len(steps) == env.get_wrapper_attr("config").deadline + 1
    last = steps[-1].info
    for column in ("trajectory", "latent_mse", "num_deliveries", "bits_sent", "uplink_slots"):
        assert last[column] == row[column], column


def test_each_step_says_what_was_done_on_which_observation(make_env: MakeEnv) -> None:
    env = make_env(snr_db=9.0)
    steps = list(play_episode(env, agents.make("lookahead", env.get_wrapper_attr("config")), seed=3))
    assert steps[0].action is None
    assert steps[0].before is None
    assert all(step.before is previous.observation for previous, step in itertools.pairwise(steps))
    twin = make_env(snr_db=9.0)
    observation, _ = twin.reset(seed=3)
    for step in steps[1:]:
        observation = twin.step(np.int64(step.action))[0]
        assert observation.keys() == step.observation.keys()
        assert all(np.array_equal(observation[key], step.observation[key]) for key in observation)


def test_options_and_errors(make_env: MakeEnv) -> None:
    env = make_env()
    policy = agents.make("final-only", env.get_wrapper_attr("config"))
    assert next(play_episode(env, policy, options={"trajectory": 2})).info["trajectory"] == 2
    with pytest.raises(ConfigurationError, match="`trajectory` must"):
        next(play_episode(env, policy, options={"trajectory": 99}))

    class Half(type(policy)):  # type: ignore[misc]
        def select_action(self, observation: Any, info: Any) -> Any:
            return 0.5

    with pytest.raises(ActionError, match=r"`action` must .*0\.5"):
        list(play_episode(env.unwrapped, Half(env.get_wrapper_attr("config"))))
