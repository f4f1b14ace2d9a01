"""Environments on caches whose trajectories start at midpoints: what the cache says, and both errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import agents
import refine_env
from agents import evaluate
from agents.report import read_run
from agents.report.player import make_player
from refine_env import ConfigurationError, LatentRefinementEnv, TrajectoryCache
from refine_env.config import WarmStart
from refine_env.evaluation import EPISODE_COLUMNS, read_table, roll_out
from tests.processes import run
from tests.test_vector_env import assert_equal

STEP = 20
CODERS = ["forward", "closed_loop"]


def test_the_cache_says_where_generation_starts(reuse_cache: Path, gaussian_cache: Path) -> None:
    cache = TrajectoryCache.open(reuse_cache)
    assert (cache.midpoint, cache.num_steps, cache.has_full) == (STEP, STEP, True)
    ordinary = TrajectoryCache.open(gaussian_cache)
    assert (ordinary.midpoint, ordinary.has_full, ordinary.payload_schedule) == (None, False, ordinary.schedule)
    for given, shared in ((None, False), ({"step": STEP}, False), ({"shared": True}, True)):
        env = LatentRefinementEnv(cache=str(reuse_cache), warm_start=given)
        assert env.config.warm_start == WarmStart(step=STEP, shared=shared)
        assert env.config.num_steps == STEP + 1
        np.testing.assert_array_equal(env.config.schedule.alpha_bar[:-1], cache.schedule.alpha_bar)
    written = env.unwrapped.config.to_dict()
    assert refine_env.SystemConfig.from_dict(written) == env.config
    assert LatentRefinementEnv(cache=str(gaussian_cache)).config.warm_start is None


@pytest.mark.parametrize("coder", CODERS)
def test_a_device_without_the_midpoint_starts_from_noise(reuse_cache: Path, coder: str) -> None:
    """Noise of unit power, another one of each trajectory and always the same, of which nothing is predicted."""
    env = LatentRefinementEnv(cache=str(reuse_cache), coder=coder, moments="measured")
    cache = env.cache
    payloads = [cache.payload(index, "latent") for index in range(len(cache))]
    noise = np.stack([payload[STEP + 1] for payload in payloads]).astype(float)
    np.testing.assert_array_equal(np.stack([cache.payload(i, "latent")[STEP + 1] for i in range(len(cache))]), noise)
    for index, payload in enumerate(payloads):
        np.testing.assert_array_equal(payload[: STEP + 1], cache.latents(index))
        np.testing.assert_array_equal(env.config.initial(payload), payload[STEP + 1])
    assert np.square(noise).mean() == pytest.approx(1.0, abs=0.1)
    flat = noise.reshape(len(cache), -1)
    assert np.abs(np.corrcoef(flat) - np.eye(len(cache))).max() < 0.35
    model = env.config.refinement_model
    assert model.gain[: STEP + 1, STEP + 1] == pytest.approx(0.0, abs=1e-4)
    power = np.diag(cache.second_moments) if coder == "closed_loop" else np.ones(STEP + 1)
    assert model.innovation[: STEP + 1, STEP + 1] == pytest.approx(power, rel=1e-6)


@pytest.mark.parametrize("name", ["persistent-q3", "lookahead", "dp", "clairvoyant", "final-adaptive"])
@pytest.mark.parametrize("shared", [False, True])
def test_the_same_as_the_warm_start_of_an_ordinary_cache(
    reuse_cache: Path, gaussian_cache: Path, name: str, shared: bool
) -> None:
    """The trajectories are the ordinary ones' last steps, so what is sent and scored is the same, to the bit.

    On the closed-loop coder a device without the midpoint has there an x_T that says a little about x_t.
    """
    start = {"step": STEP, "shared": shared}
    tables = [
        roll_out(
            lambda config: agents.make(name, config),
            env_kwargs={**agents.env_kwargs(name), "cache": str(cache), "snr_db": 3.0, "warm_start": start},
            episodes=12,
        )
        for cache in (reuse_cache, gaussian_cache)
    ]
    for ours, theirs in zip(*tables, strict=True):
        del ours["full_latent_mse"]
        if not shared:
            assert theirs["num_deliveries"] > 0
            ours["no_delivery_mse"] = theirs["no_delivery_mse"]  # of another noise
        if not shared and ours["coder"] == "closed_loop":
            assert 0.2 * theirs["latent_mse"] <= ours["latent_mse"] <= 5.0 * theirs["latent_mse"]
            ours["latent_mse"] = theirs["latent_mse"]
        assert ours == theirs


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"warm_start": {"step": 19}},
            "`warm_start.step` must be that of the cache, .* start at x_20, got 19",
        ),
        ({"warm_start": {"step": 21, "shared": True}}, "start at x_20, got 21. Leave it out, or choose another cache"),
        ({"warm_start": {"share": True}}, "`warm_start` must be an object .* Did you mean `shared`"),
        ({"warm_start": 20}, "`warm_start` must be an object with `step`"),
        ({"coder": "closed_loop", "payload": "posterior_mean"}, "`payload` must be 'latent' on a cache whose traj"),
        ({"device_decoder": "denoise"}, "`device_decoder` must be 'none' on a cache whose trajectories start at midp"),
    ],
)
def test_what_contradicts_the_cache(reuse_cache: Path, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        gym.make(refine_env.ENV_ID, cache=str(reuse_cache), **kwargs)


KWARGS: list[dict[str, Any]] = [
    {},
    {"warm_start": {"shared": True}, "decision_epochs": True},
    {"coder": "closed_loop", "reward": "anytime"},
]


@pytest.mark.parametrize("kwargs", KWARGS, ids=["not-shared", "shared", "closed-loop"])
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_the_vector_environment_equals_single_ones(reuse_cache: Path, mode: str, kwargs: dict[str, Any]) -> None:
    """Bit for bit, the error against the full run, too."""
    cache = str(reuse_cache)
    ours = gym.make_vec(refine_env.ENV_ID, num_envs=4, cache=cache, autoreset_mode=mode, **kwargs)
    single = [lambda: gym.make(refine_env.ENV_ID, cache=cache, **kwargs)] * 4
    theirs = SyncVectorEnv(single, autoreset_mode=AutoresetMode(mode))
    first = ours.reset(seed=5)
    assert_equal(first, theirs.reset(seed=5))
    assert "full_latent_mse" in first[1]
    rng = np.random.default_rng(5)
    for step in range(100):
        actions = rng.integers(6, size=4)
        a, b = ours.step(actions), theirs.step(actions)
        assert_equal(a, b, f"step {step}")
        assert a[0] in ours.observation_space


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("coder", CODERS)
def test_both_errors(reuse_cache: Path, gaussian_cache: Path, coder: str, shared: bool) -> None:
    """Of the environment by hand, and the roll-out's are the environment's, to the bit."""
    kwargs = {"cache": str(reuse_cache), "coder": coder, "split": "all", "warm_start": {"shared": shared}}
    rows = roll_out(
        lambda config: agents.make("persistent-q3", config), env_kwargs={**kwargs, "snr_db": 0.0}, episodes=6
    )
    env = LatentRefinementEnv(**kwargs, snr_db=0.0)
    agent = agents.make("persistent-q3", env.config)
    for row in rows:
        observation, info = env.reset(seed=row["seed"])
        clean, full = env.cache.latents(info["trajectory"])[0], env.cache.full_latent(info["trajectory"])
        errors, terminated = [], False
        while not terminated:
            held = env._process.episodes.device[0].reshape(clean.shape).astype(float)
            errors.append(info["full_latent_mse"])
            assert type(errors[-1]) is float
            assert info["latent_mse"] == pytest.approx(np.square(held - clean).mean(), rel=1e-9)
            assert errors[-1] == pytest.approx(np.square(held - full).mean(), rel=1e-9)
            observation, _, terminated, _, info = env.step(agent.select_action(observation, info))
        assert info["num_deliveries"] > 1
        assert (info["latent_mse"], info["full_latent_mse"]) == (row["latent_mse"], row["full_latent_mse"])
        assert len(set(errors)) == info["num_deliveries"] + 1 - (errors[-1] != info["full_latent_mse"])
    assert "full_latent_mse" not in LatentRefinementEnv(cache=str(gaussian_cache)).reset(seed=0)[1]


def test_the_reward_is_not_against_the_full_run(reuse_cache: Path) -> None:
    env = LatentRefinementEnv(cache=str(reuse_cache), snr_db=12.0)
    env.reset(seed=1)
    terminated = False
    while not terminated:
        _, reward, terminated, _, info = env.step(1)
    assert reward == -info["latent_mse"] != -info["full_latent_mse"]


def test_tables_carry_both_errors(reuse_cache: Path, gaussian_cache: Path, tmp_path: Path) -> None:
    """At the end, with an interval in the summary; and not where there is no full run."""
    words = ("--agents", "lookahead,dp", "--snr-db", "6", "--episodes", "3", "--no-figures", "--anytime")
    headers = {}
    for cache in (reuse_cache, gaussian_cache):
        run(evaluate.main, *words, "--cache", str(cache), "--out", str(tmp_path / cache.name))
        for name in ("episodes", "summary"):
            text = (tmp_path / cache.name / f"{name}.csv").read_text()
            headers[cache.name, name] = text.splitlines()[0].split(",")
    assert headers["gaussian", "episodes"] == [*EPISODE_COLUMNS, "anytime_mse"]
    assert headers["reuse", "episodes"] == [*headers["gaussian", "episodes"], "full_latent_mse"]
    new = ["full_latent_mse", "full_latent_mse_low", "full_latent_mse_high"]
    assert headers["reuse", "summary"] == [*headers["gaussian", "summary"], *new]


def test_policies_do_not_see_the_full_run(reuse_cache: Path) -> None:
    class Curious(agents.Agent):
        def decide(self, observation: Any, legal: Any) -> Any:
            return legal.astype(np.int64)

        def select_action(self, observation: Any, info: Any) -> Any:
            assert "full_latent_mse" not in info
            return super().select_action(observation, info)

    for coder in CODERS:
        roll_out(
            lambda config: Curious(config, name="curious"),
            env_kwargs={"cache": str(reuse_cache), "coder": coder},
            episodes=2,
        )


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_replayed(reuse_cache: Path, shared: bool) -> None:
    env = LatentRefinementEnv(cache=str(reuse_cache), warm_start={"shared": shared}, split="test")
    rates = np.full(60, env.config.uplink_bits)
    observation, info = env.reset(seed=1, options={"rates": rates, "trajectory": 3})
    assert info["trajectory"] == 3
    assert observation["device_step"] == (STEP if shared else STEP + 1)
    observation, *_ = env.step(0)
    assert observation["server_step"] == STEP  # x_m is there in the first slot after the uplink
    assert bool(env.action_masks()[1]) != shared
    observation, *_ = env.step(0)
    assert observation["server_step"] == STEP - 1


@pytest.mark.parametrize(("start", "first"), [((), "only noise"), (("--warm-start", "20,shared"), "the midpoint x_20")])
def test_the_episode_player_names_what_the_device_has(
    reuse_cache: Path, tmp_path: Path, start: tuple[str, ...], first: str
) -> None:
    pytest.importorskip("plotly")
    words = ("--agents", "lookahead", "--snr-db", "6", "--episodes", "1", "--no-figures", "--cache", str(reuse_cache))
    run(evaluate.main, *words, *start, "--out", str(tmp_path))
    player, notes = make_player(read_table(tmp_path / "episodes.csv", EPISODE_COLUMNS), read_run(tmp_path), 1, None)
    assert player is not None
    assert not notes
    (episode,) = player["episodes"].values()
    assert "Server: only noise. Link" in episode["slots"][0]
    assert f"Device: {first}, latent MSE" in episode["slots"][0]
    assert player["layout"]["yaxis2"]["range"] == [-1.5, STEP + 2.5]
