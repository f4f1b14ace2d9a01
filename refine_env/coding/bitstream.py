"""Deliveries as bytes: what the server sends, and what the device makes of it.

A message is a header, the coder's side information, and the payload: M indices of b bits, most significant bit
first, in ⌈M·b/8⌉ bytes, or their entropy code in fewer. ``docs/bitstream.md`` has the format as a table.
"""

from __future__ import annotations

import hashlib
import math
import operator
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refine_env._compiled import plain
from refine_env._validation import check_integer
from refine_env.coding import kernels
from refine_env.coding.entropy import compress_indices, decompress_indices
from refine_env.coding.kernels import Transmission
from refine_env.coding.lloyd_max import LOSSLESS_BITS
from refine_env.coding.refinement import Code, Coder
from refine_env.errors import BitstreamError, ConfigurationError, import_extra
from refine_env.model.rules import is_lossy, may_transmit

__all__ = [
    "FORMAT_VERSIONS",
    "HEADER_BYTES",
    "MAX_LATENT_DIM",
    "MAX_STEP",
    "Message",
    "RefinementCodec",
    "latent_bytes",
    "pack_indices",
    "payload_bytes",
    "unpack_indices",
]

FORMAT_VERSIONS = (1, 2)
"""The versions of messages with M indices of b bits, and of messages with entropy-coded indices."""

_MAGIC = b"RFNL"
_HEADER = struct.Struct(">4sBBHHHIIII")  # network byte order, see Message
_CHECKSUM = struct.Struct(">I")
HEADER_BYTES = _HEADER.size
"""Length of a message before its side information and payload."""

MAX_STEP = 0xFFFF
"""Largest step that a header can number."""

MAX_LATENT_DIM = 2**31 - 1
"""Largest M of a message: its 2·M bytes without loss still fit the header's field."""

_MAX_SIDE_BYTES = 0xFFFF
_DAMAGED = "Send the message again."


def payload_bytes(latent_dim: int, bits: int) -> int:
    """⌈M·b/8⌉."""
    return (latent_dim * bits + 7) // 8


def latent_bytes(latent: NDArray[np.float32]) -> bytes:
    """A decoded latent as bytes, float32 in network byte order: what checksums of it are taken over."""
    return latent.astype(">f4").tobytes()


def pack_indices(indices: NDArray[np.uint16], bits: int) -> bytes:
    """Indices of b bits one after the other, most significant bit first; the last byte ends in zeros.

    Args:
        indices: each below 2^b, uint16 (M,).
        bits: b, 1 … 16.

    Returns:
        ⌈M·b/8⌉ bytes.

    Raises:
        BitstreamError: if an index does not fit b bits.
        ConfigurationError: if ``bits`` is not in 1 … 16.
    """
    check_integer("bits", bits, 1, LOSSLESS_BITS, advice="Give a bit depth, for example 3.")
    if indices.size and int(indices.max()) >> bits:
        raise BitstreamError(
            f"`indices` must be below 2^{bits}, got {int(indices.max())}. Pack with the bit depth of their quantizer."
        )
    packed = np.empty(payload_bytes(indices.size, bits), dtype=np.uint8)
    kernels.pack_bits(indices, bits, packed)
    return packed.tobytes()


def unpack_indices(payload: bytes, bits: int, latent_dim: int) -> NDArray[np.uint16]:
    """The indices that :func:`pack_indices` packed, uint16 (M,).

    Args:
        payload: ⌈M·b/8⌉ bytes.
        bits: b, 1 … 16.
        latent_dim: M.

    Raises:
        BitstreamError: if the payload is not that long, or its last byte does not end in zeros.
        ConfigurationError: if ``bits`` is not in 1 … 16.
    """
    check_integer("bits", bits, 1, LOSSLESS_BITS, advice="Give a bit depth, for example 3.")
    _check_payload(payload, bits, latent_dim)
    indices = np.empty(latent_dim, dtype=np.uint16)
    kernels.unpack_bits(np.frombuffer(payload, dtype=np.uint8), bits, indices)
    return indices


def _check_payload(payload: bytes, bits: int, latent_dim: int) -> None:
    size = payload_bytes(latent_dim, bits)
    if len(payload) != size:
        raise BitstreamError(
            f"`payload` must have {size} bytes for {latent_dim} dimensions at {bits} bits, got {len(payload)}. "
            f"{_DAMAGED}"
        )
    padding = 8 * size - latent_dim * bits
    if padding and payload[-1] & ((1 << padding) - 1):
        raise BitstreamError(
            f"`payload` must end in {padding} zero bits after {latent_dim} indices of {bits} bits, got the last byte "
            f"{payload[-1]:#04x}. {_DAMAGED}"
        )


@dataclass(frozen=True, kw_only=True)
class Message:
    """One delivery, ``bytes(message)`` on the wire and :meth:`from_bytes` back.

    The paper counts M·b bits and lets b be signaled for nothing ([K] §II-A), so the simulator counts payload and side
    information, and the header is signaling.

    Args:
        step: t, what is sent.
        device_step: t_p, what it refines.
        bits: b.
        latent_dim: M.
        latent_crc: CRC-32 of :func:`latent_bytes` of x̂_t, which the device must end up with.
        payload: M packed indices, ⌈M·b/8⌉ bytes; or their entropy code, fewer.
        side: the coder's side information; in the first message to a device that has the midpoint that generation
            started from, the midpoint's name comes before it.
        entropy_coded: whether the payload is.

    Raises:
        BitstreamError: if a value is out of range, or the payload cannot be that of so many indices.
    """

    step: int
    device_step: int
    bits: int
    latent_dim: int
    latent_crc: int
    payload: bytes
    side: bytes = b""
    entropy_coded: bool = False

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("bits", self.bits, 1, LOSSLESS_BITS),
            ("latent_dim", self.latent_dim, 1, MAX_LATENT_DIM),
            ("step", self.step, 0, MAX_STEP),
            ("device_step", self.device_step, 0, MAX_STEP),
            ("latent_crc", self.latent_crc, 0, 0xFFFFFFFF),
            ("side", len(self.side), 0, _MAX_SIDE_BYTES),
        ):
            if not low <= value <= high:
                raise BitstreamError(f"`{name}` of a message must be in {low} … {high}, got {value}. {_DAMAGED}")
        if not self.entropy_coded:
            _check_payload(self.payload, self.bits, self.latent_dim)
        elif self.bits == LOSSLESS_BITS or 8 * len(self.payload) >= self.latent_dim * self.bits:
            raise BitstreamError(
                f"An entropy-coded `payload` must be less than {self.latent_dim} dimensions at {self.bits} bits, below "
                f"{LOSSLESS_BITS}, got {len(self.payload)} bytes. {_DAMAGED}"
            )

    @property
    def num_bits(self) -> int:
        """Bits that the simulated link is charged: M·b or the entropy-coded payload, and the side information."""
        payload = 8 * len(self.payload) if self.entropy_coded else self.latent_dim * self.bits
        return payload + 8 * len(self.side)

    def __bytes__(self) -> bytes:
        header = _HEADER.pack(
            _MAGIC,
            FORMAT_VERSIONS[self.entropy_coded],
            self.bits,
            self.step,
            self.device_step,
            len(self.side),
            self.latent_dim,
            len(self.payload),
            self.latent_crc,
            0,  # where the checksum goes
        )
        body = self.side + self.payload
        return header[: -_CHECKSUM.size] + _CHECKSUM.pack(_checksum(header, body)) + body

    @staticmethod
    def length(header: bytes) -> int:
        """Length of the whole message that begins with these :data:`HEADER_BYTES`.

        Raises:
            BitstreamError: if they are no header of this format version.
        """
        if len(header) < HEADER_BYTES:
            raise BitstreamError(
                f"A message must have at least {HEADER_BYTES} bytes, got {len(header)}. Read on until it is complete."
            )
        magic, version, _, _, _, side, _, payload, _, _ = _HEADER.unpack(header[:HEADER_BYTES])
        if magic != _MAGIC:
            raise BitstreamError(f"A message must begin with {_MAGIC!r}, got {magic!r}. Read from where one begins.")
        if version not in FORMAT_VERSIONS:
            raise BitstreamError(
                f"A message must be of format version {' or '.join(map(str, FORMAT_VERSIONS))}, got {version}. "
                "Run the same version of refine-env at both ends."
            )
        return HEADER_BYTES + int(side) + int(payload)

    @classmethod
    def from_bytes(cls, data: bytes) -> Message:
        """The message that these bytes are.

        Raises:
            BitstreamError: if they are not exactly one undamaged message.
        """
        length = cls.length(data)
        if len(data) != length:
            raise BitstreamError(
                f"A message must have the {length} bytes that its header says, got {len(data)}. "
                "Hand over one message, whole."
            )
        _, version, bits, step, device_step, side, latent_dim, _, latent_crc, checksum = _HEADER.unpack(
            data[:HEADER_BYTES]
        )
        body = bytes(data[HEADER_BYTES:])
        computed = _checksum(data[:HEADER_BYTES], body)
        if computed != checksum:
            raise BitstreamError(
                f"A message must have the CRC-32 that its header says, {checksum:#010x}, got {computed:#010x}. "
                f"{_DAMAGED}"
            )
        return cls(
            step=step,
            device_step=device_step,
            bits=bits,
            latent_dim=latent_dim,
            latent_crc=latent_crc,
            payload=body[side:],
            side=body[:side],
            entropy_coded=version == FORMAT_VERSIONS[True],
        )


def midpoint_name(patterns: NDArray[np.uint16], num_bytes: int) -> bytes:
    """The name of a midpoint: so many bytes of the SHAKE-256 of its float16 values in network byte order.

    Args:
        patterns: of the midpoint, uint16 (M,).
        num_bytes: of the name.
    """
    return hashlib.shake_256(patterns.astype(">u2").tobytes()).digest(num_bytes)


def _checksum(header: bytes, body: bytes) -> int:
    """CRC-32 of a message, but for the header's last field, which is the checksum itself."""
    return zlib.crc32(body, zlib.crc32(header[: -_CHECKSUM.size]))


class RefinementCodec:
    """One end of the refinement link: the device, or the server's mirror of it.

    Both ends begin with the same noise. The server compresses against what the device holds; when the message is
    through, both ends decompress it, so they hold the same latent, bit for bit, and the one that
    :class:`refine_env.dynamics.simulator.EpisodeBatch` says the device holds. A message that does not get through
    changes nothing at either end.

    Where the device begins with a midpoint x_m of its own store, the first message names it, and a device that holds
    another one refuses the message.

    Args:
        coder: the refinement coder, for example ``config.make_coder()``.
        noise: what both ends begin with, float16 of any shape with M values: x_T, or 0 for the posterior mean, or x_m.
        first_step: of what both ends begin with; None: T.
        name_bytes: length of the name in the first message; 0 where it has none.

    Attributes:
        coder: the refinement coder.
        device: x̂_{t_p}, what the device holds, float32 (M,), read-only.
        device_step: t_p.
        device_bits: bit depth of the last delivery, 0 = none.
        device_error: e_p, predicted coding error of what the device holds.
        num_deliveries: how many messages it has decompressed.
        name: of what both ends began with.

    Raises:
        ConfigurationError: if the schedule has more steps than a header can number.
        BitstreamError: if ``noise`` is not finite float16.
        MissingExtraError: if the coder entropy-codes such latents, and the extra ``entropy`` is not installed.
    """

    def __init__(
        self, coder: Coder, noise: NDArray[np.float16], *, first_step: int | None = None, name_bytes: int = 0
    ) -> None:
        if coder.schedule.num_steps > MAX_STEP:
            raise ConfigurationError(
                f"`coder` must have at most {MAX_STEP} steps, got {coder.schedule.num_steps}. Use a shorter schedule."
            )
        patterns = _float16_patterns("noise", noise)
        if any(coder.entropy_coded(patterns.size, bits) for bits in coder.bit_depths):
            import_extra("constriction", "entropy")  # before anything is sent, not at the first message
        self.coder = coder
        self.device: NDArray[np.float32] = np.empty(patterns.size, dtype=np.float32)
        kernels.decode_float16(patterns, self.device)
        self.device.setflags(write=False)
        self.device_step = coder.schedule.num_steps if first_step is None else first_step
        self.device_bits = 0
        self.device_error = 0.0
        self.num_deliveries = 0
        self.name = midpoint_name(patterns, name_bytes)

    @property
    def latent_dim(self) -> int:
        """M."""
        return self.device.size

    def compress(self, latent: NDArray[np.float16], step: int, bits: int) -> Message:
        """The message that refines the latent that the device holds to x̂_t; it changes nothing at this end.

        Args:
            latent: x_t, float16 of any shape with M values.
            step: t.
            bits: b.

        Raises:
            BitstreamError: if the latent is not finite float16 with M values, t is nothing fresher than what the
                device holds, b is not among the coder's bit depths, or what it decodes to is not finite.
        """
        patterns = _float16_patterns("latent", latent)
        if patterns.size != self.latent_dim:
            raise BitstreamError(
                f"`latent` must have {self.latent_dim} values, as the noise has, got {patterns.size}. "
                "Send latents of the same trajectory."
            )
        step, bits = operator.index(step), operator.index(bits)
        self._check_step(step, bits)
        code = self.coder.encode(patterns, self.device, self._transmission(step, bits))
        decoded, _ = self._decode(code, step, bits)
        coded = self.coder.entropy_coded(self.latent_dim, bits)
        size = self.coder.payload_bits(self.latent_dim, bits) // 8
        return Message(
            step=step,
            device_step=self.device_step,
            bits=bits,
            latent_dim=self.latent_dim,
            latent_crc=zlib.crc32(latent_bytes(decoded)),
            payload=compress_indices(code.indices, bits, size) if coded else pack_indices(code.indices, bits),
            side=self._front + code.side,
            entropy_coded=coded,
        )

    def decompress(self, message: Message | bytes) -> NDArray[np.float32]:
        """Carry out a delivery.

        Args:
            message: as :meth:`compress` made it at the other end, or its bytes.

        Returns:
            x̂_t, what the device then holds, float32 (M,), read-only.

        Raises:
            BitstreamError: if the bytes are no undamaged message, it does not fit what the device holds, or it does
                not decode to the latent that the server meant, or to none. The device then holds what it held.
        """
        if not isinstance(message, Message):
            message = Message.from_bytes(message)
        if message.latent_dim != self.latent_dim:
            raise BitstreamError(
                f"`latent_dim` of the message must be {self.latent_dim}, as the noise has, got {message.latent_dim}. "
                "Use the same model at both ends."
            )
        if message.device_step != self.device_step:
            raise BitstreamError(
                f"`device_step` of the message must be {self.device_step}, which the device holds, got "
                f"{message.device_step}. Compress against what was delivered last."
            )
        self._check_step(message.step, message.bits)
        front = self._front
        side_bytes = len(front) + self.coder.side_bytes(message.bits)
        if len(message.side) != side_bytes:
            raise BitstreamError(
                f"`side` of the message must have {side_bytes} bytes for the coder {self.coder.name!r}, got "
                f"{len(message.side)}. Use the same coder at both ends."
            )
        if not message.side.startswith(front):
            raise BitstreamError(
                f"The name in the first message must be that of the midpoint that the device holds, {front.hex():.32}, "
                f"got {message.side[: len(front)].hex():.32}. Use the same store of midpoints at both ends."
            )
        indices = self._indices(message)
        if message.bits == LOSSLESS_BITS:
            _float16_patterns("payload", indices.view(np.float16))
        decoded, error = self._decode(Code(indices, message.side[len(front) :]), message.step, message.bits)
        found = zlib.crc32(latent_bytes(decoded))
        if found != message.latent_crc:
            raise BitstreamError(
                f"The decoded latent must have the CRC-32 that the server meant, {message.latent_crc:#010x}, got "
                f"{found:#010x}. Use the same noise, schedule and coder at both ends, and give both every message."
            )
        self.device = decoded
        self.device_step = message.step
        self.device_bits = message.bits
        self.device_error = error
        self.num_deliveries += 1
        return decoded

    @property
    def _front(self) -> bytes:
        """What comes before the coder's side information in the next message."""
        return b"" if self.num_deliveries else self.name

    def _indices(self, message: Message) -> NDArray[np.uint16]:
        coded = self.coder.entropy_coded(self.latent_dim, message.bits)
        if message.entropy_coded != coded:
            kinds = ("plain", "entropy-coded")
            raise BitstreamError(
                f"`payload` of the message must be {kinds[coded]} for this coder at {message.bits} bits, got "
                f"{kinds[not coded]}. Use the same coder at both ends."
            )
        if not coded:
            return unpack_indices(message.payload, message.bits, self.latent_dim)
        size = self.coder.payload_bits(self.latent_dim, message.bits) // 8
        if len(message.payload) != size:
            raise BitstreamError(
                f"`payload` must have {size} bytes for {self.latent_dim} dimensions at {message.bits} bits, "
                f"entropy-coded, got {len(message.payload)}. {_DAMAGED}"
            )
        return decompress_indices(message.payload, message.bits, self.latent_dim)

    def _decode(self, code: Code, step: int, bits: int) -> tuple[NDArray[np.float32], float]:
        decoded = self.device.copy()
        with np.errstate(over="ignore", invalid="ignore"):  # of moments that are none; refused below
            error = self.coder.decode(code, decoded, self._transmission(step, bits))
        if not (np.isfinite(decoded).all() and math.isfinite(error)):
            raise BitstreamError(
                "The decoded latent and its error must be finite, got values that are not. "
                "Check the second moments and the schedule that the coder predicts with."
            )
        decoded.setflags(write=False)
        return decoded, error

    def _transmission(self, step: int, bits: int) -> Transmission:
        """A transmission to this device."""
        return Transmission(step, self.device_step, bits, self.device_error, self.num_deliveries)

    def _check_step(self, step: int, bits: int) -> None:
        if bits not in self.coder.bit_depths:
            raise BitstreamError(
                f"`bits` must be one of the bit depths {list(self.coder.bit_depths)}, got {bits}. "
                "Use the same bit depths at both ends."
            )
        lossy = plain(is_lossy)(self.device_bits)
        system = (self.coder.schedule.num_steps, self.coder.refreshes_held_step, lossy)
        if step < 0 or not plain(may_transmit)(step, self.device_step, *system):
            oldest = self.device_step - (not plain(may_transmit)(self.device_step, self.device_step, *system))
            raise BitstreamError(
                f"`step` must be in 0 … {oldest}, fresher than what the device holds, got {step}. Send a later latent."
            )


def _float16_patterns(name: str, values: Any) -> NDArray[np.uint16]:
    """Finite float16 values as their patterns, uint16 (M,)."""
    array = np.asarray(values)
    if array.dtype != np.float16 or array.size == 0:
        raise BitstreamError(
            f"`{name}` must be a float16 array with values, got {array.dtype} of shape {array.shape}. "
            "Take it from a trajectory cache."
        )
    if not np.isfinite(array).all():
        raise BitstreamError(f"`{name}` must be finite, got a value that is not. Check where it comes from.")
    patterns: NDArray[np.uint16] = np.ascontiguousarray(array).reshape(-1).view(np.uint16)
    return patterns
