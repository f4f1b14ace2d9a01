"""PPO of TorchRL with action masks, on the native vector environment.

pip install -e '.[train]' torchrl; python examples/torchrl_ppo.py
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import GymWrapper
from torchrl.modules import MaskedCategorical, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

import refine_env
from refine_env.learning import LearnedPolicy, evaluate
from refine_env.wrappers import VectorMaskedObservation

ENVS, SLOTS, EPOCHS, MINIBATCH, LEARNING_RATE = 64, 64, 6, 512, 1e-3


def network(features: int, outputs: int) -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(nn.Linear(features, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))


def main(steps: int, snr_db: float, seed: int, episodes: int) -> float:
    """Train, and return the mean latent MSE at the deadline on trajectories that were not trained on."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    inner: Any = gym.make_vec(refine_env.LEARNING_ID, num_envs=ENVS, snr_db=snr_db, autoreset_mode="Disabled")
    envs = GymWrapper(VectorMaskedObservation(inner), categorical_action_encoding=True)
    envs.set_seed(seed)
    logits = network(inner.single_observation_space.shape[0], int(inner.single_action_space.n))
    actor = ProbabilisticActor(
        TensorDictModule(logits, ["observations"], ["logits"]),
        in_keys={"logits": "logits", "mask": "action_mask"},
        spec=envs.action_spec,
        distribution_class=_Masked,
        return_log_prob=True,
    )
    critic = ValueOperator(network(inner.single_observation_space.shape[0], 1), in_keys=["observations"])
    advantage = GAE(gamma=1.0, lmbda=0.95, value_network=critic, average_gae=False)
    loss = ClipPPOLoss(actor, critic, clip_epsilon=0.2, entropy_coeff=0.005, critic_coeff=0.5, normalize_advantage=True)
    optimizer = torch.optim.Adam(loss.parameters(), lr=LEARNING_RATE)
    iterations = max(1, steps // (ENVS * SLOTS))
    collector = Collector(
        envs, actor, frames_per_batch=ENVS * SLOTS, total_frames=iterations * ENVS * SLOTS, device="cpu"
    )
    for iteration, batch in enumerate(collector):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1.0 - iteration / iterations)
        for _ in range(EPOCHS):
            with torch.no_grad():
                advantage(batch)
            flat: TensorDict = batch.reshape(-1)
            for rows in torch.randperm(len(flat)).split(MINIBATCH):
                losses = loss(flat[rows])
                optimizer.zero_grad()
                (losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]).backward()
                nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimizer.step()
    collector.shutdown()

    def likeliest(shown: Any, masks: Any) -> Any:
        with torch.no_grad():
            scores = logits(torch.from_numpy(shown)).numpy()
        return np.where(masks, scores, -np.inf).argmax(axis=1)

    table = evaluate(LearnedPolicy(likeliest, inner), episodes=episodes)
    return float(np.mean([row["latent_mse"] for row in table]))


class _Masked(MaskedCategorical):
    """The masked distribution, of a mask that is 0 and 1 rather than a bool."""

    def __init__(self, logits: torch.Tensor, mask: torch.Tensor) -> None:
        super().__init__(logits=logits, mask=mask.bool())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400_000, help="steps of the environment")
    parser.add_argument("--snr-db", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=1000, help="of the evaluation")
    arguments = parser.parse_args()
    print("mean latent MSE", main(arguments.steps, arguments.snr_db, arguments.seed, arguments.episodes))
