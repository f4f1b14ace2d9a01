"""The options of ``python -m train.ppo``, and what follows from them alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer

from refine_env import ConfigurationError
from refine_env.config import PAPER_BIT_DEPTHS, PAPER_DEADLINE
from refine_env.dynamics.settings import REWARDS
from train.options import FREE, Options, parse_numbers

__all__ = ["EXTRA", "Config"]

EXTRA = ("torch", "stable_baselines3", "sb3_contrib", "tensorboard")
"""Packages of the ``train`` extra without which nothing is trained."""

_NOT_TOLD = ("threads", "progress", "tensorboard", "checkpoint_every")  # by the command of a run


@dataclass(frozen=True)
class Config(Options):
    """Every option of ``python -m train.ppo``.

    Raises:
        ConfigurationError: if an option is out of its bounds, or two do not fit each other.
    """

    MODULE = "train.ppo"

    out: Annotated[Path, typer.Option(help="Folder for policy, checkpoint and tables."), FREE] = Path("runs/ppo")
    algorithm: Annotated[
        Literal["maskable-ppo", "ppo", "dqn"], typer.Option(help="Learning algorithm; dqn is the off-policy check.")
    ] = "maskable-ppo"
    seed: Annotated[
        int, typer.Option(help="Seed of weights, actions, minibatches and episodes.", min=0, max=2**32 - 1)
    ] = 0
    total_steps: Annotated[int, typer.Option(help="Steps of the environment, over all copies.", min=1, max=10**12)] = (
        6_000_000
    )
    num_envs: Annotated[int, typer.Option(help="Copies of the environment.", min=1, max=65536)] = 256
    threads: Annotated[
        int,
        typer.Option(help="Torch threads; a second one gains a tenth where its core is idle.", min=1, max=1024),
        FREE,
    ] = 1

    snr_db: Annotated[str, typer.Option(help="SNR in dB, or low,high to draw it for every episode; never shown.")] = (
        "0,24"
    )
    coder: Annotated[str, typer.Option(help="Refinement coder of the environment.")] = "closed_loop"
    payload: Annotated[str, typer.Option(help="Payload of the environment.")] = "latent"
    cache: Annotated[str, typer.Option(help="Name or folder of a trajectory cache.")] = "default"
    bit_depths: Annotated[str, typer.Option(help="Comma-separated bit depths.")] = ",".join(map(str, PAPER_BIT_DEPTHS))
    deadline: Annotated[int, typer.Option(help="Deadline in slots.", min=1)] = PAPER_DEADLINE
    decision_epochs: Annotated[bool, typer.Option(help="Run through the slots in which only WAIT is legal.")] = True

    reward: Annotated[
        Literal["relative", "terminal", "improvement", "log", "anytime"],
        typer.Option(help="Reward: the environment's own, or the MSE relative to its running mean at that SNR."),
    ] = "relative"
    relative_cap: Annotated[
        float, typer.Option(help="Largest relative MSE that is paid for (relative reward).", min=1.0)
    ] = 100.0
    relative_power: Annotated[
        float,
        typer.Option(help="Power of the relative MSE at the start; 1 at the end (relative reward).", min=0.01, max=1.0),
    ] = 0.5
    relative_until: Annotated[
        float,
        typer.Option(help="Part of the training after which that power is 1 (relative reward).", min=0.01, max=1.0),
    ] = 0.3
    expected_misses: Annotated[
        bool, typer.Option(help="Pay for a miss what it costs on average, when it is risked (relative reward).")
    ] = True
    reward_scale: Annotated[float, typer.Option(help="Factor on every reward.")] = 1.0
    encoding: Annotated[
        Literal["summary", "normalized", "one-hot"], typer.Option(help="Encoding of the observation.")
    ] = "summary"
    history: Annotated[
        int, typer.Option(help="Entries of the channel history shown; -1: the encoding's default.", min=-1)
    ] = -1
    hindsight: Annotated[
        bool, typer.Option(help="The critic, in training alone, knows the channel to come (not for dqn).")
    ] = True

    actor: Annotated[str, typer.Option(help="Widths of the actor's (or Q-network's) hidden layers.")] = "96,96"
    critic: Annotated[str, typer.Option(help="Widths of the critic's hidden layers (not for dqn).")] = "96,96"
    activation: Annotated[Literal["tanh", "relu"], typer.Option(help="Activation of both.")] = "relu"
    learning_rate: Annotated[float, typer.Option(help="Learning rate at the start.", min=0.0)] = 1.3e-3
    final_learning_rate: Annotated[
        float, typer.Option(help="Learning rate at the end; linear in between.", min=0.0)
    ] = 1e-5
    rollout_steps: Annotated[int, typer.Option(help="Steps of every copy in a roll-out.", min=2, max=1_000_000)] = 64
    batch_size: Annotated[int, typer.Option(help="Steps in a minibatch.", min=2, max=100_000_000)] = 1024
    epochs: Annotated[int, typer.Option(help="Passes over a roll-out.", min=1, max=10_000)] = 8
    gamma: Annotated[float, typer.Option(help="Discount; 1 in an episode of fixed length.", min=0.0, max=1.0)] = 1.0
    gae_lambda: Annotated[
        float, typer.Option(help="λ of the generalized advantage estimate (not for dqn).", min=0.0, max=1.0)
    ] = 0.95
    clip_range: Annotated[
        float, typer.Option(help="PPO's clipping of the probability ratio (not for dqn).", min=1e-3)
    ] = 0.2
    first_wait: Annotated[
        float, typer.Option(help="Probability of WAIT before anything is learned (not for dqn).", min=0.0, max=0.999)
    ] = 0.75
    clone: Annotated[
        str, typer.Option(help="Agent that the actor imitates before the training; empty: from scratch (not for dqn).")
    ] = ""
    clone_decisions: Annotated[
        int, typer.Option(help="Decisions of that agent to imitate (with clone).", min=1, max=10**8)
    ] = 100_000
    entropy: Annotated[float, typer.Option(help="Weight of the entropy at the start (not for dqn).", min=0.0)] = 0.04
    final_entropy: Annotated[
        float, typer.Option(help="Weight of the entropy at the end; geometric in between (not for dqn).", min=0.0)
    ] = 2e-5
    value_weight: Annotated[float, typer.Option(help="Weight of the critic's loss (not for dqn).")] = 0.5
    max_grad_norm: Annotated[float, typer.Option(help="Largest norm of a gradient.")] = 0.5

    average_from: Annotated[
        float,
        typer.Option(
            help="Part of the training from which weights are averaged for the result; 1: the last ones.",
            min=0.0,
            max=1.0,
        ),
    ] = 0.7

    checkpoint_every: Annotated[int, typer.Option(help="Seconds between checkpoints.", min=0), FREE] = 60
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations; 0: at the end alone.", min=0), FREE] = (
        1_000_000
    )
    eval_episodes: Annotated[int, typer.Option(help="Episodes of an evaluation, per SNR.", min=1, max=10**7), FREE] = (
        256
    )
    test_episodes: Annotated[
        int, typer.Option(help="Episodes of the last one, on the test split.", min=1, max=10**7), FREE
    ] = 1000
    eval_seed: Annotated[int, typer.Option(help="Seed of the evaluations.", min=0), FREE] = 0
    eval_snr_db: Annotated[
        str, typer.Option(help="SNRs in dB of the evaluations; empty: the one SNR, or every 3 dB of the range."), FREE
    ] = ""
    rivals: Annotated[
        str,
        typer.Option(help="Policies to compare with, on the same draws; the paper's stay on the paper's coder."),
        FREE,
    ] = "dp,lookahead"
    tensorboard: Annotated[bool, typer.Option(help="Write TensorBoard curves."), FREE] = True
    progress: Annotated[bool, typer.Option(help="Show a progress bar."), FREE] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.snr_range
        if not self.learning_rate > 0.0:
            raise ConfigurationError(f"`learning_rate` must be > 0, got {self.learning_rate!r}. Give for example 1e-3.")
        if low > high:
            raise ConfigurationError(f"`snr_db` must be low,high with low < high, got {self.snr_db!r}. Swap them.")
        if self.clone and self.algorithm == "dqn":
            raise ConfigurationError(
                f"`clone` must be empty for dqn, which has no actor, got {self.clone!r}. Use maskable-ppo or ppo."
            )
        _ = self.eval_snrs_db
        parse_numbers("actor", self.actor, int)
        parse_numbers("critic", self.critic, int)

    @property
    def snr_range(self) -> tuple[float, float]:
        """Lowest and highest SNR in dB; equal where there is one."""
        numbers = parse_numbers("snr_db", self.snr_db, float)
        if len(numbers) > 2:
            raise ConfigurationError(f"`snr_db` must be one SNR or low,high, got {self.snr_db!r}. Give e.g. 0,24.")
        return numbers[0], numbers[-1]

    @property
    def eval_snrs_db(self) -> tuple[float, ...]:
        """SNRs in dB of the evaluations."""
        if self.eval_snr_db:
            return parse_numbers("eval_snr_db", self.eval_snr_db, float)
        low, high = self.snr_range
        return tuple(float(snr_db) for snr_db in np.arange(low, high + 1e-9, 3.0))

    def system_kwargs(self) -> dict[str, Any]:
        """Environment arguments that make the system, but for the SNR."""
        return {
            "cache": self.cache,
            "bit_depths": list(parse_numbers("bit_depths", self.bit_depths, int)),
            "deadline": self.deadline,
            "coder": self.coder,
            "payload": self.payload,
        }

    def env_kwargs(self) -> dict[str, Any]:
        """Environment arguments of the training."""
        low, high = self.snr_range
        return {
            **self.system_kwargs(),
            "snr_db": low if low == high else [low, high],
            "split": "train",
            "decision_epochs": self.decision_epochs,
            "reward": self.reward if self.reward in REWARDS else "terminal",
        }

    def command(self) -> str:
        """The command line of this run.

        What shapes the weights is written out even where it is the default, since the defaults may change.
        """
        free, defaults = self.free(), {field.name: field.default for field in dataclasses.fields(self)}
        return self.command_line(
            name
            for name, value in vars(self).items()
            if name not in _NOT_TOLD and value != "" and not (name in free and value == defaults[name])
        )
