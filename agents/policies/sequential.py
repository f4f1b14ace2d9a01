"""Compute first, then send: x_0 at one bit depth, or at the one that the link is likely to bring in by the deadline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from agents.base import Agent
from agents.policies.fixed import PersistentQ
from refine_env import SystemConfig
from refine_env.coding import LOSSLESS_BITS, base_distortion

__all__ = ["ClosedLoopFinalAdaptive", "FinalAdaptive", "FinalOnly", "FinalQ"]


class FinalQ(PersistentQ):
    """TRANSMIT(b) as soon as x_0 is there, once; arguments and errors are those of :class:`PersistentQ`."""

    def __init__(self, config: SystemConfig, *, bits: int) -> None:
        super().__init__(config, bits=bits)
        self.name = f"final-q{bits}"

    def decide(self, observation: Mapping[str, NDArray[Any]], legal: NDArray[np.bool_]) -> NDArray[np.int64]:
        """TRANSMIT(b) where t(n) = 0 and the device does not hold x_0 yet."""
        first = (observation["server_step"] == 0) & (observation["device_step"] > 0)
        return np.where(first, super().decide(observation, legal), 0)


class FinalOnly(FinalQ):
    """[K]'s sequential baseline (§V-A): x_0 without loss, 16 bits per dimension, as soon as it is there.

    Raises:
        ConfigurationError: if 16 is not among the configuration's bit depths.
    """

    def __init__(self, config: SystemConfig) -> None:
        super().__init__(config, bits=LOSSLESS_BITS)
        self.name = "final-only"


def _largest(likely: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For every number of slots, the index of the largest bit depth that is likely, 0 where none is (T_d + 1,)."""
    return np.where(likely.any(axis=0), len(likely) - 1 - np.argmax(likely[::-1], axis=0), 0)


class FinalAdaptive(Agent):
    """x_0, as soon as it is there, at the largest bit depth that arrives by the deadline with probability q.

    The probability is that of the exact law of the link. A coder that refines the step that the device holds may use
    two messages, the second refining the first: of all plans of one or two messages that arrive with probability q,
    the one whose error is the smallest is begun; among equals, the one of fewer messages, then the one whose first
    message is the smaller. Once x_0 is held, the largest bit depth that arrives with probability q refines it.
    Where no bit depth arrives with probability q, the smallest one is sent: nothing is lost by trying.

    Args:
        config: the system, with a single SNR; q is its ``latency_quantile``.

    Raises:
        ConfigurationError: if the configuration has an SNR range.
    """

    def __init__(self, config: SystemConfig) -> None:
        super().__init__(config, name="final-adaptive")
        config.single_snr_db(self.name)
        law, quantile = config.exact_latency_law, config.latency_quantile
        in_time = 1.0 - law.latency_sf(config.message_bits, config.deadline)  # P[T_dl <= k], shape (|𝓑|, T_d + 1)
        first_in_time = 1.0 - law.latency_sf(config.first_message_bits, config.deadline)
        arrives, first_arrives = (np.diff(law, axis=-1, prepend=0.0) for law in (in_time, first_in_time))
        errors = np.array([base_distortion(bits) for bits in config.bit_depths])
        self._refining = _largest(in_time >= quantile) + 1
        likely = first_in_time >= quantile
        largest = _largest(likely)
        self._first = largest + 1
        if not config.make_coder().refreshes_held_step:
            return
        best = np.where(likely.any(axis=0), errors[largest], np.inf)
        for first in range(len(errors)):
            for second in range(len(errors)):
                both = np.cumsum(np.convolve(first_arrives[first], arrives[second])[: config.deadline + 1])
                better = (both >= quantile) & (errors[first] * errors[second] < best)
                best = np.where(better, errors[first] * errors[second], best)
                self._first = np.where(better, first + 1, self._first)

    def decide(self, observation: Mapping[str, NDArray[Any]], legal: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Look up the action for the slots that are left, this one included, where t(n) = 0."""
        left = np.clip(self.config.deadline + 1 - observation["slot"], 0, self.config.deadline)
        actions = np.where(observation["device_step"] > 0, self._first[left], self._refining[left])
        return np.where(observation["server_step"] == 0, actions, 0)


class ClosedLoopFinalAdaptive(FinalAdaptive):
    """The same on the closed-loop coder, which refines in two messages, and once more as long as there is time."""

    env_kwargs: ClassVar[Mapping[str, Any]] = {"coder": "closed_loop", "payload": "latent"}

    def __init__(self, config: SystemConfig) -> None:
        super().__init__(config)
        self.name = "final-adaptive-closed-loop"
