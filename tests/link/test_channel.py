from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special, stats

import agents
import refine_env
from refine_env import ConfigurationError, LinkConfig, SystemConfig
from refine_env.dynamics.process import DecisionProcess, draw_for_all
from refine_env.dynamics.settings import EnvSettings
from refine_env.link import (
    ChannelModel,
    draw_rates,
    draw_rates_of_many,
    rate_law,
    rate_statistics,
    slot_rates,
    total_power,
    waterfill,
)

RICIAN = {"fading": "rician", "k_factor_db": 6.0}
NAKAGAMI = {"fading": "nakagami", "nakagami_m": 2.0}
GAUSS_MARKOV = {"correlation": "gauss-markov", "correlation_coefficient": 0.9}
JAKES = {"correlation": "jakes", "doppler": 0.05}
EQUAL = {"power_allocation": "equal"}
LINKS: list[dict[str, Any]] = [
    RICIAN,
    NAKAGAMI,
    GAUSS_MARKOV,
    JAKES,
    EQUAL,
    {"csi_delay": 2},
    {**RICIAN, **GAUSS_MARKOV, "csi_delay": 1},
    {**RICIAN, **JAKES, **EQUAL},
    {**NAKAGAMI, "csi_delay": 1},
]
NAMES = ["+".join(str(value) for value in link.values()) for link in LINKS]


def gains_of(link: dict[str, Any], episodes: int, slots: int, subchannels: int, seed: int = 8) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    channel = ChannelModel(**link)
    return np.array([channel.draw_gains(rng, slots, subchannels) for _ in range(episodes)])


def test_the_default_draws_what_it_always_drew() -> None:
    drawn = ChannelModel().draw_gains(np.random.default_rng(1), 60, 60)
    assert np.array_equal(drawn, np.random.default_rng(1).standard_exponential((60, 60)))
    rates = draw_rates(np.random.default_rng(1), 60, 60, 60.0, 70.0)
    assert np.array_equal(rates, slot_rates(drawn, 60.0, 70.0))
    # Pinned when the other links came.
    assert rates[[0, 1, 59]].tolist() == [4492.037751878816, 4248.67538212951, 3864.7416247332485]


@pytest.mark.parametrize(
    ("link", "law"),
    [
        ({}, stats.expon()),
        (RICIAN, stats.ncx2(2, 2 * 10**0.6, scale=0.5 / (1 + 10**0.6))),
        ({"fading": "rician", "k_factor_db": -60.0}, stats.expon()),
        ({"fading": "nakagami", "nakagami_m": 0.5}, stats.gamma(0.5, scale=2.0)),
        (NAKAGAMI, stats.gamma(2.0, scale=0.5)),
        (GAUSS_MARKOV, stats.expon()),
        (JAKES, stats.expon()),
        ({**RICIAN, **JAKES}, stats.ncx2(2, 2 * 10**0.6, scale=0.5 / (1 + 10**0.6))),
    ],
)
def test_the_law_of_a_gain(link: dict[str, Any], law: Any) -> None:
    """Slots 1 and 30 of 100,000 paths: Kolmogorov–Smirnov, exceeded once in 100,000 for a right law; mean 1."""
    gains = gains_of(link, 100, 30, 1000)
    for slot in (0, 29):
        sample = gains[:, slot].reshape(-1)
        assert stats.kstest(sample, law.cdf).pvalue > 1e-5
        assert sample.mean() == pytest.approx(1.0, abs=4.5 * law.std() / np.sqrt(sample.size))
    model = ChannelModel(**link).gain_law
    grid = np.array([0.01, 0.3, 1.0, 4.0])
    assert model.density(grid) == pytest.approx(law.pdf(grid), rel=2e-5)
    assert [model.probability_below(float(g)) for g in grid] == pytest.approx(law.cdf(grid), rel=2e-5)


@pytest.mark.parametrize("fading", [{}, RICIAN, {"fading": "rician", "k_factor_db": 12.0}])
@pytest.mark.parametrize("time", [{}, GAUSS_MARKOV, JAKES, {"correlation": "jakes", "doppler": 0.4}])
def test_autocorrelation(fading: dict[str, Any], time: dict[str, Any]) -> None:
    """Power gains of 60,000 paths at lags of 1 to 12 slots, within 4.5/√60000 = 0.018 of the formula.

    With the scattered part's autocorrelation ρ and K-factor κ it is (ρ² + 2κρ)/(1 + 2κ): κ > 0 shows ρ's sign.
    """
    channel = ChannelModel(**fading, **time)
    gains = gains_of({**fading, **time}, 60, 16, 1000).transpose(1, 0, 2).reshape(16, -1)
    for lag in (1, 2, 5, 12):
        rho = {"gauss-markov": 0.9**lag, "iid": 0.0}.get(
            channel.correlation, special.j0(2.0 * np.pi * (channel.doppler or 0.0) * lag)
        )
        assert channel.autocorrelation(lag) == pytest.approx(rho, abs=1e-12)
        expected = (rho**2 + 2.0 * channel.k_factor * rho) / (1.0 + 2.0 * channel.k_factor)
        for start in (0, 3):
            assert np.corrcoef(gains[start], gains[start + lag])[0, 1] == pytest.approx(expected, abs=0.018)
    before, after = channel.draw_lagged_gains(np.random.default_rng(4), 60, 1000, 5)
    expected = (channel.autocorrelation(5) ** 2 + 2 * channel.k_factor * channel.autocorrelation(5)) / (
        1.0 + 2.0 * channel.k_factor
    )
    assert np.corrcoef(before.reshape(-1), after.reshape(-1))[0, 1] == pytest.approx(expected, abs=0.018)


def test_subchannels_are_independent() -> None:
    """200 slots apart in 20,000 draws: correlations within 4.5/√20000."""
    gains = gains_of({**RICIAN, **JAKES}, 20_000, 2, 4)[:, 1]
    others = np.corrcoef(gains.T)[np.triu_indices(4, 1)]
    assert np.abs(others).max() < 4.5 / np.sqrt(20_000)


def test_equal_power_by_hand() -> None:
    channel = ChannelModel(power_allocation="equal")
    rates = np.empty((1, 2))
    channel.fill_rates(np.array([[[1.0, 3.0], [0.0, 7.0]]]), np.array([2.0]), 10.0, rates)
    assert rates.tolist() == [pytest.approx([10.0 * (1.0 + 2.0), 10.0 * 3.0])]


def test_delayed_knowledge_by_hand() -> None:
    """Slot 1 is filled for gains (1, 1/4), which alone shows (2, 0) with power 2; what it carries, (3, 5) decides."""
    channel = ChannelModel(csi_delay=1)
    rates = np.empty((1, 2))
    gains = np.array([[[1.0, 0.25], [3.5, 5.0], [1.0, 1.0]]])
    channel.fill_rates(gains, np.array([2.0]), 1.0, rates)
    assert rates[0, 0] == pytest.approx(np.log2(1.0 + 2.0 * 3.5))
    assert rates[0, 1] == pytest.approx(np.log2(1.0 + waterfill([3.5, 5.0], 2.0)).sum())


@pytest.mark.parametrize("delay", [1, 3])
def test_delay_equals_plain_numpy(delay: int) -> None:
    channel = ChannelModel(csi_delay=delay, **GAUSS_MARKOV)  # type: ignore[arg-type]
    rates = draw_rates(np.random.default_rng(3), 20, 8, 16.0, 70.0, channel)
    gains = channel.draw_gains(np.random.default_rng(3), 20 + delay, 8)
    expected = 70.0 * np.log2(1.0 + waterfill(gains[:20], 16.0) * gains[delay:]).sum(axis=1)
    assert rates == pytest.approx(expected, rel=1e-12)


def test_knowledge_grows_useless_with_the_delay() -> None:
    """Mean rate of 3,000 slots: a slot's delay costs a slow link little, an i.i.d. one much."""

    def mean(**link: Any) -> float:
        rngs = [np.random.default_rng(seed) for seed in range(50)]
        rates = draw_rates_of_many(rngs, 60, 60, np.full(50, 60.0), 70.0, ChannelModel(**link))
        return float(rates.mean())

    slow = {"correlation": "gauss-markov", "correlation_coefficient": 0.99}
    assert mean(**slow) > mean(**slow, csi_delay=1) > mean(**slow, csi_delay=20) > mean(csi_delay=1)
    assert mean(**slow, csi_delay=1) > 0.97 * mean(**slow)
    assert mean(csi_delay=1) < 0.85 * mean()


@pytest.mark.parametrize("link", LINKS, ids=NAMES)
def test_many_episodes_are_the_single_ones_bit_for_bit(link: dict[str, Any]) -> None:
    channel = ChannelModel(**link)
    powers = 60.0 * 10.0 ** np.linspace(-1.0, 1.0, 23)
    many = draw_rates_of_many([np.random.default_rng(seed) for seed in range(23)], 60, 60, powers, 70.0, channel)
    for seed in range(23):
        assert np.array_equal(many[seed], draw_rates(np.random.default_rng(seed), 60, 60, powers[seed], 70.0, channel))


@pytest.mark.parametrize("link", LINKS, ids=NAMES)
def test_statistics_and_law_describe_the_simulated_slot(link: dict[str, Any]) -> None:
    """30,000 independent slots at 6 dB, each the last of a short episode: within 4.5 standard errors.

    [K]'s mean lies up to 0.2 % above the link's, its standard deviation at fixed power within 0.5 % of it.
    """
    channel = ChannelModel(**link)
    rngs = [np.random.default_rng(seed) for seed in range(30_000)]
    rates = draw_rates_of_many(rngs, 2, 20, np.full(len(rngs), total_power(6.0, 20)), 70.0, channel)[:, 1]
    law = rate_law(6.0, 20, channel=channel)
    assert law.mean == pytest.approx(rates.mean(), abs=4.5 * rates.std() / np.sqrt(rates.size))
    assert law.std == pytest.approx(rates.std(), rel=4.5 / np.sqrt(rates.size))
    shares = np.array([0.01, 0.1, 0.5, 0.9])
    errors = np.sqrt(shares * (1.0 - shares) / rates.size)
    assert (np.abs(law.cdf(np.quantile(rates, shares)) - shares) < 4.5 * errors + law.error).all()
    statistics = rate_statistics(6.0, 20, channel=channel)
    assert statistics.mean == pytest.approx(law.mean, rel=6e-3)  # K = 20: the gap is three times that at 60
    assert statistics.fixed_power_std == pytest.approx(law.std, rel=2e-2)
    assert statistics.std >= statistics.fixed_power_std
    assert law.independent == channel.independent


def test_statistics_of_nakagami_1_are_those_of_rayleigh() -> None:
    """By quadrature over the density the one, in closed form the other."""
    for snr_db in (-10.0, 6.0, 30.0):
        one = rate_statistics(snr_db, channel=ChannelModel(fading="nakagami", nakagami_m=1.0))
        other = rate_statistics(snr_db)
        assert (one.cutoff, one.mean, one.std, one.fixed_power_std) == pytest.approx(
            (other.cutoff, other.mean, other.std, other.fixed_power_std), rel=1e-7
        )


def test_a_steady_link_carries_what_the_formula_says() -> None:
    """κ or m large: no fading, ℓK log2(1 + SNR)."""
    expected = 70.0 * 20.0 * np.log2(1.0 + 10.0**0.6)
    for link in ({"fading": "rician", "k_factor_db": 60.0}, {"fading": "nakagami", "nakagami_m": 1e6}):
        assert rate_law(6.0, 20, channel=ChannelModel(**link)).mean == pytest.approx(expected, rel=1e-5)  # type: ignore[arg-type]
        assert rate_statistics(6.0, 20, channel=ChannelModel(**link)).mean == pytest.approx(expected, rel=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("link", LINKS, ids=NAMES)
def test_through_the_environment(link: dict[str, Any], make_env: Callable[..., gym.Env[Any, Any]]) -> None:
    env = make_env(link=link, snr_db=3.0, latency_model="exact")
    observation, _ = env.reset(seed=5)
    rates = env.unwrapped._process.episodes.rates[0].copy()  # type: ignore[attr-defined]
    config: SystemConfig = env.unwrapped.config  # type: ignore[attr-defined]
    assert observation["channel_history"][-1] == pytest.approx(rates[0] / config.latent_dim)
    assert config.latency_model == "exact"
    observation, *_ = env.step(0)
    assert observation["channel_history"][-2:] == pytest.approx(rates[:2] / config.latent_dim)
    plain = make_env(snr_db=3.0)
    plain.reset(seed=5)
    assert not np.array_equal(plain.unwrapped._process.episodes.rates[0], rates)  # type: ignore[attr-defined]
    # The specification and the configuration survive as JSON.
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))  # type: ignore[union-attr]
    again.reset(seed=5)
    assert np.array_equal(again.unwrapped._process.episodes.rates[0], rates)  # type: ignore[attr-defined]
    assert SystemConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    # Vector environment: the same episodes.
    venv = gym.make_vec(
        refine_env.ENV_ID,
        num_envs=2,
        cache=env.unwrapped.settings.cache,
        link=link,
        snr_db=3.0,  # type: ignore[attr-defined]
    )
    venv.reset(seed=[4, 5])
    assert np.array_equal(venv.unwrapped._process.episodes.rates[1], rates)  # type: ignore[attr-defined]
    for each in (env, plain, again, venv):
        each.close()


@pytest.mark.parametrize("link", LINKS, ids=NAMES)
def test_the_look_ahead_works_on_every_link(link: dict[str, Any]) -> None:
    small = {"num_subchannels": 20, "symbols_per_slot": 210.0}
    for latency_model in ("paper", "exact"):
        config = SystemConfig(snr_db=6.0, link=LinkConfig(**link, **small), latency_model=latency_model)
        latency = agents.make("lookahead", config=config).latency  # type: ignore[attr-defined]
        assert (np.diff(latency) >= 0).all()
        needed = [b * config.latent_dim / config.rate_law.mean for b in config.bit_depths]
        assert (latency >= np.floor(needed)).all()
        assert (latency <= 1.1 * np.array(needed) + 3).all()


def test_the_exact_latency_changes_the_look_ahead() -> None:
    paper, exact = (
        agents.make("lookahead", config=SystemConfig(snr_db=0.0, latency_model=model)) for model in ("paper", "exact")
    )
    assert paper.latency.tolist() == [12, 16, 32, 39, 61]  # type: ignore[attr-defined]  # 61: late
    assert exact.latency.tolist() == [12, 16, 31, 39, 61]  # type: ignore[attr-defined]
    assert not np.array_equal(paper.table, exact.table)  # type: ignore[attr-defined]


def test_draws_for_several_processes_are_their_own(make_env: Callable[..., gym.Env[Any, Any]]) -> None:
    cache = make_env().unwrapped.settings.cache  # type: ignore[attr-defined]
    for link in (LINKS[3], LINKS[6]):
        processes = [DecisionProcess(EnvSettings(snr_db=snr_db, cache=cache, link=link), 3) for snr_db in (0.0, 6.0)]
        shared = draw_for_all(processes, [np.random.default_rng(seed) for seed in range(3)])
        for process, draws in zip(processes, shared, strict=True):
            alone = process.draw([np.random.default_rng(seed) for seed in range(3)])
            assert np.array_equal(draws.rates, alone.rates)
            assert np.array_equal(draws.trajectories, alone.trajectories)


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ({"fading": "weibull"}, "`fading` must be one of 'rayleigh', 'rician', 'nakagami', got 'weibull'"),
        ({"correlation": "ar2"}, "`correlation` must be one of"),
        ({"power_allocation": "greedy"}, "`power_allocation` must be one of"),
        ({"fading": "rician"}, "`k_factor_db` must be a finite number, got None. Give the K-factor in dB"),
        ({"fading": "rician", "k_factor_db": 61}, "`k_factor_db` must lie in -60 … 60 dB, got 61"),
        (
            {"k_factor_db": 3.0},
            "`k_factor_db` must be left out where `fading` is not 'rician', got 3.0 with 'rayleigh'",
        ),
        ({"fading": "nakagami"}, "`nakagami_m` must be a finite number, got None"),
        ({"fading": "nakagami", "nakagami_m": 0.4}, "`nakagami_m` must lie in 0.5 … 1e\\+06, got 0.4"),
        ({"correlation": "gauss-markov"}, "`correlation_coefficient` must be a finite number, got None"),
        (
            {"correlation": "gauss-markov", "correlation_coefficient": 1.0},
            "`correlation_coefficient` must be >= 0 and < 1, got 1.0",
        ),
        ({"correlation": "jakes", "doppler": 0.0}, "`doppler` must be > 0, got 0.0. Give f_d·T_slot"),
        ({"doppler": 0.1}, "`doppler` must be left out where `correlation` is not 'jakes'"),
        ({"csi_delay": -1}, "`csi_delay` must be an integer in 0 … 10000, got -1"),
        ({"csi_delay": 1, "power_allocation": "equal"}, "`csi_delay` must be 0 for equal power"),
        ({**NAKAGAMI, **JAKES}, "`correlation` must be 'iid' for Nakagami fading"),
    ],
)
def test_links_without_a_model(link: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LinkConfig(**link)
    with pytest.raises(ConfigurationError, match=message):
        gym.make(refine_env.ENV_ID, link=link)


def test_a_jakes_process_has_a_longest_length() -> None:
    with pytest.raises(ConfigurationError, match="together must be <= 4096 slots for the Jakes process, got 5000"):
        ChannelModel(**JAKES).draw_gains(np.random.default_rng(0), 5000, 1)  # type: ignore[arg-type]


def test_rates_want_the_slots_before_too() -> None:
    with pytest.raises(
        ConfigurationError, match=r"`gains` must be of 2 episodes and 4 slots, got \(2, 3\) with \(2,\)"
    ):
        ChannelModel(csi_delay=1).fill_rates(np.ones((2, 3, 5)), np.ones(2), 1.0, np.empty((2, 3)))


def test_numbers_become_plain_ones() -> None:
    link = LinkConfig(fading="rician", k_factor_db=np.float64(6), csi_delay=np.int64(1))  # type: ignore[arg-type]
    assert json.loads(json.dumps(link.channel.settings()))["k_factor_db"] == 6.0
    assert (type(link.k_factor_db), type(link.csi_delay)) == (float, int)
    assert hash(link) == hash(LinkConfig(fading="rician", k_factor_db=6, csi_delay=1))
