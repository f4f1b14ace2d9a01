"""The look-ahead's table against the two strategies written out slot by slot, and its paper settings."""

from __future__ import annotations

import math

import numpy as np
import pytest

import agents
from agents.policies.lookahead import Lookahead
from refine_env import ConfigurationError, NoiseSchedule, SystemConfig
from refine_env.coding import base_distortion
from refine_env.link import latency_quantile


def plain_action(
    config: SystemConfig, n: int, t: int, device: int, *, literal: bool = False, tight: bool = False
) -> int:
    """[K] §IV-C as it is printed, with the readings of docs/model.md."""
    ab, depths, deadline = config.schedule.alpha_bar, config.bit_depths, config.deadline
    latency = {
        b: latency_quantile(config.latent_dim * b, config.rate_statistics, config.latency_quantile) for b in depths
    }
    slack = 1 if tight else 0

    def server(slot: int) -> int:
        return max(0, t - (slot - n))

    def largest(slot: int) -> int | None:
        fitting = [b for b in depths if slot + latency[b] - slack <= deadline]
        return max(fitting) if fitting else None

    def total(step: int, previous: int, bits: int) -> float:
        variance = 1.0 if previous == config.num_steps else (ab[step] - ab[previous]) / ab[previous]
        return float(2 * (1 - math.sqrt(ab[step])) + variance * base_distortion(bits))

    single, wait, chosen = math.inf, None, None
    for tau in range(deadline - n + 1):
        bits = largest(n + tau)
        if bits is not None and total(server(n + tau), device, bits) < single:
            single, wait, chosen = total(server(n + tau), device, bits), tau, bits
    dual, first = math.inf, None
    for b in depths:
        for slot in range(n + latency[b], deadline + 1):
            bits = largest(slot)
            if bits is None or (server(slot) == t and not literal):
                continue
            if total(server(slot), t, bits) < dual:
                dual, first = total(server(slot), t, bits), b
    if first is not None and dual <= single:
        return config.action_of(first)
    return config.action_of(chosen) if wait == 0 and chosen is not None else 0


@pytest.mark.parametrize("variant", [{}, {"literal": True}, {"tight": True}], ids=["paper", "literal", "tight"])
@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 6.0, 15.0, 27.0])
def test_table_equals_the_printed_rule(snr_db: float, variant: dict[str, bool], rng: np.random.Generator) -> None:
    config = SystemConfig(snr_db=snr_db)
    table = Lookahead(config, **variant).table
    for _ in range(250):
        n = int(rng.integers(1, 61))
        t = int(rng.integers(0, 50))
        device = int(rng.integers(t + 1, 51))
        assert table[n, t, device] == plain_action(config, n, t, device, **variant), (n, t, device)


@pytest.mark.parametrize("variant", [{}, {"literal": True}, {"tight": True}], ids=["paper", "literal", "tight"])
def test_whole_table_of_a_small_system(variant: dict[str, bool]) -> None:
    config = SystemConfig(
        snr_db=3.0,
        schedule=NoiseSchedule([1.0, 0.95, 0.8, 0.5, 0.2, 0.05]),
        bit_depths=(1, 3, 16),
        deadline=30,
    )
    table = Lookahead(config, **variant).table
    for n in range(1, 31):
        for t in range(5):
            for device in range(t + 1, 6):
                assert table[n, t, device] == plain_action(config, n, t, device, **variant), (n, t, device)


def test_ties_go_to_the_smallest_first_bit_depth() -> None:
    """At 12 dB in slot 40, with x_12: 3, 4, 8 and 10 bits (4, 5, 10, 12 slots) are all through by slot 52,
    where x_0 goes out with the same 4 bits. The choice is the smallest, though it predicts no less."""
    agent = Lookahead(SystemConfig(snr_db=12.0))
    assert agent.latency.tolist() == [4, 5, 10, 12, 19]
    assert agent.table[40, 12, 50] == 1


def test_second_transmission_must_be_fresher() -> None:
    """With x_0 at the server, the paper's text promises distortion 0 to a second copy of x_0."""
    config = SystemConfig(snr_db=27.0)
    strict, literal = Lookahead(config).table, Lookahead(config, literal=True).table
    slot = 52
    assert strict[slot, 0, 20] == config.action_of(16)
    assert literal[slot, 0, 20] == config.action_of(3)


def test_nothing_feasible_is_a_wait() -> None:
    table = Lookahead(SystemConfig(snr_db=0.0)).table
    assert table[49, 3, 50] == 0  # 12 slots for 3 bits: 49 + 12 > 60
    assert table[48, 4, 50] == 1


def test_paper_settings() -> None:
    agent = agents.make("lookahead", SystemConfig(snr_db=6.0))
    assert agent.config.latency_quantile == 0.9
    assert agent.latency.tolist() == [6, 8, 16, 20, 32]


def test_an_snr_range_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="`snr_db` must be one number for lookahead-tight, got the range"):
        agents.make("lookahead-tight", SystemConfig(snr_db=(0, 24)))
