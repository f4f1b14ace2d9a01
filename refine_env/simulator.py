"""The dynamics of a batch of episodes: pure, without Gymnasium and without a random generator.

The single environment, the vector environment and the evaluation all run on :class:`EpisodeBatch`. The
channel of an episode is handed in whole when the episode begins; from then on everything is determined by the
actions. Time, channel and steps are numbers in one structured array that a compiled loop advances; latents
are touched only when a delivery completes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from refine_env._compiled import kernel
from refine_env.coding import LOSSLESS_BITS, kernels
from refine_env.config import SystemConfig

__all__ = [
    "INTEGER_FIELDS",
    "NO_ACTION",
    "STATE_DTYPE",
    "EpisodeBatch",
    "LatentSource",
    "fill_channel_history",
    "server_step",
]

STATE_DTYPE = np.dtype(
    [
        ("slot", np.int64),  # n, 1 … T_d; T_d + 1 after the last slot
        ("uplink_slots", np.int64),  # T_ul; 0 while the uplink runs
        ("server_step", np.int64),  # t(n)
        ("device_step", np.int64),  # t_p
        ("device_bits", np.int64),  # bit depth of the last delivery, 0 = none
        ("device_error", np.float64),  # e_p, predicted coding error of what the device holds
        ("message_step", np.int64),  # step in flight
        ("message_bits", np.int64),  # bit depth in flight, 0 = none
        ("message_size", np.float64),  # [bit] in flight, the prompt included; 0 = idle
        ("message_sent", np.float64),  # [bit] of it that have flowed
        ("num_deliveries", np.int64),
        ("bits_sent", np.float64),  # [bit] carried by the downlink so far
    ],
    align=True,
)
"""What one episode is made of, apart from its channel and its latents."""

INTEGER_FIELDS = ("slot", "server_step", "device_step", "device_bits", "num_deliveries", "uplink_slots")
"""Rows of the integers in a snapshot of the state."""

NO_ACTION = -1
"""Marks an episode that a call of :meth:`EpisodeBatch.advance` leaves as it is."""


class LatentSource(Protocol):
    """What the simulator asks of a trajectory cache."""

    def latents(self, index: int) -> NDArray[np.float16]:
        """Trajectory of that index, float16 (T+1, ...), indexed by t."""


@kernel
def server_step(slot: int, uplink_slots: int, num_steps: int) -> int:
    """t(n) = T − min(T, max(0, n − T_ul − 1)) ([K] §II-A); T while the uplink runs (T_ul = 0)."""
    if uplink_slots == 0:
        return num_steps
    return num_steps - min(num_steps, max(0, slot - uplink_slots - 1))


@kernel
def _may_transmit(s: Any, num_steps: int, deadline: int, refreshes: bool) -> bool:
    """Whether TRANSMIT is legal: generation has begun, the channel is idle, and there is something to gain."""
    if s.slot > deadline or s.server_step >= num_steps or s.message_size > 0.0:
        return False
    if s.server_step < s.device_step:
        return True
    held_lossy = s.device_bits > 0 and s.device_bits < LOSSLESS_BITS
    return refreshes and held_lossy and s.server_step == s.device_step


@kernel
def _pass_slot(s: Any, rate: float, num_steps: int) -> bool:
    """Let one slot's bits flow and end the slot; returns whether a delivery completed.

    A message is through in the first slot in which the bits summed since its start reach its size; what
    the slot could have carried beyond that is lost.
    """
    delivered = False
    if s.message_size > 0.0:
        total = s.message_sent + rate
        through = total >= s.message_size
        if s.message_bits > 0:
            s.bits_sent += min(total, s.message_size) - s.message_sent
        s.message_sent = total
        if through:
            if s.message_bits == 0:
                s.uplink_slots = s.slot
            else:
                s.device_step = s.message_step
                s.device_bits = s.message_bits
                s.num_deliveries += 1
                s.message_bits = 0
                delivered = True
            s.message_size = 0.0
            s.message_sent = 0.0
    s.slot += 1
    s.server_step = server_step(s.slot, s.uplink_slots, num_steps)
    return delivered


@kernel
def _begin(s: Any, num_steps: int, uplink_bits: float) -> None:
    s.slot = 1
    s.uplink_slots = 0
    s.server_step = num_steps
    s.device_step = num_steps
    s.device_bits = 0
    s.device_error = 0.0
    s.message_step = num_steps
    s.message_bits = 0
    s.message_size = uplink_bits
    s.message_sent = 0.0
    s.num_deliveries = 0
    s.bits_sent = 0.0


@kernel
def _advance(
    state: NDArray[Any],
    rates: NDArray[np.float64],
    actions: NDArray[np.int64],
    bit_depths: NDArray[np.int64],
    num_steps: int,
    deadline: int,
    latent_dim: int,
    refreshes: bool,
    until_decision: bool,
    illegal: NDArray[np.bool_],
    delivered: NDArray[np.bool_],
    predecessor: NDArray[np.int64],
) -> int:
    """Advance every episode whose action is not NO_ACTION; returns the number of deliveries."""
    deliveries = 0
    for i in range(state.size):
        illegal[i] = False
        delivered[i] = False
        action = actions[i]
        s = state[i]
        if action < 0 or s.slot > deadline:
            continue
        if action > 0:
            if _may_transmit(s, num_steps, deadline, refreshes):
                s.message_step = s.server_step
                s.message_bits = bit_depths[action - 1]
                s.message_size = float(latent_dim * s.message_bits)
                s.message_sent = 0.0
            else:
                illegal[i] = True
        while True:
            held = s.device_step
            if _pass_slot(s, rates[i, s.slot - 1], num_steps):
                delivered[i] = True
                predecessor[i] = held
                deliveries += 1
            if not until_decision or s.slot > deadline or _may_transmit(s, num_steps, deadline, refreshes):
                break
    return deliveries


@kernel
def _skip_forced_slots(s: Any, rates: NDArray[np.float64], num_steps: int, deadline: int, refreshes: bool) -> None:
    while s.slot < deadline and not _may_transmit(s, num_steps, deadline, refreshes):
        _pass_slot(s, rates[s.slot - 1], num_steps)


@kernel
def _fill_action_mask(
    state: NDArray[Any], num_steps: int, deadline: int, refreshes: bool, mask: NDArray[np.int8]
) -> None:
    for i in range(state.size):
        mask[i, 0] = 1
        legal = 1 if _may_transmit(state[i], num_steps, deadline, refreshes) else 0
        for action in range(1, mask.shape[1]):
            mask[i, action] = legal


@kernel
def fill_channel_history(
    slots: NDArray[np.int64],
    rates: NDArray[np.float64],
    latent_dim: int,
    ceiling: float,
    out: NDArray[np.float32],
) -> None:
    """Rates of the slots up to the current one, per latent dimension, most recent last.

    Args:
        slots: n of every episode (N,); after the last slot the history ends with slot T_d.
        rates: bits per slot (N, T_d).
        latent_dim: M.
        ceiling: value at which the entries saturate [bit/dimension].
        out: (N, history length); 0 before slot 1.
    """
    length = out.shape[1]
    for i in range(out.shape[0]):
        last = min(slots[i], rates.shape[1])
        for k in range(length):
            slot = last - (length - 1 - k)
            out[i, k] = min(rates[i, slot - 1] / latent_dim, ceiling) if slot >= 1 else 0.0


@kernel
def _fill_snapshot(
    state: NDArray[Any],
    latent_dim: int,
    integers: NDArray[np.int64],
    floats: NDArray[np.float32],
    bits_sent: NDArray[np.float64],
) -> None:
    """What a snapshot shows of the state: rows of INTEGER_FIELDS; remaining bits per dimension and error; bits sent."""
    for i in range(state.size):
        s = state[i]
        integers[0, i] = s.slot
        integers[1, i] = s.server_step
        integers[2, i] = s.device_step
        integers[3, i] = s.device_bits
        integers[4, i] = s.num_deliveries
        integers[5, i] = s.uplink_slots
        floats[0, i, 0] = (s.message_size - s.message_sent) / latent_dim
        floats[1, i, 0] = s.device_error
        bits_sent[i] = s.bits_sent


class EpisodeBatch:
    """N episodes of one system, advanced together, each with its own clock.

    Args:
        config: the system.
        source: where the latents come from; its trajectories must have M dimensions and T + 1 steps.
        num_episodes: N.

    Attributes:
        state: :data:`STATE_DTYPE` (N,).
        rates: bits per slot (N, T_d), the whole episode's; no policy sees it ahead of time.
        trajectory: trajectory index (N,).
        device: x̂_{t_p}, what each device holds, float32 (N, M).
        latent_mse: (1/M)‖ŷ − x_0‖² of what each device holds (N,).
        illegal, delivered: what the last :meth:`advance` met, bool (N,).
    """

    def __init__(self, config: SystemConfig, source: LatentSource, num_episodes: int) -> None:
        self.config = config
        self.coder = config.make_coder()
        self._source = source
        self._bit_depths = np.array(config.bit_depths, dtype=np.int64)
        self._system = (config.num_steps, config.deadline, config.latent_dim)
        self._patterns: list[NDArray[np.uint16] | None] = [None] * num_episodes
        self.state = np.zeros(num_episodes, dtype=STATE_DTYPE)
        self.rates = np.zeros((num_episodes, config.deadline))
        self.trajectory = np.zeros(num_episodes, dtype=np.int64)
        self.device = np.zeros((num_episodes, config.latent_dim), dtype=np.float32)
        self.latent_mse = np.zeros(num_episodes)
        self.illegal = np.zeros(num_episodes, dtype=np.bool_)
        self.delivered = np.zeros(num_episodes, dtype=np.bool_)
        self._predecessor = np.zeros(num_episodes, dtype=np.int64)

    def __len__(self) -> int:
        return self.state.size

    def __getstate__(self) -> dict[str, Any]:
        # Views of mapped files do not travel; they are looked up again from the source.
        return {**self.__dict__, "_patterns": None}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)
        self._patterns = [
            None if self.state["slot"][i] == 0 else self._look_up(int(self.trajectory[i])) for i in range(len(self))
        ]

    def _look_up(self, trajectory: int) -> NDArray[np.uint16]:
        latents = self._source.latents(trajectory)
        return latents.reshape(latents.shape[0], -1).view(np.uint16)

    def begin(self, i: int, trajectory: int, rates: NDArray[np.float64] | Sequence[float]) -> None:
        """Start episode ``i`` anew.

        Args:
            i: which of the N.
            trajectory: index in the source.
            rates: bits per slot (T_d,).
        """
        patterns = self._look_up(trajectory)
        self._patterns[i] = patterns
        self.rates[i] = rates
        self.trajectory[i] = trajectory
        _begin(self.state[i], self.config.num_steps, self.config.uplink_bits)
        kernels.decode_float16(patterns[-1], self.device[i])  # shared randomness: the device holds x_T
        self.latent_mse[i] = kernels.mean_square_error(self.device[i], patterns[0])
        self.illegal[i] = False
        self.delivered[i] = False

    def skip_forced_slots(self, i: int) -> None:
        """Run a fresh episode to its first slot in which TRANSMIT is legal, or else to its last slot."""
        num_steps, deadline, _ = self._system
        _skip_forced_slots(self.state[i], self.rates[i], num_steps, deadline, self.coder.refreshes_held_step)

    def advance(self, actions: NDArray[np.int64], *, until_decision: bool = False) -> None:
        """Act, let the slot's bits flow, end the slot; then carry out the deliveries that completed.

        An illegal TRANSMIT is a WAIT, and marked in :attr:`illegal`. Finished episodes stay as they are.

        Args:
            actions: 0 = WAIT, i = TRANSMIT(bit_depths[i−1]), -1 = leave this episode as it is; int64 (N,).
            until_decision: go on through slots in which only WAIT is legal.
        """
        deliveries = _advance(
            self.state,
            self.rates,
            actions,
            self._bit_depths,
            *self._system,
            self.coder.refreshes_held_step,
            until_decision,
            self.illegal,
            self.delivered,
            self._predecessor,
        )
        if deliveries:
            for i in np.flatnonzero(self.delivered):
                self._deliver(int(i))

    def _deliver(self, i: int) -> None:
        s = self.state[i]
        patterns = self._patterns[i]
        assert patterns is not None
        s["device_error"] = self.coder.deliver(
            patterns,
            self.device[i],
            int(s["device_step"]),
            int(self._predecessor[i]),
            int(s["device_bits"]),
            float(s["device_error"]),
        )
        self.latent_mse[i] = kernels.mean_square_error(self.device[i], patterns[0])

    def action_mask(self) -> NDArray[np.int8]:
        """Which actions are legal now, int8 (N, 1 + |𝓑|)."""
        mask = np.empty((len(self), self.config.num_actions), dtype=np.int8)
        num_steps, deadline, _ = self._system
        _fill_action_mask(self.state, num_steps, deadline, self.coder.refreshes_held_step, mask)
        return mask

    def legal_actions(self) -> NDArray[np.bool_]:
        """:meth:`action_mask` as bool (N, 1 + |𝓑|)."""
        return self.action_mask().view(np.bool_)

    def finished(self) -> NDArray[np.bool_]:
        """Which episodes are past their last slot, bool (N,)."""
        finished: NDArray[np.bool_] = self.state["slot"] > self.config.deadline
        return finished

    def snapshot(self) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float64]]:
        """The state's visible part, in fresh arrays.

        Returns:
            :data:`INTEGER_FIELDS` by row, int64 (6, N); bits per dimension still to flow and predicted coding error,
            float32 (2, N, 1); bits sent, float64 (N,).
        """
        count = len(self)
        integers = np.empty((len(INTEGER_FIELDS), count), dtype=np.int64)
        floats = np.empty((2, count, 1), dtype=np.float32)
        bits_sent = np.empty(count)
        _fill_snapshot(self.state, self.config.latent_dim, integers, floats, bits_sent)
        return integers, floats, bits_sent

    def begun(self) -> bool:
        """Whether every episode has begun."""
        return bool((self.state["slot"] > 0).all())

    def remaining_bits(self) -> NDArray[np.float64]:
        """Bits of the message in flight that are still to flow, the prompt included; 0 = idle (N,)."""
        remaining: NDArray[np.float64] = self.state["message_size"] - self.state["message_sent"]
        return remaining
