from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate

from refine_env import ConfigurationError
from refine_env.link import draw_rates, latency_quantile, latency_quantiles, rate_statistics, total_power


@pytest.mark.parametrize("snr_db", [-30.0, -10.0, 0.0, 15.0, 40.0])
def test_cutoff_spends_the_power(snr_db: float) -> None:
    cutoff = rate_statistics(snr_db).cutoff
    spent, _ = integrate.quad(lambda g: (1 / cutoff - 1 / g) * np.exp(-g), cutoff, cutoff + 60, limit=400)
    assert spent == pytest.approx(10 ** (snr_db / 10), rel=1e-6)


def test_moments_equal_plain_quadrature() -> None:
    statistics = rate_statistics(3.0, num_subchannels=7, symbols_per_slot=2.5)

    def moment(power: int) -> float:
        value, _ = integrate.quad(
            lambda g: np.log2(g / statistics.cutoff) ** power * np.exp(-g), statistics.cutoff, 60, limit=400
        )
        return value

    assert statistics.mean == pytest.approx(2.5 * 7 * moment(1), rel=1e-8)
    assert statistics.std == pytest.approx(2.5 * np.sqrt(7 * (moment(2) - moment(1) ** 2)), rel=1e-8)


@pytest.mark.parametrize("snr_db", [0.0, 6.0, 12.0, 24.0])
def test_fixed_power_std_describes_the_simulated_link(snr_db: float) -> None:
    """100,000 slots; the delta method is off by up to 0.5 %, the sample by 4/√200000 = 0.9 %."""
    rates = draw_rates(np.random.default_rng(2), 100_000, 60, total_power(snr_db, 60), 70.0)
    assert rates.std() == pytest.approx(rate_statistics(snr_db).fixed_power_std, rel=0.014)


def test_latency_solves_equation_11() -> None:
    from scipy.special import ndtr

    statistics = rate_statistics(6.0)
    for bits in (10.0, 8601.0, 49152.0, 1e6, 1e7 + 0.5):
        slots = latency_quantile(bits, statistics, 0.9)

        # Pr(S_N >= B) reaches q at the first real N below the reported one, and not a slot earlier.
        def probability(n: float, bits: float = bits) -> float:
            return float(1 - ndtr((bits - n * statistics.mean) / (np.sqrt(n) * statistics.std)))

        assert probability(slots) >= 0.9
        assert slots == 1 or probability(slots - 1) < 0.9


def test_latency_at_the_median_is_the_mean_rate() -> None:
    statistics = rate_statistics(6.0)
    assert latency_quantile(3.5 * statistics.mean, statistics, 0.5) == 4
    for slots in range(1, 201):
        assert latency_quantile(slots * statistics.mean, statistics, 0.5) == slots
        assert latency_quantile(slots * statistics.mean * (1 + 1e-12), statistics, 0.5) == slots + 1


def test_latency_of_a_dead_link() -> None:
    """Far beyond any deadline, and still an integer that can be added to a slot."""
    assert latency_quantiles(16384, (3, 16), rate_statistics(-200.0)).tolist() == [2**31, 2**31]


def test_latency_table() -> None:
    statistics = rate_statistics(0.0)
    assert latency_quantiles(16384, (3, 4), statistics).tolist() == [12, 16]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0.0}, "`bits` must be > 0, got 0.0"),
        ({"bits": np.inf}, "`bits` must be a finite number, got inf"),
        ({"quantile": 1.0}, "`quantile` must lie strictly between 0 and 1, got 1.0"),
        ({"quantile": 0.0}, "`quantile` must be > 0"),
    ],
)
def test_bad_latency_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        latency_quantile(**{"bits": 100.0, "statistics": rate_statistics(0.0), **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize("snr_db", [np.nan, np.inf, "6", None, True, 1e3])
def test_bad_snr(snr_db: object) -> None:
    with pytest.raises(ConfigurationError, match="`snr_db` must"):
        rate_statistics(snr_db)  # type: ignore[arg-type]
