"""The shared rules by hand, and equal to their twin as kernels, as Python functions and with arrays."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from refine_env import NoiseSchedule
from refine_env._compiled import plain
from refine_env.model import rules
from refine_env.model.distortion import RefinementModel, SecondMoments
from tests.model import plain_rules

SCHEDULE = NoiseSchedule([1.0, 0.9, 0.6, 0.3, 0.05])
MODELS = [
    RefinementModel.paper(SCHEDULE),
    RefinementModel.closed_loop(SecondMoments.forward_process(SCHEDULE)),
    RefinementModel.closed_loop(SecondMoments.martingale([0.0, 0.05, 0.3, 0.6, 1.0])),
]


def test_server_step_by_hand() -> None:
    # T_ul = 3, T = 4: x_3 at the beginning of slot 5, x_0 at slot 8
    assert [rules.server_step(n, 3, 4, 4) for n in range(1, 11)] == [4, 4, 4, 4, 3, 2, 1, 0, 0, 0]
    assert rules.server_step(40, 0, 4, 4) == 4
    # with a midpoint x_2: it is there at the beginning of slot 4, x_0 at slot 6
    assert [rules.server_step(n, 3, 4, 2) for n in range(1, 8)] == [4, 4, 4, 2, 1, 0, 0]
    assert rules.server_step(40, 0, 4, 2) == 4


def test_server_step_and_its_inverse() -> None:
    systems = [(1, 1), (4, 4), (4, 1), (4, 3)]
    for slot, uplink_slots, (num_steps, first) in itertools.product(range(1, 15), range(5), systems):
        midpoint = first if first < num_steps else None
        step = plain_rules.server_step(slot, uplink_slots, num_steps, midpoint)
        assert rules.server_step(slot, uplink_slots, num_steps, first) == step
        assert plain(rules.server_step)(slot, uplink_slots, num_steps, first) == step
        longest = rules.longest_uplink(slot, step, first)
        if 0 < step < num_steps:
            assert longest == uplink_slots
        elif step == 0:
            ends = [plain_rules.server_step(slot, k, num_steps, midpoint) for k in range(1, slot)]
            assert longest == 1 + max(k for k, end in enumerate(ends) if end == 0)


def test_is_lossy() -> None:
    assert [bits for bits in range(18) if rules.is_lossy(bits)] == list(range(1, 16))


def test_may_transmit() -> None:
    states = list(itertools.product(range(4), range(4), (False, True), (False, True)))
    expected = [plain_rules.may_transmit(t, p, 3, refreshes, lossy) for t, p, refreshes, lossy in states]
    assert [rules.may_transmit(t, p, 3, refreshes, lossy) for t, p, refreshes, lossy in states] == expected
    t, p, refreshes, lossy = np.array(states).T
    arrays = plain(rules.may_transmit)(t, p, 3, refreshes.astype(bool), lossy.astype(bool))
    assert arrays.tolist() == expected


@pytest.mark.parametrize("model", MODELS)
def test_residual_variance_and_distortion(model: RefinementModel) -> None:
    for t, p, error in itertools.product(range(5), range(5), (0.0, 0.3)):
        variance = plain_rules.residual_variance(model, t, p, error)
        assert rules.residual_variance(model, t, p, error) == variance == model.residual_variance(t, p, error)
        score = plain_rules.distortion(model, t, error)
        assert rules.distortion(model, t, error) == score == model.distortion(t, error)
    errors = np.linspace(0.0, 0.5, 5)
    assert model.distortion(np.arange(5), errors) == pytest.approx(model.clean + model.error_slope * errors, abs=0)
