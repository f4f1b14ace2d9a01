"""The dynamics, followed by hand on a tiny system and against a plain Python twin on random ones."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from refine_env import NoiseSchedule, SystemConfig, TrajectoryCache
from refine_env.coding import CODERS, LloydMax, base_distortion
from refine_env.config import WarmStart
from refine_env.dynamics.process import Observations, fill_observations
from refine_env.dynamics.simulator import NO_ACTION, STATE_DTYPE, EpisodeBatch
from tests.model import plain_rules


@pytest.fixture
def batch(tiny_config: SystemConfig, tiny_cache: Path) -> EpisodeBatch:
    return EpisodeBatch(tiny_config, TrajectoryCache.open(tiny_cache), 1)


def act(batch: EpisodeBatch, action: int, *, until_decision: bool = False) -> dict[str, Any]:
    batch.advance(np.full(len(batch), action), until_decision=until_decision)
    return {name: batch.state[name][0].item() for name in batch.state.dtype.names or ()}


def test_an_episode_by_hand(batch: EpisodeBatch) -> None:
    """T = 4, T_d = 8, M = 4, 𝓑 = {1, 2, 16}, B_s = 6 bits, rates 4, 2, 3, 5, 5, 4, 30, 60.

    Slot 1: 4 of the prompt's 6 bits. Slot 2: 6, T_ul = 2 (the sum just reaches B_s). x_3 is there at the
    beginning of slot T_ul + 2 = 4, x_0 at slot T_ul + T + 1 = 7.
    """
    batch.begin(0, 1, [4.0, 2.0, 3.0, 5.0, 5.0, 4.0, 30.0, 60.0])
    assert batch.remaining_bits()[0] == 6.0
    assert act(batch, 0)["message_sent"] == 4.0
    state = act(batch, 0)
    assert (state["uplink_slots"], state["slot"], state["server_step"]) == (2, 3, 4)
    assert batch.action_mask().tolist() == [[1, 0, 0, 0]]  # generating, nothing but noise yet
    state = act(batch, 0)
    assert (state["slot"], state["server_step"]) == (4, 3)
    assert batch.action_mask().tolist() == [[1, 1, 1, 1]]
    # Slot 4: TRANSMIT(2), 8 bits of x_3: 5 in slot 4, 10 >= 8 in slot 5. The 2 left over are lost.
    state = act(batch, 2)
    assert (state["message_step"], state["message_bits"], batch.remaining_bits()[0]) == (3, 2, 3.0)
    assert batch.action_mask().tolist() == [[1, 0, 0, 0]]
    assert not batch.delivered[0]
    state = act(batch, 0)
    assert batch.delivered[0]
    assert (state["device_step"], state["device_bits"], state["slot"]) == (3, 2, 6)
    assert (state["num_deliveries"], state["bits_sent"]) == (1, 8.0)
    # First transmission: x_3 itself is quantized.
    x = batch._source.latents(1).reshape(5, 4).astype(np.float32)
    assert np.array_equal(batch.device[0], LloydMax(2).quantize(x[3]))
    assert batch.latent_mse[0] == pytest.approx(np.mean((batch.device[0] - x[0]) ** 2), rel=1e-6)
    # Slot 6: the server holds x_1; TRANSMIT(1) of 4 bits fits the slot exactly.
    state = act(batch, 1)
    assert (state["device_step"], state["device_bits"], state["server_step"]) == (1, 1, 0)
    assert batch.delivered[0]
    # Slot 7: x_0 at 16 bits is 64 bits: 30 + 60 reach it in slot 8 = T_d, which still counts.
    act(batch, 3)
    state = act(batch, 0)
    assert batch.finished()[0]
    assert (state["slot"], state["device_step"], state["device_bits"], state["num_deliveries"]) == (
        9,
        0,
        16,
        3,
    )
    assert state["bits_sent"] == 8.0 + 4.0 + 64.0
    assert batch.latent_mse[0] == 0.0
    assert batch.action_mask().tolist() == [[1, 0, 0, 0]]


def test_a_delivery_after_the_deadline_does_not_count(batch: EpisodeBatch) -> None:
    batch.begin(0, 1, [6.0, 0, 0, 0, 0, 0, 33.0, 30.9])
    for _ in range(6):
        act(batch, 0)
    initial = batch.latent_mse[0]
    act(batch, 3)
    state = act(batch, 0)
    assert batch.finished()[0]
    assert state["num_deliveries"] == 0
    assert state["bits_sent"] == pytest.approx(63.9)
    assert batch.latent_mse[0] == initial


def test_uplink_that_never_finishes(batch: EpisodeBatch) -> None:
    batch.begin(0, 0, [0.7] * 8)
    for _ in range(8):
        assert batch.action_mask().tolist() == [[1, 0, 0, 0]]
        state = act(batch, 1)
        assert batch.illegal[0]
    assert batch.finished()[0]
    assert (state["uplink_slots"], state["server_step"], state["device_step"]) == (0, 4, 4)


def test_what_is_held_already_is_not_sent_again(batch: EpisodeBatch) -> None:
    batch.begin(0, 0, [6.0] + [100.0] * 7)
    for _ in range(5):
        act(batch, 0)
    assert act(batch, 1)["device_step"] == 0
    assert batch.action_mask().tolist() == [[1, 0, 0, 0]]
    act(batch, 3)
    assert batch.illegal[0]
    assert not batch.delivered[0]


def test_until_decision_stops_where_transmit_is_legal(batch: EpisodeBatch) -> None:
    rates = np.array([[4.0, 2.0, 3.0, 5.0, 5.0, 4.0, 30.0, 60.0]])
    batch.begin([0], np.array([1]), rates, skip_forced_slots=True)
    assert batch.state["slot"][0] == 4
    state = act(batch, 2, until_decision=True)
    assert (state["slot"], state["device_step"]) == (6, 3)
    assert batch.delivered[0]
    state = act(batch, 0, until_decision=True)
    assert state["slot"] == 7
    act(batch, 3, until_decision=True)
    assert batch.finished()[0]
    assert batch.latent_mse[0] == 0.0


def test_forced_slots_leave_one_step_to_an_episode_without_decisions(batch: EpisodeBatch) -> None:
    batch.begin([0], np.array([0]), np.full((1, 8), 0.1), skip_forced_slots=True)
    assert batch.state["slot"][0] == 8
    assert not batch.finished()[0]


def test_no_action_and_finished_episodes_stay_as_they_are(tiny_config: SystemConfig, tiny_cache: Path) -> None:
    batch = EpisodeBatch(tiny_config, TrajectoryCache.open(tiny_cache), 2)
    for i in range(2):
        batch.begin(i, i, [10.0] * 8)
    for _ in range(8):
        batch.advance(np.array([0, NO_ACTION]))
    before = batch.state.copy()
    assert before["slot"].tolist() == [9, 1]
    batch.advance(np.array([1, NO_ACTION]))
    before["acted"] = False  # what the last step met, not what the episode is in
    assert np.array_equal(batch.state, before)


def test_channel_history_by_hand() -> None:
    rates = np.array([[2.0, 4.0, 6.0], [2.0, 4.0, 400.0], [2.0, 4.0, 6.0]])
    state = np.zeros(3, dtype=STATE_DTYPE)
    state["slot"] = [1, 3, 4]
    for length, expected in ((4, [[0, 0, 0, 1], [0, 1, 2, 16], [0, 1, 2, 3]]), (2, [[0, 1], [2, 16], [2, 3]])):
        observations = Observations.empty(3, length, 2)
        fill_observations(state, rates, 2, 16.0, 0, *observations[:-1], 1.0)
        assert observations.history.tolist() == expected


class PlainEpisode:
    """The timeline of the model, written as it is printed, one slot after the other."""

    def __init__(self, config: SystemConfig, rates: list[float]) -> None:
        self.config, self.rates = config, rates
        sums = np.cumsum(rates)
        reached = np.flatnonzero(sums >= config.uplink_bits)
        self.uplink = int(reached[0]) + 1 if reached.size else 10**9
        start = config.warm_start
        self.midpoint = None if start is None else start.step
        self.name_bits = start.name_bits if start is not None and start.shared else 0.0
        first = start.step if start is not None and start.shared else config.num_steps
        self.slot, self.device, self.busy_until, self.pending = 1, first, 0, (0, 0)
        self.bits, self.error = 0, 0.0

    def server(self) -> int:
        return plain_rules.server_step(self.slot, self.uplink, self.config.num_steps, self.midpoint)

    def legal(self) -> bool:
        refreshes = self.config.coder == "closed_loop" and self.config.same_step_refinement
        gain = plain_rules.may_transmit(
            self.server(), self.device, self.config.num_steps, refreshes, 0 < self.bits < 16
        )
        return self.slot <= self.config.deadline and gain and self.slot > self.busy_until

    def step(self, action: int) -> None:
        if action and self.legal():
            bits = self.config.bit_depths[action - 1] * self.config.latent_dim
            bits += self.name_bits if self.bits == 0 else 0.0
            sums = np.cumsum(self.rates[self.slot - 1 :])
            reached = np.flatnonzero(sums >= bits)
            self.busy_until = self.slot + int(reached[0]) if reached.size else 10**9
            self.pending = (self.server(), self.config.bit_depths[action - 1])
        if self.slot == self.busy_until:
            step, self.bits = self.pending
            variance = plain_rules.residual_variance(self.config.refinement_model, step, self.device, self.error)
            self.device, self.error = step, variance * base_distortion(self.bits)
        self.slot += 1


@settings(max_examples=150)
@given(data=st.data())
def test_timeline_equals_the_plain_twin(data: st.DataObject) -> None:
    """Integer rates, so that both ways of summing them agree exactly."""
    steps = data.draw(st.integers(1, 6))
    deadline = data.draw(st.integers(1, 14))
    midpoint = data.draw(st.integers(0, steps - 1))
    name_bits, shared = float(data.draw(st.integers(1, 4))), data.draw(st.booleans())
    config = SystemConfig(
        snr_db=0.0,
        latent_dim=2,
        warm_start=WarmStart(step=midpoint, shared=shared, name_bits=name_bits) if midpoint else None,
        schedule=NoiseSchedule(np.linspace(1.0, 0.1, steps + 1)),
        bit_depths=(1, 3, 16),
        deadline=deadline,
        coder=data.draw(st.sampled_from(CODERS)),
        sent_scale=False,  # the predicted error is the model's, then, and a message has M·b bits
        same_step_refinement=data.draw(st.booleans()),
        link={"uplink_bits": float(data.draw(st.integers(1, 8))), "reference_latent_dim": None},  # type: ignore[arg-type]
    )
    rates = [float(r) for r in data.draw(st.lists(st.integers(0, 9), min_size=deadline, max_size=deadline))]
    actions = data.draw(st.lists(st.integers(0, 3), min_size=deadline, max_size=deadline))

    class Source:
        has_full = False

        def payload(self, index: int, kind: str) -> NDArray[np.float16]:
            return np.ones((steps + 1, 2), dtype=np.float16)

        def full_latent(self, index: int) -> NDArray[np.float16]:
            raise AssertionError

    batch, plain = EpisodeBatch(config, Source(), 1), PlainEpisode(config, rates)
    batch.begin(0, 0, rates)
    for action in actions:
        s = batch.state[0]
        assert (s["slot"], s["server_step"], s["device_step"]) == (plain.slot, plain.server(), plain.device)
        assert s["device_error"] == pytest.approx(plain.error, rel=1e-12)
        assert bool(batch.action_mask()[0, 1]) == plain.legal()
        batch.advance(np.array([action]))
        plain.step(action)
    assert batch.finished()[0]
    assert batch.state["device_step"][0] == plain.device


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_copies_go_on_alike(batch: EpisodeBatch, clone: Any) -> None:
    batch.begin(0, 1, [6.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0])
    for action in (0, 0, 2):
        act(batch, action)
    twin = clone(batch)
    for action in (0, 1, 0, 1, 1):
        assert act(batch, action) == act(twin, action)
        assert np.array_equal(batch.device, twin.device)
    assert batch.finished()[0]
