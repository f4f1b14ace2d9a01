"""The fading law, statistically: 200,000 draws, tolerances of four standard errors."""

from __future__ import annotations

import numpy as np
import pytest

from refine_env.link import draw_gains, draw_rates, draw_rates_of_many, slot_rates, total_power, waterfill

SLOTS, SUBCHANNELS = 20_000, 10
DRAWS = SLOTS * SUBCHANNELS


@pytest.fixture(scope="module")
def gains() -> np.ndarray:
    return draw_gains(np.random.default_rng(1), SLOTS, SUBCHANNELS)


def test_gains_are_exponential_with_mean_1(gains: np.ndarray) -> None:
    assert gains.shape == (SLOTS, SUBCHANNELS)
    assert gains.mean() == pytest.approx(1.0, abs=4 / np.sqrt(DRAWS))  # standard deviation 1
    assert gains.var() == pytest.approx(1.0, abs=4 * np.sqrt(8 / DRAWS))  # fourth central moment 9
    # Kolmogorov–Smirnov distance below its 1e-5 quantile, √(ln(2/1e-5)/2n)
    ordered = np.sort(gains.ravel())
    distance = np.abs(np.arange(1, DRAWS + 1) / DRAWS - (1.0 - np.exp(-ordered))).max()
    assert distance < np.sqrt(np.log(2e5) / (2 * DRAWS))


def test_gains_are_independent_over_slots_and_subchannels(gains: np.ndarray) -> None:
    centered = gains - 1.0
    bound = 4.5 / np.sqrt(SLOTS)  # of 45 + 10 sample correlations
    across = np.corrcoef(centered.T) - np.eye(SUBCHANNELS)
    along = (centered[1:] * centered[:-1]).mean(axis=0)
    assert np.abs(across).max() < bound
    assert np.abs(along).max() < bound


def test_same_seed_same_channel_other_seed_other_channel() -> None:
    def draw(seed: int) -> np.ndarray:
        return draw_rates(np.random.default_rng(seed), 60, 60, total_power(0.0, 60), 70.0)

    assert np.array_equal(draw(5), draw(5))
    assert not np.array_equal(draw(5), draw(6))


def test_channel_is_drawn_then_applied() -> None:
    rates = draw_rates(np.random.default_rng(5), 30, 8, 4.0, 2.5)
    assert np.array_equal(rates, slot_rates(draw_gains(np.random.default_rng(5), 30, 8), 4.0, 2.5))


@pytest.mark.parametrize(("num_slots", "num_subchannels"), [(60, 60), (7, 60), (61, 3), (100, 257)])
def test_many_episodes_are_the_single_ones_bit_for_bit(num_slots: int, num_subchannels: int) -> None:
    """Each from its own generator and with its own power, whatever block or chunk its slots fall into."""
    powers = total_power(0.0, num_subchannels) * 10.0 ** np.linspace(-3.0, 12.0, 23)
    many = draw_rates_of_many(
        [np.random.default_rng(seed) for seed in range(23)], num_slots, num_subchannels, powers, 70.0
    )
    for seed, power in enumerate(powers):
        alone = draw_rates(np.random.default_rng(seed), num_slots, num_subchannels, power, 70.0)
        assert np.array_equal(many[seed], alone)


@pytest.mark.parametrize("power", [1e-18, 1e-3, 0.3, 60.0, 1e5, 1e12, 1e200])
@pytest.mark.parametrize("num_subchannels", [1, 29, 30, 31, 60, 257])
def test_rates_equal_plain_numpy(power: float, num_subchannels: int, rng: np.random.Generator) -> None:
    gains = rng.standard_exponential((61, num_subchannels))
    expected = 70.0 * np.log1p(waterfill(gains, power) * gains).sum(axis=1) / np.log(2.0)
    assert slot_rates(gains, power, 70.0) == pytest.approx(expected, rel=1e-12)


def test_slots_in_which_little_is_received() -> None:
    gains = np.array([[0.0, 0.0], [0.0, 2.0], [5e-324, 1.0], [1.0, 1.0]])
    expected = [0.0, np.log2(1.0 + 8.0), np.log2(1.0 + 4.0), 2.0 * np.log2(1.0 + 2.0)]
    assert slot_rates(gains, 4.0, 1.0) == pytest.approx(expected, rel=1e-14)
