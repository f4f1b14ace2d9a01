"""What people put around an environment: wrappers, Stable-Baselines3, sb3-contrib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import wrappers

import refine_env


@pytest.fixture
def kwargs(gaussian_cache: Path) -> dict[str, Any]:
    return {"cache": str(gaussian_cache), "snr_db": [0, 24], "decision_epochs": True, "reward": "log"}


def test_wrappers_of_the_single_environment(kwargs: dict[str, Any]) -> None:
    env: Any = gym.make(refine_env.ENV_ID, **kwargs)
    env = wrappers.RecordEpisodeStatistics(wrappers.NormalizeObservation(wrappers.FlattenObservation(env)))
    observation, _ = env.reset(seed=0)
    assert observation.shape == (62 + 51 + 51 + 60 + 1 + 1 + 17,)
    assert env.get_wrapper_attr("action_masks")().dtype == np.bool_
    terminated, total = False, 0.0
    while not terminated:
        observation, reward, terminated, _, info = env.step(1)
        total += reward
    assert info["episode"]["r"] == pytest.approx(total)


def test_wrappers_of_the_vector_environment(kwargs: dict[str, Any]) -> None:
    env: Any = gym.make_vec(refine_env.ENV_ID, num_envs=3, **kwargs)
    env = wrappers.vector.RecordEpisodeStatistics(wrappers.vector.FlattenObservation(env))
    observations, infos = env.reset(seed=0)
    returns = np.zeros(3)
    while "episode" not in infos:
        observations, rewards, _, _, infos = env.step(np.ones(3, dtype=np.int64))
        returns += rewards
    assert observations.shape == (3, 243)
    ended = infos["_episode"]
    assert infos["episode"]["r"][ended] == pytest.approx(returns[ended])


def test_stable_baselines_makes_it_by_its_id(kwargs: dict[str, Any]) -> None:
    env_util = pytest.importorskip("stable_baselines3.common.env_util")
    envs = env_util.make_vec_env(refine_env.ENV_ID, 2, env_kwargs=kwargs, seed=0)  # with render_mode="rgb_array"
    observations = envs.reset()
    assert observations["slot"].tolist() == [3, 3]
    assert len(envs.env_method("action_masks")) == 2


def test_maskable_ppo_finds_the_masks(kwargs: dict[str, Any]) -> None:
    contrib = pytest.importorskip("sb3_contrib")
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    env = gym.make(refine_env.ENV_ID, illegal_action="raise", **kwargs)  # an illegal action would end the test
    model = contrib.MaskablePPO("MultiInputPolicy", env, n_steps=64, batch_size=32, n_epochs=1, device="cpu", seed=0)
    model.learn(128)
    observation, info = env.reset(seed=1)
    action, _ = model.predict(observation, action_masks=info["action_mask"])
    assert info["action_mask"][int(action)] == 1
