"""The past of an episode, slot by slot, which is all that a frame may show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refine_env.config import SystemConfig
from refine_env.dynamics.simulator import EpisodeBatch, LatentSource

__all__ = ["EpisodeHistory", "Message"]


@dataclass(frozen=True)
class Message:
    """A message on the link.

    Attributes:
        step: the step t of the latent that it carries; T for the prompt.
        bits: the bit depth of that latent; 0 for the prompt.
        first_slot: the slot in which it began.
        last_slot: the slot in which it was through; None while it is on its way.
    """

    step: int
    bits: int
    first_slot: int
    last_slot: int | None = None


class EpisodeHistory:
    """The past of one episode, reconstructed from its actions alone.

    Noting an action costs next to nothing. Whoever reads the past first calls :meth:`catch_up`, which plays the
    episode over again, one slot at a time, on the same dynamics. So an episode of which no frame is asked for is not
    played twice, and slots that an environment runs through (``decision_epochs``) are here like all others.

    Args:
        config: the system.
        source: the cache that the latents come from.

    Attributes:
        slot: the current slot n; T_d + 1 after the last slot.
        trajectory: the index of the trajectory in the source.
        messages: the messages in the order in which they began, the prompt first.
        latent_mse: the error (1/M)‖ŷ − x_0‖² at the device in slots 1 … n; the last entry is the current one.
    """

    def __init__(self, config: SystemConfig, source: LatentSource) -> None:
        self.config = config
        self._source = source
        self._replay: EpisodeBatch | None = None
        self._rates = np.zeros(config.deadline)
        self._pending: list[tuple[int, int]] = []
        self._fresh = False
        self.slot = 0
        self.trajectory = 0
        self.messages: list[Message] = []
        self.latent_mse: list[float] = []

    def begin(self, trajectory: int, rates: NDArray[np.float64], slot: int) -> None:
        """Begin a new episode.

        Args:
            trajectory: the index of the trajectory in the source.
            rates: bits per slot (T_d,).
            slot: n, later than 1 where forced slots have been run through.
        """
        self.trajectory = trajectory
        self._rates = rates.copy()
        self._fresh = True
        self._pending = [(0, slot)] if slot > 1 else []

    def note(self, action: int, slot: int) -> None:
        """Note an action that was taken, and the slot that the episode has reached since."""
        self._pending.append((action, slot))

    def catch_up(self) -> None:
        """Bring the attributes up to date."""
        if self._replay is None:
            self._replay = EpisodeBatch(self.config, self._source, 1)
        if self._fresh:
            self._fresh = False
            self._replay.begin(0, self.trajectory, self._rates)
            self.slot = 1
            self.messages = [Message(step=self.config.num_steps, bits=0, first_slot=1)]
            self.latent_mse = [float(self._replay.latent_mse[0])]
        for action, slot in self._pending:
            self._pass_slot(self._replay, action)
            while self.slot < slot:
                self._pass_slot(self._replay, 0)
        self._pending.clear()

    def _pass_slot(self, replay: EpisodeBatch, action: int) -> None:
        state = replay.state[0]
        idle, deliveries = state["message_size"] == 0.0, int(state["num_deliveries"])
        replay.advance(np.array([action]))
        delivered = state["num_deliveries"] > deliveries
        on_its_way = state["message_size"] > 0.0
        if idle and (delivered or on_its_way):
            bits = state["device_bits"] if delivered else state["message_bits"]
            self.messages.append(Message(step=int(state["message_step"]), bits=int(bits), first_slot=self.slot))
        last = self.messages[-1]
        if last.last_slot is None and not on_its_way:
            self.messages[-1] = Message(last.step, last.bits, last.first_slot, last_slot=self.slot)
        self.slot = int(state["slot"])
        self.latent_mse.append(float(replay.latent_mse[0]))

    @property
    def rates(self) -> NDArray[np.float64]:
        """The rates [bit per latent dimension] of slots 1 … n: the current slot is included, later ones never are."""
        return self._rates[: self.slot] / self.config.latent_dim

    @property
    def in_flight(self) -> Message | None:
        """The message on the link; None if the link is idle."""
        return self.messages[-1] if self.messages[-1].last_slot is None else None

    @property
    def progress(self) -> float:
        """The part of the message in flight that has arrived, 0 … 1; 0 if the link is idle."""
        state = self._state
        return float(state["message_sent"] / state["message_size"]) if state["message_size"] > 0.0 else 0.0

    @property
    def deliveries(self) -> list[Message]:
        """The messages that have been delivered; the prompt is not among them."""
        return [message for message in self.messages if message.bits > 0 and message.last_slot is not None]

    @property
    def uplink_slots(self) -> int | None:
        """T_ul, the slots that the prompt took; None while it is on its way."""
        return self.messages[0].last_slot

    @property
    def server_step(self) -> int:
        """t(n), the step of the newest latent at the server."""
        return int(self._state["server_step"])

    @property
    def device_latent(self) -> NDArray[np.float32]:
        """The latent that the device holds, float32 (M,)."""
        assert self._replay is not None
        device: NDArray[np.float32] = self._replay.device[0]
        return device

    @property
    def _state(self) -> Any:
        assert self._replay is not None
        return self._replay.state[0]
