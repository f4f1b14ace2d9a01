"""PPO of Tianshou with action masks, on single environments.

pip install -e '.[train]' tianshou; python examples/tianshou_ppo.py
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OnPolicyTrainerParams
from torch import nn

import refine_env
from refine_env.learning import LearnedPolicy, evaluate
from refine_env.wrappers import MaskedObservation

ENVS, SLOTS, EPOCHS, MINIBATCH, LEARNING_RATE = 16, 128, 6, 256, 1e-3


def network(features: int, outputs: int) -> nn.Sequential:
    """Two hidden layers."""
    return nn.Sequential(nn.Linear(features, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))


class Actor(nn.Module):
    """Logits of the legal actions."""

    def __init__(self, features: int, actions: int) -> None:
        super().__init__()
        self.logits = network(features, actions)

    def forward(self, obs: Any, state: Any = None, info: Any = None) -> tuple[torch.Tensor, Any]:
        """Tianshou's order of arguments."""
        logits = self.logits(torch.as_tensor(obs.obs, dtype=torch.float32))
        return logits.masked_fill(torch.as_tensor(obs.mask) == 0, -1e9), state


class Critic(nn.Module):
    """The value of what is observed."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.value = network(features, 1)

    def forward(self, obs: Any, **_: Any) -> torch.Tensor:
        """Tianshou's order of arguments."""
        value: torch.Tensor = self.value(torch.as_tensor(obs.obs, dtype=torch.float32))
        return value


def main(steps: int, snr_db: float, seed: int, episodes: int) -> float:
    """Train, and return the mean latent MSE at the deadline on trajectories that were not trained on."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - Tianshou draws its minibatches from there

    def make() -> gym.Env[Any, Any]:
        return MaskedObservation(gym.make(refine_env.LEARNING_ID, snr_db=snr_db), "obs", "mask")

    env: Any = make()
    features, actions = env.observation_space["obs"].shape[0], int(env.action_space.n)
    envs = DummyVectorEnv([make] * ENVS)
    envs.seed(seed)
    actor = Actor(features, actions)
    policy = ProbabilisticActorPolicy(
        actor=actor,  # type: ignore[arg-type]
        dist_fn=lambda logits: torch.distributions.Categorical(logits=logits),
        action_space=env.action_space,
        action_scaling=False,
        action_bound_method=None,
    )
    algorithm: Any = PPO(
        policy=policy,
        critic=Critic(features),
        optim=AdamOptimizerFactory(lr=LEARNING_RATE),
        ent_coef=0.005,
        max_grad_norm=0.5,
        gamma=1.0,
    )
    iterations = max(1, steps // (ENVS * SLOTS))
    algorithm.run_training(
        OnPolicyTrainerParams(
            training_collector=Collector(algorithm, envs, VectorReplayBuffer(ENVS * SLOTS, ENVS)),
            max_epochs=1,
            epoch_num_steps=iterations * ENVS * SLOTS,
            collection_step_num_env_steps=ENVS * SLOTS,
            update_step_num_repetitions=EPOCHS,
            batch_size=MINIBATCH,
            verbose=False,
            show_progress=False,
        )
    )

    def likeliest(shown: Any, masks: Any) -> Any:
        with torch.no_grad():
            scores = actor.logits(torch.from_numpy(shown)).numpy()
        return np.where(masks, scores, -np.inf).argmax(axis=1)

    table = evaluate(LearnedPolicy(likeliest, env), episodes=episodes)
    return float(np.mean([row["latent_mse"] for row in table]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400_000, help="steps of the environment")
    parser.add_argument("--snr-db", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=1000, help="of the evaluation")
    arguments = parser.parse_args()
    print("mean latent MSE", main(arguments.steps, arguments.snr_db, arguments.seed, arguments.episodes))
