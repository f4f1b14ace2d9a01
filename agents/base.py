"""What every policy has in common: one decision rule, for one episode or for many at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from refine_env import ConfigurationError, SystemConfig

__all__ = ["Agent"]


def _check_type(config: SystemConfig) -> None:
    if not isinstance(config, SystemConfig):
        raise ConfigurationError(
            f"`config` must be a SystemConfig, got {type(config).__name__}. Pass env.unwrapped.config."
        )


class Agent(ABC):
    """A causal policy made for one system.

    A subclass writes :meth:`decide`, for a batch; :meth:`select_action` serves the single and the vector
    environment with it.

    Args:
        config: the system that it acts in, ``env.unwrapped.config``; neither environment nor cache is needed.

    Attributes:
        name: the name of the policy in tables and figures.
        config: the system that the policy acts in.
        env_kwargs: environment arguments that the policy is made for.
        plans_with_errors: whether the policy plans with the coding errors that the configuration's model predicts.
    """

    env_kwargs: ClassVar[Mapping[str, Any]] = {"coder": "forward", "payload": "latent"}
    plans_with_errors: ClassVar[bool] = False

    def __init__(self, config: SystemConfig, *, name: str) -> None:
        _check_type(config)
        self.name = name
        self.config = config
        # The length that the channel history must have; None after `check_config`, which knows the system to be right.
        self._history_length: int | None = config.deadline

    def reset(self, num_envs: int = 1) -> None:  # noqa: B027 - most policies remember nothing
        """Forget all episodes: ``num_envs`` new ones begin."""

    @abstractmethod
    def decide(self, observation: Mapping[str, NDArray[Any]], legal: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Actions of N episodes.

        Args:
            observation: the environment's observation, batched: scalar fields (N,), others (N, ...).
            legal: whether TRANSMIT is legal, bool (N,).

        Returns:
            0 = WAIT, i = TRANSMIT(bit_depths[i−1]), (N,); taken as WAIT where TRANSMIT is not legal.
        """

    def select_action(self, observation: Mapping[str, Any], info: Mapping[str, Any]) -> Any:
        """The action for an observation of the single or of the vector environment.

        Args:
            observation: the environment's observation.
            info: only its ``"action_mask"`` is read, (n,) or (N, n).

        Returns:
            An int where the observation's scalar fields are scalars, else int64 (N,).

        Raises:
            ConfigurationError: if observation and mask do not fit the system that the agent was made for.
        """
        single = np.ndim(observation["slot"]) == 0
        mask = np.asarray(info["action_mask"])
        batch = observation
        if single:
            batch = {key: np.asarray(value)[None] for key, value in observation.items()}
            mask = mask[None]
        self._check(batch, mask)
        legal = mask[:, 1] > 0
        actions = np.where(legal, self.decide(batch, legal), 0)
        return int(actions[0]) if single else actions

    def check_config(self, config: SystemConfig) -> None:
        """Refuse to act in another system than the one the agent was made for.

        Worth a call before a loop of your own: :meth:`select_action` sees only what an observation shows of the
        system, which is neither the SNR nor the link nor the coder.

        Raises:
            ConfigurationError: naming the first setting that differs.
        """
        _check_type(config)
        mine, theirs = self.config.to_dict(), config.to_dict()
        for key in {**mine, **theirs}:
            if mine.get(key) != theirs.get(key):
                shown = "another schedule" if key == "schedule" else f"{theirs.get(key)!r:.200}"
                made_for = "its own" if key == "schedule" else f"{mine.get(key)!r:.200}"
                raise ConfigurationError(
                    f"`config` must be the one that {self.name} was made for ({key} {made_for}), got {shown}. "
                    "Make the agent with env.unwrapped.config."
                )
        self._history_length = None

    def _check(self, batch: Mapping[str, NDArray[Any]], mask: NDArray[Any]) -> None:
        config = self.config
        if mask.ndim != 2 or mask.shape[1] != config.num_actions:
            raise ConfigurationError(
                f"`action_mask` must have {config.num_actions} actions for {self.name}, got shape {mask.shape}. "
                "Make the agent with env.unwrapped.config."
            )
        if "device_bits" in batch:
            bits, step = batch["device_bits"], batch["device_step"]
            first = config.first_device_step
            if ((bits == 0) != (step == first)).any() or not np.isin(bits, (0, *config.bit_depths)).all():
                raise ConfigurationError(
                    f"`device_bits` must be 0 just where `device_step` is {first}, and else one of the bit "
                    f"depths {list(config.bit_depths)} that {self.name} was made for, got {bits.tolist()[:4]} at "
                    f"steps {step.tolist()[:4]}. Make the agent with env.unwrapped.config."
                )
        length = np.shape(batch["channel_history"])[-1] if "channel_history" in batch else None
        if length is not None and self._history_length is not None and length != self._history_length:
            raise ConfigurationError(
                f"`channel_history` must have the length of the deadline that {self.name} was made for, "
                f"{self._history_length}, got {length}. Make the agent with env.unwrapped.config; where the "
                "environment has a `history_length`, call agent.check_config(env.unwrapped.config) once."
            )
        if "remaining_bits" in batch:
            prompt, sent = config.uplink_bits / config.latent_dim, batch["remaining_bits"][batch["slot"] == 1]
            if (np.abs(sent - prompt) > 1e-5 * prompt).any():
                raise ConfigurationError(
                    f"`remaining_bits` must be the prompt's in slot 1, {prompt:g} bits per dimension for the system "
                    f"that {self.name} was made for, got {float(sent.flat[0]):g}. "
                    "Make the agent with env.unwrapped.config."
                )
        for key, bound in (
            ("slot", config.deadline + 1),
            ("server_step", config.num_steps),
            ("device_step", config.num_steps),
        ):
            if batch[key].max() > bound:
                raise ConfigurationError(
                    f"`{key}` must be at most {bound} in the system {self.name} was made for, "
                    f"got {int(batch[key].max())}. Make the agent with env.unwrapped.config."
                )
