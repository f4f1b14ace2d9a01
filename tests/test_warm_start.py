"""Warm start in the environments: what server and device start with, and who refuses what."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import agents
import refine_env
from refine_env import ConfigurationError, LatentRefinementEnv, SystemConfig, TrajectoryCache
from refine_env.config import WarmStart
from refine_env.errors import BitstreamError
from refine_env.evaluation import roll_out
from refine_env.receive import describe
from refine_env.transport import Reception
from refine_env.wrappers import ObservationEncoder
from tests.test_vector_env import assert_equal

SHARED = {"step": 20, "shared": True}
OPEN = {"step": 20, "shared": False}
KWARGS = [
    {"warm_start": OPEN},
    {"warm_start": SHARED},
    {
        "warm_start": {**SHARED, "name_bits": 300.5},
        "coder": "closed_loop",
        "reward": "anytime",
        "decision_epochs": True,
    },
]


@pytest.mark.parametrize("kwargs", KWARGS, ids=["not-shared", "shared", "closed-loop"])
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_the_vector_environment_equals_single_ones(gaussian_cache: Path, mode: str, kwargs: dict[str, Any]) -> None:
    """Bit for bit, and every observation lies in the space."""
    cache = str(gaussian_cache)
    ours = gym.make_vec(refine_env.ENV_ID, num_envs=5, cache=cache, autoreset_mode=mode, **kwargs)
    single = [lambda: gym.make(refine_env.ENV_ID, cache=cache, **kwargs)] * 5
    theirs = SyncVectorEnv(single, autoreset_mode=AutoresetMode(mode))
    assert_equal(ours.reset(seed=5), theirs.reset(seed=5))
    rng = np.random.default_rng(5)
    for step in range(130):
        actions = rng.integers(6, size=5)
        a, b = ours.step(actions), theirs.step(actions)
        assert_equal(a, b, f"step {step}")
        assert a[0] in ours.observation_space


@pytest.mark.parametrize("start", [OPEN, {**SHARED, "name_bits": 40.0}])
def test_an_episode_by_hand(gaussian_cache: Path, start: dict[str, Any]) -> None:
    """T = 50, m = 20: the prompt is through in slot 2, so slot 3 has x_20 at the server, slot 5 x_18."""
    env = LatentRefinementEnv(cache=str(gaussian_cache), coder="closed_loop", warm_start=start)
    config, cache = env.config, env.cache
    rates = np.full(60, config.uplink_bits * 0.6)
    observation, info = env.reset(seed=1, options={"rates": rates})
    latents = cache.latents(info["trajectory"]).astype(np.float64).reshape(51, -1)
    first = 20 if start["shared"] else 50
    assert (observation["device_step"], observation["device_error"][0], observation["device_bits"]) == (first, 0.0, 0)
    assert info["latent_mse"] == pytest.approx(np.mean((latents[first] - latents[0]) ** 2), rel=1e-12)
    assert observation["server_step"] == 50
    seen, legal = [], []
    for _ in range(4):
        observation, _, _, _, info = env.step(0)
        seen.append(observation["server_step"])
        legal.append(bool(info["action_mask"][1]))
    assert seen == [50, 20, 19, 18]
    assert legal == [False, not start["shared"], True, True]  # a device that holds x_20 without error gains nothing
    observation, _, _, _, _ = env.step(1)  # 3 bit of x_18
    sizes = config.message_bits[0] + (40.0 if start["shared"] else 0.0)
    assert observation["remaining_bits"][0] == pytest.approx((sizes - rates[0]) / config.latent_dim, rel=1e-6)
    while observation["device_step"] == first:
        observation, _, _, _, info = env.step(0)
    assert (observation["device_step"], observation["device_bits"]) == (18, 3)
    assert info["bits_sent"] == sizes
    model = config.refinement_model
    expected = (model.innovation[18, first]) * config.base_distortion[0]
    assert observation["device_error"][0] == pytest.approx(expected, rel=0.2)  # of 256 values, their scale sent
    observation, _, _, _, _ = env.step(1)
    left = (config.message_bits[0] - rates[0]) / config.latent_dim
    assert observation["remaining_bits"][0] == pytest.approx(left, rel=1e-6)  # the name travels once


@pytest.mark.parametrize("start", [OPEN, SHARED])
@pytest.mark.parametrize("coder", ["forward", "closed_loop"])
def test_rows_of_a_roll_out_are_those_of_the_environment(
    gaussian_cache: Path, coder: str, start: dict[str, Any]
) -> None:
    """Latents are touched at the end there; nothing delivered is x_m where it is shared, x_T where not."""
    kwargs = {"cache": str(gaussian_cache), "coder": coder, "warm_start": start, "snr_db": 3.0, "split": "all"}
    rows = roll_out(lambda config: agents.make("persistent-q3", config), env_kwargs=kwargs, episodes=6)
    env = LatentRefinementEnv(**kwargs)
    agent = agents.make("persistent-q3", env.config)
    for row in rows:
        observation, info = env.reset(seed=row["seed"])
        assert info["latent_mse"] == row["no_delivery_mse"]
        terminated = False
        while not terminated:
            observation, _, terminated, _, info = env.step(agent.select_action(observation, info))
        names = ("latent_mse", "bits_sent", "num_deliveries")
        assert [info[name] for name in names] == [row[name] for name in names]
        assert row["num_deliveries"] > 1


def test_the_reset_s_forced_slots_are_paid_for(gaussian_cache: Path) -> None:
    """The return of "anytime" is the same whether slots are stepped through one by one or not."""
    returns = []
    for epochs in (False, True):
        env = LatentRefinementEnv(
            cache=str(gaussian_cache), reward="anytime", decision_epochs=epochs, warm_start=SHARED
        )
        env.reset(seed=3)
        total, terminated = 0.0, False
        while not terminated:
            _, reward, terminated, _, _ = env.step(1)
            total += reward
        returns.append(total)
    assert returns[1] == pytest.approx(returns[0], rel=1e-9)


def test_configurations_are_json() -> None:
    plain = SystemConfig(snr_db=6.0)
    assert "warm_start" not in plain.to_dict()
    assert plain.initial(np.arange(51, dtype=np.float16)) == 50
    warm = SystemConfig(snr_db=6.0, warm_start={"step": 35, "shared": True})  # type: ignore[arg-type]
    assert warm.warm_start == WarmStart(step=35, shared=True, name_bits=32.0)
    written = json.loads(json.dumps(warm.to_dict()))
    assert written["warm_start"] == {"step": 35, "shared": True, "name_bits": 32.0}
    assert SystemConfig.from_dict(written) == warm
    assert hash(warm) != hash(plain)
    assert (warm.first_server_step, warm.first_device_step, warm.name_bytes) == (35, 35, 4)
    assert warm.first_message_bits.tolist() == (warm.message_bits + 32.0).tolist()
    env = gym.make(refine_env.ENV_ID, warm_start={"step": 35})
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))  # type: ignore[union-attr]
    assert again.unwrapped.config == env.unwrapped.config  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (0, "`warm_start` must be an object with `step` and keys among step, shared, name_bits, got 0"),
        ({}, "`warm_start` must be an object with `step`"),
        ({"shared": True}, "`warm_start` must be an object with `step`"),
        ({"step": 5, "share": True}, "got .'step': 5, 'share': True.. Did you mean `shared`"),
        ({"step": 0}, "`warm_start.step` must be an integer >= 1, got 0"),
        ({"step": 5.0}, "`warm_start.step` must be an integer >= 1, got 5.0"),
        ({"step": True}, "`warm_start.step` must be an integer >= 1, got True"),
        ({"step": 50}, r"`warm_start.step` must be in 1 … 49, .* got 50\. Leave `warm_start` out"),
        ({"step": 5, "shared": 1}, "`warm_start.shared` must be True or False, got 1"),
        (
            {"step": 5, "shared": True, "name_bits": 0},
            "`warm_start.name_bits` must be > 0, got 0. Give the length of the",
        ),
        ({"step": 5, "shared": True, "name_bits": None}, "`warm_start.name_bits` must be a finite number, got None"),
        ({"step": 5, "shared": True, "name_bits": math.inf}, "`warm_start.name_bits` must be a finite number, got inf"),
        ({"step": 5, "name_bits": 1e6}, "`warm_start.name_bits` must be at most 65536, got 1000000.0"),
    ],
)
def test_what_is_no_warm_start(gaussian_cache: Path, start: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        gym.make(refine_env.ENV_ID, cache=str(gaussian_cache), warm_start=start)


def test_estimates_cannot_start_from_a_midpoint(gaussian_cache: Path) -> None:
    kwargs = {"coder": "closed_loop", "payload": "posterior_mean", "warm_start": OPEN}
    with pytest.raises(ConfigurationError, match=r"`payload` must be 'latent' with a warm start, .* which nobody has"):
        gym.make(refine_env.ENV_ID, cache=str(gaussian_cache), **kwargs)


def test_the_first_message_names_the_midpoint(gaussian_cache: Path) -> None:
    """And the second does not; a device that holds another midpoint refuses it, and keeps what it has."""
    config = LatentRefinementEnv(cache=str(gaussian_cache), coder="closed_loop", warm_start=SHARED).config
    cache = TrajectoryCache.open(str(gaussian_cache))
    latents, others = cache.latents(0), cache.latents(1)
    server, device = (config.make_codec(config.initial(latents)) for _ in range(2))
    assert (server.device_step, len(server.name)) == (20, 4)
    message = server.compress(latents[15], 15, 8)
    assert message.num_bits == config.first_message_bits[config.bit_depths.index(8)]
    assert message.side[:4] == server.name
    confused = config.make_codec(config.initial(others))
    with pytest.raises(
        BitstreamError, match="The name in the first message must be that of the midpoint that the device"
    ):
        confused.decompress(bytes(message))
    assert (confused.device_step, confused.num_deliveries) == (20, 0)
    for end in (server, device):
        end.decompress(bytes(message))
    assert np.array_equal(server.device, device.device)
    second = server.compress(latents[10], 10, 8)
    assert second.num_bits == config.message_bits[config.bit_depths.index(8)]
    assert device.decompress(bytes(second)).tobytes() == server.decompress(second).tobytes()


def test_the_encoder_reckons_with_the_name(gaussian_cache: Path) -> None:
    """Before the first delivery, what a message takes is longer; after it, as without a warm start."""
    kwargs = {"cache": str(gaussian_cache), "coder": "closed_loop"}
    long = {**SHARED, "name_bits": 2000.0}
    with_name, without = (LatentRefinementEnv(**kwargs, warm_start=w).config for w in (long, OPEN))
    observation, _ = LatentRefinementEnv(**kwargs, warm_start=OPEN).reset(seed=0)
    names = ObservationEncoder(with_name).names
    margin = names.index("margin[3]")
    for step, equal in ((20, False), (15, True)):
        shown = {**observation, "device_step": step, "server_step": 10, "remaining_bits": np.zeros(1, np.float32)}
        shown["channel_history"] = np.full(60, 0.06, np.float32)
        long_row, row = (ObservationEncoder(config).encode_one(shown) for config in (with_name, without))
        assert (long_row[margin] == row[margin]) == equal


def test_pictures_and_texts_name_the_midpoint(gaussian_cache: Path) -> None:
    env = LatentRefinementEnv(cache=str(gaussian_cache), warm_start=SHARED, render_mode="ansi")
    env.reset(seed=0)
    assert "device x_20 (midpoint), MSE" in str(env.render())
    env = LatentRefinementEnv(cache=str(gaussian_cache), warm_start=OPEN, render_mode="ansi")
    env.reset(seed=0)
    assert "device x_50 (noise), MSE" in str(env.render())


def test_a_picture_names_the_midpoint(gaussian_cache: Path) -> None:
    env = gym.make(
        refine_env.ENV_ID,
        cache=str(gaussian_cache),
        warm_start=SHARED,
        snr_db=12.0,
        render_mode="rgb_array",
        render_decoder="none",
    )
    env.reset(seed=0)
    env.render()
    painter = env.unwrapped._viewer._painter  # type: ignore[attr-defined]
    assert painter.fields["device"].get_text() == "x₂₀ (midpoint)"


def test_a_device_says_what_it_holds_at_the_deadline() -> None:
    for start, held in ((SHARED, "x_20"), (OPEN, r"x_50 (only the noise)")):
        config = SystemConfig(snr_db=6.0, warm_start=start)  # type: ignore[arg-type]
        step = config.first_device_step
        reception = Reception(
            latent=np.zeros(4, np.float32), device_step=step, device_bits=0, deliveries=(), config=config
        )
        assert describe(reception) == f"deadline: the device holds {held}"
