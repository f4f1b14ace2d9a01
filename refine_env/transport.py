"""An episode over a TCP connection: a :class:`Sender` plays the server, a :class:`Receiver` the device.

The sender runs an environment with a policy. In every slot it sends the bytes of the message in flight that have flowed
by the end of the slot, so the last of them comes in the slot in which the simulator completes the delivery, and the
device decodes just then. ``docs/bitstream.md`` has the frames as a table.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import socket
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from refine_env._validation import check_integer, check_positive
from refine_env.coding import Coder, Message, RefinementCodec
from refine_env.coding.bitstream import HEADER_BYTES, MAX_LATENT_DIM, MAX_STEP, latent_bytes, payload_bytes
from refine_env.config import SystemConfig
from refine_env.env import LatentRefinementEnv
from refine_env.errors import BitstreamError, ConfigurationError, TransportError, printable
from refine_env.evaluation import Policy, reset_policy

__all__ = [
    "DEFAULT_EPISODE_TIMEOUT",
    "DEFAULT_MAX_LATENT_DIM",
    "DEFAULT_MAX_NUM_STEPS",
    "PROTOCOL_VERSION",
    "Delivery",
    "Receiver",
    "Reception",
    "Sender",
    "Transmission",
]

PROTOCOL_VERSION = 2
DEFAULT_MAX_LATENT_DIM = 1 << 20
"""M that a device takes: 64 times Stable Diffusion's; at the device one dimension takes about 40 bytes."""

DEFAULT_MAX_NUM_STEPS = 1000
"""T that a device takes, the length of the usual training schedules; a coder's tables have (T+1)² entries."""

DEFAULT_EPISODE_TIMEOUT = 600.0
"""Seconds that an episode may take at a device, where the frames of a usual one take less than one."""

_FRAME = struct.Struct(">BII")  # kind, slot, length of the content
_CHECKSUM = struct.Struct(">I")  # CRC-32 of these three and the content, which follows
_SYSTEM, _NOISE, _SLOT, _DIGEST = range(1, 5)
_NAMES = {_SYSTEM: "system", _NOISE: "noise", _SLOT: "slot", _DIGEST: "digest"}
_DIGEST_BYTES = hashlib.sha256().digest_size
_MAX_SYSTEM_BYTES = 1 << 22  # second moments of 400 steps; JSON takes up to 30 times its length in memory
_BLOCK_BYTES = 1 << 20
_MAX_PORT = 65535
_MAX_TIMEOUT = 1e6  # seconds; the system's calls count milliseconds in 32 bits
_SAME_VERSION = "Run the same version of refine-env at both ends."


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
    """What came of an episode at the device.

    Attributes:
        latent: ŷ, what the device holds at the deadline, float32 (M,).
        device_step: t_p; T = nothing was delivered.
        device_bits: bit depth of the last delivery, 0 = none.
        deliveries: in order.
        config: the system, as the sender told it.
    """

    latent: NDArray[np.float32]
    device_step: int
    device_bits: int
    deliveries: tuple[Delivery, ...]
    config: SystemConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Transmission(Reception):
    """What came of an episode at the server: also what the device cannot know.

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
        self.timeout = _check_timeout(timeout)
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
        check_integer("port", address[1], 1, _MAX_PORT, advice="Give the port at which the receiver listens.")
        observation, info = self.env.reset(seed=seed, options=options)
        peer = f"The device at {address[0]}:{address[1]}"
        with _sentences(peer, self.timeout):
            connection = socket.create_connection(address, timeout=self.timeout)
        with connection:
            return self._play(_Link(connection, peer, self.timeout), observation, info)

    def _play(self, link: _Link, observation: Mapping[str, Any], info: Mapping[str, Any]) -> Transmission:
        config = self.config
        latents = self._cache.payload(info["trajectory"], config.payload)
        initial = self._cache.initial(info["trajectory"], config.payload)
        codec = RefinementCodec(config.make_coder(), initial)
        system = {"protocol": PROTOCOL_VERSION, "config": config.to_dict()}
        link.write(_SYSTEM, 0, json.dumps(system).encode())
        link.write(_NOISE, 0, initial.astype(">f2").tobytes())
        reset_policy(self.policy, 1, self._episodes.rates)
        message: Message | None = None
        data, sent = b"", 0  # the message in flight, and how much of it has gone out
        deliveries: list[Delivery] = []
        terminated = False
        while not terminated:
            action = int(self.policy.select_action(observation, info))
            step = int(observation["server_step"])
            observation, _, terminated, _, info = self.env.step(np.int64(action))
            slot = int(observation["slot"]) - 1
            if action > 0 and not info["illegal_action"]:
                message = codec.compress(latents[step], step, config.bit_depths[action - 1])
                data, sent = bytes(message), 0
            piece = b""
            if message is not None:
                # The header costs no bits, and comes with the first piece; the last byte comes with the last bit.
                flowed = HEADER_BYTES + int((message.num_bits - self._episodes.remaining_bits()[0]) // 8)
                piece = data[sent:] if info["delivered"] else data[sent : min(flowed, len(data) - 1)]
                sent += len(piece)
            link.write(_SLOT, slot, piece)
            if message is not None and info["delivered"]:
                codec.decompress(message)
                deliveries.append(Delivery(slot, message.step, message.bits, len(data)))
                message = None
        _, digest = link.read(_DIGEST, _DIGEST_BYTES, _DIGEST_BYTES)
        if digest != _digest(self._episodes.device[0]):
            raise TransportError(
                "The device must hold the latent that the simulator says, got a digest of another. " + _SAME_VERSION
            )
        return Transmission(
            latent=codec.device,
            device_step=codec.device_step,
            device_bits=codec.device_bits,
            deliveries=tuple(deliveries),
            config=config,
            trajectory=int(info["trajectory"]),
            latent_mse=float(info["latent_mse"]),
        )


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
        self.timeout = _check_timeout(timeout)
        self.episode_timeout = check_positive(
            "episode_timeout", episode_timeout, advice="Give seconds, for example 600."
        )
        self.max_latent_dim = check_integer(
            "max_latent_dim", max_latent_dim, 1, MAX_LATENT_DIM, advice="Give M of the largest latents to take."
        )
        self.max_num_steps = check_integer(
            "max_num_steps", max_num_steps, 1, MAX_STEP, advice="Give T of the longest schedule to take."
        )
        check_integer("port", port, 0, _MAX_PORT, advice="0 takes a free one.")
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
        """(host, port) where it listens."""
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
        with _sentences("A server", self.timeout):
            connection, _ = self._socket.accept()
        with connection:
            return self._play(_Link(connection, "The server", self.timeout, self.episode_timeout))

    def _play(self, link: _Link) -> Reception:
        config, coder = self._read_system(link.read(_SYSTEM, 1, _MAX_SYSTEM_BYTES)[1])
        _, noise = link.read(_NOISE, 2 * config.latent_dim, 2 * config.latent_dim)
        codec = RefinementCodec(coder, np.frombuffer(noise, dtype=">f2").astype(np.float16))
        largest = HEADER_BYTES + max(
            coder.side_bytes(bits) + payload_bytes(config.latent_dim, bits) for bits in config.bit_depths
        )
        buffer = bytearray()
        deliveries: list[Delivery] = []
        slot = 0
        while slot < config.deadline:
            last = slot
            slot, piece = link.read(_SLOT, 0, largest - len(buffer))
            if not last < slot <= config.deadline:
                raise TransportError(
                    f"The slot of a frame must be in {last + 1} … {config.deadline}, got {slot}. Send every slot once."
                )
            buffer += piece
            length = Message.length(bytes(buffer[:HEADER_BYTES])) if len(buffer) >= HEADER_BYTES else largest
            if length > largest:
                raise BitstreamError(
                    f"A message must have at most {largest} bytes in this system, got {length}. {_SAME_VERSION}"
                )
            if len(buffer) >= length:
                message = Message.from_bytes(bytes(buffer))
                codec.decompress(message)
                deliveries.append(Delivery(slot, message.step, message.bits, len(buffer)))
                buffer.clear()
        link.write(_DIGEST, slot, _digest(codec.device))
        return Reception(
            latent=codec.device,
            device_step=codec.device_step,
            device_bits=codec.device_bits,
            deliveries=tuple(deliveries),
            config=config,
        )

    def _read_system(self, data: bytes) -> tuple[SystemConfig, Coder]:
        """The system that a sender describes, and its coder, which is built only where both are within the limits."""
        try:
            system = json.loads(data)
            protocol, values = system["protocol"], system["config"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise TransportError(
                f"The system must be a JSON object with `protocol` and `config`, got {data[:40]!r} "
                f"({type(error).__name__}). {_SAME_VERSION}"
            ) from None
        if protocol != PROTOCOL_VERSION:
            raise TransportError(
                f"`protocol` must be {PROTOCOL_VERSION}, got {printable(repr(protocol), 40)}. {_SAME_VERSION}"
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
                f"`config` must describe a system, got one that does not ({printable(error)}). {_SAME_VERSION}"
            ) from None

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Link:
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
        with contextlib.suppress(OSError):  # of a peer that has hung up again: reading will tell
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def write(self, kind: int, slot: int, body: bytes) -> None:
        with _sentences(self._peer, self._timeout):
            self._socket.settimeout(self._time_left(time.monotonic() + self._timeout))
            front = _FRAME.pack(kind, slot, len(body))
            self._socket.sendall(front + _CHECKSUM.pack(zlib.crc32(body, zlib.crc32(front))) + body)

    def read(self, kind: int, least: int, most: int) -> tuple[int, bytes]:
        """Slot and content of the next frame, which must be of that kind and ``least`` … ``most`` bytes long."""
        until = time.monotonic() + self._timeout
        front = self._read_exactly(_FRAME.size, until)
        found, slot, length = _FRAME.unpack(front)
        if found != kind:
            raise TransportError(
                f"The next frame must be of kind {kind} ({_NAMES[kind]}), got {found}. "
                "Connect a refine-env sender to a refine-env receiver."
            )
        if not least <= length <= most:
            span = f"{most}" if least == most else f"{least} … {most}"
            raise TransportError(
                f"A frame of kind {kind} ({_NAMES[kind]}) must have {span} bytes here, got {length}. {_SAME_VERSION}"
            )
        (checksum,) = _CHECKSUM.unpack(self._read_exactly(_CHECKSUM.size, until))
        body = self._read_exactly(length, until)
        computed = zlib.crc32(body, zlib.crc32(front))
        if computed != checksum:
            raise TransportError(
                f"A frame of kind {kind} ({_NAMES[kind]}) must have the CRC-32 that it says, {checksum:#010x}, got "
                f"{computed:#010x}. Start again."
            )
        return slot, body

    def _read_exactly(self, length: int, until: float) -> bytes:
        data = bytearray()
        with _sentences(self._peer, self._timeout):
            while len(data) < length:
                self._socket.settimeout(self._time_left(until))
                try:
                    block = self._socket.recv(min(length - len(data), _BLOCK_BYTES))
                except TimeoutError:
                    continue  # to which of the two limits it was
                if not block:
                    raise ConnectionResetError("end of stream")
                data += block
        return bytes(data)

    def _time_left(self, until: float) -> float:
        """Seconds to that time, or to the end of the episode if that is earlier."""
        now = time.monotonic()
        if now >= self._end:
            raise TransportError(
                f"{self._peer} must complete the episode within {self._episode_timeout:g} s, got one that goes on. "
                "Allow a longer episode_timeout if it is meant to."
            )
        if now >= until:
            raise TimeoutError
        return min(until, self._end) - now


def _digest(latent: NDArray[np.float32]) -> bytes:
    return hashlib.sha256(latent_bytes(latent)).digest()


def _check_timeout(timeout: float) -> float:
    advice = "Give seconds, for example 10."
    if check_positive("timeout", timeout, advice=advice) > _MAX_TIMEOUT:
        raise ConfigurationError(f"`timeout` must be at most {_MAX_TIMEOUT:.0f} s, 11 days, got {timeout!r}. {advice}")
    return float(timeout)


@contextlib.contextmanager
def _sentences(peer: str, timeout: float) -> Iterator[None]:
    """Turn what a socket raises into one sentence."""
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
