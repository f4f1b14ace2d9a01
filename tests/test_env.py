"""The single environment: the checkers, the spaces, seeds, replay, rewards, bad input."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

import refine_env
from refine_env import ActionError, CacheError, ConfigurationError, LatentRefinementEnv
from refine_env.coding import CODERS, base_distortion
from refine_env.dynamics.process import INFO_KEYS
from refine_env.dynamics.settings import REWARDS

MakeEnv = Callable[..., gym.Env[Any, Any]]


def play(env: gym.Env[Any, Any], policy: Any, **reset: Any) -> list[tuple[Any, float, bool, bool, Any]]:
    """One episode: the reset as a first transition, then all steps."""
    observation, info = env.reset(**reset)
    steps = [(observation, 0.0, False, False, info)]
    while not steps[-1][2]:
        steps.append(env.step(policy(steps[-1][0], steps[-1][4])))
    return steps


def random_policy(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return lambda observation, info: int(rng.integers(info["action_mask"].size))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(np.array_equal(a, b)) and np.asarray(a).dtype == np.asarray(b).dtype


@pytest.mark.extras
@pytest.mark.parametrize("kwargs", [{}, {"decision_epochs": True}, {"reward": "log", "history_length": 5}])
def test_gymnasium_checker(make_env: MakeEnv, kwargs: dict[str, Any]) -> None:
    check_env(make_env(**kwargs).unwrapped)


@pytest.mark.extras
@pytest.mark.parametrize("kwargs", [{}, {"decision_epochs": True}, {"snr_db": [0, 24]}])
def test_stable_baselines_checker(make_env: MakeEnv, kwargs: dict[str, Any]) -> None:
    env_checker = pytest.importorskip("stable_baselines3.common.env_checker")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env_checker.check_env(make_env(**kwargs).unwrapped)


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("epochs", [False, True])
@pytest.mark.parametrize("snr_db", [-200.0, -20.0, 6.0, 60.0])
def test_every_observation_lies_in_the_space(make_env: MakeEnv, reward: str, epochs: bool, snr_db: float) -> None:
    env = make_env(reward=reward, decision_epochs=epochs, snr_db=snr_db, bit_depths=[1, 4, 16])
    for seed in range(4):
        steps = play(env, random_policy(seed), seed=seed)
        for observation, value, terminated, truncated, info in steps:
            assert observation in env.observation_space
            assert np.isfinite(env.unwrapped._process.episodes.rates).all()
            assert type(value) is float
            assert np.isfinite(value)
            assert type(terminated) is bool
            assert truncated is False
            assert tuple(sorted(info)) == INFO_KEYS
        assert steps[-1][0]["slot"] == 61
        assert len(steps) == 61 or epochs


def test_info_types(make_env: MakeEnv) -> None:
    _, info = make_env().reset(seed=0)
    kinds = {key: type(value) for key, value in info.items()}
    assert kinds == {
        "action_mask": np.ndarray,
        "bits_sent": float,
        "delivered": bool,
        "illegal_action": bool,
        "latent_mse": float,
        "num_deliveries": int,
        "trajectory": int,
        "uplink_slots": int,
    }
    assert info["action_mask"].dtype == np.int8


def test_nothing_tells_the_snr(make_env: MakeEnv) -> None:
    """The same rates replayed under any SNR give the same observations and infos."""
    rates = np.full(60, 200.0)
    episodes = [
        play(make_env(snr_db=snr), lambda o, i: 1, seed=4, options={"rates": rates, "trajectory": 2})
        for snr in (0.0, 30.0)
    ]
    assert same(*episodes)


def test_seed_fixes_the_whole_episode(make_env: MakeEnv) -> None:
    env, other = make_env(), make_env()
    first = play(env, random_policy(0), seed=11)
    assert same(first, play(other, random_policy(0), seed=11))
    assert same(first, play(env, random_policy(0), seed=11))
    assert not same(first, play(env, random_policy(0)))  # the generator runs on
    assert not same(first, play(env, random_policy(0), seed=12))


def test_draws_do_not_depend_on_the_actions(make_env: MakeEnv) -> None:
    env = make_env()
    histories = []
    for policy in (random_policy(0), lambda o, i: 0):
        play(env, policy, seed=3)
        histories.append(play(env, policy)[-1][0]["channel_history"])
    assert np.array_equal(*histories)


def test_replay_changes_nothing_else_that_is_drawn(make_env: MakeEnv) -> None:
    env = make_env(split="all")
    plain = play(env, random_policy(1), seed=5)
    following = play(env, random_policy(2))
    rates = np.linspace(50, 300, 60)
    replayed = play(env, random_policy(1), seed=5, options={"rates": rates})
    assert replayed[0][4]["trajectory"] == plain[0][4]["trajectory"]
    assert np.allclose(replayed[-1][0]["channel_history"], rates / 256, rtol=1e-6)
    assert same(following, play(env, random_policy(2)))
    chosen = (plain[0][4]["trajectory"] + 1) % 16
    moved = play(env, random_policy(1), seed=5, options={"trajectory": chosen})
    assert moved[0][4]["trajectory"] == chosen
    assert np.array_equal(moved[-1][0]["channel_history"], plain[-1][0]["channel_history"])


def test_returns_of_all_rewards(make_env: MakeEnv) -> None:
    returns = {}
    for reward in REWARDS:
        steps = play(make_env(reward=reward), lambda o, i: 2, seed=8)
        returns[reward] = [step[1] for step in steps]
        mse = [step[4]["latent_mse"] for step in steps]
    assert returns["terminal"] == [0.0] * 60 + [-mse[-1]]
    assert returns["log"] == pytest.approx([0.0] * 60 + [-10 * np.log10(mse[-1] + 1e-8)], rel=1e-14)
    assert returns["improvement"] == pytest.approx([0.0, *(a - b for a, b in itertools.pairwise(mse))])
    assert sum(returns["improvement"]) == pytest.approx(mse[0] - mse[-1])
    assert sum(value != 0.0 for value in returns["improvement"]) == steps[-1][4]["num_deliveries"] > 1
    assert returns["anytime"] == pytest.approx([0.0, *(-value / 60 for value in mse[1:])])


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("snr_db", [-40.0, 3.0, 12.0])
def test_anytime_reward_counts_the_slots_that_are_run_through(make_env: MakeEnv, coder: str, snr_db: float) -> None:
    """Those of the uplink, which the reset runs through, too; at -40 dB it never ends."""
    kwargs = {"reward": "anytime", "snr_db": snr_db, "coder": coder}
    for seed in range(4):
        slots = play(make_env(**kwargs), lambda o, i: 2, seed=seed)
        epochs = play(make_env(decision_epochs=True, **kwargs), lambda o, i: 2, seed=seed)
        assert len(epochs) < len(slots) == 61
        expected = -np.mean([info["latent_mse"] for *_, info in slots[1:]])
        assert sum(reward for _, reward, *_ in epochs) == pytest.approx(expected, rel=1e-12)
        assert sum(reward for _, reward, *_ in slots) == pytest.approx(expected, rel=1e-12)


def test_observations_by_hand(tiny_kwargs: dict[str, Any]) -> None:
    """The episode of ``test_simulator.test_an_episode_by_hand``: T = 4, T_d = 8, M = 4, a prompt of 6 bits."""
    env = refine_env.LatentRefinementEnv(latent_dim=4, **tiny_kwargs)
    alpha_bar = env.config.schedule.alpha_bar
    rates = [4.0, 2.0, 3.0, 5.0, 5.0, 4.0, 30.0, 60.0]
    after_x3 = base_distortion(2)  # the first transmission: σ² = 1
    after_x1 = (alpha_bar[1] - alpha_bar[3]) / alpha_bar[3] * base_distortion(1)
    # slot, server step, device step, bits, remaining bits per dimension, error; and the action taken then
    expected = [
        (1, 4, 4, 0, 6 / 4, 0.0, 0),
        (2, 4, 4, 0, 2 / 4, 0.0, 0),
        (3, 4, 4, 0, 0.0, 0.0, 0),
        (4, 3, 4, 0, 0.0, 0.0, 2),
        (5, 2, 4, 0, 3 / 4, 0.0, 0),
        (6, 1, 3, 2, 0.0, after_x3, 1),
        (7, 0, 1, 1, 0.0, after_x1, 3),
        (8, 0, 1, 1, 34 / 4, after_x1, 0),
        (9, 0, 0, 16, 0.0, 0.0, None),
    ]
    observation, info = env.reset(seed=0, options={"trajectory": 1, "rates": rates})
    reward = 0.0
    for slot, server, device, bits, remaining, error, action in expected:
        assert [observation[key] for key in ("slot", "server_step", "device_step", "device_bits")] == [
            slot,
            server,
            device,
            bits,
        ]
        assert observation["remaining_bits"] == pytest.approx([remaining])
        assert observation["device_error"] == pytest.approx([error])
        history = [0.0] * 8 + [rate / 4 for rate in rates[:slot]]
        assert observation["channel_history"] == pytest.approx(np.minimum(history[-8:], 16.0))
        if action is not None:
            observation, reward, _, _, info = env.step(action)
    # The delivery of the last slot counts: x_0 without loss.
    assert reward == 0.0
    assert (info["num_deliveries"], info["uplink_slots"], info["bits_sent"]) == (3, 2, 8.0 + 4.0 + 64.0)


def test_lossless_x0_scores_exactly_zero(make_env: MakeEnv) -> None:
    env = make_env()
    steps = play(
        env,
        lambda o, i: 5 if o["server_step"] == 0 else 0,
        seed=0,
        options={"rates": np.full(60, 1e9)},
    )
    assert steps[-1][1] == 0.0
    assert steps[-1][4]["latent_mse"] == 0.0
    assert steps[-1][0]["device_bits"] == 16
    assert steps[-1][0] in env.observation_space  # the history saturates


def test_decision_epochs_see_the_same_episode(make_env: MakeEnv) -> None:
    def policy(observation: Any, info: Any) -> int:
        return 2 if observation["slot"] % 3 == 0 else 0

    every = play(make_env(), policy, seed=2)
    epochs = play(make_env(decision_epochs=True), policy, seed=2)
    legal = [step for step in every if step[4]["action_mask"][1]]
    assert [int(step[0]["slot"]) for step in epochs[:-1]] == [int(step[0]["slot"]) for step in legal]
    assert same(epochs[-1][0], every[-1][0])
    assert epochs[-1][1] == every[-1][1]
    assert all(step[4]["action_mask"][1] for step in epochs[:-1])


def test_illegal_actions(make_env: MakeEnv) -> None:
    env = make_env()
    env.reset(seed=0)
    info = env.step(3)[4]
    assert info["illegal_action"] is True
    assert env.step(0)[4]["illegal_action"] is False
    env = make_env(illegal_action="raise")
    env.reset(seed=0)
    with pytest.raises(ActionError, match="`action` must be legal in slot 1, got 3"):
        env.step(3)


@pytest.mark.parametrize("action", [-1, 6, 1.0, True, None, "1"])
def test_actions_outside_the_space(make_env: MakeEnv, action: Any) -> None:
    env = make_env().unwrapped
    env.reset(seed=0)
    with pytest.raises(ActionError, match=r"`action` must be in 0 … 5, got"):
        env.step(action)


def test_an_action_of_another_type_is_named(make_env: MakeEnv) -> None:
    env = make_env()
    env.reset(seed=0)
    for action, message in (
        (2.0, "got 2.0, a float. Give an integer"),
        ("1", "got '1', a str"),
        (True, "got True, a bool"),
        (np.array([1]), r"got array\(\[1\]\), a ndarray"),
        (np.float32(2), r"got np.float32\(2.0\), a float32"),
        (7, "got 7. Give an integer"),
    ):
        with pytest.raises(ActionError, match=message):
            env.step(action)


class TestTimeLimit:
    """One below the deadline would end episodes before they pay."""

    @pytest.mark.parametrize("limit", [1, 30, 59])
    @pytest.mark.parametrize("kwargs", [{}, {"decision_epochs": True}])
    def test_refused_at_reset(self, make_env: MakeEnv, limit: int, kwargs: dict[str, Any]) -> None:
        message = f"`max_episode_steps` must be at least the deadline, 60, got {limit}: cut off before it"
        inner = make_env(**kwargs)
        for env in (
            make_env(max_episode_steps=limit, **kwargs),
            gym.wrappers.TimeLimit(inner.unwrapped, limit),
            gym.wrappers.RecordEpisodeStatistics(gym.wrappers.TimeLimit(inner, limit)),
            gym.wrappers.TimeLimit(gym.wrappers.RecordEpisodeStatistics(inner), limit),
        ):
            with pytest.raises(ConfigurationError, match=message):
                env.reset(seed=0)

    def test_refused_in_many(self, gaussian_cache: Path) -> None:
        kwargs = {"cache": str(gaussian_cache), "max_episode_steps": 30}
        envs = gym.make_vec(refine_env.ENV_ID, num_envs=2, vectorization_mode="sync", **kwargs)
        with pytest.raises(ConfigurationError, match="`max_episode_steps` must be at least the deadline, 60, got 30"):
            envs.reset(seed=0)
        with pytest.raises(ConfigurationError, match="argument 'max_episode_steps'. Did you mean `deadline`"):
            gym.make_vec(refine_env.ENV_ID, num_envs=2, **kwargs)

    def test_one_that_cuts_nothing_off(self, make_env: MakeEnv) -> None:
        for limit in (60, 1000):
            env = make_env(max_episode_steps=limit)
            steps = play(env, lambda o, i: 0, seed=0)
            assert steps[-1][1] == -steps[-1][4]["latent_mse"]

    def test_with_wrappers_of_one_s_own_between(self, make_env: MakeEnv) -> None:
        class Own(gym.Wrapper[Any, Any, Any, Any]):
            def reset(self, **options: Any) -> Any:
                return self.env.reset(**options)

        with pytest.raises(ConfigurationError, match="`max_episode_steps` must be at least the deadline, 60, got 30"):
            gym.wrappers.TimeLimit(Own(make_env()), 30).reset(seed=0)

    def test_one_around_another_environment_does_not_count(self, make_env: MakeEnv) -> None:
        class Outer(gym.Wrapper[Any, Any, Any, Any]):
            def reset(self, **options: Any) -> Any:
                make_env().reset(seed=0)
                return self.env.reset(**options)

        gym.wrappers.TimeLimit(Outer(gym.make("CartPole-v1").unwrapped), 30).reset(seed=0)


def test_stepping_without_an_episode(make_env: MakeEnv) -> None:
    env = make_env().unwrapped
    with pytest.raises(ResetNeeded, match="must be running to step"):
        env.step(0)
    play(env, lambda o, i: 0, seed=0)
    with pytest.raises(ResetNeeded, match="must be running to step"):
        env.step(0)


def test_rendering_without_an_episode(make_env: MakeEnv) -> None:
    with pytest.raises(ResetNeeded, match="must have begun to render"):
        make_env(render_mode="ansi").unwrapped.render()


def test_a_link_beyond_all_bounds(gaussian_cache: Path) -> None:
    for link in ({"uplink_bits": 1e300}, {"uplink_bits": 5e-324}, {"symbols_per_slot": 1e200}):
        with pytest.raises(ConfigurationError, match=f"`{next(iter(link))}` must be between 1e-30 and 1e.30"):
            refine_env.LatentRefinementEnv(cache=str(gaussian_cache), link=link)


def test_masks_agree(make_env: MakeEnv) -> None:
    env = make_env()
    _, info = env.reset(seed=1)
    for _ in range(60):
        mask = env.unwrapped.action_masks()
        assert mask.dtype == np.bool_
        assert np.array_equal(mask, info["action_mask"].astype(bool))
        *_, info = env.step(1)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_copies_mid_episode_go_on_alike(make_env: MakeEnv, clone: Any) -> None:
    env = make_env().unwrapped
    env.reset(seed=9)
    for _ in range(20):
        env.step(1)
    twin = clone(env)
    while True:
        a, b = env.step(2), twin.step(2)
        assert same(a, b)
        if a[2]:
            break
    assert same(env.reset(), twin.reset())


def test_spec_round_trip(gaussian_cache: Path) -> None:
    kwargs = {
        "cache": str(gaussian_cache),
        "snr_db": [0, 24],
        "link": {"num_subchannels": 30},
        "bit_depths": [1, 2, 16],
        "reward": "log",
    }
    env = gym.make(refine_env.ENV_ID, **kwargs)
    spec = env.spec
    assert spec is not None
    restored = gym.make(EnvSpec.from_json(spec.to_json()))
    assert restored.unwrapped.config == env.unwrapped.config
    assert same(play(env, random_policy(0), seed=1), play(restored, random_policy(0), seed=1))


def test_never_truncated_and_no_step_limit() -> None:
    assert gym.spec(refine_env.ENV_ID).max_episode_steps is None


def test_ansi_frames(make_env: MakeEnv) -> None:
    env = make_env(render_mode="ansi")
    env.reset(seed=0, options={"rates": [300.0] * 60})
    assert "prompt, 0.50 bit/dim left" in env.render()
    for _ in range(9):
        env.step(2)
    frame = env.render()
    assert "slot  10/60" in frame
    assert "x_42" in frame
    assert frame.count("\n") == 1
    while not env.step(0)[2]:
        pass
    assert "[deadline]" in env.render()
    quiet = make_env().unwrapped
    quiet.reset(seed=0)
    assert quiet.render() is None


def test_snr_range_is_drawn_per_episode(make_env: MakeEnv) -> None:
    env = make_env(snr_db=[0, 24])
    means = [play(env, lambda o, i: 0, seed=seed)[-1][0]["channel_history"].mean() for seed in range(12)]
    assert max(means) / min(means) > 2.5
    fixed = make_env(snr_db=6.0)
    means = [play(fixed, lambda o, i: 0, seed=seed)[-1][0]["channel_history"].mean() for seed in range(12)]
    assert max(means) / min(means) < 1.1


def test_who_plays_the_environment_may_know_the_snr(make_env: MakeEnv) -> None:
    """Its channel's mean rate is that of the SNR that it names."""
    env = make_env(snr_db=[0, 24])
    inner = env.unwrapped
    assert isinstance(inner, LatentRefinementEnv)
    with pytest.raises(ResetNeeded, match="An episode must have begun to have a channel"):
        _ = inner.episode_snr_db
    told = []
    for seed in range(12):
        env.reset(seed=seed)
        told.append(inner.episode_snr_db)
        law = replace(inner.config, snr_db=told[-1]).rate_law
        assert inner.episode_rates.mean() == pytest.approx(law.mean, abs=5.0 * law.std / np.sqrt(60))
    assert max(told) - min(told) > 8.0
    fixed = make_env(snr_db=6.0)
    fixed.reset(seed=0)
    assert fixed.unwrapped.episode_snr_db == 6.0  # type: ignore[attr-defined]


BAD_KWARGS: list[tuple[dict[str, Any], str]] = [
    ({"snr_db": float("nan")}, "`snr_db` must be a finite number, got nan"),
    ({"snr_db": float("inf")}, "`snr_db` must be a finite number, got inf"),
    ({"snr_db": [3]}, "`snr_db` must be one number or a pair"),
    ({"snr_db": [24, 0]}, "`snr_db` must be a pair with low < high"),
    ({"snr_db": "6"}, "`snr_db` must be a finite number, got '6'"),
    ({"bit_depths": []}, "`bit_depths` must be a non-empty sequence"),
    ({"bit_depths": [8, 4]}, "`bit_depths` must be strictly ascending"),
    ({"bit_depths": [4, 4]}, "`bit_depths` must be strictly ascending"),
    ({"bit_depths": [0, 4]}, "`bit_depths` must be an integer in 1 … 16, got 0"),
    ({"bit_depths": [4, 17]}, "`bit_depths` must be an integer in 1 … 16, got 17"),
    ({"bit_depths": [4.5]}, "`bit_depths` must be an integer in 1 … 16, got 4.5"),
    ({"latent_dim": 128}, "`latent_dim` must be that of the cache, 256, got 128"),
    ({"deadline": 0}, "`deadline` must be an integer in 1 … 100000, got 0"),
    ({"latency_quantile": 1.5}, "`latency_quantile` must lie strictly between 0 and 1"),
    ({"split": "validation"}, "`split` must be one of 'train', 'test', 'all', got 'validation'"),
    ({"reward": "dense"}, "`reward` must be one of"),
    ({"illegal_action": "ignore"}, "`illegal_action` must be one of"),
    ({"coder": "nearest"}, "`coder` must be one of"),
    ({"payload": "pixels"}, "`payload` must be one of"),
    ({"payload": "posterior_mean"}, "`payload` must be 'latent' for the coder 'forward'"),
    ({"moments": "guessed"}, "`moments` must be one of 'model', 'measured', got 'guessed'"),
    ({"rotation": "yes"}, "`rotation` must be True or False, got 'yes'"),
    ({"sent_scale": 0}, "`sent_scale` must be True or False, got 0"),
    ({"same_step_refinement": None}, "`same_step_refinement` must be True or False, got None"),
    ({"entropy_coding": 1}, "`entropy_coding` must be True or False, got 1"),
    ({"entropy_coding": True}, "`entropy_coding` must be False unless coder='closed_loop'"),
    ({"history_length": 0}, "`history_length` must be an integer in 1 … 100000"),
    ({"decision_epochs": 1}, "`decision_epochs` must be True or False"),
    ({"link": {"subchannels": 60}}, "`link` must be an object with keys among .*, num_subchannels"),
    ({"link": {"uplink_bits": 0.0}}, "`uplink_bits` must be > 0"),
    ({"render_mode": "human3d"}, "`render_mode` must be one of 'ansi', 'human', 'rgb_array' or None"),
    ({"snr": 6.0}, "Environment arguments must be among .*got an unexpected keyword argument 'snr'"),
    ({"cache": 3}, "`cache` must be a cache's name or folder, got 3"),
]


@pytest.mark.parametrize(("kwargs", "message"), BAD_KWARGS, ids=lambda value: str(value)[:40])
def test_bad_arguments(gaussian_cache: Path, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        refine_env.LatentRefinementEnv(**{"cache": str(gaussian_cache), **kwargs})
    if "render_mode" not in kwargs:
        with pytest.raises(ConfigurationError, match=message):
            refine_env.LatentRefinementVectorEnv(2, **{"cache": str(gaussian_cache), **kwargs})


CLOSED_LOOP: list[dict[str, Any]] = [
    {},
    {"rotation": False, "sent_scale": False},
    {"moments": "measured", "bit_depths": [1, 2, 5, 11, 16]},
    {"payload": "posterior_mean"},
    {"payload": "posterior_mean", "moments": "measured", "sent_scale": False},
]


@pytest.mark.parametrize("kwargs", CLOSED_LOOP, ids=str)
def test_closed_loop_episodes(make_env: MakeEnv, kwargs: dict[str, Any]) -> None:
    """What flows is what the messages are, what is held gets better, and every observation lies in the space."""
    env = make_env(coder="closed_loop", snr_db=18.0, **kwargs)
    inner: Any = env.unwrapped
    config = inner.config
    side = 16 if config.sent_scale else 0
    sizes = [config.latent_dim * bits + (side if bits < 16 else 0) for bits in config.bit_depths]
    assert config.message_bits.tolist() == sizes
    refreshed = 0
    for seed in range(4):
        observation, info = env.reset(seed=seed)
        start = info["latent_mse"]
        if config.payload == "posterior_mean":  # from the prior mean, 0
            clean = inner.cache.latents(info["trajectory"])[0].astype(np.float64)
            assert start == pytest.approx(np.mean(clean**2), rel=1e-6)
        policy, terminated, sent, flowed = random_policy(seed), False, 0, 0.0
        while not terminated:
            legal = info["action_mask"][1] == 1
            held, step = observation["device_step"], observation["server_step"]
            lossy = 0 < observation["device_bits"] < 16
            idle = observation["remaining_bits"][0] == 0 and step < config.num_steps
            assert legal == (idle and (step < held or (step == held and lossy)) and observation["slot"] <= 60)
            action = policy(observation, info) if legal else 0
            if action:
                sent = action
                refreshed += step == held
            observation, _, terminated, _, info = env.step(action)
            assert observation in env.observation_space
            if info["delivered"]:
                flowed += sizes[sent - 1]
        assert info["latent_mse"] < start
        assert flowed - 1e-6 <= info["bits_sent"] < flowed + max(sizes)  # slots are summed, with roundings
    assert refreshed > 0


def test_same_step_refinement_can_be_left_out(make_env: MakeEnv) -> None:
    env = make_env(coder="closed_loop", snr_db=18.0, same_step_refinement=False)
    observation, info = env.reset(seed=0)
    terminated = False
    while not terminated:
        action = int(info["action_mask"][1])
        assert not action or observation["server_step"] < observation["device_step"]
        observation, _, terminated, _, info = env.step(action)


def test_missing_cache(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="nowhere"):
        refine_env.LatentRefinementEnv(cache=str(tmp_path / "nowhere"))


BAD_OPTIONS: list[tuple[Any, str]] = [
    ({"trajectory": 16}, "`trajectory` must be in 0 … 15, got 16"),
    ({"trajectory": -1}, "`trajectory` must be in 0 … 15, got -1"),
    ({"trajectory": 1.5}, "`trajectory` must be an integer"),
    ({"rates": [1.0] * 59}, r"`rates` must have length T_d = 60, got shape \(59,\)"),
    ({"rates": [[1.0] * 60] * 5}, r"`rates` must have length T_d = 60, got shape \(5, 60\)"),
    ({"rates": "fast"}, "`rates` must have length T_d = 60"),
    ({"rates": [-1.0] * 60}, "`rates` must be finite and >= 0"),
    ({"rates": [float("nan")] * 60}, "`rates` must be finite and >= 0"),
    ({"prompt": 1}, "`options` must be a dict with keys among trajectory, rates, got .*prompt"),
    ({"trajectory": [[1], [1, 2]]}, "`trajectory` must be an integer"),
    ("x", "`options` must be a dict with keys among"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_reset_options_lose_nothing(make_env: MakeEnv, options: Any, message: str) -> None:
    env = make_env()
    expected = play(env, random_policy(0), seed=6)
    env.reset(seed=6)
    with pytest.raises(ConfigurationError, match=message):
        env.reset(options=options)
    # The running episode goes on as if the bad call had not been made.
    policy = random_policy(0)
    steps = [expected[0]]
    while not steps[-1][2]:
        steps.append(env.step(policy(steps[-1][0], steps[-1][4])))
    assert same(expected, steps)
