"""The native vector environment equals SyncVectorEnv over single ones, bit for bit."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import refine_env
from refine_env import ActionError, ConfigurationError, LatentRefinementVectorEnv


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Equal in structure, type, dtype and every bit."""
    assert type(a) is type(b), where
    if isinstance(a, tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    elif isinstance(a, dict):
        assert set(a) == set(b), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype, where
        assert a.shape == b.shape, where
        if a.dtype == object:
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                assert_equal(x, y, f"{where}[{i}]")
        else:
            assert a.tobytes() == b.tobytes(), where
    else:
        assert a == b, where


def sync_env(cache: Path, num_envs: int, mode: str, **kwargs: Any) -> SyncVectorEnv:
    def make() -> gym.Env[Any, Any]:
        return gym.make(refine_env.ENV_ID, cache=str(cache), **kwargs)

    return SyncVectorEnv([make] * num_envs, autoreset_mode=AutoresetMode(mode))


def step_all(env: Any, actions: Any, mode: str) -> list[Any]:
    """What a step returns, and in the mode ``Disabled`` what the reset of those that ended returns."""
    told = [env.step(actions)]
    if mode == "Disabled" and told[0][2].any():
        told.append(env.reset(options={"reset_mask": told[0][2].copy()}))
    return told


@pytest.mark.parametrize("mode", [mode.value for mode in AutoresetMode])
@pytest.mark.parametrize("num_envs", [1, 2, 7, 64])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"snr_db": [0, 24], "reward": "improvement", "decision_epochs": True, "history_length": 9},
        {"snr_db": [0, 24], "reward": "anytime", "decision_epochs": True},
        {"coder": "closed_loop", "payload": "posterior_mean", "moments": "measured"},
        {"coder": "closed_loop", "entropy_coding": True, "bit_depths": [2, 4, 6, 8, 16]},
    ],
    ids=["default", "epochs", "anytime", "closed-loop", "entropy-coded"],
)
def test_equals_sync_vector_env(gaussian_cache: Path, num_envs: int, mode: str, kwargs: dict[str, Any]) -> None:
    ours = gym.make_vec(refine_env.ENV_ID, num_envs=num_envs, cache=str(gaussian_cache), autoreset_mode=mode, **kwargs)
    theirs = sync_env(gaussian_cache, num_envs, mode, **kwargs)
    assert isinstance(ours, LatentRefinementVectorEnv)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert ours.single_observation_space == theirs.single_observation_space
    assert ours.metadata["autoreset_mode"] == theirs.metadata["autoreset_mode"] == ours.autoreset_mode
    rng = np.random.default_rng(num_envs)
    assert_equal(ours.reset(seed=123), theirs.reset(seed=123))
    assert ours.np_random_seed == theirs.np_random_seed
    ends = 0
    for step in range(150):  # more than two episodes
        actions = rng.integers(6, size=num_envs)
        a, b = step_all(ours, actions, mode), step_all(theirs, actions, mode)
        assert_equal(tuple(a), tuple(b), f"step {step}")
        assert a[0][0] in ours.observation_space
        ends += int(a[0][2].sum())
    assert ends >= 2 * num_envs
    assert_equal(ours.reset(), theirs.reset())  # the generators have run alike
    seeds = list(range(50, 50 + num_envs))
    assert_equal(ours.reset(seed=seeds), theirs.reset(seed=seeds))
    single = [env.unwrapped for env in theirs.envs]
    assert ours.episode_snrs_db.tolist() == [env.episode_snr_db for env in single]
    assert np.array_equal(ours.episode_rates, [env.episode_rates for env in single])


def test_a_channel_is_known_once_all_episodes_have_begun(gaussian_cache: Path) -> None:
    env = LatentRefinementVectorEnv(2, cache=str(gaussian_cache))
    for name in ("episode_rates", "episode_snrs_db"):
        with pytest.raises(ResetNeeded, match="All episodes must have begun to have a channel"):
            getattr(env, name)


def test_terminal_transition_in_same_step_mode(gaussian_cache: Path) -> None:
    env = LatentRefinementVectorEnv(3, cache=str(gaussian_cache), autoreset_mode="SameStep")
    env.reset(seed=0)
    for _ in range(59):
        observation, _, terminated, _, infos = env.step(np.ones(3, dtype=int))
        assert "final_obs" not in infos
    observation, rewards, terminated, _, infos = env.step(np.ones(3, dtype=int))
    assert terminated.all()
    assert observation["slot"].tolist() == [1, 1, 1]
    assert [int(final["slot"]) for final in infos["final_obs"]] == [61, 61, 61]
    assert (-infos["final_info"]["latent_mse"] == rewards).all()
    assert all(final in env.single_observation_space for final in infos["final_obs"])
    assert infos["_final_info"].tolist() == infos["_final_obs"].tolist() == [True] * 3


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_partial_reset_equals_sync_vector_env(gaussian_cache: Path, mode: str) -> None:
    ours = LatentRefinementVectorEnv(3, cache=str(gaussian_cache), autoreset_mode=mode)
    theirs = sync_env(gaussian_cache, 3, mode)
    assert_equal(ours.reset(seed=1), theirs.reset(seed=1))
    actions = np.array([1, 2, 3])
    for _ in range(60):
        assert_equal(ours.step(actions), theirs.step(actions))
    mask = np.array([True, False, True])
    a = ours.reset(seed=[7, 8, 9], options={"reset_mask": mask})
    b = theirs.reset(seed=[7, 8, 9], options={"reset_mask": mask.copy()})
    assert_equal(a, b)
    for _ in range(70):
        assert_equal(ours.step(actions), theirs.step(actions))


def test_without_autoreset_an_episode_that_is_over_waits(gaussian_cache: Path) -> None:
    env = LatentRefinementVectorEnv(2, cache=str(gaussian_cache), autoreset_mode="Disabled")
    env.reset(seed=0)
    for _ in range(60):
        _, _, terminated, _, _ = env.step(np.zeros(2, dtype=int))
    assert terminated.all()
    env.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(ResetNeeded, match=r"got finished ones in the environments \[1\]. Call reset\(options="):
        env.step(np.zeros(2, dtype=int))
    env.reset(options={"reset_mask": np.array([False, True])})
    env.step(np.zeros(2, dtype=int))


def test_every_episode_must_have_begun(gaussian_cache: Path) -> None:
    env = LatentRefinementVectorEnv(2, cache=str(gaussian_cache), render_mode="ansi")
    assert len(env.np_random_seed) == 2
    for _ in range(2):
        with pytest.raises(ResetNeeded, match="All episodes must have begun to step"):
            env.step(np.zeros(2, dtype=int))
        with pytest.raises(ResetNeeded, match="All episodes must have begun to render"):
            env.render()
        env.reset(seed=0, options={"reset_mask": np.array([True, False])})
    env.reset(options={"reset_mask": np.array([False, True])})
    env.step(np.zeros(2, dtype=int))


def test_a_bad_seed_changes_no_generator(gaussian_cache: Path) -> None:
    env = LatentRefinementVectorEnv(3, cache=str(gaussian_cache))
    env.reset(seed=5)
    for seed in ([7, -1, 8], [7, 1.5, 8], 1.5, "12"):
        with pytest.raises(ConfigurationError, match="`seed` must be"):
            env.reset(seed=seed)  # type: ignore[arg-type]
        assert env.np_random_seed == (5, 6, 7)


def test_replay(gaussian_cache: Path) -> None:
    env = LatentRefinementVectorEnv(2, cache=str(gaussian_cache))
    rates = np.stack([np.full(60, 100.0), np.full(60, 200.0)])
    observation, info = env.reset(seed=0, options={"trajectory": np.array([3, 12]), "rates": rates})
    assert info["trajectory"].tolist() == [3, 12]
    assert observation["channel_history"][:, -1].tolist() == [100 / 256, 200 / 256]
    single = gym.make(refine_env.ENV_ID, cache=str(gaussian_cache))
    alone, _ = single.reset(seed=1, options={"trajectory": 12, "rates": rates[1]})
    assert np.array_equal(observation["channel_history"][1], alone["channel_history"])


def test_holds_no_single_environments(gaussian_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a single environment was made")

    monkeypatch.setattr(refine_env.LatentRefinementEnv, "__init__", refuse)
    env = LatentRefinementVectorEnv(4, cache=str(gaussian_cache))
    env.reset(seed=0)
    env.step(np.zeros(4, dtype=int))


def test_masks_and_frames(gaussian_cache: Path) -> None:
    env = LatentRefinementVectorEnv(4, cache=str(gaussian_cache), render_mode="ansi", snr_db=30.0)
    env.reset(seed=0)
    for _ in range(5):
        *_, infos = env.step(np.zeros(4, dtype=int))
    assert env.action_masks().dtype == np.bool_
    assert env.action_masks().shape == (4, 6)
    assert np.array_equal(env.action_masks(), infos["action_mask"].astype(bool))
    assert env.action_masks().all()
    frames = env.render()
    assert frames is not None
    assert len(frames) == 4
    assert all("slot   6/60" in frame for frame in frames)


def test_spec_is_json_and_rebuilds(gaussian_cache: Path) -> None:
    env = gym.make_vec(refine_env.ENV_ID, num_envs=3, cache=str(gaussian_cache), autoreset_mode="SameStep")
    assert env.spec is not None
    restored = gym.make_vec(EnvSpec.from_json(env.spec.to_json()))
    assert restored.num_envs == 3
    assert_equal(env.reset(seed=3), restored.reset(seed=3))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_copies_go_on_alike(gaussian_cache: Path, clone: Any) -> None:
    env = LatentRefinementVectorEnv(3, cache=str(gaussian_cache))
    env.reset(seed=2)
    for _ in range(30):
        env.step(np.array([1, 2, 3]))
    twin = clone(env)
    for _ in range(40):
        assert_equal(env.step(np.array([1, 1, 1])), twin.step(np.array([1, 1, 1])))


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
@pytest.mark.parametrize("kwargs", [{}, {"snr_db": [0, 24], "decision_epochs": True, "coder": "closed_loop"}])
def test_it_goes_on_in_the_middle_of_episodes(gaussian_cache: Path, mode: str, kwargs: dict[str, Any]) -> None:
    """From draws and actions alone, and the generators, everything that follows is the same."""

    def make() -> LatentRefinementVectorEnv:
        return LatentRefinementVectorEnv(6, cache=str(gaussian_cache), autoreset_mode=mode, **kwargs)

    env, rng = make(), np.random.default_rng(0)
    env.reset(seed=4)
    taken: list[list[int]] = [[] for _ in range(6)]
    ended = np.zeros(6, dtype=bool)
    for count in range(90):
        if count in (0, 41, 59, 60, 61, 89):
            length = max(map(len, taken))
            actions = np.array([own + [-1] * (length - len(own)) for own in taken], dtype=int)
            twin = make()
            twin.resume(env.episode_trajectories, env.episode_rates, env.episode_snrs_db, actions)
            for own, other in zip(env.np_random, twin.np_random, strict=True):
                other.bit_generator.state = own.bit_generator.state
            probe = copy.deepcopy(env)
            for _ in range(70):
                choice = rng.integers(0, 6, 6)
                assert_equal(probe.step(choice), twin.step(choice))
        chosen = rng.integers(0, 6, 6)
        before = ended
        _, _, ended, _, _ = env.step(chosen)
        for i in range(6):
            if (ended if mode == "SameStep" else before)[i]:
                taken[i] = []
            else:
                taken[i].append(int(chosen[i]))


def test_it_does_not_go_on_with_what_is_no_episode(gaussian_cache: Path) -> None:
    env = LatentRefinementVectorEnv(2, cache=str(gaussian_cache), snr_db=[0, 24])
    env.reset(seed=0)
    told: dict[str, Any] = {
        "trajectories": env.episode_trajectories,
        "rates": env.episode_rates,
        "snrs_db": env.episode_snrs_db,
        "actions": np.zeros((2, 3), dtype=np.int8),
    }
    env.resume(**told)
    for name, value, error, message in (
        ("trajectories", np.array([0, 99]), ConfigurationError, r"`trajectory` must be in 0 … 15"),
        ("rates", np.full((2, 60), np.nan), ConfigurationError, r"`rates` must be finite and >= 0"),
        ("rates", np.zeros((2, 7)), ConfigurationError, r"`rates` must have length T_d = 60"),
        ("snrs_db", np.array([3.0, np.nan]), ConfigurationError, r"`snrs_db` must be 2 numbers in 0 … 24 dB"),
        ("snrs_db", np.array([3.0]), ConfigurationError, r"`snrs_db` must be 2 numbers in 0 … 24 dB"),
        ("actions", np.array([[0], [6]]), ActionError, r"`actions` must be in 0 … 5, got 6"),
        ("actions", np.array([[0], [-2]]), ActionError, r"`actions` must be in 0 … 5, got -2"),
    ):
        with pytest.raises(error, match=message):
            env.resume(**{**told, name: value})


def test_bad_calls(gaussian_cache: Path) -> None:
    with pytest.raises(ConfigurationError, match="`num_envs` must be an integer >= 1, got 0"):
        LatentRefinementVectorEnv(0, cache=str(gaussian_cache))
    with pytest.raises(ConfigurationError, match="`autoreset_mode` must be one of 'NextStep', 'SameStep', 'Disabled'"):
        LatentRefinementVectorEnv(1, cache=str(gaussian_cache), autoreset_mode="Never")
    env = LatentRefinementVectorEnv(2, cache=str(gaussian_cache))
    with pytest.raises(ResetNeeded, match="All episodes must have begun to step"):
        env.step(np.zeros(2, dtype=int))
    with pytest.raises(ConfigurationError, match=r"`seed` must be one integer or 2 of them, got \[1, 2, 3\]"):
        env.reset(seed=[1, 2, 3])
    env.reset(seed=0)
    for actions in (np.zeros(3, dtype=int), np.array([0.0, 1.0])):
        with pytest.raises(ActionError, match=r"`actions` must be 2 integers in 0 … 5"):
            env.step(actions)
    with pytest.raises(ActionError, match=r"`actions` must be in 0 … 5, got 6"):
        env.step(np.array([6, 0]))
    with pytest.raises(ActionError, match=r"`actions` must be in 0 … 5, got -1"):
        env.step(np.array([0, -1]))
    for _ in range(30):
        env.step(np.array([1, 0]))
    with pytest.raises(ActionError, match=r"`actions` must be in 0 … 5, got 9"):
        env.step(np.array([0, 9]))
    with pytest.raises(ConfigurationError, match="`reset_mask` must be a bool array"):
        env.reset(options={"reset_mask": np.array([False, False])})
    with pytest.raises(ConfigurationError, match=r"`trajectory` must be in 0 … 15"):
        env.reset(options={"trajectory": np.array([0, 99])})
