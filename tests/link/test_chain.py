from __future__ import annotations

import numpy as np
import pytest

from refine_env import ConfigurationError, LinkConfig, SystemConfig
from refine_env.link import (
    ChannelModel,
    RateChain,
    RateLevels,
    draw_rates_of_many,
    latency_quantiles,
    rate_chain,
    rate_law,
    total_power,
)
from refine_env.link import chain as chain_module

M = 16384
GAUSS_MARKOV = ChannelModel(correlation="gauss-markov", correlation_coefficient=0.9)


@pytest.fixture
def hand() -> RateChain:
    """Two rates, 1 and 2 bits per slot; stationary: 3/4 and 1/4."""
    levels = RateLevels(
        np.array([1.0, 2.0]), np.array([1.5]), np.array([0.75, 0.25]), np.array([[0.9, 0.1], [0.3, 0.7]])
    )
    return RateChain(levels, 0.0, 1.0, 1.0, np.eye(2))


def test_latency_by_hand(hand: RateChain) -> None:
    """2.5 bits: two slots if one of them carries 2, else three."""
    pmf = hand.latency_pmf(2.5, 4)
    transition = hand.levels.transition
    assert pmf.shape == (2, 5, 2)
    assert pmf[0, 2] == pytest.approx(0.1 * transition[1])
    assert pmf[0, 3] == pytest.approx(0.9 * (transition @ transition)[0])
    assert pmf[1, 2] == pytest.approx((transition @ transition)[1])
    assert pmf[:, [0, 1, 4]] == pytest.approx(0.0, abs=1e-12)
    assert hand.latency_pmf(0.5, 2)[:, 1] == pytest.approx(transition)
    assert hand.latency_sf(2.5, 3) == pytest.approx([1.0, 1.0, 0.75 * 0.9, 0.0])
    assert [hand.latency_quantile(2.5, q) for q in (0.3, 0.34)] == [2, 3]
    assert hand.latency_pmf(np.array([[0.5, 2.5]]), 4)[0, 1] == pytest.approx(pmf)


def test_sums_of_many_slots_on_a_coarser_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid four times as coarse changes little; it is taken where sums are wide."""
    chain = rate_chain(6.0, 10, 1.0, channel=GAUSS_MARKOV, num_levels=4)
    bits = 60.0 * chain.mean
    expected = chain.latency_sf(bits, 80)
    monkeypatch.setattr(chain_module, "_MOST_POINTS", 1 << 12)
    coarse = chain.latency_sf(bits, 80)
    assert not np.array_equal(coarse, expected)
    assert np.abs(coarse - expected).max() < 0.005


def test_transitions_of_independent_slots() -> None:
    """Every row is uniform within five times the error; sums are those of the exact law."""
    chain = rate_chain(6.0)
    assert chain.levels.transition == pytest.approx(np.full((8, 8), 1 / 8), abs=5 * chain.error)
    assert 5e-4 < chain.error < 5e-3
    assert chain.levels.probabilities == pytest.approx(np.full(8, 1 / 8), abs=5e-3)
    law = rate_law(6.0)
    assert chain.mean == pytest.approx(law.mean, rel=1e-3)
    for bits in (3.0 * M, 10.0 * M):
        assert chain.latency_sf(bits, 25) == pytest.approx(law.latency_sf(bits, 25), abs=0.01)


def test_a_chain_of_a_correlated_link() -> None:
    chain = rate_chain(6.0, channel=GAUSS_MARKOV)
    levels = chain.levels
    assert levels.transition.sum(axis=1) == pytest.approx(1.0)
    assert levels.probabilities @ levels.transition == pytest.approx(levels.probabilities)
    assert levels.probabilities == pytest.approx(np.full(8, 1 / 8), abs=0.01)
    assert (np.diff(levels.rates) > 0).all()
    assert levels.transition[0, 0] > 0.5 > 0.01 > levels.transition[0, 7]
    # Each level's own law lies between its edges.
    grid = chain.origin + chain.spacing * np.arange(chain.masses.shape[1])
    assert chain.masses.sum(axis=1) == pytest.approx(1.0)
    for i, edge in enumerate(levels.edges):
        assert chain.masses[i, grid > edge + chain.spacing].sum() == 0.0
        assert chain.masses[i + 1, grid < edge - chain.spacing].sum() == 0.0


def test_its_latency_is_that_of_the_link() -> None:
    """Gauss–Markov, a = 0.9: 10,000 transmissions. Eight levels forget a little: within 0.03; as i.i.d., 0.1 off."""
    bits, slots = 10.0 * M, 25
    rngs = [np.random.default_rng(seed) for seed in range(10_000)]
    rates = draw_rates_of_many(rngs, slots, 60, np.full(len(rngs), total_power(6.0, 60)), 70.0, GAUSS_MARKOV)
    needed = 1 + (np.cumsum(rates, axis=1) < bits).sum(axis=1)
    simulated = np.array([(needed > k).mean() for k in range(slots + 1)])
    chain = rate_chain(6.0, channel=GAUSS_MARKOV)
    assert np.abs(chain.latency_sf(bits, slots) - simulated).max() < 0.03
    assert np.abs(rate_law(6.0).latency_sf(bits, slots) - simulated).max() > 0.05
    # From a given first level, and with the level after the transmission.
    pmf = chain.latency_pmf(bits, slots)
    first = chain.levels.level_of(rates[:, 0])
    through = (needed < slots) & (first == 0)
    after = chain.levels.level_of(rates[np.arange(len(rates)), np.minimum(needed, slots - 1)])
    assert (
        np.abs(
            pmf[0].sum(axis=1) - np.bincount(needed[first == 0], minlength=slots + 2)[: slots + 1] / (first == 0).sum()
        ).max()
        < 0.06
    )
    shares = np.bincount(after[through], minlength=8) / through.sum()
    assert np.abs(pmf[0].sum(axis=0) / pmf[0].sum() - shares).max() < 0.06


def test_it_is_kept_and_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    first = rate_chain(6.0, 10, 1.0, channel=GAUSS_MARKOV, num_levels=4)
    chain_module._unit_chain.cache_clear()
    monkeypatch.setattr(chain_module, "_simulate", None)
    again = rate_chain(6.0, 10, 70.0, channel=GAUSS_MARKOV, num_levels=4)
    assert np.array_equal(again.levels.transition, first.levels.transition)
    assert again.levels.rates == pytest.approx(70.0 * first.levels.rates)
    assert again.latency_sf(700.0, 30) == pytest.approx(first.latency_sf(10.0, 30))


def test_the_configuration_takes_it_where_slots_depend_on_each_other() -> None:
    config = SystemConfig(
        snr_db=6.0,
        latency_model="exact",
        link=LinkConfig(correlation="gauss-markov", correlation_coefficient=0.9),
    )
    assert isinstance(config.latency_law, RateChain)
    assert config.rate_chain(4).levels.rates.size == 4
    quantiles = latency_quantiles(M, (3, 16), config.latency_law)
    assert quantiles.tolist() == [config.latency_law.latency_quantile(b * M) for b in (3, 16)]
    assert repr(config.latency_law).startswith("RateChain(8 levels, mean=859")
    with pytest.raises(ConfigurationError, match="`num_slots` must be <= 1 on a link whose slots depend on each other"):
        config.rate_law.sum_below(2, 1.0)
    with pytest.raises(ConfigurationError, match=r"Use refine_env.link.rate_chain"):
        config.rate_law.latency_pmf(1.0, 5)
    with pytest.raises(ConfigurationError, match="`snr_db` must be one number for the rate chain"):
        SystemConfig(snr_db=(0.0, 6.0)).rate_chain()
    with pytest.raises(ConfigurationError, match="`num_levels` must be an integer in 1 … 64, got 0"):
        config.rate_chain(0)
    with pytest.raises(ConfigurationError, match="`bits` must be > 0, got 0.0"):
        config.latency_law.latency_pmf(0.0, 3)
