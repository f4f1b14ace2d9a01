"""The server's end of a connection."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium as gym

from refine_env._validation import check_integer
from refine_env.coding import Message
from refine_env.coding.bitstream import HEADER_BYTES
from refine_env.env import LatentRefinementEnv
from refine_env.errors import ConfigurationError, TransportError
from refine_env.evaluation import EpisodeStep, Policy, play_episode
from refine_env.transport import frames
from refine_env.transport.frames import Connection, Delivery, FrameKind, Reception

__all__ = ["Sender", "Transmission"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Transmission(Reception):
    """The outcome of an episode at the server, with what the device cannot know.

    Attributes:
        trajectory: index in the cache.
        latent_mse: (1/M)‖ŷ − x_0‖².
    """

    trajectory: int
    latent_mse: float


class Sender:
    """The server's end: plays episodes of an environment, and sends what their deliveries consist of.

    The environment's own dynamics decide what flows when; with ``decision_epochs=True`` one frame stands for all the
    slots of a step.

    Args:
        env: the environment, from ``gymnasium.make``.
        policy: what acts in it, for example an agent of ``agents``.
        timeout: seconds to wait for the device before giving up.

    Raises:
        ConfigurationError: if ``env`` is another environment, the policy was made for another system, or ``timeout``
            is not > 0.
    """

    def __init__(self, env: gym.Env[Any, Any], policy: Policy, *, timeout: float = 10.0) -> None:
        if not isinstance(env.unwrapped, LatentRefinementEnv):
            raise ConfigurationError(
                f"`env` must be a LatentRefinementEnv, got {type(env.unwrapped).__name__}. "
                'Make it with gymnasium.make("refine_env/LatentRefinement-v0").'
            )
        self.env = env
        self.policy = policy
        self.config = env.unwrapped.config
        self._cache = env.unwrapped.cache
        self._episodes = env.unwrapped._process.episodes
        self.timeout = frames.check_timeout(timeout)
        policy.check_config(self.config)

    def send(
        self, address: tuple[str, int], *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> Transmission:
        """Play one episode with the device at that address.

        Args:
            address: (host, port) of a receiver.
            seed: of the episode, see ``env.reset``.
            options: of the episode, see ``env.reset``.

        Raises:
            TransportError: if the device cannot be reached, takes too long, hangs up, answers anything but the
                protocol, or ends up with another latent than the simulator.
            ConfigurationError: if an option is unknown or out of range, or the port is none.
        """
        check_integer("port", address[1], 1, frames.MAX_PORT, advice="Give the port at which the receiver listens.")
        episode = play_episode(self.env, self.policy, seed=seed, options=options)
        start = next(episode)  # what is wrong with the arguments is said before the device is called
        peer = f"The device at {address[0]}:{address[1]}"
        with frames.transport_errors(peer, self.timeout):
            connected = socket.create_connection(address, timeout=self.timeout)
        with connected:
            return self._play(Connection(connected, peer, self.timeout), start, episode)

    def _play(self, connection: Connection, start: EpisodeStep, episode: Iterator[EpisodeStep]) -> Transmission:
        """Send the system, and then in every slot what flows of the messages that the policy chooses."""
        config, trajectory = self.config, start.info["trajectory"]
        latents = self._cache.payload(trajectory, config.payload)
        initial = config.initial(latents)
        codec = config.make_codec(initial)
        system = {"protocol": frames.PROTOCOL_VERSION, "config": config.to_dict()}
        connection.write(FrameKind.SYSTEM, 0, json.dumps(system).encode())
        connection.write(FrameKind.NOISE, 0, initial.astype(">f2").tobytes())
        message: Message | None = None
        data, sent = b"", 0  # the message in flight, and how much of it has gone out
        deliveries: list[Delivery] = []
        info = start.info
        for observation, info, action, before in episode:
            slot = observation["slot"] - 1
            if action and before and not info["illegal_action"]:
                step = before["server_step"]
                message = codec.compress(latents[step], step, config.bit_depths[action - 1])
                data, sent = bytes(message), 0
            piece = b""
            if message is not None:
                # The header costs no bits, and comes with the first piece; the last byte comes with the last bit.
                flowed = HEADER_BYTES + int((message.num_bits - self._episodes.remaining_bits()[0]) // 8)
                piece = data[sent:] if info["delivered"] else data[sent : min(flowed, len(data) - 1)]
                sent += len(piece)
            connection.write(FrameKind.SLOT, slot, piece)
            if message is not None and info["delivered"]:
                codec.decompress(message)
                deliveries.append(Delivery(slot, message.step, message.bits, len(data)))
                message = None
        _, digest = connection.read(FrameKind.DIGEST, frames.DIGEST_BYTES, frames.DIGEST_BYTES)
        if digest != frames.latent_digest(self._episodes.device[0]):
            raise TransportError(
                "The device must hold the latent that the simulator says, got a digest of another. "
                + frames.SAME_VERSION
            )
        return Transmission.of(codec, deliveries, config, trajectory=trajectory, latent_mse=info["latent_mse"])
