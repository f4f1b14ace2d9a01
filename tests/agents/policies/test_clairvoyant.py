"""The bound against every sequence of actions, tried one by one in the simulator."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import agents
from refine_env import ConfigurationError, LinkConfig, NoiseSchedule, SystemConfig
from refine_env.coding import base_distortion
from refine_env.dynamics.simulator import EpisodeBatch
from refine_env.model.distortion import SecondMoments
from tests.agents.policies.distortion_level import draw_channel, play
from tests.model import plain_rules

SCHEDULE = NoiseSchedule([1.0, 0.9, 0.6, 0.3, 0.05])
SYSTEMS: dict[str, dict[str, Any]] = {
    "closed_loop": {"coder": "closed_loop"},
    "no_same_step": {"coder": "closed_loop", "same_step_refinement": False},
    "forward": {"coder": "forward"},
    "posterior_mean": {
        "coder": "closed_loop",
        "payload": "posterior_mean",
        "second_moments": SecondMoments.martingale([0.0, 0.05, 0.3, 0.6, 1.0]),
    },
}


def tiny(name: str, **kwargs: Any) -> SystemConfig:
    """T = 4, T_d = 8, M = 64: about 80 bits a slot, messages of 80, 208 and 1024."""
    return SystemConfig(
        **{
            "snr_db": 0.0,
            "latent_dim": 64,
            "schedule": SCHEDULE,
            "bit_depths": (1, 3, 16),
            "deadline": 8,
            "link": LinkConfig(symbols_per_slot=1.3, uplink_bits=60.0, reference_latent_dim=None),
            **SYSTEMS[name],
            **kwargs,
        }
    )


def all_schedules(config: SystemConfig) -> NDArray[np.int64]:
    """Every sequence of actions in slots 1 … T_d, (num_actions^T_d, T_d)."""
    return np.array(list(itertools.product(range(config.num_actions), repeat=config.deadline)))


def try_all(config: SystemConfig, rates: NDArray[np.float64]) -> NDArray[np.float64]:
    """Modeled distortion after every sequence of actions on one channel; illegal ones are WAIT."""
    schedules = all_schedules(config)
    batch = EpisodeBatch(config, None, len(schedules))
    for i in range(len(schedules)):
        batch.begin(i, 0, rates)
    for actions in schedules.T:
        batch.advance(np.ascontiguousarray(actions))
    scores: NDArray[np.float64] = config.refinement_model.distortion(
        batch.state["device_step"], batch.state["device_error"]
    )
    return scores


def plain_best(config: SystemConfig, rates: NDArray[np.float64]) -> float:
    """Least modeled distortion of all ways to act, followed slot by slot with the rules' independent twin."""
    model, num_steps, deadline = config.refinement_model, config.num_steps, config.deadline
    refreshes = config.make_coder().refreshes_held_step
    start = config.warm_start
    midpoint = None if start is None else start.step
    shared = start is not None and start.shared

    def through(first_slot: int, size: float) -> int:
        """The slot in which a message begun then is through; after the deadline where none."""
        sent = 0.0
        for slot in range(first_slot, deadline + 1):
            sent += rates[slot - 1]
            if sent >= size:
                return slot
        return deadline + 1

    uplink_slots = through(1, config.uplink_bits)

    def best(n: int, p: int, error: float, longer: float) -> float:
        """``longer``: bits of the name, until something has been delivered."""
        if n > deadline:
            return plain_rules.distortion(model, p, error)
        values = [best(n + 1, p, error, longer)]
        t = plain_rules.server_step(n, uplink_slots, num_steps, midpoint)
        if plain_rules.may_transmit(t, p, num_steps, refreshes, error > 0.0):
            variance = plain_rules.residual_variance(model, t, p, error)
            for bits, size in zip(config.bit_depths, config.message_bits, strict=True):
                end = through(n, size + longer)
                if end <= deadline:
                    values.append(best(end + 1, t, variance * base_distortion(bits), 0.0))
        return min(values)

    if start is not None and shared:
        return best(uplink_slots + 1, start.step, 0.0, start.name_bits)
    return best(uplink_slots + 1, num_steps, 0.0, 0.0)


@pytest.mark.parametrize("name", list(SYSTEMS))
def test_equals_the_best_of_all_schedules(name: str, rng: np.random.Generator) -> None:
    """Channels from hopeless to generous, one with slots that carry nothing."""
    config = tiny(name)
    channels = rng.uniform(1.0, 10.0, (6, 8)) * rng.choice([1.0, 10.0, 40.0, 120.0], (6, 8))
    channels[0] = [60.0, 0.0, 80.0, 0.0, 80.0, 80.0, 79.0, 80.0]
    channels[1, :2] = 80.0, 1024.0
    channels[1, 2:] = 1024.0
    agent = agents.Clairvoyant(config)
    scores = play(agent, config, channels)
    for channel, planned, score in zip(channels, agent.predicted_values, scores, strict=True):
        assert planned == pytest.approx(try_all(config, channel).min(), rel=1e-12)
        assert planned == pytest.approx(plain_best(config, channel), rel=1e-12)
        assert score == pytest.approx(planned, rel=1e-12)


def test_same_step_refinement_is_used_where_it_pays() -> None:
    """A slot of 80 bits takes 1 bit of x_0; sent twice it is a refinement with s² = e_p."""
    config = tiny("closed_loop", bit_depths=(1,))
    rates = np.array([[60.0, 0.0, 0.0, 0.0, 0.0, 0.0, 80.0, 80.0]])
    agent = agents.Clairvoyant(config)
    agent.reset(1, rates=rates)
    assert agent.schedules[0].tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 1, 0]  # the first is through in slot 7
    without = agents.Clairvoyant(tiny("no_same_step", bit_depths=(1,)))
    without.reset(1, rates=rates)
    assert agent.predicted_value < 0.9 * without.predicted_value  # which sends x_1, then x_0


def test_the_largest_error_can_be_the_best() -> None:
    """While ᾱ_t < 1/4 a centroid quantizer's error lowers the distortion, since levels are shrunk: of two ways to hold
    the same step, that with the larger error scores less."""
    config = tiny("closed_loop", schedule=NoiseSchedule([1.0, 0.2, 0.1, 0.05, 0.01]), bit_depths=(1, 3))
    assert config.refinement_model.error_slope[1] < 0.0
    rates = np.array([60.0, 0.0, 0.0, 0.0, 300.0, 0.0, 0.0, 0.0])
    agent = agents.Clairvoyant(config)
    agent.reset(1, rates=rates[None])
    assert agent.schedules[0, 5] == 1
    assert agent.predicted_value == pytest.approx(try_all(config, rates).min(), rel=1e-12)


def test_nothing_can_be_delivered() -> None:
    config = tiny("closed_loop")
    rates = np.zeros((3, 8))
    rates[1, :] = 59.0 / 8  # the prompt does not get through
    rates[2, 0] = 60.0
    agent = agents.Clairvoyant(config)
    agent.reset(3, rates=rates)
    assert not agent.schedules.any()
    assert agent.predicted_values == pytest.approx(config.refinement_model.clean[-1])


@pytest.mark.parametrize("snr_db", [0.0, 9.0])
@pytest.mark.parametrize(("coder", "bit_depths"), [("closed_loop", (3, 4, 8, 10, 16)), ("forward", (3, 16))])
def test_the_plan_comes_true(snr_db: float, coder: str, bit_depths: tuple[int, ...]) -> None:
    config = SystemConfig(snr_db=snr_db, coder=coder, bit_depths=bit_depths)
    agent = agents.Clairvoyant(config)
    scores = play(agent, config, draw_channel(config, 100))
    assert scores == pytest.approx(agent.predicted_values, rel=1e-12)
    assert agent.predicted_value == pytest.approx(scores.mean(), rel=1e-12)


def test_it_does_not_need_the_snr() -> None:
    config = SystemConfig(snr_db=(0.0, 24.0), coder="closed_loop")
    agents.make("clairvoyant", config).reset(2, rates=np.full((2, 60), 1e4))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        (None, r"`rates` must have shape \(2, 8\) for clairvoyant, got None"),
        (np.ones((8,)), r"`rates` must have shape \(2, 8\) for clairvoyant, got \(8,\)"),
        (np.ones((2, 9)), r"`rates` must have shape \(2, 8\) for clairvoyant, got \(2, 9\)"),
        ("fast", r"`rates` must have shape \(2, 8\) for clairvoyant, got \(0,\)"),
        (np.full((2, 8), np.nan), "`rates` must be finite and >= 0"),
        (np.full((2, 8), -1.0), "`rates` must be finite and >= 0"),
    ],
)
def test_rates_of_another_form(rates: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        agents.Clairvoyant(tiny("closed_loop")).reset(2, rates=rates)


def test_acting_before_the_rates_are_known() -> None:
    agent = agents.make("clairvoyant", tiny("closed_loop"))
    observation = {"slot": 5, "server_step": 2, "device_step": 4}
    with pytest.raises(ConfigurationError, match=r"`num_envs` must be 1, .* got 0\. Call reset"):
        agent.select_action(observation, {"action_mask": np.ones(4, dtype=np.int8)})
