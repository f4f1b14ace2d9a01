"""Policies that look at nothing: Persistent-Q ([K] §V-A), and a random one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.base import Agent
from refine_env import SystemConfig

__all__ = ["PersistentQ", "RandomAgent"]


class PersistentQ(Agent):
    """TRANSMIT(b) whenever that is legal: the policy sends every fresh latent, as fast as the channel allows.

    Args:
        config: the system.
        bits: b.

    Raises:
        ConfigurationError: if b is not among the configuration's bit depths.
    """

    def __init__(self, config: SystemConfig, *, bits: int) -> None:
        super().__init__(config, name=f"persistent-q{bits}")
        self.bits = bits
        self._action = config.action_of(bits)

    def decide(self, observation: Mapping[str, NDArray[Any]], legal: NDArray[np.bool_]) -> NDArray[np.int64]:
        """TRANSMIT(b) everywhere."""
        return np.full(legal.shape, self._action, dtype=np.int64)


class RandomAgent(Agent):
    """A uniformly random action where TRANSMIT is legal, WAIT elsewhere.

    Args:
        config: the system.
        seed: seed of the policy's own generator. Resets do not restart it.
    """

    def __init__(self, config: SystemConfig, *, seed: int = 0) -> None:
        super().__init__(config, name="random")
        self._rng = np.random.default_rng(seed)

    def decide(self, observation: Mapping[str, NDArray[Any]], legal: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Uniform over WAIT and all bit depths."""
        return self._rng.integers(self.config.num_actions, size=legal.shape)
