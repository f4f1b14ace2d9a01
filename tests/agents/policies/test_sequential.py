"""Sending x_0 alone: at one bit depth, and at the one that the link is likely to bring in by the deadline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import agents
from refine_env import LinkConfig, SystemConfig
from refine_env.coding import base_distortion

LINKS: dict[str, dict[str, Any]] = {
    "iid": {},
    "memory": {"correlation": "gauss-markov", "correlation_coefficient": 0.5},
}


def decide(agent: agents.Agent, slot: int, server_step: int = 0, device_step: int = 50) -> int:
    """The bit depth that an agent chooses in a state, 0 for WAIT."""
    observation = {
        "slot": np.array([slot]),
        "server_step": np.array([server_step]),
        "device_step": np.array([device_step]),
    }
    action = int(agent.decide(observation, np.array([True]))[0])
    return agent.config.bit_depths[action - 1] if action else 0


@pytest.mark.parametrize("bits", [3, 4, 8, 10, 16])
def test_final_q_sends_once_and_nothing_but_the_clean_latent(bits: int) -> None:
    agent = agents.make(f"final-q{bits}", SystemConfig(snr_db=6.0, coder="closed_loop"))
    assert agent.name == f"final-q{bits}"
    assert decide(agent, 54) == bits
    assert decide(agent, 54, server_step=1) == 0
    assert decide(agent, 54, device_step=7) == bits
    assert decide(agent, 57, device_step=0) == 0


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("coder", ["forward", "closed_loop"])
def test_final_adaptive_is_the_best_plan_that_is_likely_to_arrive(coder: str, link: str, quantile: float) -> None:
    """Against simulated latencies: every plan's probability is counted, the best of the likely ones is chosen."""
    config = SystemConfig(snr_db=7.0, coder=coder, latency_quantile=quantile, link=LinkConfig(**LINKS[link]))
    name = "final-adaptive" if coder == "forward" else "final-adaptive-closed-loop"
    agent = agents.make(name, config)
    sf = config.exact_latency_law.latency_sf(config.message_bits, config.deadline)
    pmf = -np.diff(sf, axis=-1, prepend=1.0)
    errors = [base_distortion(bits) for bits in config.bit_depths]
    chosen = set()
    for left in range(1, 31):
        plans = []
        for i, bits in enumerate(config.bit_depths):
            if 1.0 - sf[i, left] >= quantile:
                plans.append((errors[i], 1, -bits, bits))
            for j in range(len(errors) if coder == "closed_loop" else 0):
                arrival = sum(pmf[i, a] * pmf[j, b] for a in range(left + 1) for b in range(left + 1 - a))
                if arrival >= quantile:
                    plans.append((errors[i] * errors[j], 2, bits, bits))
        expected = min(plans)[3] if plans else 3
        assert decide(agent, config.deadline + 1 - left) == expected, left
        chosen.add(expected)
        # Once x_0 is held: the largest that is likely to arrive.
        likely = [bits for i, bits in enumerate(config.bit_depths) if 1.0 - sf[i, left] >= quantile]
        assert decide(agent, config.deadline + 1 - left, device_step=0) == max(likely, default=3)
    assert chosen >= {3, 4, 16}


def test_nothing_is_sent_before_the_clean_latent_is_there() -> None:
    for name in ("final-adaptive", "final-only"):
        agent = agents.make(name, SystemConfig(snr_db=9.0))
        assert [decide(agent, 40, server_step=t) for t in (1, 10, 49)] == [0, 0, 0]
