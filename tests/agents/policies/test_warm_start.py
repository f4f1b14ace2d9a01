"""Policies with a warm start: predicted against simulated, the bound, and what they know of the first message."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import agents
from agents.policies.dynamic_programming import solution
from refine_env import ConfigurationError, LatentRefinementEnv, LinkConfig, SystemConfig
from refine_env.coding import base_distortion
from refine_env.config import WarmStart
from refine_env.evaluation import roll_out
from refine_env.trajectories import generate_gaussian
from tests.agents.policies.distortion_level import draw_channel, play
from tests.agents.policies.test_clairvoyant import plain_best, tiny, try_all

STARTS = [
    WarmStart(step=35),
    WarmStart(step=10),
    WarmStart(step=35, shared=True),
    WarmStart(step=10, shared=True),
    WarmStart(step=10, shared=True, name_bits=4096.0),
]


PLANS = [(name, start) for name in ("dp", "dp-final", "dp-anytime") for start in STARTS]


@pytest.mark.parametrize(("name", "start"), [*PLANS, ("dp-current-rate", STARTS[-1])], ids=str)
@pytest.mark.parametrize("snr_db", [-3.0, 3.0])
def test_what_is_predicted_is_simulated(name: str, start: WarmStart, snr_db: float) -> None:
    """At the distortion level, within 2 %, and three standard errors where a few late messages carry the mean."""
    config = SystemConfig(snr_db=snr_db, coder="closed_loop", warm_start=start)
    agent = agents.make(name, config)
    assert isinstance(agent, agents.DynamicProgramming)
    scores = play(agent, config, draw_channel(config, 10_000), anytime=name == "dp-anytime")
    error = scores.std() / np.sqrt(scores.size)
    assert scores.mean() == pytest.approx(agent.predicted_value, rel=0.02, abs=3.0 * error)


@pytest.mark.parametrize("shared", [False, True])
def test_on_gaussian_trajectories(shared: bool, tmp_path: Path) -> None:
    """Ideal trajectories, rotated coder: what latents score is what dp predicts, within 2 %."""
    folder = tmp_path / "cache"
    generate_gaussian(folder, num_trajectories=48, latent_shape=(4, 16, 16), num_steps=50, seed=11)
    kwargs: dict[str, Any] = {
        "cache": str(folder),
        "split": "all",
        "snr_db": -4.0,
        "coder": "closed_loop",
        "warm_start": {"step": 25, "shared": shared},
    }
    table = roll_out(lambda config: agents.make("dp", config), env_kwargs=kwargs, episodes=480)
    predicted = solution(LatentRefinementEnv(**kwargs).config, 1).predicted_value
    assert np.mean([row["latent_mse"] for row in table]) == pytest.approx(predicted, rel=0.02)


def test_rare_late_messages_are_in_the_prediction() -> None:
    """At 0 dB with m = 25 a fifth of dp's prediction is what one message in 100,000 costs that comes too late.

    So plain episodes end below it, however many thousands; episodes drawn from slower slots find it, weighted by how
    likely they are: slots tilted by exp(-θ rate) over a window, all windows and θ together (the balance heuristic).
    """
    config = SystemConfig(snr_db=0.0, coder="closed_loop", warm_start=WarmStart(step=25, shared=True))
    agent = agents.make("dp", config)
    assert isinstance(agent, agents.DynamicProgramming)
    deadline, count = config.deadline, 700
    plain = draw_channel(config, 4000)
    assert play(agent, config, plain).mean() < 0.9 * agent.predicted_value
    pool = np.sort(plain.ravel())
    centered, rng = pool - pool.mean(), np.random.default_rng(1)
    tilts = np.array([0.5, 0.9, 1.3]) / pool.std()
    windows = [(a, b) for a in range(0, deadline - 5, 6) for b in (a + 10, a + 18, deadline) if b <= deadline]
    parts = [(0, deadline, 0.0)] * 20 + [(a, b, tilt) for a, b in windows for tilt in tilts]
    norms = {tilt: np.log(np.mean(np.exp(-tilt * centered))) for _, _, tilt in parts}
    rates = np.empty((count * len(parts), deadline))
    for k, (a, b, tilt) in enumerate(parts):
        likely = np.cumsum(np.exp(-tilt * centered))
        rows = rates[k * count : (k + 1) * count]
        rows[:] = rng.choice(pool, rows.shape)
        rows[:, a:b] = pool[np.searchsorted(likely / likely[-1], rng.random((count, b - a)))]
    sums = np.cumsum(rates - pool.mean(), axis=1)
    sums = np.concatenate([np.zeros((len(rates), 1)), sums], axis=1)
    likelihoods = np.zeros(len(rates))
    for a, b, tilt in parts:
        likelihoods += np.exp(-tilt * (sums[:, b] - sums[:, a]) - (b - a) * norms[tilt]) / len(parts)
    weights = 1.0 / likelihoods
    scores = play(agent, config, rates) * weights
    covariance = np.cov(scores, weights)
    scores -= covariance[0, 1] / covariance[1, 1] * (weights - 1.0)
    error = scores.std() / np.sqrt(scores.size)
    assert error < 0.05 * agent.predicted_value
    assert scores.mean() == pytest.approx(agent.predicted_value, abs=3.0 * error)


MORE_KNOWN = ("dp", "clairvoyant", "dp-current-rate")
OTHERS = [name for name in agents.names() if name not in MORE_KNOWN]
"""All but the optimum, and what knows more of the channel."""


@pytest.mark.parametrize("snr_db", [-6.0, 0.0])
@pytest.mark.parametrize("start", [*STARTS[1:3], STARTS[-1]], ids=str)
def test_clairvoyant_then_dp_then_every_other_policy(start: WarmStart, snr_db: float) -> None:
    config = SystemConfig(snr_db=snr_db, coder="closed_loop", warm_start=start)
    rates = draw_channel(config, 1000)
    bound, optimal = (play(agents.make(name, config), config, rates) for name in ("clairvoyant", "dp"))
    assert (bound <= optimal * (1.0 + 1e-12)).all()
    for name in OTHERS:
        scores = play(agents.make(name, config), config, rates)
        assert (bound <= scores * (1.0 + 1e-12)).all(), name
        gap = scores - optimal
        assert gap.mean() > -4.0 * gap.std() / np.sqrt(gap.size) - 1e-6 * optimal.mean(), name


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("coder", ["forward", "closed_loop"])
def test_the_bound_is_the_best_of_all_schedules(coder: str, shared: bool, rng: np.random.Generator) -> None:
    config = tiny(coder, warm_start=WarmStart(step=2, shared=shared, name_bits=30.0))
    channels = rng.uniform(1.0, 10.0, (4, 8)) * rng.choice([1.0, 10.0, 40.0, 120.0], (4, 8))
    channels[0] = [60.0, 0.0, 80.0, 0.0, 80.0, 80.0, 79.0, 80.0]
    channels[1] = 0.0  # nothing arrives: the device shows what it started with
    agent = agents.Clairvoyant(config)
    scores = play(agent, config, channels)
    for channel, planned, score in zip(channels, agent.predicted_values, scores, strict=True):
        assert planned == pytest.approx(try_all(config, channel).min(), rel=1e-12)
        assert planned == pytest.approx(plain_best(config, channel), rel=1e-12)
        assert score == pytest.approx(planned, rel=1e-12)
    assert agent.predicted_values[1] == config.refinement_model.clean[2 if shared else 4]


def test_a_chain_of_levels_knows_the_longer_first_message() -> None:
    """Predicted and simulated on a link whose slots depend on each other."""
    link = LinkConfig(correlation="gauss-markov", correlation_coefficient=0.9)
    start = WarmStart(step=10, shared=True, name_bits=8192.0)
    config = SystemConfig(snr_db=3.0, coder="closed_loop", link=link, warm_start=start)
    agents_ = [
        agents.DynamicProgramming(replace(config, warm_start=replace(start, name_bits=b))) for b in (1.0, 8192.0)
    ]
    short, long = (agent.predicted_value for agent in agents_)
    assert short < 0.995 * long


def test_final_adaptive_reckons_with_the_name() -> None:
    """Its first message's probability to be in time is that of the longer message, its second's is not."""
    start = WarmStart(step=10, shared=True, name_bits=16384.0)
    config = SystemConfig(snr_db=6.0, coder="forward", warm_start=start)
    agent = agents.make("final-adaptive", config)
    for left in (10, 20, 30):
        fits = [
            config.exact_latency_law.latency_sf(config.latent_dim * bits + 16384.0, left)[-1] <= 0.1
            for bits in config.bit_depths
        ]
        observation = {
            "slot": np.array([config.deadline + 1 - left] * 2),
            "server_step": np.zeros(2, dtype=np.int64),
            "device_step": np.array([10, 0]),
        }
        first, again = agent.decide(observation, np.ones(2, dtype=bool))
        assert first == (max(k for k, fit in enumerate(fits) if fit) if any(fits) else 0) + 1
        assert again >= first


def test_the_look_ahead_decides_by_what_the_device_has() -> None:
    """With the midpoint at the device x_t refines it: look-ahead sends other things than to a device without."""
    without, shared = (SystemConfig(snr_db=6.0, warm_start={"step": 35, "shared": s}) for s in (False, True))  # type: ignore[arg-type]
    rates = draw_channel(without, 300)
    scores = [play(agents.make("lookahead", config), config, rates).mean() for config in (without, shared)]
    assert scores[1] < scores[0]
    with pytest.raises(ConfigurationError, match="`config` must be the one that lookahead was made for .warm_start"):
        agents.make("lookahead", without).check_config(shared)


def test_learned_refuses_what_it_was_not_trained_for() -> None:
    env = LatentRefinementEnv(**{**agents.env_kwargs("learned"), "warm_start": {"step": 10}})
    with pytest.raises(
        ConfigurationError, match=r"`config` must be the system that learned was trained for .warm_start None"
    ):
        agents.make("learned", env.config)


def test_nothing_is_promised_by_the_step_held_first() -> None:
    """By hand: the message from x_m to x_0 at 1 bit leaves s² D_base, and nothing else is known to the bound."""
    config = tiny("closed_loop", bit_depths=(1,), warm_start=WarmStart(step=1, shared=True, name_bits=16.0))
    rates = np.array([[60.0, 0.0, 80.0, 0.0, 0.0, 0.0, 0.0, 0.0], [60.0, 0.0, 79.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    rates[:, 2] += 16.0  # 64 + 16 + 16: values, their scale, and the name
    agent = agents.Clairvoyant(config)
    agent.reset(2, rates=rates)
    model = config.refinement_model
    variance = float(model.innovation[0, 1])
    assert agent.predicted_values[0] == pytest.approx(float(model.clean[0]) + variance * base_distortion(1), rel=1e-12)
    assert agent.predicted_values[1] == model.clean[1]


@pytest.mark.parametrize("name", [name for name in agents.names() if name != "learned"])
def test_every_policy_plays(gaussian_cache: Path, name: str) -> None:
    """But for the one that was trained for another system."""
    kwargs = {**agents.env_kwargs(name), "cache": str(gaussian_cache), "warm_start": {"step": 25, "shared": True}}
    rows = roll_out(partial(agents.make, name), env_kwargs={**kwargs, "snr_db": 6.0}, episodes=3)
    assert all(row["latent_mse"] < row["no_delivery_mse"] for row in rows)
