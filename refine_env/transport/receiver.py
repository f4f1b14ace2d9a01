"""The device's end of a connection."""

from __future__ import annotations

import json
import socket

import numpy as np

from refine_env._validation import check_integer, check_positive
from refine_env.coding import Coder, Message
from refine_env.coding.bitstream import HEADER_BYTES, MAX_LATENT_DIM, MAX_STEP, payload_bytes
from refine_env.config import SystemConfig
from refine_env.errors import BitstreamError, TransportError, printable
from refine_env.transport import frames
from refine_env.transport.frames import Connection, Delivery, FrameKind, Reception

__all__ = ["DEFAULT_EPISODE_TIMEOUT", "DEFAULT_MAX_LATENT_DIM", "DEFAULT_MAX_NUM_STEPS", "Receiver"]

DEFAULT_MAX_LATENT_DIM = 1 << 20
"""M that a device takes: 64 times Stable Diffusion's; at the device one dimension takes about 40 bytes."""

DEFAULT_MAX_NUM_STEPS = 1000
"""T that a device takes, the length of the usual training schedules; a coder's tables have (T+1)² entries."""

DEFAULT_EPISODE_TIMEOUT = 600.0
"""Seconds that an episode may take at a device, where the frames of a usual one take less than one."""

_MAX_SYSTEM_BYTES = 1 << 22  # second moments of 400 steps; JSON takes up to 30 times its length in memory


class Receiver:
    """The device's end: listens, and decodes one episode after the other. Close it, or use it in a ``with`` block.

    Args:
        host: address to listen at.
        port: 0 takes a free one, see :attr:`address`.
        timeout: seconds to wait for a sender, and then for each of its frames, before giving up.
        episode_timeout: seconds that an episode may take from the first connection to the answer.
        max_latent_dim: M that is taken; memory and work of an episode grow with it.
        max_num_steps: T that is taken; memory grows with its square.

    Raises:
        ConfigurationError: if a time is not > 0, or the port or another number is none.
        TransportError: if the address cannot be listened at.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        timeout: float = 10.0,
        episode_timeout: float = DEFAULT_EPISODE_TIMEOUT,
        max_latent_dim: int = DEFAULT_MAX_LATENT_DIM,
        max_num_steps: int = DEFAULT_MAX_NUM_STEPS,
    ) -> None:
        self.timeout = frames.check_timeout(timeout)
        self.episode_timeout = check_positive(
            "episode_timeout", episode_timeout, advice="Give seconds, for example 600."
        )
        self.max_latent_dim = check_integer(
            "max_latent_dim", max_latent_dim, 1, MAX_LATENT_DIM, advice="Give M of the largest latents to take."
        )
        self.max_num_steps = check_integer(
            "max_num_steps", max_num_steps, 1, MAX_STEP, advice="Give T of the longest schedule to take."
        )
        check_integer("port", port, 0, frames.MAX_PORT, advice="0 takes a free one.")
        try:
            self._socket = socket.create_server((host, port))
        except (OSError, UnicodeError) as error:
            raise TransportError(
                f"`host` and `port` must be an address to listen at, got {host}:{port} ({error}). "
                "Choose another; port 0 takes a free one."
            ) from None
        self._socket.settimeout(self.timeout)

    @property
    def address(self) -> tuple[str, int]:
        """The address (host, port) at which it listens."""
        host, port = self._socket.getsockname()[:2]
        return str(host), int(port)

    def receive(self) -> Reception:
        """Wait for a sender, and play the device for one episode.

        Raises:
            TransportError: if none comes, or it takes too long, hangs up, describes a system that is none or too
                large, or sends anything else but the protocol.
            BitstreamError: if it sends a message that is none, or does not fit what the device holds.
            MissingExtraError: if it is to entropy-code, and the extra ``entropy`` is not installed.
        """
        with frames.transport_errors("A server", self.timeout):
            accepted, _ = self._socket.accept()
        with accepted:
            return self._play(Connection(accepted, "The server", self.timeout, self.episode_timeout))

    def _play(self, connection: Connection) -> Reception:
        config, coder = self._read_system(connection.read(FrameKind.SYSTEM, 1, _MAX_SYSTEM_BYTES)[1])
        _, noise = connection.read(FrameKind.NOISE, 2 * config.latent_dim, 2 * config.latent_dim)
        codec = config.make_codec(np.frombuffer(noise, dtype=">f2").astype(np.float16), coder)
        largest = HEADER_BYTES + max(
            config.name_bytes + coder.side_bytes(bits) + payload_bytes(config.latent_dim, bits)
            for bits in config.bit_depths
        )
        buffer = bytearray()
        deliveries: list[Delivery] = []
        slot = 0
        while slot < config.deadline:
            last = slot
            slot, piece = connection.read(FrameKind.SLOT, 0, largest - len(buffer))
            if not last < slot <= config.deadline:
                raise TransportError(
                    f"The slot of a frame must be in {last + 1} … {config.deadline}, got {slot}. Send every slot once."
                )
            buffer += piece
            length = Message.length(bytes(buffer[:HEADER_BYTES])) if len(buffer) >= HEADER_BYTES else largest
            if length > largest:
                raise BitstreamError(
                    f"A message must have at most {largest} bytes in this system, got {length}. {frames.SAME_VERSION}"
                )
            if len(buffer) >= length:
                message = Message.from_bytes(bytes(buffer))
                codec.decompress(message)
                deliveries.append(Delivery(slot, message.step, message.bits, len(buffer)))
                buffer.clear()
        connection.write(FrameKind.DIGEST, slot, frames.latent_digest(codec.device))
        return Reception.of(codec, deliveries, config)

    def _read_system(self, data: bytes) -> tuple[SystemConfig, Coder]:
        """Read the system that a sender describes, and build its coder, which happens only within the limits."""
        try:
            system = json.loads(data)
            protocol, values = system["protocol"], system["config"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise TransportError(
                f"The system must be a JSON object with `protocol` and `config`, got {data[:40]!r} "
                f"({type(error).__name__}). {frames.SAME_VERSION}"
            ) from None
        if protocol != frames.PROTOCOL_VERSION:
            raise TransportError(
                f"`protocol` must be {frames.PROTOCOL_VERSION}, got {printable(repr(protocol), 40)}. "
                f"{frames.SAME_VERSION}"
            )
        try:
            with np.errstate(over="raise", divide="raise", invalid="raise"):  # numbers that no system has
                config = SystemConfig.from_dict(values)
                for name, value in (("latent_dim", config.latent_dim), ("num_steps", config.num_steps)):
                    limit = getattr(self, f"max_{name}")
                    if value > limit:
                        raise TransportError(
                            f"`{name}` must be at most {limit} at this device, got {printable(value, 40)}. "
                            f"Raise the receiver's `max_{name}` if it is meant to be so large."
                        )
                return config, config.make_coder()
        except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
            raise TransportError(
                f"`config` must describe a system, got one that does not ({printable(error)}). {frames.SAME_VERSION}"
            ) from None

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
