"""Entropy-coded indices: their model, payloads of fixed size, and the same latent at both ends, bit for bit."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special

import agents
from refine_env import ConfigurationError, SystemConfig
from refine_env.coding import (
    ClosedLoopCoder,
    LloydMax,
    Message,
    RefinementCodec,
    Transmission,
    base_distortion,
    entropy,
    kernels,
)
from refine_env.coding.bitstream import HEADER_BYTES
from refine_env.coding.refinement import rotation_orders
from refine_env.errors import BitstreamError
from refine_env.transport import Receiver, Sender
from tests.coding import closed_loop_coder
from tests.coding.test_bitstream import SCHEDULE, check_refused, forge, state

ROOT = Path(__file__).parents[2]
QUANTIZED = range(1, 16)
EVERY_BIT_DEPTH = tuple(range(1, 17))
DIMS = (61, 256, 1024, 16384)
UNIT = entropy.COST_UNIT
Latents = NDArray[np.float16]


@pytest.mark.parametrize("bits", QUANTIZED)
def test_model_equals_direct_integration(bits: int) -> None:
    """Riemann sums over four million points, of functions that are constant within cells."""
    model, quantizer = entropy.index_model(bits), LloydMax(bits)
    z, step = np.linspace(-9.0, 9.0, 4_000_001, retstep=True)
    weight = np.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi) * step
    cost = model.costs[quantizer.index(z)] * UNIT
    rate = weight @ cost
    assert model.rate == pytest.approx(rate, abs=1e-5)
    slope = (weight * cost) @ (z * z - 1.0) / 2.0
    rest = cost - rate - slope * (z * z - 1.0)
    assert model.spread == pytest.approx(math.sqrt(weight @ rest**2), abs=2e-5)
    below = special.ndtr(np.append(quantizer.thresholds[: 2 ** (bits - 1)], 0.0))  # up to the middle, no cancellation
    probability = np.diff(below[:-1], prepend=0.0)
    probability = np.concatenate([probability, probability[::-1]])
    assert model.entropy == pytest.approx(special.entr(probability).sum() / math.log(2.0), rel=1e-10)
    assert 0.0 <= model.rate - model.entropy < 3e-5


@pytest.mark.parametrize("bits", QUANTIZED)
def test_frequencies_are_rounded_probabilities(bits: int) -> None:
    model = entropy.index_model(bits)
    exact = LloydMax(bits).probabilities * 2**24
    assert model.frequencies.sum() == 2**24
    assert model.frequencies.min() >= 1
    off = np.abs(model.frequencies - np.maximum(exact, 1.0))
    middle = slice(2 ** (bits - 1) - 1, 2 ** (bits - 1) + 1)
    assert off[middle].max() <= 128.0  # take up the rest of 32768 roundings
    off[middle] = 0.0
    assert off.max() <= 0.5
    over = model.costs * UNIT - (24.0 - np.log2(model.frequencies))
    assert 0.0 <= over.min() <= over.max() < UNIT


def test_entropy_at_high_rate_is_in_closed_form() -> None:
    """Levels have the density of N(0, 3), so b − H_b → ½ log2 3 − ⅓ log2 e."""
    saved = [bits - entropy.index_model(bits).entropy for bits in QUANTIZED]
    assert saved[-1] == pytest.approx(0.5 * math.log2(3.0) - math.log2(math.e) / 3.0, abs=1e-4)
    assert saved[0] == pytest.approx(0.0, abs=1e-12)
    assert (np.diff(saved) > 0.0).all()


def test_payloads_have_the_size_of_their_formula() -> None:
    model = entropy.index_model(4)
    bits = 1024 * model.rate + 3.0 * 32.0 * model.spread + 40.0
    assert entropy.coded_bytes(1024, 4) == math.ceil(bits / 8.0) == 489
    assert entropy.longest_code(489) * UNIT == 489 * 8 - 40
    assert entropy.coded_bytes(1024, 16) is None
    assert entropy.coded_bytes(1 << 20, 1) is None  # nothing to save
    assert entropy.coded_bytes(61, 8) is None  # the coder's state eats it up
    assert entropy.coded_bytes(0, 8) is None


def test_raised_scales_are_float16_values() -> None:
    values = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    for steps in (1, 2, 16):
        raised = [kernels._raise_half(value, steps) for value in values[::7].astype(np.float32)]
        expected = np.append(values[steps:], np.zeros(steps, dtype=np.float16))[::7]
        assert np.array_equal(raised, expected.astype(np.float32))


def make_coder(bit_depths: tuple[int, ...] = EVERY_BIT_DEPTH) -> ClosedLoopCoder:
    return closed_loop_coder(SCHEDULE, bit_depths, entropy_coding=True)


LAWS: dict[str, Callable[[np.random.Generator, int], NDArray[np.float64]]] = {
    "gaussian": lambda rng, dim: rng.standard_normal(dim),
    "heavy": lambda rng, dim: rng.standard_t(2.5, dim),
    "sparse": lambda rng, dim: np.where(rng.random(dim) < 0.02, rng.standard_normal(dim), 1e-3),
    "flat": lambda rng, dim: rng.uniform(-1.0, 1.0, dim),
    "one value": lambda rng, dim: np.full(dim, 0.7),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dim", DIMS)
def test_payloads_are_never_too_small(dim: int, law: str, rng: np.random.Generator) -> None:
    """The entropy coder's own code, at every bit depth; what it needs beyond the codelength is within the allowance."""
    coder = make_coder()
    for bits in QUANTIZED:
        size = entropy.coded_bytes(dim, bits)
        assert coder.payload_bits(dim, bits) == (dim * bits if size is None else 8 * size) <= dim * bits
        if size is None:
            continue
        for k in range(4 if dim > 1024 else 20):
            latent = (LAWS[law](rng, dim) * rng.choice([0.01, 1.0, 30.0])).astype(np.float16)
            device = np.zeros(dim, dtype=np.float32)
            code = coder.encode(latent.view(np.uint16), device, Transmission(3, 6, bits, number=k))
            codelength = int(entropy.index_model(bits).costs[code.indices].astype(np.int64).sum()) * UNIT
            assert codelength <= entropy.longest_code(size) * UNIT
            payload = entropy.compress_indices(code.indices, bits, size)
            assert len(payload) == size
            assert 8 * len(payload.rstrip(b"\0")) <= codelength + entropy.STATE_BITS
            assert np.array_equal(entropy.decompress_indices(payload, bits, dim), code.indices)


def test_codelengths_vary_as_little_as_the_model_says(rng: np.random.Generator) -> None:
    """Of 2000 messages; a scale rounded to float16 adds less than a tenth to the standard deviation at 3 bits."""
    dim, coder, model = 1024, make_coder((3,)), entropy.index_model(3)
    held = np.zeros(dim, dtype=np.float32)
    lengths = []
    for k in range(2000):
        latent = rng.standard_normal(dim).astype(np.float16).view(np.uint16)
        indices = coder.encode(latent, held, Transmission(3, 6, 3, 0.0, k % 7)).indices
        lengths.append(float(model.costs[indices].sum()) * UNIT)
    deviation = math.sqrt(dim) * model.spread
    assert np.mean(lengths) == pytest.approx(dim * model.rate, abs=6 * deviation / math.sqrt(2000))
    assert np.std(lengths) == pytest.approx(deviation, rel=0.1)


@pytest.mark.parametrize(("bits", "fraction", "inner"), [(3, 0.3, 0.32), (4, 0.2, 0.84), (5, 0.1, 0.34)])
def test_residuals_that_do_not_fit_are_sent_with_a_larger_scale(bits: int, fraction: float, inner: float) -> None:
    """Rotated to two magnitudes that cost more than Gaussian values of the same power."""
    dim, many = 1024, round(1024 * fraction)
    outer = math.sqrt((dim - (dim - many) * inner**2) / many)
    rotated = np.where(np.arange(dim) < many, outer, inner).astype(np.float32)
    rotated[::2] *= -1.0
    residual = np.empty_like(rotated)
    kernels.unrotate(rotated, rotation_orders(dim, 1)[0], residual)
    latents = np.zeros((SCHEDULE.num_steps + 1, dim), dtype=np.float16)
    latents[3] = residual
    codecs = {coded: RefinementCodec(coder, latents[-1]) for coded, coder in both_coders()}
    plain, message = codecs[False].compress(latents[3], 3, bits), codecs[True].compress(latents[3], 3, bits)
    rms, scale = (float(np.frombuffer(side, dtype=">f2")[0]) for side in (plain.side, message.side))
    assert rms == pytest.approx(1.0, abs=2e-3)
    assert 1.001 * rms < scale < 1.3 * rms
    codecs[True].decompress(bytes(message))
    device = np.zeros(dim, dtype=np.float32)
    error = make_coder().deliver(latents.view(np.uint16), device, Transmission(3, 6, bits))
    assert device.tobytes() == codecs[True].device.tobytes()
    assert error == codecs[True].device_error == scale**2 * base_distortion(bits)


def both_coders() -> list[tuple[bool, ClosedLoopCoder]]:
    return [(coded, closed_loop_coder(SCHEDULE, EVERY_BIT_DEPTH, entropy_coding=coded)) for coded in (False, True)]


def test_scales_are_raised_until_the_code_fits(rng: np.random.Generator) -> None:
    """However short it must be; and the quantizer's error grows by no more than s²."""
    values = rng.standard_normal(4096).astype(np.float32)
    for bits in (3, 8):
        quantizer, costs = LloydMax(bits), entropy.index_model(bits).costs
        table = quantizer.table
        lower = np.searchsorted(table.levels, table.cells.rows[:, 1])
        by_row = np.stack([costs[lower], costs[np.minimum(lower + 1, costs.size - 1)]], axis=1)

        def fit(start: float, saved: float, table: Any = table, by_row: Any = by_row, bits: int = bits) -> float:
            longest = int(4096 * (entropy.index_model(bits).rate - saved) / UNIT)
            return float(kernels.fit_scale(values, np.float32(start), table.cells, by_row, longest))

        scales = [fit(1.0, saved) for saved in (-1.0, 0.02, 0.1, 0.3)]
        assert scales[0] == 1.0
        assert np.array_equal(np.float16(scales), scales)
        assert (np.diff(scales) > 0.0).all()
        at_first = np.mean((quantizer.quantize(values) - values) ** 2)
        for scale, saved in zip(scales[1:], (0.02, 0.1, 0.3), strict=True):
            standardized = (values / np.float32(scale)).astype(np.float32)
            assert costs[quantizer.index(standardized)].mean() * UNIT <= entropy.index_model(bits).rate - saved
            assert np.mean((scale * quantizer.quantize(standardized) - values) ** 2) <= 1.01 * scale**2 * at_first
        assert fit(65504.0, -1.0) == 65504.0
        assert fit(1.0, 20.0) == 0.0  # no scale does


def draw_latents(rng: np.random.Generator, dim: int) -> Latents:
    return (rng.standard_normal((SCHEDULE.num_steps + 1, dim)) * rng.choice([0.1, 1.0, 3.0])).astype(np.float16)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    dim=st.sampled_from([61, 100, 256, 1000, 1024]),
    chain=st.lists(st.tuples(st.integers(0, SCHEDULE.num_steps - 1), st.integers(1, 16)), min_size=1, max_size=5),
)
def test_bytes_give_the_simulators_latent(seed: int, dim: int, chain: list[tuple[int, int]]) -> None:
    latents = draw_latents(np.random.default_rng(seed), dim)
    coder = make_coder()
    server, device = RefinementCodec(coder, latents[-1]), RefinementCodec(coder, latents[-1])
    simulated, error, held, count = latents[-1].astype(np.float32), 0.0, SCHEDULE.num_steps, 0
    for step, bits in sorted(chain, reverse=True):
        if step == held and not 0 < server.device_bits < 16:
            continue
        message = server.compress(latents[step], step, bits)
        side = 2 * (bits < 16)
        assert message.num_bits == coder.payload_bits(dim, bits) + 8 * side
        assert len(bytes(message)) == HEADER_BYTES + side + -(-coder.payload_bits(dim, bits) // 8)
        assert message.entropy_coded == coder.entropy_coded(dim, bits) == (message.num_bits < dim * bits + 8 * side)
        assert Message.from_bytes(bytes(message)) == message
        assert bytes(message)[4] == 1 + message.entropy_coded
        device.decompress(bytes(message))
        server.decompress(message)
        error = coder.deliver(latents.view(np.uint16), simulated, Transmission(step, held, bits, error, count))
        held, count = step, count + 1
        assert state(device) == state(server)
        assert (simulated.tobytes(), error) == (device.device.tobytes(), device.device_error)


def test_scored_chains_are_deliveries(rng: np.random.Generator) -> None:
    latents = draw_latents(rng, 1024)
    coder = make_coder()
    chains = (((4, 3),), ((4, 3), (2, 8)), ((4, 3), (2, 8), (2, 5)), ((3, 16), (1, 4)))
    mse, devices = coder.score_chains(latents.view(np.uint16), chains, keep_devices=True)
    for chain, score, held in zip(chains, mse, devices, strict=True):
        codec = RefinementCodec(coder, latents[-1])
        for step, bits in chain:
            codec.decompress(codec.compress(latents[step], step, bits))
        assert held.tobytes() == codec.device.tobytes()
        assert score == pytest.approx(np.mean((codec.device - latents[0].astype(np.float64)) ** 2))


@pytest.mark.parametrize("value", [0.0, 6e-8, 1e-6, 60000.0])
def test_residuals_at_the_ends_of_float16(value: float) -> None:
    latents = np.zeros((SCHEDULE.num_steps + 1, 1024), dtype=np.float16)
    latents[3, ::3] = value
    coder = make_coder()
    for bits in (3, 12):
        codec, device = RefinementCodec(coder, latents[-1]), np.zeros(1024, dtype=np.float32)
        codec.decompress(bytes(codec.compress(latents[3], 3, bits)))
        coder.deliver(latents.view(np.uint16), device, Transmission(3, 6, bits))
        assert np.array_equal(device, codec.device)
        indices = coder.encode(latents[3].view(np.uint16), np.zeros_like(device), Transmission(3, 6, bits)).indices
        costs = entropy.index_model(bits).costs[indices].astype(np.int64)
        assert costs.sum() <= entropy.longest_code(coder.payload_bits(1024, bits) // 8)


def test_the_code_is_pinned() -> None:
    """What both ends must agree on: other frequencies or another coder would break every stored message."""
    indices = (np.arange(40) ** 2 % 8).astype(np.uint16)
    payload = entropy.compress_indices(indices, 3, 24)
    assert payload.hex() == "d8129bfd211a158c9484006fc6b601fd8b01320100000000"
    assert np.array_equal(entropy.decompress_indices(payload, 3, 40), indices)


def test_too_long_a_code_is_refused() -> None:
    with pytest.raises(BitstreamError, match="`indices` must fit a payload of 8 bytes, got a code of"):
        entropy.compress_indices(np.full(40, 7, dtype=np.uint16), 3, 8)
    payload = entropy.compress_indices(np.full(41, 3, dtype=np.uint16), 3, 40)
    with pytest.raises(BitstreamError, match="`payload` must hold the code of 40 indices of 3 bits, got a longer one"):
        entropy.decompress_indices(payload, 3, 40)


@pytest.fixture
def message_and_device(rng: np.random.Generator) -> tuple[Message, RefinementCodec]:
    latents = draw_latents(rng, 256)
    device = RefinementCodec(make_coder((4, 8, 16)), latents[-1])
    device.decompress(device.compress(latents[4], 4, 8))
    return device.compress(latents[3], 3, 4), device


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda m: forge(m, version=3), "must be of format version 1 or 2, got 3"),
        (lambda m: forge(m, version=1), "`payload` must have 128 bytes for 256 dimensions at 4 bits, got 127"),
        (lambda m: forge(m, version=1, payload=b"\0" * 128), "must be entropy-coded for this coder at 4 bits, got p"),
        (lambda m: forge(m, version=2, payload=m.payload[1:]), "`payload` must have 127 bytes .* entropy-coded, got 1"),
        (lambda m: forge(m, version=2, payload=m.payload + b"\0"), "must be less than 256 dimensions at 4 bits"),
        (lambda m: forge(m, version=2, bits=16), "must be less than 256 dimensions at 16 bits, below 16"),
        (lambda m: forge(m, version=2, payload=b"\xff" * 127), "must hold the code of 256 indices of 4 bits, got a l"),
        (lambda m: forge(m, version=2, payload=b"\0" * 127), "must have the CRC-32 that the server meant"),
        (lambda m: bytes(m)[:60] + b"\0" + bytes(m)[61:], "must have the CRC-32 that its header says"),
    ],
)  # fmt: skip
def test_damage_is_refused(
    message_and_device: tuple[Message, RefinementCodec], spoil: Callable[[Message], bytes], sentence: str
) -> None:
    message, device = message_and_device
    assert (message.entropy_coded, len(message.payload)) == (True, 127)
    check_refused(device, message, spoil, sentence)


def test_the_other_coder_refuses_the_payload(rng: np.random.Generator) -> None:
    latents = draw_latents(rng, 256)
    coders = dict(both_coders())
    message = RefinementCodec(coders[True], latents[-1]).compress(latents[3], 3, 8)
    with pytest.raises(BitstreamError, match="must be plain for this coder at 8 bits, got entropy-coded"):
        RefinementCodec(coders[False], latents[-1]).decompress(bytes(message))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_random_payloads_never_yield_another_latent(data: st.DataObject) -> None:
    latents = draw_latents(np.random.default_rng(0), 256)
    codec = RefinementCodec(make_coder(), latents[-1])
    message = codec.compress(latents[3], 3, 6)
    payload = bytearray(message.payload)
    for position in data.draw(st.sets(st.integers(0, len(payload) - 1), min_size=1)):
        payload[position] = data.draw(st.integers(0, 255))
    before = state(codec)
    try:
        decoded = codec.decompress(forge(message, version=2, payload=bytes(payload)))
    except BitstreamError:
        assert state(codec) == before
    else:
        assert bytes(payload) == message.payload or decoded.tobytes() == codec.decompress(message).tobytes()


@pytest.mark.parametrize(
    "kwargs", [{}, {"coder": "closed_loop", "rotation": False}, {"coder": "closed_loop", "sent_scale": False}]
)
def test_it_is_refused_without_rotation_and_sent_scale(kwargs: dict[str, Any]) -> None:
    sentence = (
        "`entropy_coding` must be False unless coder='closed_loop', rotation=True and sent_scale=True, got coder="
    )
    with pytest.raises(ConfigurationError, match=sentence):
        SystemConfig(snr_db=6.0, entropy_coding=True, **kwargs)
    options = {name: value for name, value in kwargs.items() if name != "coder"}
    if options:
        with pytest.raises(ConfigurationError, match=sentence):
            closed_loop_coder(SCHEDULE, (3,), entropy_coding=True, **options)


def test_configurations_have_the_size_of_their_messages() -> None:
    config = SystemConfig(snr_db=6.0, coder="closed_loop", entropy_coding=True, bit_depths=(1, 3, 8, 16))
    assert config.message_bits.tolist() == [16384 + 16, 46424 + 16, 126112 + 16, 16384 * 16]
    assert SystemConfig.from_dict(config.to_dict()) == config
    assert config != SystemConfig(snr_db=6.0, coder="closed_loop", bit_depths=(1, 3, 8, 16))


KWARGS = {"coder": "closed_loop", "entropy_coding": True, "snr_db": 12.0}


@pytest.mark.parametrize("seed", range(3))
def test_an_episode_over_a_socket(make_env: Callable[..., gym.Env[Any, Any]], seed: int) -> None:
    env, twin = make_env(**KWARGS), make_env(**KWARGS)
    config = env.unwrapped.config  # type: ignore[attr-defined]
    with Receiver(timeout=20.0) as receiver, ThreadPoolExecutor(max_workers=1) as pool:
        at_the_device = pool.submit(receiver.receive)
        policy = agents.make("random", config, seed=seed)
        sent = Sender(env, policy, timeout=20.0).send(receiver.address, seed=seed)
        received = at_the_device.result(timeout=30.0)
    observation, info = twin.reset(seed=seed)
    policy, terminated = agents.make("random", config, seed=seed), False
    policy.reset(1)
    while not terminated:
        observation, _, terminated, _, info = twin.step(policy.select_action(observation, info))
    assert received.latent.tobytes() == sent.latent.tobytes()
    assert received.latent.tobytes() == twin.unwrapped._process.episodes.device[0].tobytes()  # type: ignore[attr-defined]
    assert len(sent.deliveries) == info["num_deliveries"] > 0
    for delivery in received.deliveries:
        size = config.message_bits[config.bit_depths.index(delivery.bits)]
        assert delivery.num_bytes == HEADER_BYTES + math.ceil(size / 8)
    assert any(2 + 256 * d.bits // 8 > d.num_bytes - HEADER_BYTES for d in received.deliveries)


WITHOUT = """
import sys
sys.modules["constriction"] = None
import gymnasium as gym, numpy as np, refine_env
from refine_env.coding import RefinementCodec
from tests.coding import closed_loop_coder
env = gym.make(refine_env.ENV_ID, cache=sys.argv[1], coder="closed_loop", entropy_coding=True, snr_db=18.0)
observation, info = env.reset(seed=0)
while observation["slot"] <= 60:
    observation, _, _, _, info = env.step(4 * int(info["action_mask"][4]))
print(info["num_deliveries"])
noise = np.zeros(256, dtype=np.float16)
try:
    RefinementCodec(env.unwrapped.config.make_coder(), noise).compress(noise, 3, 8)
except refine_env.MissingExtraError as error:
    print(error)
"""


def test_the_simulator_does_not_need_the_entropy_coder(gaussian_cache: Path) -> None:
    command = [sys.executable, "-c", WITHOUT, str(gaussian_cache)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    deliveries, sentence = result.stdout.splitlines()
    assert int(deliveries) > 0
    assert "`constriction` must be installed" in sentence
    assert "refine-env[entropy]" in sentence
