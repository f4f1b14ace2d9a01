"""The bitstream: exact sizes, the simulator's latent bit for bit over whole chains, nothing wrong in silence."""

from __future__ import annotations

import copy
import dataclasses
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from refine_env import ConfigurationError, NoiseSchedule, SystemConfig, TrajectoryCache
from refine_env.coding import ClosedLoopCoder, ForwardCoder, LloydMax, Message, RefinementCodec, Transmission, kernels
from refine_env.coding.bitstream import HEADER_BYTES, latent_bytes, pack_indices, unpack_indices
from refine_env.dynamics.simulator import EpisodeBatch
from refine_env.errors import BitstreamError
from refine_env.model.distortion import RefinementModel, SecondMoments
from tests.coding import closed_loop_coder, golden

SCHEDULE = NoiseSchedule([1.0, 0.97, 0.85, 0.6, 0.3, 0.1, 0.01])
EVERY_BIT_DEPTH = tuple(range(1, 17))
FINITE_PATTERNS = np.arange(65536, dtype=np.uint16)[np.isfinite(np.arange(65536, dtype=np.uint16).view(np.float16))]


def draw_trajectory(rng: np.random.Generator, dim: int, steps: int = SCHEDULE.num_steps) -> NDArray[np.float16]:
    """Half Gaussian values, half any finite float16: both zeros, subnormals and the largest among them."""
    gaussian = rng.standard_normal((steps + 1, dim)).astype(np.float16)
    anything = rng.choice(FINITE_PATTERNS, (steps + 1, dim)).view(np.float16)
    return np.where(rng.random((steps + 1, dim)) < 0.5, gaussian, anything)


def check_refused(codec: RefinementCodec, message: Message, spoil: Callable[[Message], bytes], sentence: str) -> None:
    """A spoiled message changes nothing, and the good one still fits after it."""
    before = state(codec)
    with pytest.raises(BitstreamError, match=sentence):
        codec.decompress(spoil(message))
    assert state(codec) == before
    codec.decompress(bytes(message))
    assert codec.device_step == message.step


def make_codec(noise: NDArray[np.float16], bit_depths: tuple[int, ...] = EVERY_BIT_DEPTH) -> RefinementCodec:
    return RefinementCodec(ForwardCoder(SCHEDULE, bit_depths), noise)


@pytest.fixture
def trajectory(rng: np.random.Generator) -> NDArray[np.float16]:
    return draw_trajectory(rng, 61)


@pytest.fixture
def codec(trajectory: NDArray[np.float16]) -> RefinementCodec:
    """A device that holds x_4 at 8 bits."""
    codec = make_codec(trajectory[-1])
    codec.decompress(codec.compress(trajectory[4], 4, 8))
    return codec


def state(codec: RefinementCodec) -> tuple[Any, ...]:
    return latent_bytes(codec.device), codec.device_step, codec.device_bits, codec.device_error


def forge(message: Message, **changes: Any) -> bytes:
    """The bytes of a message with other values than its own, some of them values that no message can have."""
    fields = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)} | changes
    payload, side = fields["payload"], fields["side"]
    front = struct.pack(
        ">4sBBHHHIII", fields.get("magic", b"RFNL"), fields.get("version", 1), fields["bits"], fields["step"],
        fields["device_step"], len(side), fields["latent_dim"], len(payload), fields["latent_crc"],
    )  # fmt: skip
    return front + struct.pack(">I", zlib.crc32(front + side + payload)) + side + payload


def test_packing_by_hand() -> None:
    """101 010 111 is 1010 1011 1000 0000."""
    indices = np.array([5, 2, 7], dtype=np.uint16)
    assert pack_indices(indices, 3) == b"\xab\x80"
    assert unpack_indices(b"\xab\x80", 3, 3).tolist() == [5, 2, 7]
    assert pack_indices(np.array([0x1234, 0xFEDC], dtype=np.uint16), 16) == b"\x12\x34\xfe\xdc"


@given(seed=st.integers(0, 2**32), dim=st.integers(1, 200), bits=st.integers(1, 16))
def test_packing_equals_the_plain_twin(seed: int, dim: int, bits: int) -> None:
    indices = np.random.default_rng(seed).integers(2**bits, size=dim).astype(np.uint16)
    as_bits = (indices[:, None] >> np.arange(bits - 1, -1, -1)) & 1
    payload = pack_indices(indices, bits)
    assert payload == np.packbits(as_bits.astype(np.uint8)).tobytes()
    assert len(payload) == -(-dim * bits // 8)
    assert np.array_equal(unpack_indices(payload, bits, dim), indices)


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(BitstreamError, match=r"`indices` must be below 2\^3, got 8"):
        pack_indices(np.array([0, 8], dtype=np.uint16), 3)
    for call in (lambda: pack_indices(np.zeros(2, dtype=np.uint16), 17), lambda: unpack_indices(b"\0" * 8, 0, 2)):
        with pytest.raises(ConfigurationError, match="`bits` must be an integer in 1 … 16"):
            call()


@pytest.mark.parametrize("bits", range(1, 16))
def test_indices_are_those_of_the_quantizer(bits: int, rng: np.random.Generator) -> None:
    """Every finite float16, which meets a threshold (0) and both ends."""
    quantizer = LloydMax(bits)
    assert (np.diff(quantizer.table.levels) > 0).all()  # so that a level has one index
    device = np.zeros(FINITE_PATTERNS.size, dtype=np.float32)
    coder = ForwardCoder(SCHEDULE, (bits,))
    code = coder.encode(FINITE_PATTERNS, device, Transmission(4, SCHEDULE.num_steps, bits))
    assert not device.any()
    assert np.array_equal(code.indices, quantizer.index(FINITE_PATTERNS.view(np.float16).astype(np.float32)))
    if bits <= 8:
        assert len(np.unique(code.indices)) == 2**bits
    coder.decode(code, device, Transmission(4, SCHEDULE.num_steps, bits))
    assert np.array_equal(device, quantizer.table.levels[code.indices])


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**32),
    dim=st.one_of(st.integers(1, 40), st.sampled_from([61, 64, 255, 1024])),
    chain=st.dictionaries(st.integers(0, SCHEDULE.num_steps - 1), st.integers(1, 16), min_size=1),
)
def test_chains_equal_the_simulator_bit_for_bit(seed: int, dim: int, chain: dict[int, int]) -> None:
    latents = draw_trajectory(np.random.default_rng(seed), dim)
    coder = ForwardCoder(SCHEDULE, EVERY_BIT_DEPTH)
    server, device = RefinementCodec(coder, latents[-1]), RefinementCodec(coder, latents[-1])
    simulated = latents[-1].astype(np.float32)
    held, error = SCHEDULE.num_steps, 0.0
    for step in sorted(chain, reverse=True):
        bits = chain[step]
        message = server.compress(latents[step], step, bits)
        assert len(message.payload) == -(-dim * bits // 8)
        assert message.num_bits == dim * bits
        assert len(bytes(message)) == HEADER_BYTES + len(message.payload)
        error = coder.deliver(latents.view(np.uint16), simulated, Transmission(step, held, bits, error))
        decoded = device.decompress(bytes(message))
        assert decoded.tobytes() == simulated.tobytes()
        server.decompress(message)
        assert state(server) == state(device) == (latent_bytes(simulated), step, bits, error)
        held = step


def test_a_whole_episode_equals_the_simulator(gaussian_cache: Path, rng: np.random.Generator) -> None:
    cache = TrajectoryCache.open(gaussian_cache)
    config = SystemConfig(snr_db=6.0, latent_dim=cache.latent_dim, schedule=cache.schedule, bit_depths=(1, 3, 10, 16))
    batch = EpisodeBatch(config, cache, 1)
    deliveries = 0
    for trajectory in range(8):
        batch.begin(0, trajectory, rng.uniform(0.0, 4.0, config.deadline) * config.latent_dim)
        latents = cache.latents(trajectory)
        codec = RefinementCodec(config.make_coder(), latents[-1])
        while not batch.finished()[0]:
            batch.advance(rng.integers(config.num_actions, size=1))
            if batch.delivered[0]:
                step, bits = (int(batch.state[name][0]) for name in ("device_step", "device_bits"))
                codec.decompress(bytes(codec.compress(latents[step], step, bits)))
                deliveries += 1
                assert codec.device.tobytes() == batch.device[0].tobytes()
                assert codec.device_error == batch.state["device_error"][0]
                assert kernels.mean_square_error(codec.device, latents[0].view(np.uint16).ravel()) == batch.latent_mse
    assert deliveries >= 40


def test_without_loss_the_payload_is_the_latent_itself() -> None:
    noise = np.zeros(FINITE_PATTERNS.size, dtype=np.float16)
    codec = make_codec(noise, (16,))
    latent = FINITE_PATTERNS.view(np.float16)
    message = codec.compress(latent, 0, 16)
    assert message.payload == FINITE_PATTERNS.astype(">u2").tobytes()
    assert codec.decompress(message).tobytes() == latent.astype(np.float32).tobytes()  # signs of zeros too


def test_header_by_hand(codec: RefinementCodec, trajectory: NDArray[np.float16]) -> None:
    message = codec.compress(trajectory[2], 2, 3)
    data = bytes(message)
    assert data[:6] == b"RFNL\x01\x03"
    assert data[6:12] == b"\x00\x02\x00\x04\x00\x00"  # t = 2, t_p = 4, no side information
    assert data[12:20] == b"\x00\x00\x00\x3d\x00\x00\x00\x17"  # M = 61 values, ⌈183/8⌉ = 23 bytes
    decoded = codec.decompress(message)
    assert data[20:24] == zlib.crc32(decoded.astype(">f4").tobytes()).to_bytes(4, "big")
    assert data[24:28] == zlib.crc32(data[:24] + data[28:]).to_bytes(4, "big")
    assert data[28:] == message.payload
    assert Message.from_bytes(data) == message
    assert forge(message) == data


def test_shape_and_memory_order_do_not_matter(trajectory: NDArray[np.float16]) -> None:
    latents = trajectory[:, :60]
    flat, shaped = make_codec(latents[-1]), make_codec(latents[-1].reshape(3, 4, 5))
    message = flat.compress(latents[3], 3, 4)
    assert shaped.compress(np.repeat(latents[3], 2)[::2].reshape(3, 4, 5), 3, 4) == message


def test_compressing_changes_nothing_and_results_cannot_be_written(
    codec: RefinementCodec, trajectory: NDArray[np.float16]
) -> None:
    before = state(codec)
    first, second = codec.compress(trajectory[3], 3, 5), codec.compress(trajectory[0], 0, 15)
    assert state(codec) == before
    assert codec.decompress(second) is codec.device  # the first never got through
    assert first.device_step == second.device_step == 4
    with pytest.raises(ValueError, match="read-only"):
        codec.device[0] = 0.0


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda m: b"", f"A message must have at least {HEADER_BYTES} bytes, got 0"),
        (lambda m: bytes(m)[: HEADER_BYTES - 1], "must have at least"),
        (lambda m: forge(m, magic=b"RIFF"), "must begin with b'RFNL', got b'RIFF'"),
        (lambda m: forge(m, version=3), "must be of format version 1 or 2, got 3"),
        (lambda m: bytes(m)[:-1], "must have the 51 bytes that its header says, got 50"),
        (lambda m: bytes(m) + b"\0", "must have the 51 bytes that its header says, got 52"),
        (lambda m: bytes(m)[:-3] + b"abc", "must have the CRC-32 that its header says"),
        (lambda m: forge(m, bits=0), "`bits` of a message must be in 1 … 16, got 0"),
        (lambda m: forge(m, bits=17), "`bits` of a message must be in 1 … 16, got 17"),
        (lambda m: forge(m, latent_dim=0), "`latent_dim` of a message must be in 1 …"),
        (lambda m: forge(m, payload=m.payload[:-1]), "`payload` must have 23 bytes for 61 .* at 3 bits, got 22"),
        (lambda m: forge(m, payload=m.payload + b"\0"), "`payload` must have 23 bytes .* got 24"),
        (
            lambda m: forge(m, payload=m.payload[:-1] + bytes([m.payload[-1] | 1])),
            "`payload` must end in 1 zero bits after 61 indices of 3 bits",
        ),
        (lambda m: forge(m, step=4), r"`step` must be in 0 … 3, fresher than what the device holds, got 4"),
        (lambda m: forge(m, step=5), r"`step` must be in 0 … 3"),
        (lambda m: forge(m, bits=2, payload=b"\0" * 16), r"`bits` must be one of the bit depths \[3, 8, 16\], got 2"),
        (lambda m: forge(m, device_step=5), "`device_step` of the message must be 4, which the device holds, got 5"),
        (lambda m: forge(m, device_step=6), "`device_step` of the message must be 4"),
        (lambda m: forge(m, latent_dim=60, payload=m.payload), "`latent_dim` of the message must be 61.* got 60"),
        (lambda m: forge(m, side=b"\0\0"), "`side` of the message must have 0 bytes for the coder 'forward', got 2"),
        (lambda m: forge(m, latent_crc=m.latent_crc ^ 1), "must have the CRC-32 that the server meant"),
        (lambda m: forge(m, payload=b"\0" + m.payload[1:]), "must have the CRC-32 that the server meant"),
        (
            lambda m: forge(m, bits=16, payload=b"\x7c\x00" * 61),
            "`payload` must be finite, got a value that is not",
        ),
    ],
)  # fmt: skip
def test_malformed_messages_are_refused(trajectory: NDArray[np.float16], spoil: Any, sentence: str) -> None:
    codec = make_codec(trajectory[-1], (3, 8, 16))
    codec.decompress(codec.compress(trajectory[4], 4, 8))
    check_refused(codec, codec.compress(trajectory[2], 2, 3), spoil, sentence)


def test_a_message_is_refused_twice_and_out_of_order(codec: RefinementCodec, trajectory: NDArray[np.float16]) -> None:
    message = codec.compress(trajectory[2], 2, 3)
    codec.decompress(message)
    with pytest.raises(BitstreamError, match="`device_step` of the message must be 2, which the device holds, got 4"):
        codec.decompress(message)


def test_another_latent_of_the_same_step_is_no_predecessor(trajectory: NDArray[np.float16]) -> None:
    """The device holds x_4 as the message says, but decoded from other bits: only the latent's checksum tells."""
    server, device = make_codec(trajectory[-1]), make_codec(trajectory[-1])
    server.decompress(server.compress(trajectory[4], 4, 8))
    device.decompress(device.compress(trajectory[4], 4, 3))
    with pytest.raises(BitstreamError, match="must have the CRC-32 that the server meant"):
        device.decompress(server.compress(trajectory[2], 2, 8))


def test_another_schedule_at_the_device_is_noticed(codec: RefinementCodec, trajectory: NDArray[np.float16]) -> None:
    other = copy.copy(codec)
    values = SCHEDULE.alpha_bar.copy()
    values[2] = 0.8501
    other.coder = ForwardCoder(NoiseSchedule(values), EVERY_BIT_DEPTH)
    with pytest.raises(BitstreamError, match="Use the same noise, schedule and coder at both ends"):
        other.decompress(codec.compress(trajectory[2], 2, 8))


@pytest.mark.parametrize(
    ("latent", "step", "bits", "sentence"),
    [
        (np.zeros(60, dtype=np.float16), 2, 8, "`latent` must have 61 values, as the noise has, got 60"),
        (np.zeros(61, dtype=np.float32), 2, 8, r"`latent` must be a float16 array with values, got float32 of shape"),
        (np.full(61, np.nan, dtype=np.float16), 2, 8, "`latent` must be finite"),
        (np.zeros(61, dtype=np.float16), 4, 8, "`step` must be in 0 … 3, fresher than what the device holds, got 4"),
        (np.zeros(61, dtype=np.float16), -1, 8, "`step` must be in 0 … 3"),
        (np.zeros(61, dtype=np.float16), 2, 17, "`bits` must be one of the bit depths"),
    ],
)
def test_what_cannot_be_compressed_is_refused(
    codec: RefinementCodec, latent: Any, step: int, bits: int, sentence: str
) -> None:
    with pytest.raises(BitstreamError, match=sentence):
        codec.compress(latent, step, bits)


def test_what_cannot_be_noise_is_refused() -> None:
    with pytest.raises(BitstreamError, match="`noise` must be finite"):
        make_codec(np.array([np.inf], dtype=np.float16))
    with pytest.raises(BitstreamError, match="`noise` must be a float16 array with values, got float16 of shape"):
        make_codec(np.empty(0, dtype=np.float16))


def test_a_schedule_too_long_for_the_header_is_refused() -> None:
    class Endless(ForwardCoder):
        def __init__(self) -> None:
            self.schedule = NoiseSchedule(np.linspace(1.0, 0.5, 65537 + 1))

    with pytest.raises(ConfigurationError, match="`coder` must have at most 65535 steps, got 65537"):
        RefinementCodec(Endless(), np.zeros(4, dtype=np.float16))


@settings(max_examples=300)
@given(data=st.one_of(st.binary(max_size=120), st.binary(max_size=100).map(lambda tail: b"RFNL\x01" + tail)))
def test_random_bytes_are_refused(data: bytes) -> None:
    codec = make_codec(np.zeros(8, dtype=np.float16))
    with pytest.raises(BitstreamError, match=r"\. "):
        codec.decompress(data)
    assert codec.device_bits == 0


@settings(max_examples=300)
@given(data=st.data())
def test_damage_never_passes_silently(data: st.DataObject) -> None:
    """Bits flipped, bytes cut, put in, or put twice, anywhere in a message."""
    latents = draw_trajectory(np.random.default_rng(data.draw(st.integers(0, 99))), data.draw(st.integers(1, 30)))
    codec = make_codec(latents[-1])
    good = bytes(codec.compress(latents[3], 3, data.draw(st.integers(1, 16))))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
    where = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    if kind == "flip":
        for position in data.draw(st.sets(st.integers(0, 8 * len(good) - 1), min_size=1, max_size=12)):
            bad[position // 8] ^= 1 << position % 8
    elif kind == "cut":
        del bad[where : where + data.draw(st.integers(1, 8))]
    elif kind == "insert":
        bad[where:where] = data.draw(st.binary(min_size=1, max_size=8))
    else:
        bad += bad[where:]
    before = state(codec)
    with pytest.raises(BitstreamError, match=r"\. "):
        codec.decompress(bytes(bad))
    assert state(codec) == before


@settings(max_examples=300)
@given(data=st.data())
def test_forged_fields_never_yield_another_latent(data: st.DataObject) -> None:
    """Values changed under a checksum that is right: refused, or what the server meant after all."""
    latents = draw_trajectory(np.random.default_rng(data.draw(st.integers(0, 99))), 10)
    server, device = make_codec(latents[-1], (1, 3, 8, 16)), make_codec(latents[-1], (1, 3, 8, 16))
    for codec in (server, device):
        codec.decompress(codec.compress(latents[4], 4, 8))
    message = server.compress(latents[3], 3, data.draw(st.sampled_from([1, 3, 8, 16])))
    changes = data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "bits": st.integers(0, 255),
                "step": st.integers(0, 7),
                "device_step": st.integers(0, 7),
                "latent_dim": st.integers(0, 20),
                "latent_crc": st.integers(0, 2**32 - 1),
                "side": st.binary(max_size=3),
                "payload": st.binary(min_size=len(message.payload), max_size=len(message.payload)),
            },
        )
    )
    forged = forge(message, **changes)
    before = state(device)
    try:
        decoded = device.decompress(forged)
    except BitstreamError:
        assert state(device) == before
    else:
        assert decoded.tobytes() == server.decompress(message).tobytes()


@pytest.mark.parametrize("rotation", [True, False])
@pytest.mark.parametrize("dim", [61, 64])
def test_a_coder_with_side_information(rotation: bool, dim: int, rng: np.random.Generator) -> None:
    latents = rng.standard_normal((SCHEDULE.num_steps + 1, dim)).astype(np.float16)
    coder = closed_loop_coder(SCHEDULE, (3, 8, 16), rotation=rotation)
    server, device = RefinementCodec(coder, latents[-1]), RefinementCodec(coder, latents[-1])
    simulated, error, held = latents[-1].astype(np.float32), 0.0, SCHEDULE.num_steps
    distances = []
    for k, (step, bits) in enumerate(((3, 3), (3, 8), (1, 3), (0, 16))):  # the second refines the first
        message = server.compress(latents[step], step, bits)
        side = 2 if bits < 16 else 0
        assert message.num_bits == dim * bits + 8 * side
        assert len(bytes(message)) == HEADER_BYTES + side + -(-dim * bits // 8)
        device.decompress(bytes(message))
        server.decompress(message)
        assert state(device) == state(server)
        error = coder.deliver(latents.view(np.uint16), simulated, Transmission(step, held, bits, error, k))
        held = step
        assert simulated.tobytes() == device.device.tobytes()
        assert error == device.device_error
        distances.append(float(np.mean((device.device - latents[step].astype(np.float32)) ** 2)))
    assert distances[1] < 0.05 * distances[0]
    assert (distances[3], error) == (0.0, 0.0)


def test_side_information_and_held_steps_are_checked(rng: np.random.Generator) -> None:
    latents = rng.standard_normal((SCHEDULE.num_steps + 1, 61)).astype(np.float16)
    coder = ClosedLoopCoder(SCHEDULE, (3, 8, 16))
    server, device = RefinementCodec(coder, latents[-1]), RefinementCodec(coder, latents[-1])
    message = server.compress(latents[3], 3, 3)
    server.decompress(message)
    device.decompress(message)
    with pytest.raises(BitstreamError, match="`step` must be in 0 … 3"):
        server.compress(latents[4], 4, 8)
    with pytest.raises(
        BitstreamError, match="`side` of the message must have 2 bytes for the coder 'closed_loop', got 0"
    ):
        device.decompress(forge(server.compress(latents[2], 2, 8), side=b""))
    with pytest.raises(BitstreamError, match="`side` of the message must have 0 bytes"):
        device.decompress(forge(server.compress(latents[2], 2, 16), side=b"ab"))
    frozen = RefinementCodec(closed_loop_coder(SCHEDULE, (3, 8), same_step_refinement=False), latents[-1])
    frozen.decompress(frozen.compress(latents[3], 3, 3))
    with pytest.raises(BitstreamError, match="`step` must be in 0 … 2"):
        frozen.compress(latents[3], 3, 8)


def test_rotations_are_fresh_for_every_delivery(rng: np.random.Generator) -> None:
    """Two messages of the same residual differ; a decoder that missed one notices."""
    latents = rng.standard_normal((SCHEDULE.num_steps + 1, 64)).astype(np.float16)
    coder = ClosedLoopCoder(SCHEDULE, (3, 8))
    held = latents[-1].astype(np.float32)
    first, second = (coder.encode(latents[3].view(np.uint16), held, Transmission(3, 6, 3, 0.0, k)) for k in (0, 1))
    assert first.side == second.side
    assert (first.indices != second.indices).mean() > 0.5


def test_what_is_held_without_loss_is_not_refreshed(rng: np.random.Generator) -> None:
    latents = rng.standard_normal((SCHEDULE.num_steps + 1, 8)).astype(np.float16)

    codec = RefinementCodec(ClosedLoopCoder(SCHEDULE, (3, 16)), latents[-1])
    with pytest.raises(BitstreamError, match="`step` must be in 0 … 5"):
        codec.compress(latents[6], 6, 3)  # the noise, which the device holds
    codec.decompress(codec.compress(latents[3], 3, 16))
    with pytest.raises(BitstreamError, match="`step` must be in 0 … 2"):
        codec.compress(latents[3], 3, 3)


@pytest.mark.parametrize("dim", golden.DIMS)
@pytest.mark.parametrize("chain", golden.CHAINS)
def test_golden_files(dim: int, chain: str) -> None:
    """After a change of the format that is meant, write them anew: ``python -m tests.coding.golden``."""
    latents = np.load(golden.latents_file(golden.FOLDER, dim))
    kept = golden.split_messages(golden.messages_file(golden.FOLDER, dim, chain).read_bytes())
    assert [data.hex() for data in golden.compress_chain(latents, chain)] == [data.hex() for data in kept]
    coder = ForwardCoder(golden.SCHEDULE, golden.BIT_DEPTHS)
    codec, simulated = RefinementCodec(coder, latents[-1]), latents[-1].astype(np.float32)
    held = golden.SCHEDULE.num_steps
    for data, (step, bits) in zip(kept, golden.CHAINS[chain], strict=True):
        coder.deliver(latents.view(np.uint16), simulated, Transmission(step, held, bits))
        assert codec.decompress(data).tobytes() == simulated.tobytes()
        held = step


def test_golden_files_can_be_written_anew(tmp_path: Path) -> None:
    written = golden.rebuild(tmp_path)
    assert {path.name for path in written} == {
        path.name for path in golden.FOLDER.iterdir() if path.suffix in (".npy", ".bin")
    }
    for path in written:
        assert path.read_bytes() == (golden.FOLDER / path.name).read_bytes(), path.name


@pytest.mark.parametrize("rotation", [True, False])
@pytest.mark.parametrize(
    ("scale", "good"),
    [(np.nan, False), (np.inf, False), (-np.inf, False), (-1.0, False), (0.0, True), (2.0**-24, True), (65504.0, True)],
)
def test_a_forged_scale_is_refused(trajectory: NDArray[np.float16], rotation: bool, scale: float, good: bool) -> None:
    """With all three checksums right. 0 and subnormal scales are good ones: of residuals that are, or nearly are, 0."""
    coder = closed_loop_coder(SCHEDULE, (3, 8), rotation=rotation)
    server, device = RefinementCodec(coder, trajectory[-1]), RefinementCodec(coder, trajectory[-1])
    first = server.compress(trajectory[4], 4, 8)
    for end in (server, device):
        end.decompress(first)
    message = server.compress(trajectory[2], 2, 3)
    latent = device.device.copy()
    indices = unpack_indices(message.payload, 3, 61)
    coder._reconstruct(indices, latent, Transmission(2, 4, 3, device.device_error, number=1), scale)
    forged = forge(message, side=np.array(scale, dtype=">f2").tobytes(), latent_crc=zlib.crc32(latent_bytes(latent)))
    before = state(device)
    if good:
        assert latent_bytes(device.decompress(forged)) == latent_bytes(latent)
        return
    with pytest.raises(
        BitstreamError, match="The scale of a message must be a finite number >= 0, got (nan|-?inf|-1.0)"
    ):
        device.decompress(forged)
    assert state(device) == before


def test_a_latent_that_is_not_finite_is_refused(rng: np.random.Generator) -> None:
    """Of moments that are none, and predict every latent as 10^30 times the one before."""
    moments = np.full((SCHEDULE.num_steps + 1, SCHEDULE.num_steps + 1), 1e30)
    np.fill_diagonal(moments, 1.0)
    coder = ClosedLoopCoder(SCHEDULE, (8,), RefinementModel.closed_loop(SecondMoments(moments)))
    latents = rng.standard_normal((SCHEDULE.num_steps + 1, 61)).astype(np.float16)
    codec = RefinementCodec(coder, latents[-1])
    codec.decompress(codec.compress(latents[4], 4, 8))
    before = state(codec)
    with pytest.raises(BitstreamError, match="The decoded latent and its error must be finite"):
        codec.compress(latents[2], 2, 8)
    assert state(codec) == before


@pytest.mark.parametrize("rotation", [True, False])
def test_a_residual_of_zero_equals_the_simulator_bit_for_bit(rotation: bool) -> None:
    """Of negative zeros: adding a zero of either sign makes a difference."""
    coder = closed_loop_coder(SCHEDULE, (3,), rotation=rotation)
    latents = np.full((SCHEDULE.num_steps + 1, 61), -0.0, dtype=np.float16)
    codec, simulated = RefinementCodec(coder, latents[-1]), latents[-1].astype(np.float32)
    codec.decompress(codec.compress(latents[4], 4, 3))
    coder.deliver(latents.view(np.uint16), simulated, Transmission(4, SCHEDULE.num_steps, 3))
    assert latent_bytes(codec.device) == latent_bytes(simulated)


def test_a_rotation_is_one_row_whatever_its_number() -> None:
    """A sender may make a hundred thousand deliveries; all their rotations would be M times that many numbers."""
    coder = ClosedLoopCoder(SCHEDULE, (3,))
    code = coder.encode(np.zeros(64, dtype=np.uint16), np.ones(64, dtype=np.float32), Transmission(2, 4, 3))
    tracemalloc.start()
    coder.decode(code, np.ones(64, dtype=np.float32), Transmission(2, 4, 3, 0.0, number=99_999))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e5
