"""Every link at every SNR that a configuration accepts: right numbers fast, or a sentence."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import agents
from refine_env import ConfigurationError, LinkConfig, SystemConfig
from refine_env._store import DIRECTORY_VARIABLE
from refine_env.link import ChannelModel, chain, draw_rates, law, rate_law, rate_statistics, total_power, waterfill
from refine_env.link.channel import CORRELATIONS, FADINGS, POWER_ALLOCATIONS
from refine_env.link.gains import NakagamiGains
from refine_env.link.slot_law import controlled_rates, steady_law

K = 12
PARAMETERS: dict[str, list[dict[str, Any]]] = {
    "rayleigh": [{}],
    "rician": [{"k_factor_db": 20.0}, {"k_factor_db": 60.0}],
    "nakagami": [{"nakagami_m": 0.5}, {"nakagami_m": 10.0}, {"nakagami_m": 1e6}],
    "iid": [{}],
    "gauss-markov": [{"correlation_coefficient": 0.999}],
    "jakes": [{"doppler": 1e-6}, {"doppler": 0.3}],
}


def every_link() -> Iterator[dict[str, Any]]:
    """All combinations that have a model; every other one is refused with a sentence."""
    for fading, correlation, allocation, delay in itertools.product(FADINGS, CORRELATIONS, POWER_ALLOCATIONS, (0, 1)):
        for own, correlated in itertools.product(PARAMETERS[fading], PARAMETERS[correlation]):
            chosen = {"fading": fading, "correlation": correlation, "power_allocation": allocation}
            try:
                yield ChannelModel(**chosen, csi_delay=delay, **own, **correlated).settings()
            except ConfigurationError:
                assert (fading == "nakagami" and correlation != "iid") or (allocation == "equal" and delay)


LINKS = list(every_link())


@pytest.fixture
def few_slots(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Laws and chains from so few simulated slots that all of them can be looked at, and none is kept."""
    monkeypatch.setenv(DIRECTORY_VARIABLE, "")
    for module, name, value in (
        (law, "_SIMULATED_SLOTS", 20_000),
        (law, "_CONTROLLED_SLOTS", 20_000),
        (chain, "_EPISODES", 256),
    ):
        monkeypatch.setattr(module, name, value)
    kept = (law._unit_law, chain._unit_chain)
    for computed in kept:
        computed.cache_clear()
    yield
    for computed in kept:
        computed.cache_clear()


@pytest.mark.usefixtures("few_slots")
@pytest.mark.parametrize("snr_db", [-40.0, 75.0, 200.0])
def test_laws_equal_simulated_slots(snr_db: float) -> None:
    """20,000 simulated slots against 20,000 others, or against a quadrature: six standard errors, 10 % of the std."""
    for link in LINKS:
        channel = ChannelModel(**{**link, "correlation": "iid", "correlation_coefficient": None, "doppler": None})
        slots = rate_law(snr_db, K, channel=channel)
        rates = draw_rates(np.random.default_rng(1), 20_000, K, total_power(snr_db, K), 70.0, channel)
        assert np.isfinite(rates).all(), link
        assert slots.mean == pytest.approx(rates.mean(), abs=6.0 * rates.std() / np.sqrt(10_000)), link
        assert slots.std == pytest.approx(rates.std(), rel=0.1), link
        assert 0.0 <= slots.error < 0.02
        assert (np.diff(slots.cdf(np.linspace(0.0, 2.0 * slots.mean, 99))) >= 0.0).all(), link


@pytest.mark.parametrize(
    "link", [link for link in LINKS if link["correlation"] == "iid" and not link["csi_delay"]], ids=str
)
def test_statistics_are_finite_and_rise_with_the_snr(link: dict[str, Any]) -> None:
    """At the highest SNRs every 10 dB are log2(10) bits on each subchannel, the standard deviation that of log2 g."""
    channel = ChannelModel(**link)
    all_of_them = [rate_statistics(snr_db, K, channel=channel) for snr_db in np.arange(-200.0, 201.0, 20.0)]
    means, stds, fixed, cutoffs = (
        np.array([getattr(one, name) for one in all_of_them]) for name in ("mean", "std", "fixed_power_std", "cutoff")
    )
    assert np.isfinite([means, stds, fixed, cutoffs]).all()
    assert (means > 0.0).all()
    assert (np.diff(means) > 0.0).all()
    assert (np.diff(cutoffs) <= 0.0).all()
    assert means[-1] - means[-2] == pytest.approx(70.0 * K * 2.0 * np.log2(10.0), rel=1e-6)
    gains = np.log2(channel.gain_law.draw(np.random.default_rng(0), (400_000,)))
    assert stds[-1] == pytest.approx(70.0 * np.sqrt(K) * gains.std(), rel=0.01)
    assert fixed[-1] == pytest.approx(stds[-1], rel=1e-6)


@pytest.mark.usefixtures("few_slots")
def test_latencies_fall_with_the_snr_and_end_at_the_deadline() -> None:
    """Of a message that takes thousands of slots nobody asks more than that it is late."""
    for link in LINKS:
        slots = []
        for snr_db in (-20.0, 75.0, 200.0):
            config = SystemConfig(
                snr_db=snr_db, latency_model="exact", link=LinkConfig(num_subchannels=K, symbols_per_slot=350.0, **link)
            )
            slots.append(agents.Lookahead(config).latency)
        assert slots[0].max() == 61, link
        assert (np.diff(slots, axis=0) <= 0).all(), link
        assert (np.diff(slots, axis=1) >= 0).all(), link
        assert slots[-1].max() <= 2, link


@pytest.mark.parametrize("snr_db", [-200.0, 200.0])
def test_waterfilling_spends_the_power(snr_db: float) -> None:
    gains = np.random.default_rng(3).standard_exponential((2000, K))
    power = total_power(snr_db, K)
    powers = waterfill(gains, power)
    assert (powers >= 0.0).all()
    assert powers.sum(axis=1) == pytest.approx(power, rel=1e-9)


def test_a_steady_level() -> None:
    """Between equal power and Φ where the two are one: simulated slots of little randomness have that law too."""
    gains, channel = NakagamiGains(10.0), ChannelModel(fading="nakagami", nakagami_m=10.0)
    assert steady_law(gains, 60, total_power(30.0, 60)) is None
    power = total_power(40.0, 60)
    steady = steady_law(gains, 60, power)
    assert steady is not None
    assert steady.error < 1e-7
    rates = controlled_rates(gains, 60, power, lambda summarize: law._simulate(channel, 60, power, 100_000, summarize))
    assert rates is not None
    points = steady.origin + steady.spacing * (np.arange(steady.masses.size) + 0.5)
    shares = np.searchsorted(np.sort(rates), points) / rates.size
    assert np.abs(shares - np.cumsum(steady.masses)).max() < 1e-4
