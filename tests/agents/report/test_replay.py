"""A trace of an episode: the same one as in the table, and consistent with the channel, slot by slot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import agents
from agents.evaluate import evaluate, own_env_kwargs
from agents.report.replay import TRACE_COLUMNS, replay_row, trace_episode
from refine_env import ConfigurationError, LatentRefinementEnv, TrajectoryCache

LAST_SLOT = ("trajectory", "latent_mse", "device_step", "device_bits", "num_deliveries", "bits_sent", "uplink_slots")


def make(name: str) -> Any:
    return lambda config: agents.make(name, config)


@pytest.fixture
def kwargs(gaussian_cache: Path) -> dict[str, Any]:
    return {"cache": str(gaussian_cache), "deadline": 60, "bit_depths": [3, 4, 8, 10, 16]}


@pytest.mark.parametrize("name", [name for name in agents.names() if name != "random"])
def test_a_trace_ends_with_the_row_of_the_table(name: str, kwargs: dict[str, Any]) -> None:
    rows = evaluate((name,), (0.0, 12.0, 30.0), episodes=3, seed=3, env_kwargs=kwargs)
    for row in rows:
        trace = replay_row(row, kwargs)
        assert {column: trace[-1][column] for column in LAST_SLOT} == {column: row[column] for column in LAST_SLOT}
        assert [slot["slot"] for slot in trace] == list(range(1, 61))
        assert all(set(slot) == set(TRACE_COLUMNS) for slot in trace)
        assert all(type(slot[column]) is kind for slot in trace for column, kind in TRACE_COLUMNS.items())
        assert trace[0]["latent_mse"] == row["no_delivery_mse"]


@pytest.mark.parametrize(("name", "snr_db"), [("lookahead", 6.0), ("persistent-q3", 3.0), ("final-only", 30.0)])
def test_the_books_balance_in_every_slot(name: str, snr_db: float, kwargs: dict[str, Any]) -> None:
    """What is left of a message is its size minus what its slots carried; deliveries change what is held."""
    own = {**kwargs, "snr_db": snr_db}
    env = LatentRefinementEnv(split="test", **own)
    env.reset(seed=11)
    config = env.config
    rates = env._process.episodes.rates[0] / config.latent_dim
    left, held, mse, deliveries = config.uplink_bits / config.latent_dim, (config.num_steps, 0), None, 0
    for slot in trace_episode(make(name), env_kwargs=own, seed=11):
        assert slot["rate"] == np.float32(rates[slot["slot"] - 1])
        if slot["action_bits"]:
            assert left == 0.0
            assert slot["message_step"] == slot["server_step"] < held[0]
            assert slot["message_bits"] == slot["action_bits"]
            left = slot["message_bits"]
        expected = "idle" if left == 0.0 else "latent" if slot["message_bits"] else "prompt"
        assert slot["channel"] == expected
        left = max(0.0, left - rates[slot["slot"] - 1])
        assert slot["remaining_bits"] == pytest.approx(left, abs=1e-5)
        left = 0.0 if slot["remaining_bits"] == 0.0 else left
        assert slot["delivered"] == (slot["channel"] == "latent" and left == 0.0)
        if slot["delivered"]:
            held = (slot["message_step"], slot["message_bits"])
            deliveries += 1
        else:
            assert mse in (None, slot["latent_mse"])
        mse = slot["latent_mse"]
        assert (slot["device_step"], slot["device_bits"]) == held
        assert slot["num_deliveries"] == deliveries
    assert deliveries >= 1


def test_a_latent_is_what_the_error_says(kwargs: dict[str, Any], gaussian_cache: Path) -> None:
    own = {**kwargs, "snr_db": 9.0}
    trace = trace_episode(make("persistent-q8"), env_kwargs=own, seed=2, latents=True)
    clean = TrajectoryCache.open(gaussian_cache).latents(trace[0]["trajectory"])[0].astype(np.float64).ravel()
    ends = [slot for slot in trace if slot["delivered"]]
    assert len(ends) >= 3
    for slot in ends:
        assert slot["latent"].dtype == np.float32
        assert np.square(slot["latent"] - clean).mean() == pytest.approx(slot["latent_mse"], rel=1e-6)
    assert all(slot["latent"] is None for slot in trace if not slot["delivered"])
    assert [{**slot, "latent": None} for slot in trace] == [
        {**slot, "latent": None} for slot in trace_episode(make("persistent-q8"), env_kwargs=own, seed=2)
    ]


class Impatient(agents.Agent):
    """TRANSMIT in every slot, legal or not."""

    def __init__(self, config: Any) -> None:
        super().__init__(config, name="impatient")

    def decide(self, observation: Any, legal: Any) -> Any:
        return np.ones(legal.shape, dtype=np.int64)

    def select_action(self, observation: Any, info: Any) -> Any:
        return 1


def test_an_illegal_transmit_is_noted_and_sends_nothing(tiny_kwargs: dict[str, Any]) -> None:
    trace = trace_episode(Impatient, env_kwargs=tiny_kwargs, seed=0)
    assert len(trace) == 8
    assert all(slot["action_bits"] == 1 for slot in trace)
    assert trace[0]["channel"] == "prompt"
    assert trace == [{**slot, "action_bits": 1} for slot in trace_episode(make_q1, env_kwargs=tiny_kwargs, seed=0)]


def make_q1(config: Any) -> Any:
    return agents.make("persistent-q1", config)


def test_another_seed_is_another_episode(kwargs: dict[str, Any]) -> None:
    own = {**kwargs, "snr_db": 6.0}
    traces = [trace_episode(make("lookahead"), env_kwargs=own, seed=seed) for seed in (0, 0, 1)]
    assert traces[0] == traces[1]
    assert traces[0] != traces[2]


def test_what_cannot_be_played_again_is_refused(kwargs: dict[str, Any]) -> None:
    rows = evaluate(("random", "lookahead"), (6.0,), episodes=4, seed=0, env_kwargs=kwargs)
    with pytest.raises(ConfigurationError, match="`row` must be what random does again with seed .* got"):
        replay_row(rows[0], kwargs)
    with pytest.raises(ConfigurationError, match=r"`row` must be what lookahead .* \(latent_mse .*\), got"):
        replay_row({**rows[4], "latent_mse": rows[4]["latent_mse"] * (1 + 1e-15)}, kwargs)
    with pytest.raises(ConfigurationError, match="`row` must be what lookahead does again"):
        replay_row(rows[4], {**kwargs, "split": "train"})
    with pytest.raises(ConfigurationError, match="`name` must be one of"):
        replay_row({**rows[4], "agent": "mine"}, kwargs)
    with pytest.raises(ConfigurationError, match="`env_kwargs` must have every slot played for a trace"):
        trace_episode(make("lookahead"), env_kwargs={**kwargs, "decision_epochs": True}, seed=0)


def test_the_bound_is_told_the_channel_here_too(gaussian_cache: Path) -> None:
    """A row of the clairvoyant, and of the optimum on another payload, is played again."""
    env_kwargs = {"cache": str(gaussian_cache), "payload": "posterior_mean", "moments": "measured"}
    assert own_env_kwargs("lookahead", env_kwargs, 6.0)["payload"] == "latent"
    table = evaluate(("clairvoyant", "dp", "lookahead"), (6.0,), episodes=2, seed=3, env_kwargs=env_kwargs)
    assert [row["payload"] for row in table[::2]] == ["posterior_mean", "posterior_mean", "latent"]
    for row in table:
        trace = replay_row(row, env_kwargs, latents=True)
        held = [slot["latent"] for slot in trace if slot["delivered"]]
        assert len(held) == row["num_deliveries"]
        clean = TrajectoryCache.open(gaussian_cache).latents(row["trajectory"])[0].astype(np.float64).ravel()
        if held:
            assert np.mean((held[-1] - clean) ** 2) == pytest.approx(row["latent_mse"])
