"""The dynamics of a batch of episodes: pure, without Gymnasium and without a random generator.

The single environment, the vector environment and the evaluation all run on :class:`EpisodeBatch`. The
channel of an episode is handed in whole when the episode begins; from then on everything is determined by the
actions. Time, channel and steps are numbers in one structured array that a compiled loop advances; latents
are touched only when a delivery completes, or not at all where a batch is played without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from refine_env._compiled import kernel
from refine_env.coding import kernels
from refine_env.config import SystemConfig
from refine_env.model.rules import is_lossy, may_transmit, server_step

__all__ = [
    "NO_ACTION",
    "STATE_DTYPE",
    "EpisodeBatch",
    "LatentSource",
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
        ("trajectory", np.int64),  # index in the source
        ("latent_mse", np.float64),  # (1/M)‖ŷ − x_0‖² of what the device holds
        ("previous_mse", np.float64),  # the same before the last step
        ("full_latent_mse", np.float64),  # that against the x_0 of the full run, where the source has one
        ("forced_slots", np.int64),  # slots that the reset ran through, until a step takes them
        ("slots_before", np.int64),  # slots of the last step after which the device showed what it had before,
        ("slots_after", np.int64),  # and those after which it showed what was delivered in it
        ("predecessor", np.int64),  # step that the device held before the last delivery
        ("legal", np.bool_),  # TRANSMIT is legal now
        ("acted", np.bool_),  # what the last step met: it was this episode's,
        ("illegal", np.bool_),  # its action was an illegal TRANSMIT,
        ("delivered", np.bool_),  # a delivery completed in it
    ],
    align=True,
)
"""What one episode is made of, apart from its channel and its latents."""

_MOST_RECENT = 256  # trajectories whose views are kept, so that few files of a large cache stay mapped

NO_ACTION = -1
"""Marks an episode that a call of :meth:`EpisodeBatch.advance` leaves as it is."""


class LatentSource(Protocol):
    """What the simulator asks of a trajectory cache."""

    @property
    def has_full(self) -> bool:
        """Whether there is the x_0 of a full run beside each trajectory."""

    def full_latent(self, index: int) -> NDArray[np.float16]:
        """That x_0, of M values."""

    def payload(self, index: int, kind: str) -> NDArray[np.float16]:
        """What is sent of the trajectory of that index, float16, indexed by t.

        (T+1, ...) where the device starts with the last of them, (T, ...) where it starts from 0.
        """


@kernel
def _is_legal(s: Any, num_steps: int, deadline: int, refreshes: bool) -> bool:
    """Whether TRANSMIT is legal now: the episode runs, the channel is idle, and there is something to gain."""
    if s.slot > deadline or s.message_size > 0.0:
        return False
    # Of a delivery that completes now the coder writes the error only afterwards: its bit depth tells here.
    return bool(may_transmit(s.server_step, s.device_step, num_steps, refreshes, is_lossy(s.device_bits)))


@kernel
def _pass_slot(s: Any, rate: float, num_steps: int, first_step: int) -> bool:
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
    s.server_step = server_step(s.slot, s.uplink_slots, num_steps, first_step)
    return delivered


@kernel
def _begin(
    state: NDArray[Any],
    rates: NDArray[np.float64],
    selected: NDArray[np.int64],
    uplink_bits: float,
    first_device_step: int,
    num_steps: int,
    first_step: int,
    deadline: int,
    refreshes: bool,
    until_decision: bool,
) -> None:
    """Begin the selected episodes; run on to the first slot in which TRANSMIT is legal, or the last one, if wanted."""
    for i in selected:
        s = state[i]
        s.slot = 1
        s.uplink_slots = 0
        s.server_step = num_steps
        s.device_step = first_device_step
        s.device_bits = 0
        s.device_error = 0.0
        s.message_step = num_steps
        s.message_bits = 0
        s.message_size = uplink_bits
        s.message_sent = 0.0
        s.num_deliveries = 0
        s.bits_sent = 0.0
        s.forced_slots = 0
        s.slots_before = 0
        s.slots_after = 0
        s.predecessor = first_device_step
        s.legal = False  # nothing is generated in the first slot
        s.acted = False
        s.illegal = False
        s.delivered = False
        while until_decision and s.slot < deadline and not s.legal:
            _pass_slot(s, rates[i, s.slot - 1], num_steps, first_step)
            s.forced_slots += 1
            s.legal = _is_legal(s, num_steps, deadline, refreshes)


@kernel
def _advance(
    state: NDArray[Any],
    rates: NDArray[np.float64],
    actions: NDArray[np.int64],
    bit_depths: NDArray[np.int64],
    message_bits: NDArray[np.float64],
    first_message_bits: NDArray[np.float64],
    num_steps: int,
    first_step: int,
    deadline: int,
    refreshes: bool,
    until_decision: bool,
) -> int:
    """Advance every episode whose action is not NO_ACTION; returns the number of deliveries."""
    deliveries = 0
    for i in range(state.size):
        s = state[i]
        s.acted = False
        s.illegal = False
        s.delivered = False
        s.previous_mse = s.latent_mse
        action = actions[i]
        if action < 0 or s.slot > deadline:
            continue
        s.acted = True
        s.slots_before = s.forced_slots
        s.slots_after = 0
        s.forced_slots = 0
        if action > 0:
            if s.legal:
                s.message_step = s.server_step
                s.message_bits = bit_depths[action - 1]
                sizes = first_message_bits if s.num_deliveries == 0 else message_bits
                s.message_size = sizes[action - 1]
                s.message_sent = 0.0
            else:
                s.illegal = True
        while True:
            before = s.device_step
            if _pass_slot(s, rates[i, s.slot - 1], num_steps, first_step):
                s.delivered = True
                s.predecessor = before
                deliveries += 1
            if s.delivered:
                s.slots_after += 1
            else:
                s.slots_before += 1
            s.legal = _is_legal(s, num_steps, deadline, refreshes)
            if not until_decision or s.slot > deadline or s.legal:
                break
    return deliveries


def _field_of_state(name: str, description: str) -> Any:
    """A property of :class:`EpisodeBatch` that is a field of its state."""
    return property(lambda batch: batch.state[name], doc=description)


class EpisodeBatch:
    """N episodes of one system, advanced together, each with its own clock.

    Args:
        config: the system.
        source: where the latents come from; its trajectories must have M dimensions and T + 1 steps. None plays the
            episodes without latents: what is decided and delivered is the same, the latent MSE stays NaN.
        num_episodes: N.

    Attributes:
        state: :data:`STATE_DTYPE` (N,).
        rates: bits per slot (N, T_d), the whole episode's; no policy sees it ahead of time.
        device: x̂_{t_p}, what each device holds, float32 (N, M); (N, 0) without latents.
        has_full: whether the state's ``full_latent_mse`` is known.
    """

    def __init__(self, config: SystemConfig, source: LatentSource | None, num_episodes: int) -> None:
        self.config = config
        self.coder = config.make_coder()
        self._source = source
        self.has_full = source is not None and source.has_full
        self._bit_depths = np.array(config.bit_depths, dtype=np.int64)
        self._message_bits = config.message_bits
        self._first_message_bits = config.first_message_bits
        self._system = (
            config.num_steps,
            config.first_server_step,
            config.deadline,
            self.coder.refreshes_held_step,
        )
        self._uplink_bits = config.uplink_bits
        self._patterns: list[NDArray[np.uint16] | None] = [None] * num_episodes
        self._addresses = np.zeros(num_episodes, dtype=np.uint64)  # of _patterns, which keep the memory alive
        self._num_rows = np.zeros(num_episodes, dtype=np.int64)
        self._recent: dict[int, tuple[NDArray[np.uint16], int]] = {}  # patterns by trajectory, with their address
        self.state = np.zeros(num_episodes, dtype=STATE_DTYPE)
        self.rates = np.zeros((num_episodes, config.deadline))
        self.device = np.zeros((num_episodes, 0 if source is None else config.latent_dim), dtype=np.float32)

    def __len__(self) -> int:
        return self.state.size

    def __getstate__(self) -> dict[str, Any]:
        # Views of mapped files do not travel; they are looked up again from the source.
        return {**self.__dict__, "_patterns": None, "_addresses": None, "_recent": {}}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)
        self._patterns = [None] * len(self)
        self._addresses = np.zeros(len(self), dtype=np.uint64)
        if self._source is not None:
            for i in np.flatnonzero(self.state["slot"]):
                self._look_up_patterns(int(i), int(self.state["trajectory"][i]))

    trajectory = _field_of_state("trajectory", "Trajectory index, int64 (N,).")
    latent_mse = _field_of_state("latent_mse", "(1/M)‖ŷ − x_0‖² of what each device holds (N,).")
    illegal = _field_of_state("illegal", "Whether the last :meth:`advance` met an illegal TRANSMIT, bool (N,).")
    delivered = _field_of_state("delivered", "Whether a delivery completed in the last :meth:`advance`, bool (N,).")

    def _look_up_patterns(self, i: int, trajectory: int) -> None:
        """Note where the float16 patterns of what episode ``i`` sends are, (T+1, M) or (T, M).

        The kernels are given raw addresses, which keep nothing alive: ``_patterns[i]`` does, for as long as the
        episode runs. It is a view of the source's mapped file, or a contiguous copy.
        """
        found = self._recent.get(trajectory)
        if found is None:
            assert self._source is not None
            payload = self._source.payload(trajectory, self.config.payload)
            patterns = np.ascontiguousarray(payload.reshape(len(payload), -1)).view(np.uint16)
            if len(self._recent) >= _MOST_RECENT:
                self._recent.clear()
            found = self._recent[trajectory] = (patterns, patterns.ctypes.data)
        self._patterns[i], self._addresses[i] = found
        self._num_rows[i] = len(found[0])

    def begin(
        self,
        selected: int | Sequence[int],
        trajectories: int | NDArray[np.int64],
        rates: NDArray[np.float64] | Sequence[float],
        *,
        skip_forced_slots: bool = False,
    ) -> None:
        """Begin episodes anew, one or several.

        Args:
            selected: which of the N, an index or (n,).
            trajectories: their indices in the source, one or (n,).
            rates: bits per slot (T_d,) or (n, T_d).
            skip_forced_slots: run to the first slot in which TRANSMIT is legal, or else to the last slot.
        """
        chosen = np.array(selected, dtype=np.int64, ndmin=1)
        trajectories = np.array(trajectories, dtype=np.int64, ndmin=1)
        self.rates[chosen] = rates
        latent_mse = np.full(chosen.size, np.nan)
        first_device_step = self.config.first_device_step
        if self._source is not None:
            for i, trajectory in zip(chosen.tolist(), trajectories.tolist(), strict=True):
                self._look_up_patterns(i, trajectory)
            kernels.begin_batch(chosen, self._addresses, self._num_rows, first_device_step, self.device, latent_mse)
        for name, values in (("trajectory", trajectories), ("latent_mse", latent_mse), ("previous_mse", latent_mse)):
            self.state[name][chosen] = values
        uplink_bits = self._uplink_bits
        _begin(self.state, self.rates, chosen, uplink_bits, first_device_step, *self._system, skip_forced_slots)
        self._score_against_full_runs(chosen)

    def _score_against_full_runs(self, selected: NDArray[np.int64]) -> None:
        """Compare what the selected devices hold with the x_0 of the full runs, where the source has these."""
        if self._source is None or not self.has_full:
            return
        for i in selected.tolist():
            clean = self._source.full_latent(int(self.state["trajectory"][i])).reshape(-1).view(np.uint16)
            self.state["full_latent_mse"][i] = kernels.mean_square_error(self.device[i], clean)

    def advance(self, actions: NDArray[np.int64], *, until_decision: bool = False) -> int:
        """Act, let the slot's bits flow, end the slot; then carry out the deliveries that completed.

        An illegal TRANSMIT is a WAIT, and marked in :attr:`illegal`. Finished episodes stay as they are.

        Args:
            actions: 0 = WAIT, i = TRANSMIT(bit_depths[i−1]), -1 = leave this episode as it is; int64 (N,).
            until_decision: go on through slots in which only WAIT is legal.

        Returns:
            The number of deliveries.
        """
        deliveries: int = _advance(
            self.state,
            self.rates,
            actions,
            self._bit_depths,
            self._message_bits,
            self._first_message_bits,
            *self._system,
            until_decision,
        )
        if deliveries:
            self.coder.deliver_batch(self.state, self._addresses, self.device)
            self._score_against_full_runs(np.flatnonzero(self.state["delivered"]))
        return deliveries

    def action_mask(self) -> NDArray[np.int8]:
        """Which actions are legal now, int8 (N, 1 + |𝓑|)."""
        mask = np.ones((len(self), self.config.num_actions), dtype=np.int8)
        mask[:, 1:] = self.state["legal"][:, None]
        return mask

    def legal_actions(self) -> NDArray[np.bool_]:
        """:meth:`action_mask` as bool (N, 1 + |𝓑|)."""
        return self.action_mask().view(np.bool_)

    def finished(self) -> NDArray[np.bool_]:
        """Which episodes are past their last slot, bool (N,)."""
        finished: NDArray[np.bool_] = self.state["slot"] > self.config.deadline
        return finished

    def begun(self) -> bool:
        """Whether every episode has begun."""
        return bool((self.state["slot"] > 0).all())

    def remaining_bits(self) -> NDArray[np.float64]:
        """Bits of the message in flight that are still to flow, the prompt included; 0 = idle (N,)."""
        remaining: NDArray[np.float64] = self.state["message_size"] - self.state["message_sent"]
        return remaining
