"""Dynamic programming against a recursion without tables, against simulation, and against the bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import agents
import refine_env
from agents.policies.dynamic_programming import (
    AT_DEADLINE,
    ChannelKnowledge,
    Objective,
    Solution,
    chained_slots,
    independent_slots,
    solution,
)
from refine_env import ConfigurationError, LinkConfig, NoiseSchedule, SystemConfig
from refine_env.coding import LOSSLESS_BITS, base_distortion
from refine_env.config import WarmStart
from refine_env.dynamics.simulator import EpisodeBatch
from refine_env.evaluation import roll_out
from refine_env.link import RateChain, RateLevels
from refine_env.model.decoding import DecoderCurve
from refine_env.model.distortion import SecondMoments
from refine_env.trajectories import generate_gaussian
from tests.agents.policies.distortion_level import draw_channel, observe, play
from tests.agents.policies.test_clairvoyant import SYSTEMS, tiny
from tests.model import plain_rules

CLOSED_LOOP = {"coder": "closed_loop", "payload": "latent"}


OBJECTIVES = {
    "deadline": AT_DEADLINE,
    "final": Objective(final_only=True),
    "anytime": Objective(terminal=0.0, running=1.0 / 8.0),
    "mixed": Objective(terminal=0.7, running=0.2, final_only=True),
}


def plain_value(
    config: SystemConfig,
    tail: NDArray[np.float64],
    uplink: NDArray[np.float64],
    objective: Objective = AT_DEADLINE,
    first_tail: NDArray[np.float64] | None = None,
) -> tuple[float, Callable[[int, int, int, float, bool], tuple[float, int]]]:
    """Expectation over every outcome, minimum over every action, with exact errors and no table.

    Args:
        config: the system.
        tail: P[T_dl > k] (|𝓑|, T_d + 1).
        uplink: P[T_ul = k] (T_d + 1,).
        objective: what is minimized.
        first_tail: ``tail`` of an episode's first message, where it is longer.

    Returns:
        The value at the start; and that of a state (T_ul, n, t_p, e_p, whether the device holds a lossy latent, whether
        nothing has been delivered), with the best action.
    """
    model, deadline, num_steps = config.refinement_model, config.deadline, config.num_steps
    midpoint = None if config.warm_start is None else config.warm_start.step
    held_first = num_steps if midpoint is None or first_tail is None else midpoint
    refreshes = config.make_coder().refreshes_held_step

    @cache
    def value(uplink_slots: int, n: int, p: int, error: float, lossy: bool, first: bool = False) -> tuple[float, int]:
        if n > deadline:
            return objective.terminal * float(config.final_distortion(p, error)), 0
        t = plain_rules.server_step(n, uplink_slots, num_steps, midpoint)
        held = plain_rules.distortion(model, p, error)
        best, action = value(uplink_slots, n + 1, p, error, lossy, first)[0] + objective.running * held, 0
        late_by = first_tail if first and first_tail is not None else tail
        excluded = objective.final_only and t > 0
        if excluded or not plain_rules.may_transmit(t, p, num_steps, refreshes, lossy):
            return best, action
        for i, bits in enumerate(config.bit_depths):
            left = plain_rules.residual_variance(model, t, p, error) * base_distortion(bits)
            slots_left = deadline + 1 - n
            final = float(config.final_distortion(p, error))
            late = objective.terminal * final + objective.running * slots_left * held
            expected = late_by[i, slots_left] * late
            for k in range(1, slots_left + 1):
                probability = late_by[i, k - 1] - late_by[i, k]
                if probability > 0.0:
                    shown = objective.running * ((k - 1) * held + plain_rules.distortion(model, t, left))
                    after = value(uplink_slots, n + k, t, left, bits != LOSSLESS_BITS)[0]
                    expected += probability * (shown + after)
            if expected < best * (1.0 - 1e-6):
                best, action = expected, i + 1
        return best, action

    clean, final = float(model.clean[held_first]), float(config.final_distortion(held_first, 0.0))
    start = (1.0 - uplink.sum()) * (objective.terminal * final + objective.running * deadline * clean)
    for uplink_slots in range(1, deadline + 1):
        waited = objective.running * uplink_slots * clean
        start += uplink[uplink_slots] * (
            value(uplink_slots, uplink_slots + 1, held_first, 0.0, False, True)[0] + waited
        )
    return start, value


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("bits_per_slot", [50.0, 82.0, 160.0, 420.0])
@pytest.mark.parametrize("name", list(SYSTEMS))
def test_equals_the_recursion_without_tables(name: str, bits_per_slot: float, objective: str) -> None:
    """Also with rates at which a message takes now one, now two slots, and the prompt too."""
    symbols = bits_per_slot / 61.6
    config = tiny(name, link=LinkConfig(symbols_per_slot=symbols, uplink_bits=bits_per_slot, reference_latent_dim=None))
    law = config.rate_law
    knowledge = independent_slots(law, config, 1)
    assert 0.3 < knowledge.uplink[1, 0] < 0.7
    wanted = OBJECTIVES[objective]
    tail, uplink = law.latency_sf(config.message_bits, 8), law.latency_pmf(config.uplink_bits, 8)
    value, _ = plain_value(config, tail, uplink, wanted)
    assert Solution(config, knowledge, objective=wanted).predicted_value == pytest.approx(value, rel=1e-4)
    assert Solution(config, knowledge, 60, wanted).predicted_value == pytest.approx(value, rel=2e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("bits_per_slot", [82.0, 160.0])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("step", [1, 3])
def test_a_warm_start_equals_the_recursion_without_tables(
    step: int, shared: bool, bits_per_slot: float, objective: str
) -> None:
    """A name of 40 bits makes the first message of a shared midpoint longer by half a slot or more."""
    symbols = bits_per_slot / 61.6
    link = LinkConfig(symbols_per_slot=symbols, uplink_bits=bits_per_slot, reference_latent_dim=None)
    start = WarmStart(step=step, shared=shared, name_bits=40.0)
    config = tiny("closed_loop", link=link, warm_start=start)
    law, wanted = config.rate_law, OBJECTIVES[objective]
    tail, uplink = law.latency_sf(config.message_bits, 8), law.latency_pmf(config.uplink_bits, 8)
    first_tail = law.latency_sf(config.message_bits + 40.0, 8) if shared else None
    value, _ = plain_value(config, tail, uplink, wanted, first_tail)
    solved = Solution(config, independent_slots(law, config, 1), 60, wanted).predicted_value
    assert solved == pytest.approx(value, rel=2e-6)
    without, _ = plain_value(replace(config, warm_start=None), tail, uplink, wanted)
    assert value < 0.99 * without


def decoder_of(config: SystemConfig) -> DecoderCurve:
    """A decoder that makes much of what is noisy and nothing of what is nearly clean."""
    shares = np.linspace(0.0, 0.95, 12)
    steps = np.arange(config.num_steps + 1)
    held = np.maximum(0.0, config.refinement_model.distortion(steps[:, None], shares[None, :]))
    return DecoderCurve(np.ones(steps.size), shares, held, 0.01 + 0.5 * held / (1.0 + held))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_decoder_s_curve_is_the_cost_at_the_deadline(objective: str) -> None:
    config = tiny("closed_loop", link=LinkConfig(symbols_per_slot=0.8, uplink_bits=50.0, reference_latent_dim=None))
    config = replace(config, decoder_curve=decoder_of(config))
    law, wanted = config.rate_law, OBJECTIVES[objective]
    tail, uplink = law.latency_sf(config.message_bits, 8), law.latency_pmf(config.uplink_bits, 8)
    value, _ = plain_value(config, tail, uplink, wanted)
    solved = Solution(config, independent_slots(law, config, 1), 60, wanted).predicted_value
    assert solved == pytest.approx(value, rel=1e-4)
    without, _ = plain_value(replace(config, decoder_curve=None), tail, uplink, wanted)
    assert (value < 0.999 * without) == (wanted.terminal > 0.0)


def small_systems(count: int, seed: int) -> Iterator[SystemConfig]:
    """Systems of up to five steps and nine slots, from hopeless to so generous that nothing is left but rounding."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        num_steps, deadline = int(rng.integers(2, 6)), int(rng.integers(6, 10))
        depths = rng.choice(np.arange(1, 17), int(rng.integers(1, 4)), replace=False)
        alpha_bar = np.sort(rng.uniform(0.001, 0.99, num_steps) ** rng.choice([0.1, 1.0, 3.0]))[::-1]
        kwargs: dict[str, Any] = {}
        if rng.integers(2):
            mmse = np.cumsum(rng.uniform(0.0, 1.0, num_steps) ** rng.choice([1, 3, 9]))
            moments = SecondMoments.martingale(np.append(0.0, mmse) / mmse[-1])
            kwargs = {"payload": "posterior_mean", "second_moments": moments}
        bits_per_slot = float(rng.choice([40.0, 82.0, 160.0, 340.0, 1500.0]) * rng.uniform(0.8, 1.3))
        link = LinkConfig(
            symbols_per_slot=bits_per_slot / 61.6, uplink_bits=0.7 * bits_per_slot, reference_latent_dim=None
        )
        yield SystemConfig(
            snr_db=0.0,
            latent_dim=64,
            schedule=NoiseSchedule(np.append(1.0, alpha_bar)),
            bit_depths=sorted(depths.tolist()),  # type: ignore[arg-type]
            deadline=deadline,
            coder="closed_loop",
            same_step_refinement=bool(rng.integers(4)),
            link=link,
            **kwargs,
        )


def test_values_below_single_precision() -> None:
    """Ten messages of 15 bits, each of which leaves a billionth of the error, with certainty."""
    link = LinkConfig(symbols_per_slot=100.0, uplink_bits=100.0, reference_latent_dim=None)
    config = tiny("closed_loop", bit_depths=(15,), deadline=12, link=link)
    law = config.rate_law
    expected, _ = plain_value(config, law.latency_sf(config.message_bits, 12), law.latency_pmf(config.uplink_bits, 12))
    assert 0.0 < expected < 1e-45
    value = Solution(config, independent_slots(law, config, 1)).predicted_value
    assert value == pytest.approx(expected, rel=1e-6, abs=0.0)


def test_many_small_systems() -> None:
    """300 systems: the grid of errors costs no more than 0.1 %, and levels of the rate are never worth less than none.

    Values below 1e-12 come from probabilities that are no more than rounding: levels are not compared there.
    """
    for config in small_systems(300, 12):
        law = config.rate_law
        expected, _ = plain_value(
            config,
            law.latency_sf(config.message_bits, config.deadline),
            law.latency_pmf(config.uplink_bits, config.deadline),
        )
        blind, aware = (Solution(config, independent_slots(law, config, levels)).predicted_value for levels in (1, 24))
        assert blind == pytest.approx(expected, rel=1e-3, abs=0.0), config
        if expected > 1e-12:
            assert aware < 1.001 * blind, config


def test_an_uplink_may_never_end() -> None:
    """Within the eight slots or not, about as likely; x_T is scored either way, since then nothing can be sent."""
    config = tiny("closed_loop", link=LinkConfig(symbols_per_slot=1.3, uplink_bits=8 * 80.0, reference_latent_dim=None))
    law = config.rate_law
    uplink = law.latency_pmf(config.uplink_bits, 8)
    assert 0.2 < 1.0 - uplink.sum() < 0.8
    expected, _ = plain_value(config, law.latency_sf(config.message_bits, 8), uplink)
    assert agents.DynamicProgramming(config).predicted_value == pytest.approx(expected, rel=1e-6)


def test_decides_as_the_recursion_without_tables(rng: np.random.Generator) -> None:
    """Also where the uplink ends before it usually does, so that t(n) is 0 in a slot in which it usually is not."""
    link = LinkConfig(symbols_per_slot=1.3, uplink_bits=110.0, reference_latent_dim=None)
    config = tiny("closed_loop", bit_depths=(1, 2, 3, 16), link=link)
    law = config.rate_law
    assert law.latency_pmf(110.0, 8)[2] > 0.9
    _, value = plain_value(config, law.latency_sf(config.message_bits, 8), law.latency_pmf(config.uplink_bits, 8))
    agent = agents.make("dp", config)
    rates = draw_channel(config, 300)
    rates[::2, 0] = 120.0
    batch = EpisodeBatch(config, None, len(rates))
    for i, channel in enumerate(rates):
        batch.begin(i, 0, channel)
    taken = 0
    for _ in range(8):
        observation = observe(batch, np.zeros((len(rates), 8), dtype=np.float32))
        mask = batch.action_mask()
        mask[:, 1:] &= rng.random((len(rates), 1)) < 0.7  # also states off the best path
        actions = np.asarray(agent.select_action(observation, {"action_mask": mask}))
        for i in np.flatnonzero(mask[:, 1]):
            state = batch.state[i]
            lossy = bool(0 < state["device_bits"] < LOSSLESS_BITS)
            step, error = int(state["device_step"]), float(state["device_error"])
            assert actions[i] == value(int(state["uplink_slots"]), int(state["slot"]), step, error, lossy)[1]
            taken += int(actions[i] > 0)
        batch.advance(actions)
    assert taken > 300


class TestPredictedValue:
    """Predicted and simulated: modeled distortion of many episodes, four standard errors allowed."""

    @pytest.mark.parametrize(
        ("snr_db", "kwargs"),
        [
            (0.0, {}),
            (1.0, {"bit_depths": tuple(range(1, 17))}),
            (3.5, {}),
            (6.3, {}),
            (3.5, {"coder": "forward"}),
            (3.5, {"same_step_refinement": False}),
            (12.0, {"bit_depths": tuple(range(1, 17)), "deadline": 57}),
            (-4.0, {}),
        ],
    )
    def test_without_the_rate(self, snr_db: float, kwargs: dict[str, Any]) -> None:
        config = SystemConfig(**{"snr_db": snr_db, "coder": "closed_loop", **kwargs})
        agent = agents.DynamicProgramming(config)
        scores = play(agent, config, draw_channel(config, 20_000))
        error = scores.std() / np.sqrt(scores.size)
        assert scores.mean() == pytest.approx(agent.predicted_value, abs=4.0 * error, rel=1e-3)

    @pytest.mark.parametrize("snr_db", [0.0, 3.0, 6.0, 9.0, 12.0])
    def test_within_2_percent(self, snr_db: float) -> None:
        """Enough episodes that two standard errors are within 2 %: 6 dB has 0.3 % of them carry the mean."""
        config = SystemConfig(snr_db=snr_db, coder="closed_loop")
        agent = agents.DynamicProgramming(config)
        batches = range(24 if snr_db == 6.0 else 1)
        scores = np.concatenate([play(agent, config, draw_channel(config, 20_000, seed)) for seed in batches])
        assert 2.0 * scores.std() / np.sqrt(scores.size) < 0.02 * scores.mean()
        assert scores.mean() == pytest.approx(agent.predicted_value, rel=0.02)

    def test_with_the_rate(self) -> None:
        """The value improves by 5 % at 6 dB, and hardly elsewhere."""
        gains = {}
        for snr_db in (3.0, 6.0, 9.0):
            config = SystemConfig(snr_db=snr_db, coder="closed_loop")
            agent = agents.DynamicProgramming(config, current_rate=True)
            scores = play(agent, config, draw_channel(config, 20_000))
            error = scores.std() / np.sqrt(scores.size)
            assert scores.mean() == pytest.approx(agent.predicted_value, abs=4.0 * error, rel=1e-3)
            gains[snr_db] = 1.0 - agent.predicted_value / agents.DynamicProgramming(config).predicted_value
        assert 0.04 < gains[6.0] < 0.07
        assert -1e-6 < gains[3.0] < 0.003
        assert -1e-6 < gains[9.0] < 0.003

    @pytest.mark.parametrize("snr_db", [3.0, 9.0])
    def test_on_gaussian_trajectories(self, snr_db: float, tmp_path: Path) -> None:
        """Rotation makes the recursion true: what latents score is what the distortion level scores, within 2 %.

        M = 1024 instead of 16384, 48 trajectories: a standard error of 0.7 %. Both are scored for the same episodes.
        """
        folder = tmp_path / "cache"
        generate_gaussian(folder, num_trajectories=48, latent_shape=(4, 16, 16), num_steps=50, seed=11)
        kwargs = {"cache": str(folder), "split": "all", "snr_db": snr_db, **CLOSED_LOOP}
        table = roll_out(lambda config: agents.make("dp", config), env_kwargs=kwargs, episodes=480)
        config = refine_env.LatentRefinementEnv(**kwargs).config
        predicted = solution(config, 1).predicted_value
        assert np.mean([row["latent_mse"] for row in table]) == pytest.approx(predicted, rel=0.02)


@pytest.mark.parametrize("snr_db", [0.0, 3.0, 6.0, 9.0, 12.0])
@pytest.mark.parametrize("name", ["dp-final", "dp-anytime"])
def test_other_objectives_are_met_in_simulation(name: str, snr_db: float) -> None:
    """At the distortion level: what was predicted for x_0 alone, and for the mean over the slots, within 2 %."""
    config = SystemConfig(snr_db=snr_db, coder="closed_loop")
    agent = agents.make(name, config)
    assert isinstance(agent, agents.DynamicProgramming)
    scores = play(agent, config, draw_channel(config, 10_000), anytime=name == "dp-anytime")
    error = scores.std() / np.sqrt(scores.size)
    assert scores.mean() == pytest.approx(agent.predicted_value, rel=0.02, abs=3.0 * error)


class TestOrder:
    """clairvoyant <= dp <= every other causal agent, on common draws and in the model's sense."""

    OTHERS = (
        "lookahead-closed-loop",
        "persistent-q3",
        "persistent-q8",
        "final-only",
        "final-adaptive-closed-loop",
        "dp-final",
        "dp-anytime",
        "random",
    )

    @pytest.mark.parametrize("snr_db", [3.0, 9.0])
    def test_nothing_sends_the_final_latent_better_than_dp_final(self, snr_db: float) -> None:
        config = SystemConfig(snr_db=snr_db, coder="closed_loop")
        rates = draw_channel(config, 2000)
        optimal = play(agents.make("dp-final", config), config, rates)
        for name in ("final-adaptive-closed-loop", "final-only", "final-q3", "final-q4", "final-q8", "final-q10"):
            gap = play(agents.make(name, config), config, rates) - optimal
            assert gap.mean() > -4.0 * gap.std() / np.sqrt(gap.size) - 1e-6 * optimal.mean(), name

    @pytest.mark.parametrize("snr_db", [3.0, 9.0])
    def test_nothing_shows_better_all_along_than_dp_anytime(self, snr_db: float) -> None:
        config = SystemConfig(snr_db=snr_db, coder="closed_loop")
        rates = draw_channel(config, 2000)
        optimal = play(agents.make("dp-anytime", config), config, rates, anytime=True)
        for name in ("dp", "lookahead-closed-loop", "persistent-q3", "persistent-q8", "final-only"):
            gap = play(agents.make(name, config), config, rates, anytime=True) - optimal
            assert gap.mean() > -4.0 * gap.std() / np.sqrt(gap.size), name

    @pytest.mark.parametrize("snr_db", [0.0, 3.3, 9.0, 15.0, 24.0])
    def test_on_common_draws(self, snr_db: float) -> None:
        """At 24 dB Final-Only ends with 0 but in the one episode of 1500 in which it ends with nothing."""
        config = SystemConfig(snr_db=snr_db, coder="closed_loop")
        rates = draw_channel(config, 20_000 if snr_db == 24.0 else 2000)
        bound = play(agents.Clairvoyant(config), config, rates)
        optimal = play(agents.DynamicProgramming(config), config, rates)
        aware = play(agents.DynamicProgramming(config, current_rate=True), config, rates)
        for name in self.OTHERS:
            scores = play(agents.make(name, config), config, rates)
            assert (bound <= scores * (1.0 + 1e-12)).all(), name
            gap = scores - optimal
            assert gap.mean() > -4.0 * gap.std() / np.sqrt(gap.size) - 1e-6 * optimal.mean(), name
        for scores in (optimal, aware):
            assert (bound <= scores * (1.0 + 1e-12)).all()
        gap = optimal - aware
        assert gap.mean() > -4.0 * gap.std() / np.sqrt(gap.size) - 1e-6 * optimal.mean()

    @pytest.mark.parametrize(
        "restriction", [{"same_step_refinement": False}, {"bit_depths": (3, 8)}, {"bit_depths": (3,)}, {"deadline": 58}]
    )
    def test_less_freedom_is_worth_less(self, restriction: dict[str, Any]) -> None:
        config = SystemConfig(snr_db=12.0, coder="closed_loop")
        free, restricted = (solution(c, 1).predicted_value for c in (config, replace(config, **restriction)))
        assert free < 0.99 * restricted


class TestCorrelatedLink:
    CONFIG = SystemConfig(
        snr_db=6.0,
        coder="closed_loop",
        link=LinkConfig(correlation="gauss-markov", correlation_coefficient=0.9),
    )

    def test_uses_the_chain(self) -> None:
        """The policy for independent slots misses deadlines here: it is 5 times worse."""
        rates = draw_channel(self.CONFIG, 1000)
        agent = agents.DynamicProgramming(self.CONFIG)
        scores = play(agent, self.CONFIG, rates)
        unaware = agents.DynamicProgramming(replace(self.CONFIG, link=LinkConfig()))
        assert scores.mean() < 0.4 * play(unaware, replace(self.CONFIG, link=LinkConfig()), rates).mean()
        # Twelve levels keep little more of the process than its law over two slots: the prediction is approximate.
        assert scores.mean() == pytest.approx(agent.predicted_value, rel=0.2)

    def test_equals_the_recursion_along_all_paths(self) -> None:
        """Two levels of 60 and 110 bits, seldom left: every path of levels is followed, in every state."""
        link = LinkConfig(symbols_per_slot=1.3, uplink_bits=100.0, reference_latent_dim=None)
        config = tiny("closed_loop", bit_depths=(1, 2, 16), link=link)
        rates, odds = np.array([60.0, 110.0]), np.array([[0.8, 0.2], [0.3, 0.7]])
        levels = RateLevels(rates, np.array([85.0]), np.array([0.6, 0.4]), odds)
        chain = RateChain(levels, 0.0, 10.0, 60.0, np.array([[1.0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1.0]]))
        model = config.refinement_model

        def send(n: int, size: float, level: int, ended: Callable[[int, int], float], late: float) -> float:
            """Expectation over all paths of ``ended(slot after, its level)``; ``late`` after the deadline."""
            if n > 8:
                return late
            through = size <= rates[level]
            return float(
                sum(
                    odds[level, j] * (ended(n + 1, j) if through else send(n + 1, size - rates[level], j, ended, late))
                    for j in (0, 1)
                )
            )

        @cache
        def value(uplink_slots: int, n: int, p: int, error: float, level: int) -> float:
            held = plain_rules.distortion(model, p, error)
            if n > 8:
                return held
            t = plain_rules.server_step(n, uplink_slots, 4)
            options = [sum(odds[level, j] * value(uplink_slots, n + 1, p, error, j) for j in (0, 1))]
            if plain_rules.may_transmit(t, p, 4, True, error > 0.0):
                for bits, size in zip(config.bit_depths, config.message_bits, strict=True):
                    left = plain_rules.residual_variance(model, t, p, error) * base_distortion(bits)
                    ended = partial(lambda t, left, slot, j: value(uplink_slots, slot, t, left, j), t, left)
                    options.append(send(n, size, level, ended, held))
            return min(options)

        nothing = float(model.clean[-1])
        expected = sum(
            share * send(1, 100.0, level, lambda slot, j: value(slot - 1, slot, 4, 0.0, j), nothing)
            for level, share in enumerate((0.6, 0.4))
        )
        assert Solution(config, chained_slots(chain, config), 60).predicted_value == pytest.approx(expected, rel=1e-5)

    def test_classes_that_tell_nothing(self) -> None:
        """Independent slots described as a chain."""
        config = tiny("closed_loop")
        plain = independent_slots(config.rate_law, config, 6)
        mixing = np.tile(plain.mixing, (3, 1))
        thirds = np.full(3, 1.0 / 3.0)
        chained = ChannelKnowledge(
            plain.edges,
            mixing,
            plain.onward * thirds,
            plain.deliveries * thirds,
            plain.tail,
            plain.slots_before,
            plain.uplink * thirds,
        )
        assert Solution(config, chained).predicted_value == pytest.approx(
            Solution(config, plain).predicted_value, rel=1e-6
        )

    def test_inferring_refuses_it(self) -> None:
        with pytest.raises(ConfigurationError, match="`link` must have independent slots for dp-inferred"):
            agents.make("dp-inferred", self.CONFIG)


class TestInferred:
    def test_posterior_finds_the_snr(self) -> None:
        config = SystemConfig(snr_db=7.3, coder="closed_loop")
        agent = agents.InferringDynamicProgramming(config, snrs_db=(3.0, 12.0))
        rates = draw_channel(config, 200) / config.latent_dim
        for seen, spread in ((1, 1.0), (60, 0.15)):
            history = np.zeros((200, 60), dtype=np.float32)
            history[:, 60 - seen :] = rates[:, :seen]
            posterior = agent.posterior({"channel_history": history, "slot": np.full(200, seen)})
            assert posterior.sum(axis=1) == pytest.approx(1.0)
            means = posterior @ agent.snrs_db
            assert means.mean() == pytest.approx(7.3, abs=4.0 * spread / np.sqrt(200) + 0.05)
            assert means.std() < 1.5 * spread

    @pytest.mark.parametrize(("snr_db", "loss"), [(3.0, 0.05), (3.3, 0.15), (12.0, 0.05)])
    def test_loses_little(self, snr_db: float, loss: float) -> None:
        """4000 episodes, common draws. Where the schedule changes with the SNR, knowing it matters most.

        Prior: ± 3 dB. From a wider one the first rates tell as much.
        """
        config = SystemConfig(snr_db=snr_db, coder="closed_loop")
        rates = draw_channel(config, 4000)
        known = play(agents.DynamicProgramming(config), config, rates)
        bound = play(agents.Clairvoyant(config), config, rates)
        prior = (snr_db - 3.0, snr_db + 3.0)
        for system, options in ((config, {"snrs_db": prior}), (replace(config, snr_db=prior), {})):
            agent = agents.make("dp-inferred", system, **options)
            agent.check_config(system)
            inferred = play(agent, config, rates)
            assert (bound <= inferred * (1.0 + 1e-12)).all()
            gap = inferred - known
            assert gap.mean() >= -4.0 * gap.std() / np.sqrt(gap.size)
            assert inferred.mean() < (1.0 + loss) * known.mean()

    def test_does_not_look_at_the_configured_snr(self) -> None:
        config = SystemConfig(snr_db=9.0, coder="closed_loop")
        other = replace(config, snr_db=3.0)
        rates = draw_channel(config, 50)
        agent, misled = (agents.InferringDynamicProgramming(c, snrs_db=(3.0, 12.0)) for c in (config, other))
        assert np.array_equal(play(agent, config, rates), play(misled, config, rates))

    @pytest.mark.parametrize("snrs_db", [(3.0,), (3.0, 3.0), (5.0, 3.0)])
    def test_prior_of_another_form(self, snrs_db: Any) -> None:
        with pytest.raises(ConfigurationError, match=r"`snrs_db` must be a pair \(low, high\) with low < high, got"):
            agents.make("dp-inferred", SystemConfig(snr_db=6.0), snrs_db=snrs_db)


class TestValue:
    """The value of a state that an environment shows."""

    def test_along_episodes(self) -> None:
        """Idle states have the value that the tables have; it is a martingale on average, busy ones have none."""
        config = SystemConfig(snr_db=3.3, coder="closed_loop")
        agent = agents.DynamicProgramming(config)
        rates = draw_channel(config, 4000)
        batch = EpisodeBatch(config, None, len(rates))
        for i, channel in enumerate(rates):
            batch.begin(i, 0, channel)
        history = np.zeros((len(rates), 60), dtype=np.float32)
        first = np.full(len(rates), np.nan)
        seen_busy = 0
        while not batch.finished().all():
            observation = observe(batch, history)
            values = agent.value(observation)
            busy = batch.remaining_bits() > 0
            assert np.array_equal(np.isnan(values), busy)
            seen_busy += int(busy.sum())
            first = np.where(np.isnan(first), values, first)
            batch.advance(np.asarray(agent.select_action(observation, {"action_mask": batch.action_mask()})))
        last = agent.value(observe(batch, history))
        assert last == pytest.approx(
            config.refinement_model.distortion(batch.state["device_step"], batch.state["device_error"]), rel=1e-6
        )
        assert seen_busy > 0
        assert first.mean() == pytest.approx(agent.predicted_value, rel=0.01)
        gap = last - first
        assert abs(gap.mean()) < 4.0 * gap.std() / np.sqrt(gap.size) + 1e-5

    def test_single(self, make_env: Callable[..., Any]) -> None:
        env = make_env(snr_db=6.0, **CLOSED_LOOP)
        agent = agents.make("dp", env.unwrapped.config)
        assert isinstance(agent, agents.DynamicProgramming)
        observation, _ = env.reset(seed=0)
        assert np.isnan(agent.value(observation))  # the uplink
        observation, *_ = env.step(0)
        observation, *_ = env.step(0)
        observation, *_ = env.step(0)
        assert float(agent.value(observation)) == pytest.approx(agent.predicted_value, rel=0.3)


@pytest.mark.parametrize("snr_db", [0.0, 9.0])
def test_levels_of_the_rate_average_to_its_law(snr_db: float) -> None:
    """A level's law is averaged over its rates, in parts of a thirty-second of the standard deviation."""
    config = SystemConfig(snr_db=snr_db, coder="closed_loop")
    law = config.rate_law
    plain, aware = (independent_slots(law, config, count) for count in (1, 24))
    average = np.einsum("l,blk->bk", aware.mixing[0], aware.tail)
    assert average == pytest.approx(plain.tail[:, 0], abs=5e-5)
    scaled = independent_slots(law, config, 24, rate_scale=1.25)
    smaller = replace(config, link=LinkConfig(symbols_per_slot=70.0 * 1.25, uplink_bits=8192.0))
    assert scaled.tail == pytest.approx(independent_slots(smaller.rate_law, smaller, 24).tail, abs=1e-9)
    assert scaled.uplink == pytest.approx(independent_slots(smaller.rate_law, smaller, 24).uplink, abs=1e-9)
    assert scaled.edges == pytest.approx(1.25 * aware.edges)


class TestTables:
    def test_are_shared(self) -> None:
        one, other = (agents.DynamicProgramming(SystemConfig(snr_db=7.0, coder="closed_loop")) for _ in range(2))
        assert one.solution is other.solution
        assert one.solution is not agents.DynamicProgramming(SystemConfig(snr_db=7.5, coder="closed_loop")).solution

    @pytest.mark.parametrize("bit_depths", [(3, 4, 8, 10, 16), tuple(range(1, 17))])
    @pytest.mark.parametrize("snr_db", [3.0, 12.0])
    def test_interpolation_error(self, snr_db: float, bit_depths: tuple[int, ...]) -> None:
        """Ten points a decade against a hundred: within 2e-4, of a value, everywhere on the way there."""
        config = SystemConfig(snr_db=snr_db, coder="closed_loop", bit_depths=bit_depths)
        knowledge = independent_slots(config.rate_law, config, 1)
        coarse, fine = Solution(config, knowledge), Solution(config, knowledge, 100)
        assert coarse.predicted_value == pytest.approx(fine.predicted_value, rel=2e-4)


@pytest.mark.parametrize("name", ["dp", "dp-current-rate", "lookahead-closed-loop"])
def test_an_snr_range_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"`snr_db` must be one number for {name.rsplit('-closed', 1)[0]}"):
        agents.make(name, SystemConfig(snr_db=(0, 24)))


def test_any_slot_can_be_the_last_of_the_uplink() -> None:
    """Replayed rates make uplinks that the law never has; the agent acts all the same, up to the last slot."""
    config = SystemConfig(snr_db=12.0, coder="closed_loop")
    rates = draw_channel(config, 60)
    for i in range(60):
        rates[i, :i] = 0.0
    scores = play(agents.DynamicProgramming(config), config, rates)
    assert (np.diff(scores) >= -1e-12).sum() > 50
    assert scores[-1] == config.refinement_model.clean[-1]
    assert scores[0] < 1e-4
