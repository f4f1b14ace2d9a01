"""Every link through every encoding and every policy: it works, or one sentence refuses it."""

from __future__ import annotations

import itertools
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import agents
import refine_env
from refine_env import ConfigurationError, LatentRefinementVectorEnv
from refine_env.evaluation import roll_out
from refine_env.link.channel import CORRELATIONS, FADINGS, POWER_ALLOCATIONS
from refine_env.wrappers import ENCODINGS, EncodeObservation, ObservationEncoder

PARAMETERS: dict[str, dict[str, Any]] = {
    "rician": {"k_factor_db": 6.0},
    "nakagami": {"nakagami_m": 2.0},
    "gauss-markov": {"correlation_coefficient": 0.9},
    "jakes": {"doppler": 0.05},
}


def link_of(fading: str, correlation: str, power: str, delay: int) -> dict[str, Any]:
    """With few subchannels where laws or chains are simulated, which takes a while."""
    return {
        "fading": fading,
        "correlation": correlation,
        "power_allocation": power,
        "csi_delay": delay,
        "num_subchannels": 2 if delay else 60 if correlation == "iid" else 12,
        **PARAMETERS.get(fading, {}),
        **PARAMETERS.get(correlation, {}),
    }


def has_model(link: dict[str, Any]) -> bool:
    try:
        refine_env.LinkConfig(**link)
    except ConfigurationError:
        return False
    return True


ALL = [link_of(*choice) for choice in itertools.product(FADINGS, CORRELATIONS, POWER_ALLOCATIONS, (0, 1))]
LINKS = [pytest.param(link, id=" ".join(map(str, list(link.values())[:4]))) for link in ALL if has_model(link)]


@pytest.fixture
def kwargs(tiny_kwargs: dict[str, Any]) -> dict[str, Any]:
    """T = 4, M = 4 and 16 slots that carry about two bits per dimension each at 6 dB."""
    return {**tiny_kwargs, "snr_db": 6.0, "deadline": 16}


def on(link: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The environment's arguments with that link, as many bits a slot whatever K."""
    symbols = 4.0 / link["num_subchannels"]
    return {**kwargs, "link": {**link, "symbols_per_slot": symbols, "uplink_bits": 6.0, "reference_latent_dim": None}}


def test_the_combinations_that_are_refused_are_known() -> None:
    assert len(ALL) == 36
    assert len(LINKS) == 36 - 8 - 9 + 2  # Nakagami fading with correlation; equal power with a delay; and both


@pytest.mark.parametrize("link", LINKS)
def test_encodings(kwargs: dict[str, Any], link: dict[str, Any]) -> None:
    for encoding in ENCODINGS:
        env = EncodeObservation(gym.make(refine_env.ENV_ID, **on(link, kwargs)), encoding)
        observation, _ = env.reset(seed=0)
        for action in (0, 1, 0, 3, 0):
            assert observation in env.observation_space
            observation = env.step(action)[0]


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("snr_db", [-3.0, 10.0])
def test_the_summary_s_deviation_is_that_of_the_link(
    kwargs: dict[str, Any], link: dict[str, Any], snr_db: float
) -> None:
    """Against the rates of 2000 episodes, over which a deviation is known to 3 %, though slots depend on each other."""
    link = {**link, "num_subchannels": 8}
    envs = LatentRefinementVectorEnv(2000, **{**on(link, kwargs), "snr_db": snr_db, "bit_depths": [8]})
    envs.reset(seed=0)
    rates = envs.episode_rates / 4  # bits per dimension
    mean, deadline = float(rates.mean()), 16
    encoder = ObservationEncoder(envs.config)
    margins = []
    for slot in range(2, deadline):  # the slot in which the message is about as large as what is left carries
        left = deadline - slot + 1
        history = np.zeros(deadline, dtype=np.float32)
        history[-slot:] = mean
        observation = {
            "slot": slot,
            "server_step": 2,
            "device_step": 4,
            "device_bits": 0,
            "channel_history": history,
            "remaining_bits": np.zeros(1, np.float32),
            "device_error": np.zeros(1, np.float32),
        }
        margin = 5.0 * float(encoder.encode_one(observation)[encoder.names.index("margin[8]")])
        if 0.05 < abs(margin) < 4.9:
            spread = (left * mean - 8.0) / margin
            margins.append(spread / np.sqrt((left - 1) + (left - 1) ** 2 / slot))
    assert margins
    assert np.allclose(margins, rates.std(), rtol=0.06)


@pytest.mark.parametrize("link", LINKS)
def test_policies(kwargs: dict[str, Any], link: dict[str, Any]) -> None:
    options: dict[str, Any] = {"dp-inferred": {"snrs_db": (5.0, 7.0)}}
    refused = {}
    for name, latency in itertools.product((*agents.names(), "learned"), ("paper", "exact")):
        if latency == "exact" and "lookahead" not in name:  # which no other policy asks for
            continue
        own = {"bit_depths": [3, 4, 8, 10, 16], "latency_model": latency, **agents.env_kwargs(name)}

        def make(config: refine_env.SystemConfig, name: str = name) -> agents.Agent:
            return agents.make(name, config, **options.get(name, {}))

        try:
            (row,) = roll_out(make, env_kwargs={**on(link, kwargs), **own}, episodes=1)
            assert np.isfinite(row["latent_mse"])
        except ConfigurationError as error:
            refused[name] = str(error)
    assert all("must" in message and len(message) < 500 for message in refused.values()), refused
    independent = refine_env.LinkConfig(**link).channel.independent
    assert set(refused) == ({"learned"} if independent else {"learned", "dp-inferred"})
