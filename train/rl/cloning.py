"""A warm start by behavior cloning: before the training, the actor imitates an agent.

The agent plays the training's environments; the actor maximizes the likelihood of its actions where there is a choice.
The critic and everything after know nothing of it. A policy that began so is not from scratch: it is a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import agents
from refine_env.errors import ConfigurationError
from refine_env.learning.policy import find_wrapper
from refine_env.sb3 import RefinementVecEnv
from refine_env.wrappers import VectorEncodeObservation

__all__ = ["clone", "demonstrate"]

_LEARNING_RATE = 1e-3
_BATCH_SIZE = 1024
_EPOCHS = 10


def demonstrate(
    make_envs: Callable[[float], RefinementVecEnv],
    snrs_db: Sequence[float],
    name: str,
    num_decisions: int,
    seed: int,
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int64]]:
    """What an agent does where it has a choice.

    Args:
        make_envs: the training's environments at one SNR, which the agent is told.
        snrs_db: at which it plays, each as long.
        name: of the agent.
        num_decisions: how many decisions at least, over all SNRs.
        seed: of the episodes.

    Returns:
        Observations as the training has them (n, D), masks (n, actions), actions (n,).

    Raises:
        ConfigurationError: if there is no such agent, or it plays another system.
    """
    decisions: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    for k, snr_db in enumerate(snrs_db):
        envs = make_envs(snr_db)
        encoded = find_wrapper(envs.envs, VectorEncodeObservation)
        settings = encoded.unwrapped.settings
        for key, value in agents.env_kwargs(name).items():
            if getattr(settings, key) != value:
                raise ConfigurationError(
                    f"`clone` must name an agent of this system, got {name!r}, which wants {key}={value!r}. "
                    "Choose another."
                )
        agent = agents.make(name, encoded.encoder.config)
        envs.seed(seed + k * envs.num_envs)
        observations = envs.reset()
        agent.reset(envs.num_envs)
        count = 0
        while count * len(snrs_db) < num_decisions:
            masks = encoded.action_masks()
            legal = masks[:, 1:].any(axis=1)
            actions = agent.decide(encoded.observations, legal)
            for rows, values in zip(decisions, (observations, masks, actions), strict=True):
                rows.append(values[legal])
            count += int(legal.sum())
            observations, _, _, _ = envs.step(actions)
    first, second, third = (np.concatenate(rows) for rows in decisions)
    return first, second, third


def clone(
    model: Any,
    observations: NDArray[np.float32],
    masks: NDArray[np.bool_],
    actions: NDArray[np.int64],
    seed: int,
) -> float:
    """Fit the actor of PPO or MaskablePPO.

    Args:
        model: of Stable-Baselines3 or sb3-contrib.
        observations, masks, actions: as :func:`demonstrate` returns them.
        seed: of the minibatches.

    Returns:
        The share of the actions that it repeats in the end.
    """
    import torch

    policy = model.policy
    masked = {"action_masks": masks} if type(model).__name__ == "MaskablePPO" else {}
    optimizer = torch.optim.Adam(policy.parameters(), lr=_LEARNING_RATE)
    rng = np.random.default_rng(seed)
    for _ in range(_EPOCHS):
        order = rng.permutation(len(actions))
        for start in range(0, len(order), _BATCH_SIZE):
            rows = order[start : start + _BATCH_SIZE]
            _, likelihoods, _ = policy.evaluate_actions(
                torch.from_numpy(observations[rows]),
                torch.from_numpy(actions[rows]),
                **{key: values[rows] for key, values in masked.items()},
            )
            optimizer.zero_grad()
            (-likelihoods.mean()).backward()
            optimizer.step()
    repeated, _ = model.predict(observations, deterministic=True, **masked)
    return float(np.mean(repeated == actions))
