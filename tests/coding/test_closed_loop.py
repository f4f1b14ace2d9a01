"""The closed-loop coder: its transform against SciPy's, its recursion against what is really delivered."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import linalg, stats

from refine_env import ConfigurationError, NoiseSchedule
from refine_env.coding import ClosedLoopCoder, LloydMax, Transmission, base_distortion, kernels
from refine_env.coding.refinement import rotation_orders
from refine_env.dynamics.simulator import STATE_DTYPE
from refine_env.model.distortion import RefinementModel, SecondMoments
from tests.coding import closed_loop_coder
from tests.coding.test_refinement import SCHEDULE, forward_trajectory

BIT_DEPTHS = (1, 3, 4, 8, 10, 12, 16)
DIM = 16384


def plain_rotate(values: NDArray[np.float64], order: NDArray[np.int32]) -> NDArray[np.float64]:
    """Permutation and signs, then H/√P of the first P values and, where M > P, of the last P."""
    indices = np.where(order >= 0, order, ~order)
    out = values[indices] * np.where(order >= 0, 1.0, -1.0)
    size = 1 << (values.size.bit_length() - 1)
    matrix = linalg.hadamard(size) / np.sqrt(size)
    out[:size] = matrix @ out[:size]
    if size < values.size:
        out[-size:] = matrix @ out[-size:]
    return out


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32, 64, 128, 1024])
def test_transform_equals_scipys_hadamard_matrix(size: int, rng: np.random.Generator) -> None:
    values = rng.standard_normal(size)
    fast = values.astype(np.float32)
    kernels.hadamard(fast)
    np.testing.assert_allclose(fast, linalg.hadamard(size) @ values, atol=2e-5 * np.sqrt(size))


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 12, 61, 64, 100, 768, 1024])
def test_rotation_equals_its_twin_and_is_undone(dim: int, rng: np.random.Generator) -> None:
    values = rng.standard_normal(dim)
    order = rotation_orders(dim, 3)[2]
    rotated, back = np.empty(dim, dtype=np.float32), np.empty(dim, dtype=np.float32)
    kernels.rotate(values.astype(np.float32), order, rotated)
    np.testing.assert_allclose(rotated, plain_rotate(values, order), atol=1e-5)
    kernels.unrotate(rotated.copy(), order, back)
    np.testing.assert_allclose(back, values, atol=1e-5)


def test_rotations_are_permutations_with_signs_all_different() -> None:
    orders = rotation_orders(DIM, 9)
    indices = np.where(orders >= 0, orders, ~orders)
    assert (np.sort(indices, axis=1) == np.arange(DIM)).all()
    assert len({order.tobytes() for order in orders}) == len(orders) >= 9
    negative = (orders < 0).mean(axis=1)
    assert np.abs(negative - 0.5).max() < 5 * 0.5 / np.sqrt(DIM)
    displacement = np.corrcoef(indices[0], np.arange(DIM))[0, 1]
    assert abs(displacement) < 5 / np.sqrt(DIM)
    assert np.array_equal(rotation_orders(DIM, 2)[1], orders[1])  # the same however many there are
    # What both ends must agree on is pinned: another generator would break every stored message.
    assert rotation_orders(8, 1)[0].tolist() == [-4, -6, -7, -5, 0, -2, 2, 7]


def test_rotated_residuals_are_gaussian(rng: np.random.Generator) -> None:
    """A one-dimensional signal in M dimensions, as far from Gaussian as can be."""
    values = np.where(rng.random(DIM) < 0.02, 10.0 * rng.standard_normal(DIM), 0.01).astype(np.float32)
    assert stats.kurtosis(values) > 50.0
    rotated = np.empty_like(values)
    kernels.rotate(values, rotation_orders(DIM, 1)[0], rotated)
    assert abs(stats.kurtosis(rotated)) < 0.3
    assert stats.kstest(rotated / rotated.std(), "norm").pvalue > 1e-3


@given(pattern=st.integers(0, 0x7BFF), fraction=st.floats(0.0, 1.0))
def test_scale_is_rounded_as_numpy_rounds_to_float16(pattern: int, fraction: float) -> None:
    low, high = np.array([pattern, pattern + 1], dtype=np.uint16).view(np.float16).astype(np.float64)
    if not np.isfinite(high):
        high = 65520.0 - 1e-6
    value = low + fraction * (high - low)
    assert kernels.round_to_half(value) == np.float64(np.float16(value))


def test_scale_is_capped_at_the_largest_float16() -> None:
    assert [kernels.round_to_half(v) for v in (0.0, 2.0**-26, 65504.0, 65519.9, 1e9)] == [0, 0, 65504, 65504, 65504]


def test_moments_of_the_forward_process_give_the_models_formulas() -> None:
    model, ab = RefinementModel.closed_loop(SecondMoments.forward_process(SCHEDULE)), SCHEDULE.alpha_bar
    for step, held in ((0, 50), (20, 30), (7, 8)):
        rho2 = ab[held] / ab[step]
        assert model.gain[step, held] == pytest.approx(np.sqrt(rho2))
        for error in (0.0, 0.01):
            assert model.residual_variance(step, held, error) == pytest.approx(1 - rho2 + rho2 * error)
        expected = 2 * (1 - np.sqrt(ab[step])) + 0.01 * (2 * np.sqrt(ab[step]) - 1)
        assert model.distortion(step, 0.01) == pytest.approx(expected)
    assert model.residual_variance(20, 20, 0.01) == pytest.approx(0.01)  # the same step again
    assert model.gain[20, 20] == 1.0


def test_moments_of_a_martingale_give_the_models_formulas() -> None:
    mmse = np.array([0.0, 0.01, 0.1, 0.5, 0.9])
    model = RefinementModel.closed_loop(SecondMoments.martingale(mmse))
    for step, held in ((0, 3), (1, 2), (2, 3)):
        assert model.gain[step, held] == pytest.approx(1.0)
        assert model.residual_variance(step, held, 0.02) == pytest.approx(mmse[held] - mmse[step] + 0.02)
        assert model.distortion(step, 0.02) == pytest.approx(mmse[step] + 0.02)
    assert model.residual_variance(1, 4, 0.0) == pytest.approx(0.9 - 0.01)  # from the prior mean
    assert model.distortion(4, 0.0) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (np.ones(3), r"must be a matrix \(T\+1, T\+1\)"),
        ("ab", r"must be a matrix \(T\+1, T\+1\)"),
        ([[1.0, np.nan], [np.nan, 1.0]], "must be finite"),
        ([[0.0, 0.0], [0.0, 1.0]], "must be finite, with a diagonal >= 0"),
        ([[1.0, 0.5], [0.2, 1.0]], "must be symmetric"),
    ],
)
def test_bad_moments_are_refused(values: object, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        SecondMoments(values)  # type: ignore[arg-type]


@pytest.mark.parametrize("rotation", [True, False])
@pytest.mark.parametrize("sent_scale", [True, False])
@pytest.mark.parametrize("dim", [61, 512])
def test_a_delivery_equals_plain_numpy(rotation: bool, sent_scale: bool, dim: int, rng: np.random.Generator) -> None:
    x = forward_trajectory(rng, dim)
    coder = closed_loop_coder(SCHEDULE, BIT_DEPTHS, rotation=rotation, sent_scale=sent_scale)
    ab = SCHEDULE.alpha_bar
    device, held, error = x[50].astype(np.float32), 50, 0.0
    for k, (step, bits) in enumerate(((41, 3), (30, 8), (30, 4), (3, 10))):
        rho = np.sqrt(ab[held] / ab[step])
        prediction = rho * device.astype(float)
        residual = x[step].astype(float) - prediction
        variance = 1 - rho**2 + rho**2 * error
        scale = float(np.float16(np.sqrt(np.mean(residual**2)))) if sent_scale else np.sqrt(variance)
        if rotation:
            order = rotation_orders(dim, k + 1)[k]
            matrix = np.array([plain_rotate(column, order) for column in np.eye(dim)]).T
            expected = prediction + matrix.T @ (scale * LloydMax(bits).quantize(matrix @ residual / scale))
        else:
            expected = prediction + scale * LloydMax(bits).quantize(residual / scale)
        error = coder.deliver(x.view(np.uint16), device, Transmission(step, held, bits, error, k))
        assert error == pytest.approx(scale**2 * base_distortion(bits), rel=1e-6)
        # A value at a threshold may fall on either side; all others agree.
        assert np.quantile(np.abs(device - expected), 0.98 if not rotation else 0.5) < 1e-4 * scale + 1e-6
        assert np.mean((device - expected) ** 2) < 2e-3 * scale**2
        held = step
    assert coder.deliver(x.view(np.uint16), device, Transmission(0, held, 16, error, 4)) == 0.0
    assert np.array_equal(device, x[0].astype(np.float32))


WORST = ((20, 4), (1, 4), (0, 10))  # the chain of MODEL.md §4 that is off by 10³ without care


@pytest.mark.parametrize("chain", [WORST, ((45, 3), (30, 8), (15, 3), (4, 4)), ((10, 1), (10, 3), (9, 8), (0, 4))])
def test_recursion_holds_with_rotation(chain: tuple[tuple[int, int], ...], rng: np.random.Generator) -> None:
    """Of x_t's and x_0's distortion, eight trajectories of 16384 dimensions; and off without, on the worst chain.

    131,072 values estimate a variance to 0.4 %, and a distortion at 4 bits to about 0.6: 2 % are three of these. The
    outermost cells of 10 bits hold eight values, and 1 % of the distortion: 5 % there.
    """
    model = RefinementModel.closed_loop(SecondMoments.forward_process(SCHEDULE))
    measured = {(rotation, sent): np.zeros(2) for rotation in (True, False) for sent in (True, False)}
    for _ in range(8):
        x = forward_trajectory(rng, DIM)
        for (rotation, sent), sums in measured.items():
            coder = closed_loop_coder(SCHEDULE, BIT_DEPTHS, rotation=rotation, sent_scale=sent)
            device, held, error = x[50].astype(np.float32), 50, 0.0
            for k, (step, bits) in enumerate(chain):
                error = coder.deliver(x.view(np.uint16), device, Transmission(step, held, bits, error, k))
                held = step
            sums += np.mean((device - x[step].astype(np.float32)) ** 2), np.mean((device - x[0].astype(float)) ** 2)
    error, held = 0.0, 50
    for step, bits in chain:
        error = model.residual_variance(step, held, error) * base_distortion(bits)
        held = step
    tolerance = 0.05 if chain == WORST else 0.02
    for sent in (True, False):
        assert measured[True, sent][0] / 8 == pytest.approx(error, rel=tolerance)
        assert measured[True, sent][1] / 8 == pytest.approx(model.distortion(held, error), rel=tolerance)
    if chain == WORST:
        assert measured[False, False][0] / 8 > 100 * error


def test_same_step_again_refines(rng: np.random.Generator) -> None:
    x = forward_trajectory(rng, 1024)
    coder = ClosedLoopCoder(SCHEDULE, BIT_DEPTHS)
    device = x[50].astype(np.float32)
    first = coder.deliver(x.view(np.uint16), device, Transmission(5, 50, 3, 0.0, 0))
    before = np.mean((device - x[5].astype(float)) ** 2)
    second = coder.deliver(x.view(np.uint16), device, Transmission(5, 5, 4, first, 1))
    after = np.mean((device - x[5].astype(float)) ** 2)
    assert second == pytest.approx(first * base_distortion(4), rel=0.1)
    assert after / before == pytest.approx(base_distortion(4), rel=0.15)


def test_nothing_missing_sends_a_scale_of_zero() -> None:
    x = np.zeros((51, 16), dtype=np.float16)
    coder = ClosedLoopCoder(SCHEDULE, BIT_DEPTHS)
    device = np.zeros(16, dtype=np.float32)
    assert coder.deliver(x.view(np.uint16), device, Transmission(3, 50, 3)) == 0.0
    assert not device.any()
    code = coder.encode(x.view(np.uint16)[3], device, Transmission(3, 50, 3))
    assert code.side == b"\0\0"
    assert coder.decode(code, device, Transmission(3, 50, 3)) == 0.0
    assert not device.any()


@pytest.mark.parametrize("rotation", [True, False])
@pytest.mark.parametrize("sent_scale", [True, False])
@pytest.mark.parametrize("prior_mean", [True, False])
def test_chains_and_batches_equal_single_deliveries_bit_for_bit(
    rotation: bool, sent_scale: bool, prior_mean: bool, rng: np.random.Generator
) -> None:
    x = forward_trajectory(rng, 61)[: 50 if prior_mean else 51]
    coder = closed_loop_coder(SCHEDULE, BIT_DEPTHS, rotation=rotation, sent_scale=sent_scale)
    initial = np.zeros(61, dtype=np.float32) if prior_mean else x[50].astype(np.float32)
    chains = [(), ((40, 3),), ((40, 3), (7, 3), (7, 8)), ((40, 3), (7, 8), (0, 16)), ((40, 4), (7, 8))]
    chains = sorted(chains)
    mse, devices = coder.score_chains(x.view(np.uint16), chains, keep_devices=True)
    for chain, score, final in zip(chains, mse, devices, strict=True):
        state = np.zeros(1, dtype=STATE_DTYPE)
        batch, addresses = initial[None].copy(), np.array([x.ctypes.data], dtype=np.uint64)
        device, held, error = initial.copy(), 50, 0.0
        for k, (step, bits) in enumerate(chain):
            error = coder.deliver(x.view(np.uint16), device, Transmission(step, held, bits, error, k))
            state["delivered"], state["predecessor"], state["device_step"] = True, held, step
            state["device_bits"], state["num_deliveries"] = bits, k + 1
            coder.deliver_batch(state, addresses, batch)
            held = step
            assert np.array_equal(batch[0], device)
            assert state["device_error"][0] == error
        assert np.array_equal(final, device)
        assert score == kernels.mean_square_error(device, x[0].view(np.uint16))


def test_without_latents_a_batch_has_the_models_error() -> None:
    coder = ClosedLoopCoder(SCHEDULE, BIT_DEPTHS)
    state = np.zeros(1, dtype=STATE_DTYPE)
    state["delivered"], state["predecessor"], state["device_step"], state["device_bits"] = True, 30, 20, 4
    state["device_error"], state["num_deliveries"] = 0.01, 2
    coder.deliver_batch(state, np.zeros(1, dtype=np.uint64), np.empty((1, 0), dtype=np.float32))
    assert state["device_error"][0] == pytest.approx(coder.refinement(Transmission(20, 30, 4, 0.01)).error)


def test_max_error_bounds_the_models_chains(rng: np.random.Generator) -> None:
    for bit_depths in ((1, 2), BIT_DEPTHS):
        coder = ClosedLoopCoder(SCHEDULE, bit_depths)
        for _ in range(200):
            error, held = 0.0, 50
            for step in sorted(rng.choice(50, size=8, replace=False).tolist(), reverse=True):
                error = coder.refinement(Transmission(step, held, int(rng.choice(bit_depths)), error)).error
                held = step
                assert error <= coder.max_error


def test_options_of_the_coder() -> None:
    coder = closed_loop_coder(SCHEDULE, (3, 16), sent_scale=False, same_step_refinement=False)
    assert (coder.side_bytes(3), coder.refreshes_held_step, coder.error_needs_latents) == (0, False, False)
    coder = closed_loop_coder(SCHEDULE, (3, 16))
    assert (coder.side_bytes(3), coder.side_bytes(16)) == (2, 0)
    assert (coder.refreshes_held_step, coder.error_needs_latents) == (True, True)
    short = NoiseSchedule([1.0, 0.5, 0.1])
    assert closed_loop_coder(short, (3,)).refinement(Transmission(0, 1, 3)).gain == pytest.approx(np.sqrt(0.5))
