"""The coder's kernels against plain NumPy, bit for bit, and the coder against the model."""

from __future__ import annotations

import re

import numpy as np
import pytest
from numpy.typing import NDArray

from refine_env import ConfigurationError, NoiseSchedule, SystemConfig
from refine_env.coding import CoderConfig, ForwardCoder, LloydMax, Transmission, base_distortion, kernels
from refine_env.dynamics.simulator import STATE_DTYPE
from refine_env.model.distortion import residual_variance

SCHEDULE = NoiseSchedule.stable_diffusion()
BIT_DEPTHS = (1, 3, 4, 8, 10, 12, 16)


def plain_refine(
    latent: NDArray[np.float16], device: NDArray[np.float32], gain: float, scale: float, bits: int
) -> NDArray[np.float32]:
    """x̂ = c x̂_p + s Q_b((x − c x̂_p)·(1/s)) in float32."""
    quantizer = LloydMax(bits)
    prediction = np.float32(gain) * device
    z = (latent.astype(np.float32) - prediction) * (np.float32(1) / np.float32(scale))
    return prediction + np.float32(scale) * quantizer.quantize(z)


def forward_trajectory(rng: np.random.Generator, dim: int) -> NDArray[np.float16]:
    x = [rng.standard_normal(dim)]
    for alpha in SCHEDULE.alpha:
        x.append(np.sqrt(alpha) * x[-1] + np.sqrt(1 - alpha) * rng.standard_normal(dim))
    return np.array(x).astype(np.float16)


def test_every_finite_float16_is_decoded_exactly() -> None:
    patterns = np.arange(65536, dtype=np.uint16)
    decoded = np.empty(65536, dtype=np.float32)
    kernels.decode_float16(patterns, decoded)
    expected = patterns.view(np.float16).astype(np.float32)
    finite = np.isfinite(expected)
    assert finite.sum() == 65536 - 2 * 1024
    assert np.array_equal(decoded[finite].view(np.uint32), expected[finite].view(np.uint32))


@pytest.mark.parametrize("bits", [b for b in BIT_DEPTHS if b != 16])
def test_kernel_equals_plain_numpy_bit_for_bit(bits: int, rng: np.random.Generator) -> None:
    latent = rng.standard_normal(5003).astype(np.float16)
    held = rng.standard_normal(5003).astype(np.float32)
    for gain, scale in ((0.0, 1.0), (1.01, 0.1), (7.3, 5.0)):
        device = held.copy()
        kernels.refine(latent.view(np.uint16), device, gain, scale, LloydMax(bits).table)
        assert np.array_equal(device, plain_refine(latent, held, gain, scale, bits))


@pytest.mark.parametrize("dim", [1, 7, 8, 9, 5003])
def test_mean_square_error_equals_plain_numpy(dim: int, rng: np.random.Generator) -> None:
    clean = rng.standard_normal(dim).astype(np.float16)
    device = rng.standard_normal(dim).astype(np.float32)
    expected = np.mean((device.astype(float) - clean.astype(float)) ** 2)
    assert kernels.mean_square_error(device, clean.view(np.uint16)) == pytest.approx(expected, rel=1e-12)
    assert kernels.mean_square_error(clean.astype(np.float32), clean.view(np.uint16)) == 0.0


def test_chain_of_deliveries_equals_plain_numpy(rng: np.random.Generator) -> None:
    x = forward_trajectory(rng, 512)
    coder = ForwardCoder(SCHEDULE, BIT_DEPTHS)
    ab = SCHEDULE.alpha_bar
    device, expected = x[50].astype(np.float32), x[50].astype(np.float32)
    previous = 50
    for step, bits in ((41, 3), (30, 8), (12, 4), (3, 10)):
        error = coder.deliver(x.view(np.uint16), device, Transmission(step, previous, bits))
        if previous == 50:  # the first transmission codes x_t itself
            gain, variance = 0.0, 1.0
        else:
            gain, variance = np.sqrt(ab[step] / ab[previous]), (ab[step] - ab[previous]) / ab[previous]
        expected = plain_refine(x[step], expected, gain, np.sqrt(variance), bits)
        assert np.array_equal(device, expected)
        assert error == pytest.approx(variance * base_distortion(bits), rel=1e-12)
        previous = step
    error = coder.deliver(x.view(np.uint16), device, Transmission(0, previous, 16))
    assert np.array_equal(device, x[0].astype(np.float32))
    assert error == 0.0


def random_chain(rng: np.random.Generator) -> tuple[tuple[int, int], ...]:
    steps = sorted(rng.choice(50, size=rng.integers(0, 6), replace=False).tolist(), reverse=True)
    return tuple((step, int(rng.choice(BIT_DEPTHS))) for step in steps)


@pytest.mark.parametrize("dim", [1, 61, 512])
def test_chains_equal_single_deliveries_bit_for_bit(dim: int, rng: np.random.Generator) -> None:
    """Whatever beginnings they share; the empty chain, one that begins another, and 40 random ones are among them."""
    x = forward_trajectory(rng, dim)
    coder = ForwardCoder(SCHEDULE, BIT_DEPTHS)
    chains = {(), ((40, 3),), ((40, 3), (7, 8)), ((40, 3), (7, 8), (0, 16)), ((40, 4), (7, 8))}
    chains = sorted(chains | {random_chain(rng) for _ in range(40)})
    mse, devices = coder.score_chains(x.view(np.uint16), chains, keep_devices=True)
    for chain, error, held in zip(chains, mse, devices, strict=True):
        device, previous = x[50].astype(np.float32), 50
        for step, bits in chain:
            coder.deliver(x.view(np.uint16), device, Transmission(step, previous, bits))
            previous = step
        assert np.array_equal(held, device)
        assert error == kernels.mean_square_error(device, x[0].view(np.uint16))
    alone, nothing = coder.score_chains(x.view(np.uint16), chains)
    assert np.array_equal(alone, mse)
    assert nothing.shape == (0, dim)


def test_a_batch_of_deliveries_equals_single_ones_bit_for_bit(rng: np.random.Generator) -> None:
    coder = ForwardCoder(SCHEDULE, BIT_DEPTHS)
    trajectories = [forward_trajectory(rng, 61) for _ in range(3)]
    state = np.zeros(3, dtype=STATE_DTYPE)
    state["delivered"] = [True, False, True]
    state["predecessor"], state["device_step"], state["device_bits"] = [50, 50, 30], [30, 30, 2], [16, 8, 3]
    state["device_error"] = state["latent_mse"] = 7.0
    device = rng.standard_normal((3, 61)).astype(np.float32)
    expected = device.copy()
    addresses = np.array([x.ctypes.data for x in trajectories], dtype=np.uint64)
    coder.deliver_batch(state, addresses, device)
    for i in (0, 2):
        s, x = state[i], trajectories[i].view(np.uint16)
        error = coder.deliver(x, expected[i], Transmission(s["device_step"], s["predecessor"], s["device_bits"]))
        assert s["device_error"] == pytest.approx(error, rel=1e-15)
        assert s["latent_mse"] == kernels.mean_square_error(expected[i], x[0])
    assert np.array_equal(device, expected)
    assert (state["device_error"][1], state["latent_mse"][1]) == (7.0, 7.0)


def test_residual_variance_by_hand() -> None:
    variance = residual_variance(NoiseSchedule([1.0, 0.8, 0.4, 0.1]))
    assert variance[0, 1] == pytest.approx(0.25)
    assert variance[1, 2] == pytest.approx(1.0)
    assert variance[0, 2] == pytest.approx(1.5)
    assert variance[:3, 3].tolist() == [1.0, 1.0, 1.0]  # first transmission
    assert variance[2, 1] == 0.0


def test_max_error_bounds_every_delivery() -> None:
    coder = ForwardCoder(SCHEDULE, BIT_DEPTHS)
    errors = [coder.refinement(Transmission(t, p, b)).error for p in range(1, 51) for t in range(p) for b in BIT_DEPTHS]
    assert max(errors) == pytest.approx(coder.max_error)


def test_unknown_coder() -> None:
    with pytest.raises(ConfigurationError, match="`coder` must be one of 'forward', 'closed_loop', got 'nearest'"):
        CoderConfig(coder="nearest")


@pytest.mark.parametrize("coder", ["forward", "closed_loop"])
def test_tables_are_what_their_docstring_says(coder: str) -> None:
    """Kinds and shapes of what the kernels read."""
    config = SystemConfig(snr_db=6.0, coder=coder, entropy_coding=coder == "closed_loop")
    tables = config.make_coder()._tables(config.latent_dim)
    sizes = {"T": config.num_steps, "rows": len(tables.rows)}
    said = re.findall(
        r"^ +(\w+): .*?(float32|float64|int32|int64) (\([^)]*\))", type(tables).__doc__ or "", re.MULTILINE
    )
    assert len(said) >= 8
    for name, kind, shape in said:
        array = getattr(tables, name)
        assert str(array.dtype) == kind, name
        if coder == "closed_loop" or name not in ("costs", "longest"):
            assert array.shape == eval(shape, {}, sizes), name
