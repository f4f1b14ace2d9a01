"""MaskablePPO of sb3-contrib, with its default hyperparameters, on the set-up for learning.

pip install -e '.[train]'; python examples/sb3_maskable_ppo.py
"""

from __future__ import annotations

import argparse

import gymnasium as gym
import numpy as np
import torch
from sb3_contrib import MaskablePPO

import refine_env
from refine_env.sb3 import evaluate_sb3


def main(steps: int, snr_db: float, seed: int, episodes: int) -> float:
    """Train, and return the mean latent MSE at the deadline on trajectories that were not trained on."""
    torch.set_num_threads(1)  # small networks: more threads only wait for each other
    env = gym.make(refine_env.LEARNING_ID, snr_db=snr_db)
    model = MaskablePPO("MlpPolicy", env, seed=seed, device="cpu").learn(steps)
    return float(np.mean([row["latent_mse"] for row in evaluate_sb3(model, episodes=episodes)]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200_000, help="steps of the environment")
    parser.add_argument("--snr-db", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=1000, help="of the evaluation")
    arguments = parser.parse_args()
    print("mean latent MSE", main(arguments.steps, arguments.snr_db, arguments.seed, arguments.episodes))
