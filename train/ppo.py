"""Learn to send: ``python -m train.ppo``.

Trains PPO, MaskablePPO or DQN on the native vector environment, on the cache's train split, and writes into ``--out``:

- ``policy.json``, ``policy.safetensors``: the policy, as ``agents.make("learned:DIR", config)`` wants it;
- ``model.zip``: the same as Stable-Baselines3 has it, with the critic and the optimizer; written, never read here
  (Stable-Baselines3 unpickles what it loads: load only your own);
- ``evaluations.csv``: what it scored during the training (train split) and at the end (test split), beside the
  policies that it is compared with, on common draws;
- ``run.json``: options, command, versions, wall time and steps;
- ``checkpoint.safetensors``: from which the same command goes on after an interruption, as if there had been none;
- ``tensorboard/``: curves.

What it is compared with enters the evaluations alone: no action, value or label of another policy is learned from.
"""

from __future__ import annotations

from typing import Any

from refine_env.commands import command, run
from train.options import show_log, takes_options
from train.rl.config import Config
from train.rl.training import train

__all__ = ["Config", "main", "train"]


@takes_options(Config)
@command
def main(**options: Any) -> None:
    """Train a policy, or go on where an interrupted run with the same options stopped.

    Exit codes: 0 done, 2 an argument is wrong, 3 a cache is missing or damaged, or the output cannot be written, 4 the
    train extra is not installed.
    """
    show_log()
    train(Config(**options))


if __name__ == "__main__":
    run(main)
