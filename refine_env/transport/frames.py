"""What both ends share: the frames on a connection, their kinds and checks, and the outcome of an episode."""

from __future__ import annotations

import contextlib
import hashlib
import math
import socket
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from refine_env._validation import check_positive
from refine_env.coding import RefinementCodec
from refine_env.coding.bitstream import latent_bytes
from refine_env.config import SystemConfig
from refine_env.errors import ConfigurationError, TransportError

__all__ = [
    "DIGEST_BYTES",
    "MAX_PORT",
    "PROTOCOL_VERSION",
    "SAME_VERSION",
    "Connection",
    "Delivery",
    "FrameKind",
    "Reception",
    "check_timeout",
    "latent_digest",
    "transport_errors",
]

PROTOCOL_VERSION = 2
MAX_PORT = 65535
DIGEST_BYTES = hashlib.sha256().digest_size
SAME_VERSION = "Run the same version of refine-env at both ends."
"""What to do where the two ends disagree."""

_FRAME = struct.Struct(">BII")  # kind, slot, length of the content
_CHECKSUM = struct.Struct(">I")  # CRC-32 of these three and the content, which follows
_BLOCK_BYTES = 1 << 20
_MAX_TIMEOUT = 1e6  # seconds; the system's calls count milliseconds in 32 bits


class FrameKind(IntEnum):
    """What a frame carries."""

    SYSTEM = 1
    NOISE = 2
    SLOT = 3
    DIGEST = 4

    def __str__(self) -> str:
        return f"{self.value} ({self.name.lower()})"


class Delivery(NamedTuple):
    """A delivery that completed.

    Attributes:
        slot: n in whose course its last bit came.
        step: t.
        bits: b.
        num_bytes: length of the message, its header included.
    """

    slot: int
    step: int
    bits: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Reception:
    """The outcome of an episode at the device.

    Attributes:
        latent: ŷ, what the device holds at the deadline, float32 (M,).
        device_step: t_p; T = nothing was delivered.
        device_bits: bit depth of the last delivery, 0 = none.
        deliveries: in order.
        config: the system, as the sender described it.
    """

    latent: NDArray[np.float32]
    device_step: int
    device_bits: int
    deliveries: tuple[Delivery, ...]
    config: SystemConfig

    @classmethod
    def of(cls, codec: RefinementCodec, deliveries: Sequence[Delivery], config: SystemConfig, **more: Any) -> Self:
        """Make the outcome of an episode from the codec at its end; ``more`` are the attributes of a subclass."""
        return cls(
            latent=codec.device,
            device_step=codec.device_step,
            device_bits=codec.device_bits,
            deliveries=tuple(deliveries),
            config=config,
            **more,
        )


class Connection:
    """A connection that carries frames.

    Args:
        connection: a connected socket.
        peer: who is at the other end, for messages.
        timeout: seconds that a whole frame may take.
        episode_timeout: seconds that all of them may take.
    """

    def __init__(self, connection: socket.socket, peer: str, timeout: float, episode_timeout: float = math.inf) -> None:
        self._socket = connection
        self._peer = peer
        self._timeout = timeout
        self._episode_timeout = episode_timeout
        self._end = time.monotonic() + episode_timeout
        with contextlib.suppress(OSError):  # from a peer that has hung up already: reading will tell
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def write(self, kind: FrameKind, slot: int, content: bytes) -> None:
        """Send a frame.

        Raises:
            TransportError: if the peer does not take it in time, or has hung up.
        """
        with transport_errors(self._peer, self._timeout):
            self._socket.settimeout(self._time_left(time.monotonic() + self._timeout))
            front = _FRAME.pack(kind, slot, len(content))
            self._socket.sendall(front + _CHECKSUM.pack(zlib.crc32(content, zlib.crc32(front))) + content)

    def read(self, kind: FrameKind, least: int, most: int) -> tuple[int, bytes]:
        """Read slot and content of the next frame, which must be of that kind and ``least`` … ``most`` bytes long.

        Raises:
            TransportError: if it is another frame, does not come in time, or was damaged on the way.
        """
        until = time.monotonic() + self._timeout
        front = self._read_exactly(_FRAME.size, until)
        found, slot, length = _FRAME.unpack(front)
        if found != kind:
            raise TransportError(
                f"The next frame must be of kind {kind}, got {found}. "
                "Connect a refine-env sender to a refine-env receiver."
            )
        if not least <= length <= most:
            span = f"{most}" if least == most else f"{least} … {most}"
            raise TransportError(f"A frame of kind {kind} must have {span} bytes here, got {length}. {SAME_VERSION}")
        (checksum,) = _CHECKSUM.unpack(self._read_exactly(_CHECKSUM.size, until))
        content = self._read_exactly(length, until)
        computed = zlib.crc32(content, zlib.crc32(front))
        if computed != checksum:
            raise TransportError(
                f"A frame of kind {kind} must have the CRC-32 that it says, {checksum:#010x}, got {computed:#010x}. "
                "Start again."
            )
        return slot, content

    def _read_exactly(self, length: int, until: float) -> bytes:
        data = bytearray()
        with transport_errors(self._peer, self._timeout):
            while len(data) < length:
                self._socket.settimeout(self._time_left(until))
                try:
                    block = self._socket.recv(min(length - len(data), _BLOCK_BYTES))
                except TimeoutError:
                    continue  # _time_left then says which of the two limits it was
                if not block:
                    raise ConnectionResetError("end of stream")
                data += block
        return bytes(data)

    def _time_left(self, until: float) -> float:
        """Return the seconds to that time, or to the end of the episode if that is earlier."""
        now = time.monotonic()
        if now >= self._end:
            raise TransportError(
                f"{self._peer} must complete the episode within {self._episode_timeout:g} s, got one that goes on. "
                "Allow a longer episode_timeout if it is meant to."
            )
        if now >= until:
            raise TimeoutError
        return min(until, self._end) - now


def latent_digest(latent: NDArray[np.float32]) -> bytes:
    """Compute the SHA-256 of a latent, by which both ends find out whether they hold the same."""
    return hashlib.sha256(latent_bytes(latent)).digest()


def check_timeout(timeout: float) -> float:
    """Return ``timeout`` [s] if a socket can wait so long; raise ConfigurationError otherwise."""
    advice = "Give seconds, for example 10."
    if check_positive("timeout", timeout, advice=advice) > _MAX_TIMEOUT:
        raise ConfigurationError(f"`timeout` must be at most {_MAX_TIMEOUT:.0f} s, 11 days, got {timeout!r}. {advice}")
    return float(timeout)


@contextlib.contextmanager
def transport_errors(peer: str, timeout: float) -> Iterator[None]:
    """Turn what a socket raises into a TransportError of one sentence."""
    try:
        yield
    except TransportError:  # a sentence already
        raise
    except TimeoutError:
        raise TransportError(
            f"{peer} must be heard of within {timeout:g} s, got nothing complete. Start it, or allow a longer timeout."
        ) from None
    except ConnectionRefusedError:
        raise TransportError(f"{peer} must be listening, got a refusal. Start it first.") from None
    except ConnectionError:
        raise TransportError(
            f"{peer} must stay connected to the end of the episode, got a closed connection. "
            "See what it says, and start again."
        ) from None
    except (OSError, UnicodeError) as error:  # no such host, no route
        raise TransportError(f"{peer} must be reachable, got {error}. Check host and port.") from None
