"""The model that is trained, and the files of the policy that comes of it."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save
from sb3_contrib import MaskablePPO
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.utils import LinearSchedule
from torch import nn

from agents.policies.learned import FORMAT, PolicyFiles
from refine_env.evaluation import write_atomically
from refine_env.learning.policy import find_wrapper
from refine_env.sb3 import RefinementVecEnv
from refine_env.wrappers import VectorEncodeObservation
from train.options import parse_numbers
from train.rl.config import Config
from train.rl.critic import AsymmetricPolicy, MaskableAsymmetricPolicy, PrivilegedObservation

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

__all__ = ["export_policy", "make_model", "policy_files"]


def make_model(config: Config, envs: RefinementVecEnv) -> BaseAlgorithm:
    """A fresh model of Stable-Baselines3 or sb3-contrib."""
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
    if isinstance(envs.envs, PrivilegedObservation):
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


def _layers(model: Any) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Weights and biases from the encoded observation to logits (PPO) or Q-values (DQN)."""
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
    adapter: Any = model.get_env()
    encoder = find_wrapper(adapter.envs, VectorEncodeObservation).encoder
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
    arrays: dict[str, Any] = {}
    for k, (weight, bias) in enumerate(files.layers):
        arrays[f"{k}.weight"], arrays[f"{k}.bias"] = np.ascontiguousarray(weight), np.ascontiguousarray(bias)
    content = save(arrays)
    description = {**files.description, "weights_sha256": hashlib.sha256(content).hexdigest()}
    write_atomically(folder / "policy.safetensors", content)
    write_atomically(folder / "policy.json", json.dumps(description, indent=1) + "\n")
