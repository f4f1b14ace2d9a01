"""The environments of a training, wrapped as its options say."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

import refine_env
from refine_env.learning import VectorRelativeReward
from refine_env.sb3 import RefinementVecEnv
from refine_env.wrappers import VectorEncodeObservation
from train.rl.config import Config
from train.rl.critic import PrivilegedObservation

__all__ = ["make_envs"]


def make_envs(config: Config) -> RefinementVecEnv:
    """The training's environments, wrapped as the options say."""
    envs: Any = gym.make_vec(
        refine_env.ENV_ID, num_envs=config.num_envs, autoreset_mode="SameStep", **config.env_kwargs()
    )
    if config.reward == "relative":
        envs = VectorRelativeReward(
            envs, cap=config.relative_cap, power=config.relative_power, expected_misses=config.expected_misses
        )
    envs = VectorEncodeObservation(envs, config.encoding, None if config.history < 0 else config.history)
    if config.hindsight and config.algorithm != "dqn":
        envs = PrivilegedObservation(envs)
    return RefinementVecEnv(envs, reward_scale=config.reward_scale)
