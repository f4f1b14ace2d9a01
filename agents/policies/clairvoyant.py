"""The bound that no causal policy can beat: the best schedule for a channel that is known in advance.

Along a fixed chain of deliveries the distortion at the deadline is affine in the coding error that the device starts
with, so over all ways to go on the best one is concave in it: of the states with the same slot and device step only
the one with the smallest and the one with the largest error can be on a best chain. Keeping these two, forward through
the slots, is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from agents.base import Agent
from refine_env import ConfigurationError, SystemConfig
from refine_env._compiled import kernel
from refine_env.model.distortion import RefinementModel
from refine_env.model.rules import distortion, may_transmit, residual_variance, server_step

__all__ = ["Clairvoyant"]

_SMALLEST, _LARGEST = 0, 1


@kernel
def _fill_latencies(
    rates: NDArray[np.float64], sizes: NDArray[np.float64], first_slot: int, latencies: NDArray[np.int64]
) -> None:
    """T_dl of every message begun in slot n, at [n, b]; 0 where it is not through by the deadline.

    Added up as the simulator does, to the last bit.

    Args:
        rates: bits per slot (T_d,).
        sizes: of the messages [bit] (|𝓑|,).
        first_slot: to begin with.
        latencies: (T_d + 2, |𝓑|).
    """
    deadline = rates.size
    latencies[:] = 0
    for n in range(first_slot, deadline + 1):
        total = 0.0
        for slot in range(n, deadline + 1):
            total += rates[slot - 1]
            for b in range(sizes.size):
                if latencies[n, b] == 0 and total >= sizes[b]:
                    latencies[n, b] = slot - n + 1


class System(NamedTuple):
    """What the best schedule depends on, besides the channel.

    Attributes:
        uplink_bits: B_s [bit].
        sizes: of the messages [bit], followed by those of the first one where they differ, (|𝓑|,) or (2|𝓑|,).
        base: D_base of every bit depth (|𝓑|,).
        model: how the distortion develops over a chain of deliveries.
        refreshes: the held step may be sent again while it has an error.
        first_server_step: m, where generation starts.
        first_device_step: t_p of what the device starts with.
    """

    uplink_bits: float
    sizes: NDArray[np.float64]
    base: NDArray[np.float64]
    model: RefinementModel
    refreshes: bool
    first_server_step: int
    first_device_step: int


class Reached(NamedTuple):
    """The states that can be on a best chain, by slot n, device step t_p and kind (smallest or largest error).

    Attributes:
        errors: e_p (T_d + 2, T + 1, 2).
        ways: how each state is reached: the slot decided in, 0 for not at all; which state of that slot, as
            kind · (T + 1) + t_p; and the action, (T_d + 2, T + 1, 2, 3).
    """

    errors: NDArray[np.float64]
    ways: NDArray[np.int64]


@kernel
def _put(reached: Reached, n: int, p: int, error: float, way: tuple[int, int, int]) -> None:
    """Enter a state's way into slot n where it has the smallest or the largest error so far."""
    for kind in range(2):
        kept = reached.errors[n, p, kind]
        better = error < kept if kind == _SMALLEST else error > kept
        if reached.ways[n, p, kind, 0] == 0 or better:
            reached.errors[n, p, kind] = error
            for k in range(3):
                reached.ways[n, p, kind, k] = way[k]


@kernel
def _best_schedule(rates: NDArray[np.float64], system: System, schedule: NDArray[np.int64]) -> float:
    """Fill in the actions of one episode (T_d + 2,) and return the distortion at the deadline that they end in."""
    model, sizes, first_device_step = system.model, system.sizes, system.first_device_step
    deadline, num_steps = rates.size, model.clean.size - 1
    schedule[:] = 0
    sent, uplink_slots = 0.0, 0
    while sent < system.uplink_bits:
        if uplink_slots == deadline:
            return float(model.clean[first_device_step])
        sent += rates[uplink_slots]
        uplink_slots += 1
    first = min(uplink_slots + 1, deadline + 1)  # nothing is generated yet
    latencies = np.empty((deadline + 2, sizes.size), dtype=np.int64)
    _fill_latencies(rates, sizes, first, latencies)
    errors = np.zeros((deadline + 2, num_steps + 1, 2))
    ways = np.zeros((deadline + 2, num_steps + 1, 2, 3), dtype=np.int64)
    reached = Reached(errors, ways)
    ways[first, first_device_step, :, 0] = -1
    for n in range(first, deadline + 1):
        t = server_step(n, uplink_slots, num_steps, system.first_server_step)
        for p in range(t, num_steps + 1):
            # Only before the first delivery does the device hold what it started with.
            own = sizes.size - system.base.size if p == first_device_step else 0
            for kind in range(2):
                if ways[n, p, kind, 0] == 0 or (kind == _LARGEST and errors[n, p, _LARGEST] == errors[n, p, _SMALLEST]):
                    continue
                error = errors[n, p, kind]
                which = kind * (num_steps + 1) + p
                _put(reached, n + 1, p, error, (n, which, 0))
                if not may_transmit(t, p, num_steps, system.refreshes, error > 0.0):
                    continue
                variance = residual_variance(model, t, p, error)
                for b in range(system.base.size):
                    latency = latencies[n, own + b]
                    if latency > 0:
                        _put(reached, n + latency, t, variance * system.base[b], (n, which, b + 1))
    best, end_step, end_kind = np.inf, first_device_step, 0
    for p in range(num_steps, -1, -1):
        for kind in range(2):
            if ways[deadline + 1, p, kind, 0] != 0:
                value = distortion(model, p, errors[deadline + 1, p, kind])
                if value < best:
                    best, end_step, end_kind = value, p, kind
    n, p, kind = deadline + 1, end_step, end_kind
    while ways[n, p, kind, 0] > 0:
        origin, which, action = ways[n, p, kind]
        schedule[origin] = action
        n, p, kind = origin, which % (num_steps + 1), which // (num_steps + 1)
    return best


@kernel
def _best_schedules(
    rates: NDArray[np.float64], system: System, schedules: NDArray[np.int64], values: NDArray[np.float64]
) -> None:
    """:func:`_best_schedule` of N episodes, with rates (N, T_d); fills schedules (N, T_d + 2) and values (N,)."""
    for i in range(rates.shape[0]):
        values[i] = _best_schedule(rates[i], system, schedules[i])


class Clairvoyant(Agent):
    """The best schedule for the episode's channel, known in advance: a bound, not a policy.

    Exact under the distortion recursion (:class:`refine_env.model.distortion.RefinementModel`): no causal policy on the
    same coder, payload and 𝓑 ends with less expected distortion. It does not need the SNR.

    Args:
        config: the system.

    Attributes:
        needs_rates: :meth:`reset` has to be given the rates.
        schedules: the action in every slot n, index n, (N, T_d + 2).
        predicted_values: distortion at the deadline of every episode, in the model's sense (N,).
    """

    env_kwargs: ClassVar[Mapping[str, Any]] = {"coder": "closed_loop", "payload": "latent"}
    plans_with_errors: ClassVar[bool] = True
    needs_rates: ClassVar[bool] = True

    def __init__(self, config: SystemConfig) -> None:
        super().__init__(config, name="clairvoyant")
        self._system = System(
            float(config.uplink_bits),
            config.all_message_bits,
            config.base_distortion,
            config.refinement_model,
            bool(config.make_coder().refreshes_held_step),
            config.first_server_step,
            config.first_device_step,
        )
        self.schedules = np.zeros((0, config.deadline + 2), dtype=np.int64)
        self.predicted_values = np.zeros(0)

    @property
    def predicted_value(self) -> float:
        """Mean of :attr:`predicted_values`."""
        return float(self.predicted_values.mean())

    def reset(self, num_envs: int = 1, rates: ArrayLike | None = None) -> None:
        """Plan new episodes.

        Args:
            num_envs: N.
            rates: bits that every slot of every episode will carry (N, T_d); needed.

        Raises:
            ConfigurationError: if the rates are missing or not of that form.
        """
        shape = (num_envs, self.config.deadline)
        advice = "Give the bits per slot of every episode, for example those that the environment was reset with."
        if rates is None:
            raise ConfigurationError(f"`rates` must have shape {shape} for {self.name}, got None. {advice}")
        try:
            channel = np.ascontiguousarray(rates, dtype=np.float64)
        except (TypeError, ValueError):
            channel = np.empty(0)
        if channel.shape != shape:
            raise ConfigurationError(f"`rates` must have shape {shape} for {self.name}, got {channel.shape}. {advice}")
        if not (np.isfinite(channel).all() and (channel >= 0.0).all()):
            raise ConfigurationError(f"`rates` must be finite and >= 0, got a value that is not. {advice}")
        self.schedules = np.zeros((num_envs, self.config.deadline + 2), dtype=np.int64)
        self.predicted_values = np.empty(num_envs)
        _best_schedules(channel, self._system, self.schedules, self.predicted_values)

    def decide(self, observation: Mapping[str, NDArray[Any]], legal: NDArray[np.bool_]) -> NDArray[np.int64]:
        """What was planned for the slot."""
        if len(self.schedules) != legal.size:
            raise ConfigurationError(
                f"`num_envs` must be {legal.size}, as many episodes as are played, got {len(self.schedules)}. "
                "Call reset(num_envs, rates=...) first."
            )
        planned: NDArray[np.int64] = self.schedules[np.arange(legal.size), observation["slot"]]
        return planned
