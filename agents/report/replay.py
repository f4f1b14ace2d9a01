"""Play an episode of an evaluation again, and note every slot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym

import agents
from refine_env import ENV_ID, ConfigurationError, SystemConfig
from refine_env.evaluation import Policy, Table, play_episode

__all__ = ["TRACE_COLUMNS", "replay_row", "trace_episode"]

TRACE_COLUMNS: dict[str, type] = {
    "slot": int,
    "rate": float,
    "server_step": int,
    "action_bits": int,
    "channel": str,
    "message_step": int,
    "message_bits": int,
    "remaining_bits": float,
    "delivered": bool,
    "device_step": int,
    "device_bits": int,
    "latent_mse": float,
    "num_deliveries": int,
    "bits_sent": float,
    "uplink_slots": int,
    "trajectory": int,
}
"""Columns of a trace, one row a slot n = 1 … T_d.

At the beginning of the slot: ``server_step`` t(n); ``action_bits``, the bit depth of the TRANSMIT that the policy chose
in it (0 = WAIT). During the slot: ``rate``, what it carries, in bits per latent dimension, as the observation shows it
(float32, saturated at the largest message); ``channel``, ``"prompt"``, ``"latent"`` or ``"idle"``; ``message_step`` and
``message_bits`` of the latent on the link (T and 0 where there is none). At its end: ``remaining_bits`` still to flow,
per dimension; ``delivered``, whether a latent's last bit has come; and what the device then holds."""


def trace_episode(
    make_policy: Callable[[SystemConfig], Policy],
    *,
    env_kwargs: Mapping[str, Any],
    seed: int,
    latents: bool = False,
) -> Table:
    """Play one episode with one policy and note every slot.

    With the seed of a row of ``episodes.csv`` and the arguments of its environment it is the same episode, and its last
    slot ends with exactly the numbers of that row, unless the policy draws random numbers of its own.

    Args:
        make_policy: called with the environment's configuration.
        env_kwargs: arguments of the environment; ``split`` defaults to ``"test"``, as in an evaluation.
        seed: seed of the episode.
        latents: add the column ``latent``: ŷ, what the device holds, float32 (M,) where ``delivered``, else None.

    Returns:
        One row per slot, columns :data:`TRACE_COLUMNS`.

    Raises:
        ConfigurationError: if an argument is out of range, or the policy was made for another system.
        CacheError: if the cache is missing or damaged.
    """
    if env_kwargs.get("decision_epochs"):
        raise ConfigurationError(
            "`env_kwargs` must have every slot played for a trace, got decision_epochs=True. Leave it out."
        )
    env = gym.make(ENV_ID, **{"split": "test", **env_kwargs})
    inner: Any = env.unwrapped
    config: SystemConfig = inner.config
    policy = make_policy(config)
    policy.check_config(config)
    episode = play_episode(env, policy, seed=seed)
    trajectory = next(episode).info["trajectory"]
    codec = None
    if latents:
        source = inner.cache.payload(trajectory, config.payload)
        codec = config.make_codec(config.initial(source))
    step, bits = config.num_steps, 0
    rows: Table = []
    for observation, info, action, before in episode:
        assert before is not None
        assert action is not None
        busy = before["remaining_bits"][0] > 0.0
        if action > 0 and not info["illegal_action"]:
            step, bits = int(before["server_step"]), config.bit_depths[action - 1]
        elif not busy:
            step, bits = config.num_steps, 0
        row: dict[str, Any] = {
            "slot": int(before["slot"]),
            "rate": float(before["channel_history"][-1]),
            "server_step": int(before["server_step"]),
            "action_bits": config.bit_depths[action - 1] if action > 0 else 0,
            "channel": "latent" if bits else "prompt" if busy else "idle",
            "message_step": step,
            "message_bits": bits,
            "remaining_bits": float(observation["remaining_bits"][0]),
            "delivered": bool(info["delivered"]),
            "device_step": int(observation["device_step"]),
            "device_bits": int(observation["device_bits"]),
            "latent_mse": float(info["latent_mse"]),
            "num_deliveries": int(info["num_deliveries"]),
            "bits_sent": float(info["bits_sent"]),
            "uplink_slots": int(info["uplink_slots"]),
            "trajectory": int(info["trajectory"]),
        }
        if codec is not None:
            row["latent"] = None
            if info["delivered"]:
                codec.decompress(codec.compress(source[step], step, bits))
                row["latent"] = codec.device.copy()
        rows.append(row)
    env.close()
    return rows


def replay_row(row: Mapping[str, Any], env_kwargs: Mapping[str, Any], *, latents: bool = False) -> Table:
    """Play an episode of an evaluation again, and check it against its row.

    Args:
        row: a row of ``episodes.csv``.
        env_kwargs: the environment arguments in ``run.json``.
        latents: see :func:`trace_episode`.

    Returns:
        See :func:`trace_episode`.

    Raises:
        ConfigurationError: if :func:`agents.make` does not know the policy, or the episode does not end with the
            numbers of the row: the policy draws random numbers, or the cache, the policy or the arguments are not
            those of the evaluation.
        CacheError: if the cache is missing or damaged.
    """
    name = row["agent"]
    own = {**agents.env_kwargs(name), "coder": row["coder"], "payload": row["payload"], "snr_db": row["snr_db"]}
    trace = trace_episode(
        lambda config: agents.make(name, config, neglect_errors=True),  # as it was played
        env_kwargs={**env_kwargs, **own},
        seed=row["seed"],
        latents=latents,
    )
    last = trace[-1]
    for column in ("trajectory", "uplink_slots", "num_deliveries", "device_step", "device_bits", "latent_mse"):
        if last[column] != row[column]:
            raise ConfigurationError(
                f"`row` must be what {name} does again with seed {row['seed']} at {row['snr_db']:g} dB ({column} "
                f"{row[column]!r}), got {last[column]!r}. Evaluate again, with a policy that draws no random numbers."
            )
    return trace
