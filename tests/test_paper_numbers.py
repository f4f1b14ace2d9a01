"""The reference figures of the model, computed anew and compared to the digits that are published for them."""

from __future__ import annotations

import numpy as np
import pytest

import agents
from refine_env import NoiseSchedule, SystemConfig
from refine_env.coding import LloydMax, base_distortion
from refine_env.link import draw_rates, latency_quantile, rate_statistics, total_power
from refine_env.model.distortion import diffusion_distortion

M = 16384
BIT_DEPTHS = (3, 4, 8, 10, 16)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(1, 0.99829603), (10, 0.78265444), (20, 0.45523877), (30, 0.17986361), (40, 0.0434560), (50, 0.0057755)],
)
def test_alpha_bar_of_stable_diffusion(step: int, expected: float) -> None:
    decimals = 7 if step >= 40 else 8
    assert NoiseSchedule.stable_diffusion(num_steps=50).alpha_bar[step] == pytest.approx(
        expected, abs=0.5 * 10.0**-decimals
    )


def test_timesteps_of_stable_diffusion_are_20_t_minus_19() -> None:
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    table = np.cumprod(1.0 - beta)
    schedule = NoiseSchedule.stable_diffusion(num_steps=50)
    assert np.array_equal(schedule.alpha_bar[1:], table[20 * (np.arange(1, 51) - 1) + 1])
    assert schedule.alpha_bar[0] == 1.0


@pytest.mark.parametrize(
    ("snr_db", "cutoff", "mean", "std", "latencies"),
    [
        (0.0, 0.393774, 4319.863, 559.516, (12, 16, 32, 39, 62)),
        (6.0, 0.158091, 8600.734, 752.882, (6, 8, 16, 20, 32)),
        (12.0, 0.051934, 14735.265, 890.196, (4, 5, 10, 12, 19)),
        (24.0, 0.003889, 30153.472, 989.022, (2, 3, 5, 6, 9)),
    ],
)
def test_rate_statistics_and_latency(
    snr_db: float, cutoff: float, mean: float, std: float, latencies: tuple[int, ...]
) -> None:
    statistics = rate_statistics(snr_db=snr_db, num_subchannels=60, symbols_per_slot=70.0)
    assert statistics.cutoff == pytest.approx(cutoff, abs=5e-7)
    assert statistics.mean == pytest.approx(mean, abs=5e-4)
    assert statistics.std == pytest.approx(std, abs=5e-4)
    computed = [latency_quantile(bits=M * b, statistics=statistics, quantile=0.9) for b in BIT_DEPTHS]
    assert computed == list(latencies)


@pytest.mark.parametrize(("snr_db", "expected"), [(0.0, 314.7), (6.0, 523.0), (12.0, 730.0), (24.0, 951.0)])
def test_fixed_power_standard_deviation(snr_db: float, expected: float) -> None:
    digits = 0.05 if snr_db == 0.0 else 0.5
    assert rate_statistics(snr_db).fixed_power_std == pytest.approx(expected, abs=digits)


def test_simulated_rate_at_0_db() -> None:
    """400,000 slots: mean 4311.9 ± 0.5, standard deviation 315.1.

    The standard error of the mean is 315/√400000 = 0.5, of the standard deviation 315/√800000 = 0.35;
    four of them are allowed.
    """
    rates = draw_rates(np.random.default_rng(0), 400_000, 60, total_power(0.0, 60), 70.0)
    assert rates.mean() == pytest.approx(4311.9, abs=2.0)
    assert rates.std() == pytest.approx(315.1, abs=1.4)


@pytest.mark.parametrize(
    ("bits", "expected", "digit"),
    [(3, 0.0345477608, 1e-10), (4, 0.0095010080, 1e-10), (8, 4.1185083e-5, 1e-12), (10, 2.5893758e-6, 1e-13)],
)
def test_base_distortion(bits: int, expected: float, digit: float) -> None:
    assert base_distortion(bits) == pytest.approx(expected, abs=digit / 2)


@pytest.mark.parametrize("bits", range(1, 13))
def test_centroid_condition(bits: int) -> None:
    """Residual below 1e-10, recomputed here with SciPy's distribution rather than the solver's quadrature."""
    from scipy import special

    quantizer = LloydMax(bits)
    ends = np.concatenate([[-np.inf], quantizer.thresholds, [np.inf]])
    density = np.where(np.isfinite(ends), np.exp(-0.5 * np.where(np.isfinite(ends), ends, 0.0) ** 2), 0.0)
    density /= np.sqrt(2.0 * np.pi)
    # Differences of upper tails on the positive side, where they do not cancel.
    half = 2 ** (bits - 1)
    tail = special.ndtr(-ends[half:])
    centroids = (density[half:-1] - density[half + 1 :]) / (tail[:-1] - tail[1:])
    assert quantizer.centroid_residual < 1e-10
    assert np.abs(quantizer.levels[half:] - centroids).max() < 1e-10
    assert np.array_equal(quantizer.levels, -quantizer.levels[::-1])
    assert np.allclose(quantizer.thresholds, (quantizer.levels[1:] + quantizer.levels[:-1]) / 2, atol=1e-15)


def test_diffusion_distortion_at_20() -> None:
    assert diffusion_distortion(NoiseSchedule.stable_diffusion())[20] == pytest.approx(0.651, abs=5e-4)
    assert diffusion_distortion(NoiseSchedule.stable_diffusion())[1] == pytest.approx(0.0017, abs=5e-5)


def test_final_only_needs_23_db_per_subchannel() -> None:
    """16·M bits in the slots after x_0: T_ul = 1, x_0 in slot 52, 9 slots left with mean rate R̄."""
    needed = 16 * M / 9
    assert rate_statistics(23.2).mean < needed < rate_statistics(23.4).mean
    assert (
        rate_statistics(41.0, snr_reference="total").mean < needed < rate_statistics(41.3, snr_reference="total").mean
    )


def test_latent_scaling_keeps_bits_per_dimension() -> None:
    small, large = (SystemConfig(snr_db=6.0, latent_dim=dim) for dim in (256, M))
    assert small.rate_statistics.mean / 256 == pytest.approx(large.rate_statistics.mean / M, rel=1e-12)
    assert small.rate_statistics.std / small.rate_statistics.mean == pytest.approx(
        large.rate_statistics.std / large.rate_statistics.mean, rel=1e-12
    )
    assert small.uplink_bits == 8192 / 64


def predicted(snr_db: float, bit_depths: tuple[int, ...] = BIT_DEPTHS, same_step_refinement: bool = False) -> float:
    """What dynamic programming expects, closed loop, payload x_t."""
    config = SystemConfig(
        snr_db=snr_db, bit_depths=bit_depths, coder="closed_loop", same_step_refinement=same_step_refinement
    )
    return agents.DynamicProgramming(config).predicted_value


@pytest.mark.parametrize(
    ("snr_db", "expected", "tolerance"),
    [
        (0.0, 0.0828, 0.01),
        (1.0, 0.0505, 0.01),
        (2.0, 0.0291, 0.01),
        (3.0, 0.00952, 0.01),
        (4.0, 0.00582, 0.01),
        (6.0, 1.50e-3, 0.02),  # one episode in 300 carries the mean
        (9.0, 1.905e-4, 0.01),
        (12.0, 2.386e-5, 0.01),
        (15.0, 9.06e-7, 0.01),
    ],
)
def test_dynamic_programming_predicts(snr_db: float, expected: float, tolerance: float) -> None:
    assert predicted(snr_db) == pytest.approx(expected, rel=tolerance)


def test_dynamic_programming_with_same_step_refinement() -> None:
    assert predicted(12.0, same_step_refinement=True) == pytest.approx(2.12e-5, rel=0.02)


@pytest.mark.parametrize(
    ("snr_db", "bit_depths", "same_step_refinement", "expected"),
    [
        (0.0, (*range(1, 11), 12, 16), True, 0.0207),
        (3.0, (*range(1, 11), 12, 16), True, 0.0046),
        (6.0, (*range(1, 11), 12, 16), False, 7.1e-4),
        (9.0, tuple(range(1, 17)), True, 6.3e-5),
        (15.0, tuple(range(1, 17)), True, 1.1e-7),
    ],
)
def test_dynamic_programming_with_more_bit_depths(
    snr_db: float, bit_depths: tuple[int, ...], same_step_refinement: bool, expected: float
) -> None:
    """To the two digits given. Same-step refinement changes only the entries at 6 dB, 7.2e-4 to 6.1e-4, and at 15 dB,
    1.36e-7 to 1.07e-7."""
    assert predicted(snr_db, bit_depths, same_step_refinement) == pytest.approx(expected, rel=0.04)
