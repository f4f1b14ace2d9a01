"""PPO with action masks in one file of PyTorch, on the native vector environment: to read, and to change.

pip install -e '.[train]'; python examples/cleanrl_ppo.py
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical

import refine_env
from refine_env.learning import LearnedPolicy, evaluate

GAMMA, LAMBDA, CLIP, ENTROPY, VALUE, LEARNING_RATE = 1.0, 0.95, 0.2, 0.005, 0.5, 1e-3
ENVS, SLOTS, EPOCHS, MINIBATCHES = 64, 64, 6, 8


class Network(nn.Module):
    """Actor and critic, each with two hidden layers."""

    def __init__(self, features: int, actions: int) -> None:
        super().__init__()
        self.actor = nn.Sequential(
            nn.Linear(features, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, actions)
        )
        self.critic = nn.Sequential(nn.Linear(features, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def policy(self, observations: torch.Tensor, masks: torch.Tensor) -> Categorical:
        """The distribution of the legal actions."""
        return Categorical(logits=self.actor(observations).masked_fill(~masks, -1e9))


def main(steps: int, snr_db: float, seed: int, episodes: int) -> float:
    """Train, and return the mean latent MSE at the deadline on trajectories that were not trained on."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    envs: Any = gym.make_vec(refine_env.LEARNING_ID, num_envs=ENVS, snr_db=snr_db, autoreset_mode="SameStep")
    network = Network(envs.single_observation_space.shape[0], int(envs.single_action_space.n))
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, eps=1e-5)
    seen, _ = envs.reset(seed=seed)
    iterations = max(1, steps // (ENVS * SLOTS))
    for iteration in range(iterations):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1.0 - iteration / iterations)
        batch: dict[str, list[torch.Tensor]] = {
            key: [] for key in ("seen", "masks", "actions", "logs", "rewards", "ends", "values")
        }
        with torch.no_grad():
            for _ in range(SLOTS):
                now, masks = torch.from_numpy(seen), torch.from_numpy(envs.action_masks())
                choice = network.policy(now, masks)
                actions = choice.sample()
                seen, rewards, ended, _, _ = envs.step(actions.numpy())
                columns = (now, masks, actions, choice.log_prob(actions), torch.tensor(rewards, dtype=torch.float32))
                values = network.critic(now).squeeze(1)
                for key, value in zip(batch, (*columns, torch.tensor(ended), values), strict=True):
                    batch[key].append(value)
            rolled = {key: torch.stack(values) for key, values in batch.items()}
            advantages = torch.zeros_like(rolled["values"])
            following, advantage = network.critic(torch.from_numpy(seen)).squeeze(1), torch.zeros(ENVS)
            for n in reversed(range(SLOTS)):
                alive = (~rolled["ends"][n]).float()
                surprise = rolled["rewards"][n] + GAMMA * following * alive - rolled["values"][n]
                advantage = surprise + GAMMA * LAMBDA * alive * advantage
                advantages[n], following = advantage, rolled["values"][n]
        flat = {key: values.flatten(0, 1) for key, values in rolled.items()}
        returns, advantages = (advantages + rolled["values"]).flatten(), advantages.flatten()
        for _ in range(EPOCHS):
            for rows in torch.randperm(ENVS * SLOTS).chunk(MINIBATCHES):
                choice = network.policy(flat["seen"][rows], flat["masks"][rows])
                ratio = (choice.log_prob(flat["actions"][rows]) - flat["logs"][rows]).exp()
                gain = advantages[rows]
                gain = (gain - gain.mean()) / (gain.std() + 1e-8)
                actor = -torch.min(ratio * gain, ratio.clamp(1.0 - CLIP, 1.0 + CLIP) * gain).mean()
                critic = 0.5 * (network.critic(flat["seen"][rows]).squeeze(1) - returns[rows]).square().mean()
                loss = actor + VALUE * critic - ENTROPY * choice.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 0.5)
                optimizer.step()

    def likeliest(shown: Any, masks: Any) -> Any:
        with torch.no_grad():
            scores = network.actor(torch.from_numpy(shown)).numpy()
        return np.where(masks, scores, -np.inf).argmax(axis=1)

    table = evaluate(LearnedPolicy(likeliest, envs), episodes=episodes)
    return float(np.mean([row["latent_mse"] for row in table]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400_000, help="steps of the environment")
    parser.add_argument("--snr-db", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=1000, help="of the evaluation")
    arguments = parser.parse_args()
    print("mean latent MSE", main(arguments.steps, arguments.snr_db, arguments.seed, arguments.episodes))
