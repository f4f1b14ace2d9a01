"""The registered set-ups for learning."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import refine_env
from refine_env import ConfigurationError
from refine_env.learning import RelativeReward, VectorRelativeReward

IDS = {refine_env.LEARNING_ID: 6.0, refine_env.LEARNING_RANGE_ID: (0.0, 24.0)}


@pytest.mark.parametrize("env_id", IDS)
def test_they_need_no_argument(env_id: str) -> None:
    env = gym.make(env_id)
    config = env.unwrapped.config  # type: ignore[attr-defined]
    assert (config.snr_db, config.coder) == (IDS[env_id], "closed_loop")
    assert env.observation_space.shape == (len(env.get_wrapper_attr("encoder").names),)
    check_env(env.unwrapped, skip_render_check=True)
    observation, info = env.reset(seed=0)
    total, terminated, steps = 0.0, False, 0
    while not terminated:
        assert observation in env.observation_space
        assert np.array_equal(env.get_wrapper_attr("action_masks")(), info["action_mask"] == 1)
        observation, reward, terminated, _, info = env.step(env.action_space.sample(mask=info["action_mask"]))
        total, steps = total + float(reward), steps + 1
    assert total < 0.0
    assert steps < 60  # slots without a choice are run through


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_the_vector_environment_shows_what_the_single_one_shows(env_id: str, mode: str) -> None:
    """With one copy it is also paid the same; with more, all share one mean."""
    envs = gym.make_vec(env_id, num_envs=1, autoreset_mode=mode)
    env = gym.make(env_id)
    assert isinstance(envs.env, VectorRelativeReward)  # type: ignore[attr-defined]
    assert isinstance(env.env.env.env, RelativeReward)  # type: ignore[attr-defined]
    observations, _ = envs.reset(seed=3)
    observation, info = env.reset(seed=3)
    rng = np.random.default_rng(0)
    for _ in range(60):
        assert np.array_equal(observations[0], observation)
        action = int(rng.choice(np.flatnonzero(info["action_mask"])))
        observation, reward, terminated, _, info = env.step(action)
        observations, rewards, ended, _, _ = envs.step(np.array([action]))
        assert (rewards[0], bool(ended[0])) == (reward, terminated)
        if terminated:
            observation, info = env.reset()
            if mode == "NextStep":
                observations, *_ = envs.step(np.array([0]))


@pytest.mark.parametrize("env_id", IDS)
def test_arguments_are_the_environments_but_for_the_reward(env_id: str) -> None:
    env = gym.make(env_id, snr_db=12.0, encoding="one-hot", history=3)
    assert env.unwrapped.config.snr_db == 12.0  # type: ignore[attr-defined]
    assert env.get_wrapper_attr("encoder").to_dict()["encoding"] == "one-hot"
    for make in (lambda: gym.make(env_id, reward="log"), lambda: gym.make_vec(env_id, num_envs=2, reward="log")):
        with pytest.raises(ConfigurationError, match="`reward` must be left to the learning set-ups, which pay"):
            make()


@pytest.mark.parametrize("env_id", IDS)
def test_the_spec_round_trips(env_id: str) -> None:
    spec = gym.make(env_id, snr_db=3.0).spec
    assert spec is not None
    again: Any = gym.make(gym.envs.registration.EnvSpec.from_json(spec.to_json()))
    assert again.unwrapped.config.snr_db == 3.0
    assert again.unwrapped.settings.decision_epochs
