"""PPO of RLlib with action masks, on single environments.

pip install -e '.[train]' 'ray[rllib]'; python examples/rllib_ppo.py
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
import ray
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.examples.rl_modules.classes.action_masking_rlm import ActionMaskingTorchRLModule
from ray.tune.registry import register_env

import refine_env
from refine_env.learning import LearnedPolicy, evaluate
from refine_env.wrappers import MaskedObservation

ENVS, SLOTS, EPOCHS, MINIBATCH, LEARNING_RATE = 16, 128, 6, 256, 1e-3


def make(config: dict[str, Any]) -> gym.Env[Any, Any]:
    """The environment with its mask where RLlib's module looks for it."""
    return MaskedObservation(gym.make(refine_env.LEARNING_ID, **config), "observations", "action_mask")


def main(steps: int, snr_db: float, seed: int, episodes: int) -> float:
    """Train, and return the mean latent MSE at the deadline on trajectories that were not trained on."""
    torch.set_num_threads(1)
    ray.init(num_cpus=1, include_dashboard=False, ignore_reinit_error=True, log_to_driver=False)
    register_env("refine", make)
    config = (
        PPOConfig()
        .environment("refine", env_config={"snr_db": snr_db})
        .env_runners(num_env_runners=0, num_envs_per_env_runner=ENVS, rollout_fragment_length=SLOTS)
        .learners(num_learners=0)
        .training(
            train_batch_size_per_learner=ENVS * SLOTS,
            minibatch_size=MINIBATCH,
            num_epochs=EPOCHS,
            lr=LEARNING_RATE,
            gamma=1.0,
            lambda_=0.95,
            clip_param=0.2,
            entropy_coeff=0.005,
            use_kl_loss=False,
            vf_loss_coeff=0.5,
            grad_clip=0.5,
        )
        .rl_module(
            rl_module_spec=RLModuleSpec(
                module_class=ActionMaskingTorchRLModule,
                model_config={"fcnet_hiddens": [64, 64], "fcnet_activation": "tanh", "head_fcnet_hiddens": []},
            )
        )
        .debugging(seed=seed, log_level="ERROR")
    )
    algorithm = config.build_algo()
    for _ in range(max(1, steps // (ENVS * SLOTS))):
        algorithm.train()
    module: Any = algorithm.get_module()

    def likeliest(shown: Any, masks: Any) -> Any:
        observations = {"observations": torch.from_numpy(shown), "action_mask": torch.from_numpy(masks.astype("f4"))}
        with torch.no_grad():
            scores = module.forward_inference({Columns.OBS: observations})[Columns.ACTION_DIST_INPUTS]
        return scores.numpy().argmax(axis=1)

    table = evaluate(LearnedPolicy(likeliest, make({"snr_db": snr_db})), episodes=episodes)
    algorithm.stop()
    ray.shutdown()
    return float(np.mean([row["latent_mse"] for row in table]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400_000, help="steps of the environment")
    parser.add_argument("--snr-db", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=1000, help="of the evaluation")
    arguments = parser.parse_args()
    print("mean latent MSE", main(arguments.steps, arguments.snr_db, arguments.seed, arguments.episodes))
