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

import dataclasses
import hashlib
import inspect
import json
import logging
import math
import multiprocessing
import shlex
import sys
import time
import typing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import typer

import agents
from agents.policies.learned import ACTIVATIONS, FORMAT, Learned, PolicyFiles
from refine_env import ConfigurationError, __version__
from refine_env._validation import check_choice
from refine_env.commands import command, run
from refine_env.config import PAPER_BIT_DEPTHS, PAPER_DEADLINE
from refine_env.dynamics.settings import REWARDS
from refine_env.errors import import_extra
from refine_env.evaluation import Table, read_table, roll_out, write_atomically, write_table
from refine_env.wrappers import ENCODINGS, VectorEncodeObservation

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from stable_baselines3.common.base_class import BaseAlgorithm

    from train.rl.envs import RefinementVecEnv

__all__ = ["EVALUATION_COLUMNS", "Config", "export_policy", "geometric_mean_ratio", "main", "parse_numbers", "train"]

log = logging.getLogger("train.ppo")

EXTRA = ("torch", "stable_baselines3", "sb3_contrib", "tensorboard")
MSE_FLOOR = 1e-6
"""Added to both means where two policies are compared: differences below it do not count."""

# Options that do not change what is trained: an interrupted run may go on with others.
FREE_OPTIONS = frozenset(
    {
        "out",
        "threads",
        "progress",
        "tensorboard",
        "checkpoint_every",
        "eval_every",
        "eval_episodes",
        "eval_seed",
        "test_episodes",
        "rivals",
        "eval_snr_db",
    }
)

_NOT_TOLD = ("threads", "progress", "tensorboard", "checkpoint_every")  # by the command of a run

EVALUATION_COLUMNS: dict[str, type] = {
    "steps": int,
    "seconds": float,
    "split": str,
    "agent": str,
    "snr_db": float,
    "episodes": int,
    "latent_mse": float,
}
"""Columns of ``evaluations.csv``: mean latent MSE at the deadline, after so many steps of the environment."""


@dataclass(frozen=True)
class Config:
    """Every option of the command."""

    out: Annotated[Path, typer.Option(help="Folder for policy, checkpoint and tables.")] = Path("runs/ppo")
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
        int, typer.Option(help="Torch threads; a second one gains a tenth where its core is idle.", min=1, max=1024)
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
        Literal["relative", "terminal", "improvement", "log"],
        typer.Option(help="Reward: the environment's own three, or the MSE relative to its running mean at that SNR."),
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
    learning_rate: Annotated[float, typer.Option(help="Learning rate at the start.")] = 1.3e-3
    final_learning_rate: Annotated[float, typer.Option(help="Learning rate at the end; linear in between.")] = 1e-5
    rollout_steps: Annotated[int, typer.Option(help="Steps of every copy in a roll-out.", min=2, max=1_000_000)] = 64
    batch_size: Annotated[int, typer.Option(help="Steps in a minibatch.", min=2, max=100_000_000)] = 1024
    epochs: Annotated[int, typer.Option(help="Passes over a roll-out.", min=1, max=10_000)] = 8
    gamma: Annotated[float, typer.Option(help="Discount; 1 in an episode of fixed length.")] = 1.0
    gae_lambda: Annotated[float, typer.Option(help="λ of the generalized advantage estimate (not for dqn).")] = 0.95
    clip_range: Annotated[float, typer.Option(help="PPO's clipping of the probability ratio (not for dqn).")] = 0.2
    first_wait: Annotated[
        float, typer.Option(help="Probability of WAIT before anything is learned (not for dqn).", min=0.0, max=0.999)
    ] = 0.75
    clone: Annotated[
        str, typer.Option(help="Agent that the actor imitates before the training; empty: from scratch (not for dqn).")
    ] = ""
    clone_decisions: Annotated[
        int, typer.Option(help="Decisions of that agent to imitate (with clone).", min=1, max=10**8)
    ] = 100_000
    entropy: Annotated[float, typer.Option(help="Weight of the entropy at the start (not for dqn).")] = 0.04
    final_entropy: Annotated[
        float, typer.Option(help="Weight of the entropy at the end; geometric in between (not for dqn).")
    ] = 2e-5
    value_weight: Annotated[float, typer.Option(help="Weight of the critic's loss (not for dqn).")] = 0.5
    max_grad_norm: Annotated[float, typer.Option(help="Largest norm of a gradient.")] = 0.5

    average_from: Annotated[
        float,
        typer.Option(help="Part of the training from which weights are averaged for the result; 1: the last ones."),
    ] = 0.7

    checkpoint_every: Annotated[int, typer.Option(help="Seconds between checkpoints.", min=0)] = 60
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations; 0: at the end alone.", min=0)] = 1_000_000
    eval_episodes: Annotated[int, typer.Option(help="Episodes of an evaluation, per SNR.", min=1, max=10**7)] = 256
    test_episodes: Annotated[
        int, typer.Option(help="Episodes of the last one, on the test split.", min=1, max=10**7)
    ] = 1000
    eval_seed: Annotated[int, typer.Option(help="Seed of the evaluations.", min=0)] = 0
    eval_snr_db: Annotated[
        str, typer.Option(help="SNRs in dB of the evaluations; empty: the one SNR, or every 3 dB of the range.")
    ] = ""
    rivals: Annotated[
        str, typer.Option(help="Policies to compare with, on the same draws; the paper's stay on the paper's coder.")
    ] = "dp,lookahead"
    tensorboard: Annotated[bool, typer.Option(help="Write TensorBoard curves.")] = True
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not abs(value) <= _LARGEST:
                raise ConfigurationError(
                    f"`{field.name}` must be a number of at most {_LARGEST:g} in size, got {value!r}. The training "
                    "computes in float32, which does not hold the square of a larger one."
                )
        low, high = self.snr_range
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if not least <= value <= most:
                bounds = f">= {least:g}" if most == math.inf else f"in {least:g} … {most:g}"
                raise ConfigurationError(f"`{name}` must be {bounds}, got {value!r}. Choose a number there.")
        if not self.learning_rate > 0.0:
            raise ConfigurationError(f"`learning_rate` must be > 0, got {self.learning_rate!r}. Give for example 1e-3.")
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
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

    def trained_with(self) -> dict[str, Any]:
        """The options that the weights depend on."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in FREE_OPTIONS}

    def command(self) -> str:
        """The command line of this run."""
        words = ["python", "-m", "train.ppo"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # What shapes the weights is written out: the defaults may change.
            if (field.name in FREE_OPTIONS and value == field.default) or field.name in _NOT_TOLD or value == "":
                continue
            option = "--" + field.name.replace("_", "-")
            words += [option if value else "--no-" + option[2:]] if isinstance(value, bool) else [option, str(value)]
        return shlex.join(words)


_LARGEST = 1e12
_MOST_NUMBERS, _LARGEST_WIDTH = 100, 65536
_RANGES: dict[str, tuple[float, float]] = {
    "relative_cap": (1.0, math.inf),
    "relative_power": (0.01, 1.0),
    "relative_until": (0.01, 1.0),
    "learning_rate": (0.0, math.inf),
    "final_learning_rate": (0.0, math.inf),
    "gamma": (0.0, 1.0),
    "gae_lambda": (0.0, 1.0),
    "clip_range": (1e-3, math.inf),
    "first_wait": (0.0, 0.999),
    "entropy": (0.0, math.inf),
    "final_entropy": (0.0, math.inf),
    "average_from": (0.0, 1.0),
}
_CHOICES = {
    "algorithm": ("maskable-ppo", "ppo", "dqn"),
    "reward": ("relative", *REWARDS),
    "encoding": ENCODINGS,
    "activation": ACTIVATIONS,
}


def parse_numbers(name: str, text: str, kind: type) -> tuple[Any, ...]:
    """Numbers with commas between, at most 100; integers have to be in 1 … 65536.

    Raises:
        ConfigurationError: if the text is no such list.
    """
    try:
        values = tuple(kind(word) for word in text.split(",", _MOST_NUMBERS))
    except ValueError:
        values = ()
    least, most = (1, _LARGEST_WIDTH) if kind is int else (-sys.float_info.max, sys.float_info.max)
    if not values or not all(least <= value <= most for value in values):
        what, limit = ("positive integers", f", none above {most}") if kind is int else ("numbers", "")
        raise ConfigurationError(
            f"`{name}` must be {what} with commas between, got {text!r}. Give e.g. 64,64 or 0,24; at most "
            f"{_MOST_NUMBERS}{limit}."
        )
    return values


def show_log() -> None:
    """Write what the trainings log to the standard error, each line with the time of day."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Fresh processes for trainings side by side, which log as this one does."""
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=show_log)


def require_extra() -> None:
    """Raise MissingExtraError unless every package of the ``train`` extra can be imported."""
    for module in EXTRA:
        import_extra(module, "train")


# --- Environments, model ---------------------------------------------------------------------------


def make_envs(config: Config) -> RefinementVecEnv:
    """The training's environments, wrapped as the options say."""
    import gymnasium as gym

    import refine_env
    from train.rl.critic import HindsightObservation
    from train.rl.envs import RefinementVecEnv
    from train.rl.reward import RelativeReward

    assert config.encoding in ENCODINGS
    envs: Any = gym.make_vec(
        refine_env.ENV_ID, num_envs=config.num_envs, autoreset_mode="SameStep", **config.env_kwargs()
    )
    if config.reward == "relative":
        envs = RelativeReward(
            envs, cap=config.relative_cap, power=config.relative_power, expected_misses=config.expected_misses
        )
    envs = VectorEncodeObservation(envs, config.encoding, None if config.history < 0 else config.history)
    if config.hindsight and config.algorithm != "dqn":
        envs = HindsightObservation(envs)
    return RefinementVecEnv(envs, reward_scale=config.reward_scale)


def make_model(config: Config, envs: RefinementVecEnv) -> BaseAlgorithm:
    """A fresh model of Stable-Baselines3 or sb3-contrib."""
    import torch
    from sb3_contrib import MaskablePPO
    from stable_baselines3 import DQN, PPO
    from stable_baselines3.common.utils import LinearSchedule

    from train.rl.critic import AsymmetricPolicy, HindsightObservation, MaskableAsymmetricPolicy

    activation = torch.nn.Tanh if config.activation == "tanh" else torch.nn.ReLU
    schedule = LinearSchedule(config.learning_rate, config.final_learning_rate, 1.0)
    actor, critic = list(parse_numbers("actor", config.actor, int)), list(parse_numbers("critic", config.critic, int))
    common: dict[str, Any] = {
        "env": envs,
        "learning_rate": schedule,
        "gamma": config.gamma,
        "batch_size": config.batch_size,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "device": "cpu",
        "tensorboard_log": str(config.out / "tensorboard") if config.tensorboard else None,
    }
    if config.algorithm == "dqn":
        return DQN(
            "MlpPolicy",
            policy_kwargs={"net_arch": actor, "activation_fn": activation},
            buffer_size=1_000_000,
            learning_starts=min(50_000, config.total_steps // 20),
            train_freq=config.rollout_steps,
            gradient_steps=config.epochs * max(1, config.rollout_steps * config.num_envs // config.batch_size),
            target_update_interval=50_000,
            exploration_fraction=0.3,
            exploration_final_eps=0.02,
            **common,
        )
    masked = config.algorithm == "maskable-ppo"
    policy: Any = "MlpPolicy"
    policy_kwargs: dict[str, Any] = {"net_arch": {"pi": actor, "vf": critic}, "activation_fn": activation}
    if isinstance(envs.envs, HindsightObservation):
        policy = MaskableAsymmetricPolicy if masked else AsymmetricPolicy
        policy_kwargs["actor_features"] = envs.envs.actor_features
    kind: Any = MaskablePPO if masked else PPO
    model: BaseAlgorithm = kind(
        policy,
        policy_kwargs=policy_kwargs,
        n_steps=config.rollout_steps,
        n_epochs=config.epochs,
        gae_lambda=config.gae_lambda,
        clip_range=config.clip_range,
        ent_coef=config.entropy,
        vf_coef=config.value_weight,
        **common,
    )
    if config.first_wait > 0.0:
        # At random, every slot would be a transmission sooner or later, and the channel never idle when it matters.
        others = model.action_space.n - 1  # type: ignore[attr-defined]
        with torch.no_grad():
            model.policy.action_net.bias[0] = math.log(config.first_wait / (1.0 - config.first_wait) * others)  # type: ignore[union-attr,operator]
    return model


# --- The policy, as agents.policies.learned wants it --------------------------------------------------------


def _layers(model: Any) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Weights and biases from the encoded observation to logits (PPO) or Q-values (DQN)."""
    from torch import nn

    policy = model.policy
    if hasattr(policy, "q_net"):
        modules = list(policy.q_net.q_net)
    else:
        modules = [*policy.mlp_extractor.policy_net, policy.action_net]
    return [
        (layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy())
        for layer in modules
        if isinstance(layer, nn.Linear)
    ]


def policy_files(config: Config, model: BaseAlgorithm) -> PolicyFiles:
    """The policy of a model, as it is now."""
    from train.rl.envs import find_wrapper

    encoder = find_wrapper(model.get_env(), VectorEncodeObservation).encoder
    description = {
        "format": FORMAT,
        "algorithm": config.algorithm,
        "activation": config.activation,
        "encoder": encoder.to_dict(),
        "env_kwargs": {"coder": config.coder, "payload": config.payload},
        "system": encoder.config.to_dict(),
        "steps": int(model.num_timesteps),
        "command": config.command(),
    }
    return PolicyFiles(description, _layers(model))


def export_policy(folder: Path, files: PolicyFiles) -> None:
    """Write ``policy.safetensors``, then ``policy.json`` with its hash, each atomically."""
    from safetensors.numpy import save

    arrays: dict[str, Any] = {}
    for k, (weight, bias) in enumerate(files.layers):
        arrays[f"{k}.weight"], arrays[f"{k}.bias"] = np.ascontiguousarray(weight), np.ascontiguousarray(bias)
    content = save(arrays)
    description = {**files.description, "weights_sha256": hashlib.sha256(content).hexdigest()}
    write_atomically(folder / "policy.safetensors", content)
    write_atomically(folder / "policy.json", json.dumps(description, indent=1) + "\n")


# --- Evaluation ------------------------------------------------------------------------------------


def geometric_mean_ratio(rows: Table, agent: str, rival: str) -> tuple[float, float]:
    """How much worse one policy is than another over the SNRs that both were evaluated at.

    Returns:
        Geometric mean and largest of (MSE + 1e-6)/(the rival's MSE + 1e-6); NaN where there is nothing to compare.
    """
    means = {(row["agent"], row["snr_db"]): row["latent_mse"] for row in rows}
    snrs_db = [snr_db for name, snr_db in means if name == agent and (rival, snr_db) in means]
    if not snrs_db:
        return math.nan, math.nan
    ratios = [(means[agent, s] + MSE_FLOOR) / (means[rival, s] + MSE_FLOOR) for s in snrs_db]
    return float(np.exp(np.mean(np.log(ratios)))), max(ratios)


class Evaluation:
    """Evaluate a policy beside others on common draws; what the others score is computed once in a process."""

    _known: ClassVar[dict[tuple[str, str, int, int], float]] = {}

    def __init__(self, config: Config) -> None:
        self.config = config
        self.rivals = [name for name in config.rivals.split(",") if name]
        for name in self.rivals:
            agents.env_kwargs(name)  # an unknown name is known before the training

    def rows(self, files: PolicyFiles, split: str, episodes: int, steps: int, seconds: float) -> Table:
        """A row for the policy and for each rival at every SNR."""
        rows = []
        for snr_db in self.config.eval_snrs_db:
            kwargs = {**self.config.system_kwargs(), "snr_db": snr_db, "split": split}
            learner = partial(Learned, policy=files)
            scores = {"learned": self._score(learner, kwargs, episodes)}
            for name in self.rivals:
                key = (name, repr(kwargs), episodes, self.config.eval_seed)
                if key not in self._known:
                    rival = partial(agents.make, name)
                    self._known[key] = self._score(rival, {**kwargs, **self.rival_kwargs(name)}, episodes)
                scores[name] = self._known[key]
            rows += [
                {
                    "steps": steps,
                    "seconds": round(seconds, 1),
                    "split": split,
                    "agent": name,
                    "snr_db": snr_db,
                    "episodes": episodes,
                    "latent_mse": mse,
                }
                for name, mse in scores.items()
            ]
        return rows

    def rival_kwargs(self, name: str) -> dict[str, Any]:
        """Environment arguments of a rival: those of the training, but that the paper's stay on the paper's coder."""
        own = agents.env_kwargs(name)
        if own["coder"] == "forward":
            return own
        return {**own, "coder": self.config.coder, "payload": self.config.payload}

    def describe(self, rows: Table) -> str:
        """How the policy compares with each rival, whose coder is named where it is not the training's."""
        parts = []
        for rival in self.rivals:
            mean, worst = geometric_mean_ratio(rows, "learned", rival)
            coder = self.rival_kwargs(rival)["coder"]
            other = f" ({coder})" if coder != self.config.coder else ""
            parts.append(f"{mean:.3f} × {rival}{other} (worst {worst:.3f})")
        return ", ".join(parts)

    def _score(self, make_policy: Callable[..., Any], kwargs: dict[str, Any], episodes: int) -> float:
        table = roll_out(make_policy, env_kwargs=kwargs, episodes=episodes, seed=self.config.eval_seed)
        return float(np.mean([row["latent_mse"] for row in table]))


# --- Training --------------------------------------------------------------------------------------


class _Average:
    """The mean of a network's weights over the last part of a training.

    What a minibatch does to the weights at the end is noise, which costs most where a rare miss does; the mean of many
    has less of it (Izmailov et al., *Averaging Weights Leads to Wider Optima and Better Generalization*, 2018).
    """

    def __init__(self, count: int = 0, weights: Any = 0.0) -> None:
        self.count = count
        self.weights = weights

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """The mean so far, none before the first weights are taken into it."""
        return {"average": self.weights.numpy()} if self.count else {}

    def add(self, policy: Any) -> None:
        """Take the weights of now into the mean."""
        import torch

        self.count += 1
        now = torch.nn.utils.parameters_to_vector(policy.parameters()).detach().double()
        self.weights = self.weights + (now - self.weights) / self.count

    def put_into(self, policy: Any) -> None:
        """Set a policy's weights to the mean."""
        import torch

        torch.nn.utils.vector_to_parameters(self.weights.float(), policy.parameters())


def _begin_with_a_clone(config: Config, model: BaseAlgorithm) -> None:
    from train.rl.cloning import clone, demonstrate

    low, high = config.snr_range
    demonstration = demonstrate(
        lambda snr_db: make_envs(dataclasses.replace(config, snr_db=str(snr_db))),
        np.linspace(low, high, math.ceil(high - low) + 1).tolist(),
        config.clone,
        config.clone_decisions,
        config.seed,
    )
    share = clone(model, *demonstration, seed=config.seed)
    log.info("repeats %.1f %% of the decisions of %s", 100.0 * share, config.clone)


def train(config: Config, on_rollout: Callable[[int], None] | None = None) -> Path:
    """Train, or go on training, and write policy and tables.

    Args:
        config: the options.
        on_rollout: called with the number of steps done before every roll-out, after its checkpoint.

    Returns:
        The folder, ``config.out``.

    Raises:
        MissingExtraError: if a package of the ``train`` extra is not installed.
        ConfigurationError: if an option cannot be used, or differs from the checkpoint's.
        CacheError: if the cache is missing or damaged.
    """
    require_extra()
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from tqdm import tqdm

    from train.rl.checkpoint import Checkpoints
    from train.rl.envs import find_wrapper
    from train.rl.reward import RelativeReward

    torch.set_num_threads(config.threads)
    config.out.mkdir(parents=True, exist_ok=True)
    evaluation = Evaluation(config)
    checkpoints = Checkpoints(config.out, config.trained_with())
    rows: Table = []
    average = _Average()
    clock = _Clock(0.0)

    def go_on(values: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        nonlocal rows, average, clock
        rows = [{name: kind(row[name]) for name, kind in EVALUATION_COLUMNS.items()} for row in values["rows"]]
        if values["averaged"]:
            average = _Average(int(values["averaged"]), torch.from_numpy(arrays["average"]))
        clock = _Clock(float(values["seconds"]))

    found = checkpoints.restore(lambda: make_model(config, make_envs(config)), go_on)
    if found is None:
        model = make_model(config, make_envs(config))
        if config.clone:
            _begin_with_a_clone(config, model)
    else:
        model = found
        log.info("going on after %d steps", model.num_timesteps)
    bar = tqdm(total=config.total_steps, initial=model.num_timesteps, unit="step", disable=not config.progress)
    relative = find_wrapper(model.get_env(), RelativeReward)

    def evaluate(split: str, episodes: int) -> None:
        with clock.stopped():
            fresh = evaluation.rows(policy_files(config, model), split, episodes, model.num_timesteps, clock.seconds)
            rows.extend(fresh)
            write_table(config.out / "evaluations.csv", rows, EVALUATION_COLUMNS)
        described = evaluation.describe(fresh)
        log.info("%d steps, %.0f s, %s: %s", model.num_timesteps, clock.seconds, split, described)
        bar.set_postfix_str(described)
        for rival in evaluation.rivals:
            mean, worst = geometric_mean_ratio(fresh, "learned", rival)
            model.logger.record(f"eval/ratio_{rival}", mean)
            model.logger.record(f"eval/worst_{rival}", worst)

    class Keeper(BaseCallback):
        """Before every roll-out, when all is settled: schedules, evaluation, checkpoint."""

        def __init__(self) -> None:
            super().__init__()
            self.saved = time.monotonic()
            self.evaluated = model.num_timesteps // max(config.eval_every, 1)

        def _on_rollout_start(self) -> None:
            done = model.num_timesteps
            bar.update(done - bar.n)
            share = min(done / config.total_steps, 1.0)
            if hasattr(model, "ent_coef"):
                floor = 1e-12
                model.ent_coef = (config.entropy + floor) ** (1.0 - share) * (config.final_entropy + floor) ** share
            if relative is not None:
                part = min(share / config.relative_until, 1.0)
                relative.power = config.relative_power + (1.0 - config.relative_power) * part
            if config.eval_every and done // config.eval_every > self.evaluated:
                self.evaluated = done // config.eval_every
                evaluate("train", config.eval_episodes)
            if time.monotonic() - self.saved >= config.checkpoint_every:
                with clock.stopped():
                    values = {"seconds": clock.seconds, "rows": rows, "averaged": average.count}
                    checkpoints.save(model, values, average.arrays())
                self.saved = time.monotonic()
            if done >= config.average_from * config.total_steps:  # after the checkpoint: gone on with, it is done anew
                average.add(model.policy)
            if on_rollout is not None:
                on_rollout(done)

        def _on_step(self) -> bool:
            return True

    try:
        model.learn(
            config.total_steps - model.num_timesteps,
            callback=Keeper(),
            reset_num_timesteps=found is None,
            tb_log_name=config.algorithm,
            log_interval=1,
        )
    except ValueError:  # of a distribution whose parameters are no numbers any more
        if all(bool(weights.isfinite().all()) for weights in model.policy.parameters()):
            raise
        raise ConfigurationError(
            f"`learning_rate` must keep the weights finite, got some that are not after {model.num_timesteps} steps. "
            "Take a smaller one, or a smaller `reward_scale` or `max_grad_norm`."
        ) from None
    average.add(model.policy)
    average.put_into(model.policy)
    training_seconds = clock.seconds
    bar.update(model.num_timesteps - bar.n)
    files = policy_files(config, model)
    export_policy(config.out, files)
    model.save(config.out / "model.zip")
    evaluate("train", config.eval_episodes)
    evaluate("test", config.test_episodes)
    bar.close()
    model.logger.dump(model.num_timesteps)
    versions = ("numpy", "gymnasium", "torch", "stable_baselines3", "sb3_contrib")
    run = {
        "command": config.command(),
        "options": {key: str(value) for key, value in dataclasses.asdict(config).items()},
        "steps": int(model.num_timesteps),
        "seconds": round(training_seconds, 1),
        "ratios": {rival: geometric_mean_ratio(_last(rows), "learned", rival) for rival in evaluation.rivals},
        "versions": {"refine-env": __version__, **{name: metadata.version(name) for name in versions}},
    }
    write_atomically(config.out / "run.json", json.dumps(run, indent=1) + "\n")
    checkpoints.remove()
    return config.out


def _last(rows: Table) -> Table:
    return [row for row in rows if row["split"] == "test"]


def read_evaluations(folder: Path) -> Table:
    """The table ``evaluations.csv`` of a run.

    Raises:
        ConfigurationError: if it is missing or damaged.
    """
    return read_table(folder / "evaluations.csv", EVALUATION_COLUMNS, command="python -m train.ppo")


class _Clock:
    """Wall time of the training, evaluations and checkpoints left out."""

    def __init__(self, before: float) -> None:
        self._before = before
        self._start = time.monotonic()
        self._frozen: float | None = None

    @property
    def seconds(self) -> float:
        if self._frozen is not None:
            return self._frozen
        return self._before + time.monotonic() - self._start

    def stopped(self) -> _Stopped:
        return _Stopped(self)


class _Stopped:
    def __init__(self, clock: _Clock) -> None:
        self._clock = clock

    def __enter__(self) -> None:
        self._clock._frozen = self._clock.seconds

    def __exit__(self, *error: object) -> None:
        assert self._clock._frozen is not None
        self._clock._before, self._clock._start = self._clock._frozen, time.monotonic()
        self._clock._frozen = None


@command
def main(**options: Any) -> None:
    """Train a policy, or go on where an interrupted run with the same options stopped.

    Exit codes: 0 done, 2 an argument is wrong, 3 a cache is missing or damaged, or the output cannot be written, 4 the
    train extra is not installed.
    """
    show_log()
    train(Config(**options))


# Typer reads the options off the signature: here they are the fields of Config, so that each is written once.
_hints = typing.get_type_hints(Config, include_extras=True)
main.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=_hints[field.name]
        )
        for field in dataclasses.fields(Config)
    ]
)
main.__annotations__ = {field.name: _hints[field.name] for field in dataclasses.fields(Config)}

if __name__ == "__main__":
    run(main)
