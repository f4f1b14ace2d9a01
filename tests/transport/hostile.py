"""What a hostile sender may send: ``python -m tests.transport.hostile 10000`` plays that many receptions.

It counts how they end.

Every stream begins as a valid session of a small system, one of each kind of coder, and is then spoiled; what protects
against accidents, the checksums of frames and messages and the CRC of the decoded latent, is right in most of them.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import struct
import sys
import threading
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from refine_env import NoiseSchedule, SystemConfig
from refine_env.coding import Code, RefinementCodec, Transmission
from refine_env.coding.bitstream import latent_bytes
from refine_env.errors import BitstreamError, TransportError
from refine_env.model.distortion import SecondMoments
from refine_env.transport import Receiver, Reception

SYSTEM, NOISE, SLOT, DIGEST = range(1, 5)
_SCHEDULE = NoiseSchedule.stable_diffusion(num_steps=8)
_MMSE = np.linspace(0.0, 0.8, 9)
_CODERS: tuple[dict[str, Any], ...] = (
    {},
    {"coder": "closed_loop"},
    {"coder": "closed_loop", "rotation": False},
    {"coder": "closed_loop", "sent_scale": False},
    {"coder": "closed_loop", "entropy_coding": True},
    {"coder": "closed_loop", "payload": "posterior_mean", "second_moments": SecondMoments.martingale(_MMSE)},
)
_MAX_SENTENCE = 500
ESCAPES = "\x1b]0;owned\x07\x1b[2J\u202e\ud800\n"

Frame = tuple[int, int, bytes]


def frame(kind: int, slot: int, body: bytes) -> bytes:
    """A frame as ``docs/bitstream.md`` describes it."""
    front = struct.pack(">BII", kind, slot, len(body))
    return front + struct.pack(">I", zlib.crc32(front + body)) + body


def forge(data: bytes, *, header: dict[int, bytes] | None = None, side: bytes | None = None) -> bytes:
    """A message with other bytes in its header, by offset, or other side information, and a right CRC-32."""
    changed = bytearray(data)
    if side is not None:
        length = struct.unpack(">H", data[10:12])[0]
        changed[10:12] = struct.pack(">H", len(side))
        changed[28 : 28 + length] = side
    for offset, value in (header or {}).items():
        changed[offset : offset + len(value)] = value
    changed[24:28] = struct.pack(">I", zlib.crc32(bytes(changed[28:]), zlib.crc32(bytes(changed[:24]))))
    return bytes(changed)


class Session(NamedTuple):
    """A valid session: the system, the noise, and a message or nothing for every slot."""

    config: dict[str, Any]
    noise: bytes
    messages: list[bytes]

    def frames(self) -> list[Frame]:
        system = json.dumps({"protocol": 2, "config": self.config}).encode()
        slots = [(SLOT, slot, message) for slot, message in enumerate(self.messages, start=1)]
        return [(SYSTEM, 0, system), (NOISE, 0, self.noise), *slots]


def session(rng: np.random.Generator, latent_dim: int = 256, deadline: int = 12) -> Session:
    """A session of one of the coders, with a delivery in about every other slot."""
    options = _CODERS[rng.integers(len(_CODERS))]
    config = SystemConfig(snr_db=6.0, latent_dim=latent_dim, schedule=_SCHEDULE, deadline=deadline, **options)
    latents = rng.standard_normal((_SCHEDULE.num_steps + 1, latent_dim)).astype(np.float16)
    initial = latents[-1] if config.payload == "latent" else np.zeros_like(latents[-1])
    server = RefinementCodec(config.make_coder(), initial)
    messages = []
    for _ in range(deadline):
        messages.append(b"")
        if server.device_step > 0 and rng.random() < 0.5:
            step = int(rng.integers(max(0, server.device_step - 3), server.device_step))
            message = server.compress(latents[step], step, int(rng.choice(config.bit_depths)))
            server.decompress(message)
            messages[-1] = bytes(message)
    return Session(config.to_dict(), initial.astype(">f2").tobytes(), messages)


def hostile_value(rng: np.random.Generator) -> Any:
    """Something that is no, or no usual, value of any field."""
    depth = int(rng.integers(2, 3000))
    values: list[Callable[[], Any]] = [
        lambda: 10 ** int(rng.integers(1, 4000)),
        lambda: -(10 ** int(rng.integers(0, 400))),
        lambda: float(rng.choice([math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, 0.0, -0.0])),
        lambda: ESCAPES * int(rng.integers(1, 200)),
        lambda: None,
        lambda: True,
        list,
        dict,
        lambda: {"\x1b[31m": [{}]},
        lambda: [[]] * depth,
        lambda: [ESCAPES] * depth,
        lambda: list(range(depth)),
        lambda: np.linspace(1.0, 1e-3, depth).tolist(),
        lambda: np.geomspace(1.0, 5e-324, 9).tolist(),
        lambda: [[1e300] * 9] * 9,
        lambda: (np.eye(9) * 10.0 ** rng.integers(-300, 300, 9)).tolist(),
        lambda: (np.ones((9, 9)) * 10.0 ** float(rng.integers(-300, 300))).tolist(),
        lambda: [[0.0] * 300] * 300,
        lambda: [1, 2, 15, 16],
        lambda: int(rng.integers(1, 2**20)),
        lambda: [float(end) for end in rng.integers(-250, 250, 2)],
        lambda: "closed_loop",
        lambda: "posterior_mean",
    ]
    return values[rng.integers(len(values))]()


def forged_config(rng: np.random.Generator, good: Session) -> Session:
    config = json.loads(json.dumps(good.config))
    for _ in range(rng.integers(1, 4)):
        where = config
        name = str(rng.choice(list(config)))
        if name in ("link", "schedule") and rng.random() < 0.9:
            where = config[name]
            if not isinstance(where, dict) or not where:
                where = config
            else:
                name = str(rng.choice(list(where)))
        elif rng.random() < 0.05:
            name = ESCAPES
        where[name] = hostile_value(rng)
    noise = good.noise
    size = config.get("latent_dim")
    if type(size) is int and 0 < size <= 2**20 and rng.random() < 0.5:
        noise = rng.standard_normal(size).astype(">f2").tobytes()
    return good._replace(config=config, noise=noise)


def long_schedule(rng: np.random.Generator, good: Session) -> Session:
    """T in the thousands, or matrices of them."""
    steps = int(rng.integers(1001, 20000))
    config = good.config | {"schedule": {"alpha_bar": np.round(np.linspace(1.0, 0.01, steps + 1), 9).tolist()}}
    return good._replace(config=config)


def forged_message(rng: np.random.Generator, good: Session) -> Session:
    """Other numbers in a header, or a scale that is none, with whatever CRC the device would find."""
    messages = list(good.messages)
    sent = [slot for slot, message in enumerate(messages) if message]
    if not sent:
        return good._replace(messages=[b"RFNL" + rng.bytes(40), *messages[1:]])
    slot = int(rng.choice(sent))
    kind = rng.integers(4)
    if kind == 0:
        offset, size = ((4, 1), (5, 1), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 4))[rng.integers(8)]
        messages[slot] = forge(messages[slot], header={offset: rng.bytes(size)})
    elif kind == 1:
        messages[slot] = forged_scale(good, slot, np.float16(rng.choice([np.nan, np.inf, -np.inf, -1.0, 0.0, 6e-8])))
    elif kind == 2:  # replayed
        messages[int(rng.integers(len(messages)))] = messages[slot]
    else:
        length = struct.unpack(">H", messages[slot][10:12])[0]
        body = messages[slot][:28] + rng.bytes(length) + rng.bytes(len(messages[slot]) - 28 - length)
        messages[slot] = forge(body)
    return good._replace(messages=messages)


def forged_scale(good: Session, slot: int, scale: np.float16) -> bytes:
    """The message of a slot with that scale, and the CRC-32 of what a device would make of it unasked."""
    data = good.messages[slot]
    side = scale.astype(">f2").tobytes()
    if data[10:12] != b"\0\2":
        return forge(data, side=side)
    with np.errstate(all="ignore"):
        codec = RefinementCodec(
            SystemConfig.from_dict(good.config).make_coder(), np.frombuffer(good.noise, dtype=">f2").astype(np.float16)
        )
        for earlier in good.messages[:slot]:
            if earlier:
                codec.decompress(earlier)
        bits, step = data[5], struct.unpack(">H", data[6:8])[0]
        indices = np.zeros(codec.latent_dim, dtype=np.uint16)
        coder, decoded = codec.coder, codec.device.copy()
        with contextlib.suppress(BitstreamError):
            coder.decode(
                Code(indices, side),
                decoded,
                Transmission(step, codec.device_step, bits, codec.device_error, codec.num_deliveries),
            )
    return forge(data, header={20: struct.pack(">I", zlib.crc32(latent_bytes(decoded)))}, side=side)


def spoiled_frames(rng: np.random.Generator, good: list[Frame]) -> list[Frame]:
    """A frame that is missing, twice, elsewhere, of another kind or slot, or with other content."""
    changed = list(good)
    at = int(rng.integers(len(changed)))
    kind, slot, body = changed[at]
    choice = rng.integers(6)
    if choice == 0:
        del changed[at]
    elif choice == 1:
        changed.insert(int(rng.integers(len(changed))), changed[at])
    elif choice == 2:
        changed[at] = (int(rng.integers(256)), slot, body)
    elif choice == 3:
        changed[at] = (kind, int(rng.integers(2**32)), body)
    elif choice == 4:
        changed[at] = (kind, slot, body[: rng.integers(len(body) + 1)] + rng.bytes(int(rng.integers(40))))
    else:
        changed[at] = (kind, slot, rng.bytes(int(rng.integers(3000))))
    return changed


def spoiled_bytes(rng: np.random.Generator, good: bytes) -> bytes:
    """Cut off, bits flipped, pieces inserted, a length forged: checksums left as they are."""
    data = bytearray(good)
    choice = rng.integers(5)
    if choice == 0:
        del data[rng.integers(len(data)) :]
    elif choice == 1:
        for position in rng.integers(8 * len(data), size=rng.integers(1, 9)):
            data[position // 8] ^= 1 << position % 8
    elif choice == 2:
        where = int(rng.integers(len(data)))
        data[where:where] = rng.bytes(int(rng.integers(1, 50)))
    elif choice == 3:
        data[5:9] = struct.pack(">I", int(rng.choice([0, 1, 2**22, 2**22 + 1, 2**31, 2**32 - 1])))
    else:
        return rng.bytes(int(rng.integers(400)))
    return bytes(data)


def hostile_json(rng: np.random.Generator) -> bytes:
    """A system that is another kind of JSON, or none; of up to the length that a device reads."""
    length = int(rng.choice([10, 1000, 100_000, 1_000_000] if rng.random() < 0.3 else [10, 1000]))
    texts = [
        b"[" * length,
        b'{"protocol":2,"config":' + b"[" * length,
        b'{"protocol":2,"config":' + b'{"a":' * 900 + b"1" + b"}" * 901,
        b'{"protocol":2,"config":[' + b'{"":1},' * (length // 7) + b"0]}",
        b'{"protocol":2,"config":"' + b"\\u001b[2J" * (length // 9) + b'"}',
        b'{"protocol":"' + b"\\ud800" * (length // 6) + b'","config":{}}',
        b'{"protocol":' + b"9" * min(length, 4000) + b',"config":{}}',
        b'{"protocol":2,"config":' + b"9" * length + b"}",
        b'{"protocol":2,"config":NaN}',
        b'"' + rng.bytes(length) + b'"',
    ]
    return texts[rng.integers(len(texts))]


def malformed(rng: np.random.Generator) -> bytes:
    """A stream that differs from a valid one, or has nothing of one."""
    good = session(rng)
    choice = rng.random()
    if choice < 0.35:
        found = forged_config(rng, good).frames()
    elif choice < 0.40:
        found = long_schedule(rng, good).frames()
    elif choice < 0.60:
        found = forged_message(rng, good).frames()
    elif choice < 0.75:
        found = spoiled_frames(rng, good.frames())
    elif choice < 0.80:
        found = [(SYSTEM, 0, hostile_json(rng)), *good.frames()[1:]]
    else:
        return spoiled_bytes(rng, b"".join(frame(*one) for one in good.frames()))
    return b"".join(frame(*one) for one in found)


@contextlib.contextmanager
def sending(address: tuple[str, int], data: bytes) -> Iterator[None]:
    """A sender that sends just that and hangs up, as soon as the device takes it."""

    def send(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)

    with socket.create_connection(address) as connection:
        thread = threading.Thread(target=send, args=(connection,))
        thread.start()
        try:
            yield
        finally:
            thread.join()


def outcome(receiver: Receiver, data: bytes) -> Reception | TransportError | BitstreamError:
    """What comes of a stream: an episode with a finite latent, or one bounded sentence that a terminal only shows.

    Anything else that is raised goes through, and a check that does not hold is an AssertionError.
    """
    with sending(receiver.address, data):
        try:
            reception = receiver.receive()
        except (TransportError, BitstreamError) as error:
            sentence = str(error)
            assert len(sentence) <= _MAX_SENTENCE, sentence
            assert sentence.isprintable(), sentence
            assert sentence.endswith("."), sentence
            return error
    assert np.isfinite(reception.latent).all()
    return reception


def main(count: int, seed: int = 0) -> None:
    """Play so many receptions; print how they ended, and what memory they took."""
    ends: Counter[str] = Counter()
    sentences: Counter[str] = Counter()
    peaks, slowest = [], 0.0
    with Receiver(timeout=5.0) as receiver:
        for number in range(count):
            data = malformed(np.random.default_rng([seed, number]))
            tracemalloc.start()
            start = time.perf_counter()
            try:
                end = outcome(receiver, data)
            except BaseException:
                print(f"number {number}", flush=True)
                raise
            slowest = max(slowest, time.perf_counter() - start)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            ends[type(end).__name__] += 1
            sentences[str(end)[:40] if isinstance(end, Exception) else "episode"] += 1
            if (number + 1) % max(1, count // 10) == 0:
                print(f"{number + 1}: {dict(ends)}, resident {_resident():.0f} MB, ", end="")
                print(f"peak of one reception {max(peaks) / 1e6:.1f} MB, slowest {slowest:.2f} s", flush=True)
    for sentence, times in sentences.most_common(60):
        print(f"{times:6} {sentence}")


def _resident() -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1e3 for line in file if line.startswith("VmRSS"))


if __name__ == "__main__":
    main(int(sys.argv[1]))
